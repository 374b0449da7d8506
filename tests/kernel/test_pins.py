"""Pinned sets: jobs recognised in the kernel, two versions side by side, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sams_ebpf import bpf, cgroups, layout, pins, slots, status, wire
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.programs import Options, ProgramSet
from sams_ebpf.tracing import BpfMeter

pytestmark = pytest.mark.kernel

NOBODY = 65534


class Node:
    """A bpffs folder and a parent of job cgroups of this test's own."""

    def __init__(self, tree: cgroups.Hierarchy) -> None:
        self.tree = tree
        self.root = Path(f"/sys/fs/bpf/sams-test-{os.getpid()}")
        self.parent = cgroups.at(
            tree.folder(f"/sams-test-{os.getpid()}-{time.monotonic_ns()}"), [tree]
        )
        assert self.parent is not None
        Path(self.parent.folder).mkdir()
        pins.mount_bpffs(self.root.parent)

    def load(self, quota: int = 100) -> ProgramSet:
        assert self.parent is not None
        parents = (os.fsdecode(slots.kernel_path(self.parent)),)
        options = Options(hierarchy=self.tree, quota=quota, tasks=512, parents=parents, exact=True)
        with pins.lock():
            return pins.load(options, "libbpf", stay=True, root=self.root)

    def job(self, name: str, uid: int = 0) -> Cgroup:
        assert self.parent is not None
        folder = Path(self.parent.folder, name)
        command = ["mkdir", str(folder)]
        subprocess.run(command, check=True, user=uid or None)
        found = cgroups.at(str(folder), [self.tree])
        assert found is not None
        return found

    def collect_garbage(self) -> list[str]:
        with pins.lock():
            return [path.name for path in pins.collect_garbage(self.root)]

    def close(self) -> None:
        for folder in pins.folders(self.root):
            pins.remove(folder)
        assert self.parent is not None
        assert cgroups.remove(self.parent)
        assert not self.root.exists()


