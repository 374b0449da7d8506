"""Units and hooks as a site gets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sams_ebpf import envfile, install_units
from sams_ebpf.errors import SamsError, UsageError

PROGRAM = Path("/opt/sams-ebpf/bin/sams-ebpf")
CONFIG = Path("/etc/sams-ebpf/config.yaml")


def test_installs_every_file_with_its_places_filled_in(tmp_path: Path) -> None:
    paths = install_units.install(tmp_path, PROGRAM, CONFIG)
    assert sorted(str(path.relative_to(tmp_path)) for path in paths) == [
        "etc/systemd/system/sams-ebpf-load.service",
        "etc/systemd/system/sams-ebpf-ship.service",
        "etc/systemd/system/sams-ebpf@.service",
        "etc/sysusers.d/sams-ebpf.conf",
        "etc/tmpfiles.d/sams-ebpf.conf",
        "usr/libexec/sams-ebpf/epilog.sh",
        "usr/libexec/sams-ebpf/prolog.sh",
    ]
    for path in paths:
        text = path.read_text()
        assert "@SAMS_EBPF@" not in text
        assert "@CONFIG@" not in text
        assert bool(path.stat().st_mode & 0o111) == (path.suffix == ".sh")


def test_the_unit_that_loads_sees_the_headers_that_bcc_needs(tmp_path: Path) -> None:
    install_units.install(tmp_path, Path("/opt/x"), Path("/etc/c"))
    unit = (tmp_path / "etc/systemd/system/sams-ebpf-load.service").read_text()
    settings = [line.partition("=")[0] for line in unit.splitlines() if line[:1] != "#"]
    # It hides /lib/modules; and compiling takes more memory than a collector may have.
    assert not {"ProtectKernelModules", "MemoryMax", "MemoryDenyWriteExecute"} & set(settings)


def test_every_file_of_the_package_is_installed() -> None:
    folder = Path(install_units.__file__).with_name("units")
    shipped = {path.name for path in folder.iterdir() if path.suffix not in (".py", "")}
    assert shipped == {target.source for target in install_units.TARGETS}


@pytest.mark.parametrize("path", ["relative", "/with space", "/per%cent", '/quo"te', "/dol$lar"])
def test_refuses_a_path_that_a_unit_cannot_hold(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="--program"):
        install_units.install(tmp_path, Path(path), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_says_what_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("in the way")
    with pytest.raises(SamsError, match=r"sams-ebpf@.service: cannot be written: "):
        install_units.install(tmp_path, PROGRAM, CONFIG)


class Hooks:
    """Prolog and Epilog with a folder and a systemctl of their own."""

    def __init__(self, folder: Path, *, systemctl_status: int = 0) -> None:
        self.jobs = folder / "jobs"
        self.jobs.mkdir()
        self.log = folder / "log"
        self.folder = folder
        binaries = folder / "bin"
        binaries.mkdir()
        systemctl = binaries / "systemctl"
        systemctl.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\nexit {systemctl_status}\n')
        systemctl.chmod(0o755)
        for name in ("prolog.sh", "epilog.sh"):
            text = install_units.text_of(name, PROGRAM, CONFIG)
            text = text.replace("jobs=/run/sams-ebpf/jobs", f"jobs={self.jobs}")
            text = text.replace("export PATH=", f"export PATH={binaries}:")
            (folder / name).write_text(text)

    def run(self, hook: str, **environment: str) -> list[str]:
        self.log.write_text("")
        done = subprocess.run(
            ["/bin/sh", str(self.folder / f"{hook}.sh")],
            env=environment,
            check=False,
            capture_output=True,
            timeout=20,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        return self.log.read_text().splitlines()


@pytest.fixture(name="hooks")
def _hooks(tmp_path: Path) -> Hooks:
    return Hooks(tmp_path)


def test_prolog_hands_over_identity_and_starts_the_unit(hooks: Hooks) -> None:
    calls = hooks.run(
        "prolog", SLURM_JOB_ID="7", SLURM_JOB_USER="ada", SLURM_RESTART_COUNT="0", HOME="/"
    )
    assert calls == ["--no-block start sams-ebpf@7.service"]
    env = hooks.jobs / "7" / "env"
    assert env.stat().st_mode & 0o777 == 0o600
    claims = envfile.read(env)
    assert (claims.job_id, claims.user, claims.restart_count) == (7, "ada", 0)
    assert b"HOME" not in env.read_bytes()


def test_a_hostile_value_stays_a_value(hooks: Hooks, tmp_path: Path) -> None:
    name = "$(touch pwned) `touch pwned`\n\nSLURM_JOB_USER=root\n%s\\0' \""
    hooks.run("prolog", SLURM_JOB_ID="7", SLURM_JOB_USER="ada", SLURM_JOB_NAME=name)
    claims = envfile.read(hooks.jobs / "7" / "env")
    assert claims.user == "ada"
    assert claims.job_name == name.replace("\n", "\N{REPLACEMENT CHARACTER}")
    assert not (tmp_path / "pwned").exists()


def test_a_run_beside_the_unit_of_an_earlier_run_has_a_unit_of_its_own(hooks: Hooks) -> None:
    hooks.run("prolog", SLURM_JOB_ID="7")
    assert hooks.run("prolog", SLURM_JOB_ID="7", SLURM_JOB_RESTART_COUNT="1") == [
        "--no-block --job-mode=fail stop sams-ebpf@7.service",
        "--no-block start sams-ebpf@7.1.service",
    ]
    assert envfile.read(hooks.jobs / "7.1" / "env").restart_count == 1
    assert envfile.read(hooks.jobs / "7" / "env").restart_count is None
    hooks.run("prolog", SLURM_JOB_ID="70")
    assert hooks.run("epilog", SLURM_JOB_ID="7", SLURM_JOB_RESTART_COUNT="2") == [
        "--no-block --job-mode=fail stop sams-ebpf@7.service sams-ebpf@7.1.service"
    ]
    for run in ("7", "7.1"):
        assert (hooks.jobs / run / "ended").exists()
    assert not (hooks.jobs / "70" / "ended").exists()


def test_when_a_run_began_and_ended_is_written_down(hooks: Hooks) -> None:
    """What tells the cgroups of two runs from each other, see docs/units.md."""
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - 10_000_000
    hooks.run("prolog", SLURM_JOB_ID="7")
    env = hooks.jobs / "7" / "env"
    began_ns = envfile.run_of(env).began_ns
    assert began_ns is not None
    assert before <= began_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert not envfile.ended(env)
    hooks.run("epilog", SLURM_JOB_ID="7")
    run = envfile.run_of(env)
    assert run.ended_ns is not None
    assert began_ns <= run.ended_ns
    mark = env.with_name(envfile.ENDED)
    # Nobody is later than the first who said so.
    mark.write_text("1.00\n")
    hooks.run("epilog", SLURM_JOB_ID="7")
    hooks.run("prolog", SLURM_JOB_ID="7")
    assert mark.read_text() == "1.00\n"


@pytest.mark.parametrize("sluid", ["", "s0123456789ABC"])
def test_a_prolog_inside_the_job_does_not_say_when_it_began(hooks: Hooks, sluid: str) -> None:
    """PrologFlags=RunInJob: the job's cgroup is older."""
    cgroup = hooks.folder / "cgroup"
    prolog = hooks.folder / "prolog.sh"
    prolog.write_text(prolog.read_text().replace("/proc/self/cgroup", str(cgroup)))
    for path, known in (
        (f"/system.slice/slurmstepd.scope/{sluid or 'job_7'}/step_extern/user/task_0", False),
        (f"/system.slice/slurmstepd.scope/{sluid or 'job_7'}", False),
        ("/system.slice/slurmstepd.scope/job_77/step_0", True),
        ("/system.slice/slurmd.service", True),
    ):
        cgroup.write_text(f"1:name=systemd:/\n0::{path}\n")
        hooks.run("prolog", SLURM_JOB_ID="7", SLURM_JOB_SLUID=sluid)
        env = hooks.jobs / "7" / "env"
        assert (envfile.run_of(env).began_ns is not None) is known, path
        shutil.rmtree(hooks.jobs / "7")


