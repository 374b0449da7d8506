from __future__ import annotations

from pathlib import Path

import pytest

from sams_ebpf import cgroups
from sams_ebpf.cgroups import Hierarchy
from sams_ebpf.errors import NotPossibleError, UsageError

HYBRID = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset,clone_children
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


def tree(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)


def v1(root: Path, *controllers: str) -> Hierarchy:
    return Hierarchy(version=1, mount=f"{root}/{','.join(controllers)}", controllers=controllers)


def v2(root: Path) -> Hierarchy:
    return Hierarchy(version=2, mount=f"{root}/unified")


def test_mounts_of_a_hybrid_host() -> None:
    found = cgroups.mounted(HYBRID)
    assert [(h.version, h.name) for h in found] == [
        (2, "v2"),
        (1, "cpu,cpuacct"),
        (1, "freezer"),
        (1, "cpuset"),
        (1, "name=systemd"),
    ]
    assert found[0].mount == "/sys/fs/cgroup/unified"


def test_mounts_of_a_container() -> None:
    text = (
        "30 1 0:9 /docker/abc /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
        "31 1 0:8 /../.. /with\\040space rw - cgroup cgroup rw,cpuacct\n"
        "32 1 0:8 / /again rw - cgroup cgroup rw,cpuacct\n"
        "a line that is none\n"
    )
    whole, narrow = cgroups.mounted(text)
    assert (whole.root, whole.mount) == ("/docker/abc", "/sys/fs/cgroup")
    assert narrow.mount == "/again"
    assert cgroups.mounted("31 1 0:8 / /with\\040space rw - cgroup c rw,pids")[0].mount == (
        "/with space"
    )


def test_folder_belongs_to_the_innermost_mount() -> None:
    outer = Hierarchy(version=2, mount="/sys/fs/cgroup")
    inner = Hierarchy(version=1, mount="/sys/fs/cgroup/net", controllers=("net_cls",))
    found = cgroups.at("/sys/fs/cgroup/net/a", [outer, inner])
    assert found is not None
    assert (found.path, found.hierarchy) == ("/a", inner)
    assert cgroups.at("/sys/fs/cgroup2/a", [outer]) is None


def test_resolve(tmp_path: Path) -> None:
    hierarchies = [v2(tmp_path), v1(tmp_path, "cpuacct"), v1(tmp_path, "freezer")]
    tree(tmp_path, "unified/system.slice/slurmd.service", "cpuacct/slurm/uid_1/job_2")
    tree(tmp_path, "freezer/slurm/uid_1/job_2", "elsewhere")

    def found(text: str) -> tuple[str, str]:
        cgroup = cgroups.resolve(text, hierarchies)
        assert cgroup.exists()
        return cgroup.hierarchy.name, cgroup.path

    assert found(f"{tmp_path}/freezer/slurm/uid_1/job_2") == ("freezer", "/slurm/uid_1/job_2")
    assert found("/slurm/uid_1/job_2") == ("cpuacct", "/slurm/uid_1/job_2")
    assert found("slurm/uid_1/job_2/") == ("cpuacct", "/slurm/uid_1/job_2")
    assert found("slurmd.service") == ("v2", "/system.slice/slurmd.service")
    assert found("system.slice") == ("v2", "/system.slice")
    for text, words in {
        "slurm/uid_1/job_3": "no such cgroup",
        "../..": "leads out",
        f"{tmp_path}/elsewhere": "no cgroup; cgroups are below",
        "nosuch.service": "is it running",
        "": "is empty",
    }.items():
        with pytest.raises(UsageError, match=words) as raised:
            cgroups.resolve(text, hierarchies)
        assert "\n" not in str(raised.value)


def test_a_unit_name_that_stands_for_two(tmp_path: Path) -> None:
    tree(tmp_path, "unified/user.slice/x.service", "unified/system.slice/x.service")
    with pytest.raises(UsageError, match="stands for 2"):
        cgroups.resolve("x.service", [v2(tmp_path)])


def test_resolve_without_any_hierarchy() -> None:
    with pytest.raises(NotPossibleError):
        cgroups.resolve("a", [])


def test_counters_of_both_versions(tmp_path: Path) -> None:
    hierarchies = [v2(tmp_path), v1(tmp_path, "cpuacct"), v1(tmp_path, "freezer")]
    tree(tmp_path, "unified/a", "cpuacct/job", "freezer/job", "freezer/other")
    (tmp_path / "unified/a/cpu.stat").write_text(
        "usage_usec 12\nuser_usec 10\nsystem_usec 2\nnr_periods 0\n"
    )
    (tmp_path / "cpuacct/job/cpuacct.usage").write_text("123456789\n")
    on_v2 = cgroups.resolve("a", hierarchies)
    assert cgroups.times(on_v2) == cgroups.Times(12000, 10000, 2000)
    frozen = cgroups.resolve(f"{tmp_path}/freezer/job", hierarchies)
    assert cgroups.cpu_ns(frozen) is None
    beside = cgroups.counter(frozen, hierarchies)
    assert beside is not None
    assert cgroups.times(beside) == cgroups.Times(123456789, None, None)
    alone = cgroups.resolve(f"{tmp_path}/freezer/other", hierarchies)
    assert cgroups.counter(alone, hierarchies) is None
    (tmp_path / "freezer/other").rmdir()
    with pytest.raises(FileNotFoundError):
        cgroups.cpu_ns(alone)