@pytest.fixture(params=["v2", "cpuacct"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    (tree,) = [t for t in cgroups.mounted() if request.param in (t.name, *t.controllers)]
    made = Node(tree)
    try:
        yield made
    finally:
        made.close()


def work(cgroup: Cgroup, times: int) -> None:
    """In the cgroup: one shell and so many /bin/true, each a fork and an exec."""
    enter = f"echo $$ > {cgroup.folder}/cgroup.procs"
    script = f"{enter}; n=0; while [ $n -lt {times} ]; do /bin/true; n=$((n+1)); done"
    subprocess.run(["sh", "-c", script], check=True, stdin=subprocess.DEVNULL)


def only(programs: ProgramSet) -> layout.Slot:
    (slot,) = slots.used(programs)
    return slot


def account(programs: ProgramSet, cgroup: Cgroup) -> tuple[wire.Ledger, wire.Processes, BpfMeter]:
    found = [s for s in slots.used(programs) if s.path == slots.kernel_path(cgroup)]
    meter = BpfMeter(programs, found[0], cgroup, let_go=slots.release)
    snapshot = meter.harvest()
    attributed = sum(r.cpu_ns for r in snapshot.records)
    assert snapshot.cgroup_cpu_ns is not None
    ledger = wire.Ledger(
        cgroup_cpu_ns=snapshot.cgroup_cpu_ns,
        attributed_cpu_ns=attributed,
        unattributed_cpu_ns=snapshot.cgroup_cpu_ns - attributed,
    )
    return ledger, snapshot.processes, meter


def closes(ledger: wire.Ledger) -> bool:
    return abs(ledger.unattributed_cpu_ns or 0) <= 2000 < ledger.attributed_cpu_ns


def test_a_new_version_takes_new_jobs_and_the_old_one_finishes_its_own(node: Node) -> None:
    old = node.load(quota=100)
    first = node.job("job_1")
    work(first, 20)
    new = node.load(quota=101)
    assert (old.node().closed, old.node().stay, new.node().stay) == (1, 0, 1)
    second = node.job("job_2")
    work(first, 20)
    work(second, 20)
    assert only(old).path.endswith(b"/job_1")
    assert only(new).path.endswith(b"/job_2")
    assert node.collect_garbage() == [], "the old one still has a job"
    for programs, job, shells in ((old, first, 2), (new, second, 1)):
        ledger, processes, meter = account(programs, job)
        assert closes(ledger), ledger
        assert (processes.forks, processes.exits) == (20 * shells, 21 * shells)
        meter.close()
    old_name = pins.folders(node.root)[0].name
    assert node.collect_garbage() == [old_name]
    assert len(pins.folders(node.root)) == 1
    old.close()
    new.close()


def test_a_set_of_another_version_is_left_to_its_own_collectors(node: Node) -> None:
    old = node.load(quota=100)
    first = node.job("job_1")
    work(first, 5)
    (folder,) = pins.folders(node.root)
    stranger = folder.rename(folder.with_name(folder.name.replace(f"v{layout.VERSION}_", "v0_")))
    with pytest.raises(bpf.BpfError, match="another version"):
        pins.open_set(stranger)
    new = node.load(quota=101)
    assert (old.node().closed, old.node().stay, new.node().stay) == (1, 0, 1)
    assert node.collect_garbage() == [], "the other version's job goes on"
    ledger, _, meter = account(old, first)  # as its own collector would, which has it open
    assert closes(ledger), ledger
    meter.close()
    assert node.collect_garbage() == [stranger.name]
    old.close()
    new.close()


def test_slots_are_read_alike_where_the_kernel_knows_no_batches(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = node.load()
    jobs = [node.job(f"job_{number}") for number in range(3)]
    found = list(slots.used(programs))
    assert sorted(slot.path for slot in found) == [slots.kernel_path(job) for job in jobs]
    monkeypatch.setattr(bpf.library(), "bpf_map_lookup_batch", lambda *_: -1)
    assert list(slots.used(programs)) == found
    for slot in found:
        slots.release(programs, slot.id)
    programs.close()


def test_a_later_harvest_tells_what_a_new_collector_would(node: Node, tmp_path: Path) -> None:
    programs = node.load()
    job = node.job("job_5")
    work(job, 3)
    _, _, meter = account(programs, job)
    assert {record.script for record in meter.harvest().records} == {None}
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n/bin/true\n")
    script.chmod(0o755)
    enter = f"echo $$ > {job.folder}/cgroup.procs"
    subprocess.run(["sh", "-c", f"{enter}; {script}; exit 0"], check=True)
    snapshot = meter.harvest()
    fresh = BpfMeter(programs, only(programs), job, let_go=slots.release)
    assert snapshot.records == fresh.harvest().records
    assert snapshot.processes == fresh.harvest().processes
    assert os.fsencode(script) in {record.script for record in snapshot.records}
    fresh.close()
    programs.close()


def test_a_job_is_counted_from_its_first_process_before_anyone_claims_it(node: Node) -> None:
    programs = node.load()
    job = node.job("job_42")
    nested = Path(job.folder, "step_0", "task_0")
    nested.mkdir(parents=True)
    work(Cgroup(folder=str(nested), path="", hierarchy=node.tree), 10)
    ledger, processes, meter = account(programs, job)
    assert closes(ledger), ledger
    assert (processes.forks, processes.moved_in, processes.live) == (10, 1, 0)
    assert meter.generation == 1
    meter.close()
    programs.close()


@pytest.mark.parametrize("had_ns", [5_000_000, 2916 << 32], ids=["5_ms", "longer_than_it_is_old"])
def test_a_row_left_by_an_earlier_task_is_not_taken_for_its_successor_s(
    node: Node, had_ns: int
) -> None:
    """Where a free goes unseen, a row stays at an address at which another task may come."""
    programs = node.load()
    first, second = node.job("job_1"), node.job("job_2")
    (earlier,) = [slot for slot in slots.used(programs) if slot.path.endswith(b"/job_1")]
    rows = programs.maps["tasks"]
    with subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL) as process:
        for cgroup in (Path(first.folder), Path(first.folder).parent):
            (cgroup / "cgroup.procs").write_text(str(process.pid))
            if cgroup == Path(first.folder):
                ((key, row),) = [(key, rows.lookup(key)) for key in rows.all_keys()]
        assert rows.all_keys() == [], "a process from elsewhere is let go"
        assert row is not None
        values = list(layout.TASK.unpack(row))
        values[1] = values[2] = process.pid - 1  # pid, tgid
        values[5] -= 10**9  # start_ns
        values[-2] = values[7] + had_ns  # exit_ns: what it had more than was charged
        rows.update(key, layout.TASK.pack(*values))
        before = slots.read(programs, earlier.id)
        (Path(second.folder) / "cgroup.procs").write_text(str(process.pid))
        assert rows.all_keys() == [key]
        process.kill()
    after = slots.read(programs, earlier.id)
    assert before is not None
    assert after is not None
    assert after.lost["missed_deaths"] == before.lost["missed_deaths"] + 1
    assert after.moved_out == before.moved_out == 1
    ledger, processes, meter = account(programs, second)
    assert closes(ledger), ledger
    assert (processes.moved_in, processes.exits, processes.live) == (1, 1, 0)
    meter.close()
    ledger, processes, meter = account(programs, first)
    # What was known of the earlier task is charged, if it can be true.
    charged = ledger.attributed_cpu_ns >= 5_000_000
    assert charged is (had_ns == 5_000_000), ledger
    meter.close()
    programs.close()


def test_a_job_s_cgroup_removed_and_made_again_is_the_same_job(node: Node) -> None:
    programs = node.load()
    job = node.job("job_7")
    slot = only(programs)
    work(job, 5)
    meter = BpfMeter(programs, slot, job, let_go=slots.release)
    meter.harvest()
    Path(job.folder).rmdir()
    assert only(programs).cgroups == 0
    node.job("job_7")
    assert only(programs).id == slot.id
    work(job, 5)
    snapshot = meter.harvest()
    assert snapshot.processes.forks == 10
    attributed = sum(record.cpu_ns for record in snapshot.records)
    assert snapshot.cgroup_cpu_ns is not None
    assert abs(snapshot.cgroup_cpu_ns - attributed) <= 2000
    meter.close()
    programs.close()


def used_of(programs: ProgramSet, cgroup: Cgroup) -> list[layout.Slot]:
    """Slots at this path, oldest first."""
    path = slots.kernel_path(cgroup)
    found = [slot for slot in slots.used(programs) if slot.path == path]
    return sorted(found, key=lambda slot: slot.birth_ns)


def age(programs: ProgramSet, slot: layout.Slot, by_ns: int) -> None:
    """Make a slot older than it is."""
    index = layout.U32.pack(slot.id & 0xFFF)
    data = programs.maps["slots"].lookup(index)
    assert data is not None
    before, after = (layout.U64.pack(ns) for ns in (slot.birth_ns, slot.birth_ns - by_ns))
    assert data.count(before) == 1
    programs.maps["slots"].update(index, data.replace(before, after))


def test_a_run_that_has_ended_gets_nothing_of_the_next_run_at_the_same_path(node: Node) -> None:
    """Requeued while the first run's collector still writes its last batch."""
    programs = node.load()
    job = node.job("job_11")
    work(job, 5)
    first = BpfMeter(programs, only(programs), job, let_go=slots.release)
    first.end_run(None)
    Path(job.folder).rmdir()
    node.job("job_11")
    work(job, 7)
    old, new = used_of(programs, job)
    second = BpfMeter(programs, new, job, let_go=slots.release)
    for meter, slot, times in ((first, old, 5), (second, new, 7)):
        assert meter.epoch == slot.epoch
        snapshot = meter.harvest()
        assert snapshot.processes.forks == times
        assert snapshot.lost == {}
    # The first run's counter went unread with its cgroup; the second's is not its.
    assert first.harvest().cgroup_cpu_ns is None
    snapshot = second.harvest()
    assert snapshot.cgroup_cpu_ns is not None
    assert abs(snapshot.cgroup_cpu_ns - sum(r.cpu_ns for r in snapshot.records)) <= 2000
    first.close()
    node.job("job_11/step_1")
    assert [slot.id for slot in used_of(programs, job)] == [new.id]
    second.close()
    assert list(slots.used(programs)) == []
    programs.close()


def test_runs_that_nobody_has_claimed_yet_are_kept_apart(node: Node) -> None:
    """Neither run's collector is up: what comes long after is another run, else the same."""
    programs = node.load()
    job = node.job("job_12")
    work(job, 3)
    Path(job.folder).rmdir()
    node.job("job_12")
    work(job, 4)
    (same,) = used_of(programs, job)
    assert (same.forks, slots.remade_ns(programs, same) > same.birth_ns) == (7, True)
    age(programs, same, by_ns=6_000_000_000)
    Path(job.folder).rmdir()
    node.job("job_12")
    work(job, 5)
    old, new = used_of(programs, job)
    assert (old.id, old.forks, new.forks) == (same.id, 7, 5)
    assert old.epoch != new.epoch
    for slot in (old, new):
        slots.release(programs, slot.id)
    programs.close()


def test_a_slot_taken_by_hand_gives_way_to_the_kernel_s_own(node: Node) -> None:
    """Both were made at once: the tasks are in the kernel's, and stay there."""
    programs = node.load()
    job = node.job("job_14")
    made = only(programs)
    work(job, 2)
    taken = slots.take(programs, job)
    slots.lead(programs, made, job)
    slots.release(programs, taken.id)
    assert only(programs).id == made.id
    work(job, 3)
    Path(job.folder).rmdir()
    node.job("job_14")
    work(job, 4)
    ledger, processes, meter = account(programs, job)
    assert (processes.forks, processes.exits, processes.moved_out) == (9, 12, 0)
    assert ledger.attributed_cpu_ns > 0
    meter.close()
    programs.close()


def test_a_later_run_that_was_counted_here_is_told(node: Node) -> None:
    """The collector lives but has not heard yet that its run has ended."""
    programs = node.load()
    job = node.job("job_13")
    work(job, 5)
    meter = BpfMeter(programs, only(programs), job, let_go=slots.release)
    ended_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    Path(job.folder).rmdir()
    node.job("job_13")
    work(job, 5)
    meter.look([job])
    assert meter.harvest().lost == {}, "nothing says that it is not the same run"
    meter.end_run(ended_ns)
    lost = meter.harvest().lost
    assert list(lost) == ["later_run_ns"]
    assert lost["later_run_ns"] == cgroups.cpu_ns(job)
    meter.close()
    programs.close()


@pytest.mark.parametrize(
    "name", ["s01ARZ3NDEKTSV", "job_1", "job_4294967295"], ids=["sluid", "short", "long"]
)
def test_names_of_jobs(node: Node, name: str) -> None:
    programs = node.load()
    job = node.job(name)
    assert only(programs).path == slots.kernel_path(job)
    slots.release(programs, only(programs).id)
    programs.close()


@pytest.mark.parametrize(
    "name", ["job_", "job_x", "job_1x", "jobs_1", "s01ARZ3NDEKTSI", "s01ARZ3NDEKTS", "x" * 40]
)
def test_other_names_are_nobody_s_job(node: Node, name: str) -> None:
    programs = node.load()
    node.job(name)
    assert list(slots.used(programs)) == []
    programs.close()


def test_a_user_s_own_cgroup_is_no_job_whatever_its_name(node: Node) -> None:
    programs = node.load()
    assert node.parent is not None
    os.chown(node.parent.folder, NOBODY, NOBODY)
    node.job("job_8", uid=NOBODY)
    assert list(slots.used(programs)) == []
    nested = node.job("job_9_")
    Path(nested.folder, "job_10").mkdir()
    assert list(slots.used(programs)) == [], "its folder is not a configured parent"
    programs.close()


def test_nothing_of_a_released_job_remains(node: Node) -> None:
    programs = node.load()
    job = node.job("job_3")
    work(job, 3)
    with subprocess.Popen(["sleep", "60"]) as process:
        cgroups.enter(job, process.pid)
        slots.release(programs, only(programs).id)
        for name in ("tasks", "processes", "totals", "names", "splits", "cgroups", "jobs"):
            assert programs.maps[name].all_keys() == [], name
        process.kill()
    assert list(slots.used(programs)) == []
    programs.close()


def test_a_slot_whose_collector_is_gone_is_shown(node: Node) -> None:
    """`status` tells of counts that wait for somebody, whose collector was killed."""
    programs = node.load()
    node.job("job_8")
    claim = slots.claim(programs, only(programs))
    assert [one.abandoned for one in status.programs(node.root).sets] == [0]
    with subprocess.Popen(["true"]) as ended:
        pass
    slots.set_claim(programs, claim._replace(pid=ended.pid))
    (shown,) = status.programs(node.root).sets
    assert (shown.slots_used, shown.unclaimed, shown.abandoned) == (1, 0, 1)
    programs.close()


def test_a_full_slot_table_is_counted(node: Node) -> None:
    programs = node.load()
    taken = []
    while (index := programs.maps["free_slots"].pop()) is not None:
        taken.append(index)
    node.job("job_5")
    assert (len(taken), programs.node().slots_full) == (layout.SLOTS, 1)
    assert list(slots.used(programs)) == []
    programs.close()


def test_a_half_pinned_set_is_collected(node: Node) -> None:
    unfinished = node.root / "0123456789abcdef-v2-new"
    unfinished.mkdir(parents=True)
    assert node.collect_garbage() == [unfinished.name]


def test_a_collector_s_unit_compiles_nothing(node: Node) -> None:
    options = Options(hierarchy=node.tree, quota=100, tasks=512)
    with pins.lock(), pytest.raises(bpf.BpfError, match=r"start sams-ebpf-load\.service"):
        pins.load(options, "bcc", stay=False, make=False, root=node.root)
    loaded = node.load()
    with pins.lock():
        # Whatever compiled or loaded it: what stays for this tree is used.
        pins.load(options, "bcc", stay=False, make=False, root=node.root).close()
    loaded.close()


def test_programs_that_take_too_long_switch_themselves_off(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Of any job's work, a microsecond per second is soon exceeded; the job goes on."""
    assert node.parent is not None
    parents = (os.fsdecode(slots.kernel_path(node.parent)),)
    options = Options(hierarchy=node.tree, tasks=512, parents=parents, limit_percent=1e-4)
    with pins.lock():
        one = pins.load(options, "libbpf", stay=True, root=node.root)
    cgroup = node.job("job_8")
    meter = BpfMeter(one, only(one), cgroup, let_go=slots.release)
    work(cgroup, 2000)  # every command of it runs, or this raises
    with caplog.at_level("WARNING"):
        first, second = meter.harvest(), meter.harvest()
    assert one.node().tripped
    for harvest in (first, second):
        assert harvest.lost["programs_tripped"] == 1
        assert harvest.cgroup_cpu_ns is not None
        attributed = sum(record.cpu_ns for record in harvest.records)
        assert attributed < harvest.cgroup_cpu_ns, "what came after is not hidden"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "once"
    assert "programs_limit_percent" in said[0]
    work(cgroup, 20)
    assert meter.harvest().processes == second.processes, "nothing is counted any more"
    meter.close()