def test_a_folder_that_goes_meanwhile_drains_no_node(hooks: Hooks) -> None:
    hooks.run("prolog", SLURM_JOB_ID="7")
    (hooks.jobs / "7" / "ended").symlink_to("/nowhere/at/all")
    assert hooks.run("prolog", SLURM_JOB_ID="7")[-1].endswith("start sams-ebpf@7.1.service")
    assert hooks.run("epilog", SLURM_JOB_ID="7") == [
        "--no-block --job-mode=fail stop sams-ebpf@7.service sams-ebpf@7.1.service"
    ]


def test_without_the_folder_the_unit_is_started_all_the_same(hooks: Hooks) -> None:
    hooks.jobs.rmdir()
    assert hooks.run("prolog", SLURM_JOB_ID="7") == ["--no-block start sams-ebpf@7.service"]
    assert hooks.run("epilog", SLURM_JOB_ID="7") == [
        "--no-block --job-mode=fail stop sams-ebpf@7.service"
    ]


@pytest.mark.parametrize("job", ["", "x", "../7", "7 8", "-h"])
@pytest.mark.parametrize("hook", ["prolog", "epilog"])
def test_what_is_no_job_id_is_left_alone(hooks: Hooks, hook: str, job: str) -> None:
    assert hooks.run(hook, SLURM_JOB_ID=job) == []
    assert list(hooks.jobs.iterdir()) == []


def test_hooks_succeed_when_systemd_does_not(tmp_path: Path) -> None:
    hooks = Hooks(tmp_path, systemctl_status=1)
    hooks.run("prolog", SLURM_JOB_ID="7")
    hooks.run("epilog", SLURM_JOB_ID="7")


def test_hooks_succeed_on_a_full_or_read_only_disk(hooks: Hooks) -> None:
    (hooks.jobs / "7").write_text("a file in the way")
    os.chmod(hooks.jobs, 0o500)  # noqa: PTH101
    assert hooks.run("prolog", SLURM_JOB_ID="7") == ["--no-block start sams-ebpf@7.service"]