def test_members_of_the_whole_tree(tmp_path: Path) -> None:
    tree(tmp_path, "cpuacct/job/step_0/task_0", "cpuacct/job/step_1")
    (tmp_path / "cpuacct/job/cgroup.procs").write_text("0\n5\n")
    (tmp_path / "cpuacct/job/step_0/task_0/cgroup.procs").write_text("6\n7\n")
    (tmp_path / "cpuacct/job/step_0/task_0/tasks").write_text("6\n7\n8\n")
    job = cgroups.resolve("job", [v1(tmp_path, "cpuacct")])
    assert cgroups.processes(job) == {5, 6, 7}
    assert cgroups.threads(job) == {6, 7, 8}


@pytest.fixture
def slurm(tmp_path: Path) -> list[Hierarchy]:
    """Two slurmd of one host, on v1 and on v2, with jobs of every way to name them."""
    tree(
        tmp_path,
        *[
            f"{controller}/slurm_{node}/uid_{uid}/job_{job}/step_0"
            for controller in ("cpuacct", "freezer")
            for node, uid, job in (("n1", 1, 7), ("n1", 1, 70), ("n2", 2, 7))
        ],
        "freezer/slurm/uid_3/job_8",
        "cpuacct/slurmish/uid_3/job_8",
        "unified/system.slice/n1_slurmstepd.scope/job_9/step_0/slurm",
        "unified/system.slice/n2_slurmstepd.scope/job_9/step_0/slurm",
        "unified/system.slice/slurmstepd.scope/s0123456789ABC/step_batch/slurm",
        "unified/system.slice/slurmstepd.scope/s0123456789ABD/step_batch/slurm",
        "unified/system.slice/slurmstepd.scope/system/job_9",
        "unified/site.slice/site-hpc.slice/slurmstepd.scope/job_11",
    )
    scope = tmp_path / "unified/system.slice/slurmstepd.scope"
    (scope / "s0123456789ABC/step_batch/slurm/cgroup.procs").write_text("21\n22\n")
    (scope / "s0123456789ABD/step_batch/slurm/cgroup.procs").write_text("31\n")
    return [v2(tmp_path), v1(tmp_path, "cpuacct"), v1(tmp_path, "freezer")]


def title(pid: int) -> bytes:
    return {
        21: b"sleep\0",
        22: b"slurmstepd: [10.batch]",
        31: b"slurmstepd: [100.batch]",
    }.get(pid, b"")


@pytest.mark.parametrize(
    ("job", "options", "expected"),
    [
        (7, {"node": "n1"}, ["cpuacct/slurm_n1/uid_1/job_7", "freezer/slurm_n1/uid_1/job_7"]),
        (7, {"node": "n2"}, ["cpuacct/slurm_n2/uid_2/job_7", "freezer/slurm_n2/uid_2/job_7"]),
        (70, {}, ["cpuacct/slurm_n1/uid_1/job_70", "freezer/slurm_n1/uid_1/job_70"]),
        (8, {"node": "n3"}, ["freezer/slurm/uid_3/job_8"]),
        (9, {"node": "n2"}, ["unified/system.slice/n2_slurmstepd.scope/job_9"]),
        (10, {}, ["unified/system.slice/slurmstepd.scope/s0123456789ABC"]),
        (100, {}, ["unified/system.slice/slurmstepd.scope/s0123456789ABD"]),
        (
            12,
            {"sluid": "s0123456789ABD"},
            ["unified/system.slice/slurmstepd.scope/s0123456789ABD"],
        ),
        (11, {}, []),
        (
            11,
            {"slices": ["system.slice", "site.slice/site-hpc.slice"]},
            ["unified/site.slice/site-hpc.slice/slurmstepd.scope/job_11"],
        ),
        (1, {}, []),
    ],
)
def test_find_slurm_job(
    slurm: list[Hierarchy],
    tmp_path: Path,
    job: int,
    options: dict[str, str],
    expected: list[str],
) -> None:
    found = cgroups.find_slurm_job(job, hierarchies=slurm, title=title, **options)  # type: ignore[arg-type]
    assert [cgroup.folder for cgroup in found] == [f"{tmp_path}/{path}" for path in expected]


def test_folders_to_watch_lead_to_every_job(slurm: list[Hierarchy], tmp_path: Path) -> None:
    folders = {str(Path(f).relative_to(tmp_path)) for f in cgroups.slurm_watch_folders(slurm)}
    assert {
        "cpuacct",
        "cpuacct/slurm_n1",
        "cpuacct/slurm_n1/uid_1",
        "freezer/slurm",
        "freezer/slurm/uid_3",
        "unified/system.slice",
        "unified/system.slice/slurmstepd.scope",
    } <= folders
    empty = v2(tmp_path / "empty")
    tree(tmp_path, "empty/unified")
    assert cgroups.slurm_watch_folders([empty]) == [empty.mount]
