"""Mode `proc` on real processes in real cgroups, on v1 and on v2."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cgrouptools import cgroup_of_version, start

from sams_ebpf import cgroups, procfs, sampling, wire
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.errors import UsageError
from sams_ebpf.meter import Meter, Snapshot
from sams_ebpf.procfs import ProcMeter

pytestmark = pytest.mark.kernel

# Records of the dead name executables from here on (version 12 of taskstats; docs/taskstats.md).
NAMED = (5, 19)
KERNEL = tuple(int(word) for word in re.findall(r"\d+", os.uname().release)[:2])

PYTHON = os.path.realpath(sys.executable).encode()
SHELL = os.path.realpath("/bin/sh").encode()


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    with cgroup_of_version(request.param) as made:
        yield made


@pytest.fixture(scope="session")
def burn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a program that burns CPU ms from its arguments, and says after each that it did.

    `burn MS… [-- CMD…]`: after each figure it writes a line and waits for one; then it
    executes CMD.
    """
    folder = tmp_path_factory.mktemp("burn")
    source = folder / "burn.c"
    source.write_text(
        """
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <time.h>
        #include <unistd.h>
        int main(int argc, char **argv) {
            char line[16];
            for (int i = 1; i < argc; i++) {
                struct timespec t, begun;
                if (!strcmp(argv[i], "--"))
                    return execv(argv[i + 1], argv + i + 1);
                clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begun);
                do clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
                while ((t.tv_sec - begun.tv_sec) * 1000 + (t.tv_nsec - begun.tv_nsec) / 1000000
                       < atoi(argv[i]));
                if (write(1, "x\\n", 2) != 2 || read(0, line, 2) < 1) return 1;
            }
            return 0;
        }
        """
    )
    program = folder / "burn"
    subprocess.run(["gcc", "-O1", "-o", str(program), str(source)], check=True)
    return program


class Burner:
    """A `burn` in a cgroup: `done()` waits for its next line, `go()` lets it go on."""

    def __init__(self, cgroup: Cgroup, *command: object) -> None:
        self.process = start(
            cgroup, *map(str, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def done(self) -> None:
        assert self.stdout.readline() == b"x\n"

    def go(self) -> None:
        self.stdin.write(b"x\n")
        self.stdin.flush()

    def end(self) -> None:
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.kill()
        self.process.wait()


def cpu(snapshot: Snapshot, path: bytes | Path, flags: int = 0) -> int:
    found = [r for r in snapshot.records if (r.path, r.flags) == (os.fsencode(path), flags)]
    assert len(found) <= 1
    return found[0].cpu_ns if found else 0


def check(snapshot: Snapshot) -> int:
    """Check what holds for every snapshot; give what is attributed, ns."""
    inside = [r for r in snapshot.records if not r.flags & wire.OUTSIDE]
    attributed = sum(r.cpu_ns for r in inside)
    assert snapshot.cgroup_cpu_ns is not None
    assert attributed <= snapshot.cgroup_cpu_ns
    assert sum(snapshot.unattributed_by.values()) == snapshot.cgroup_cpu_ns - attributed
    for record in snapshot.records:
        assert record.user_ns is not None
        assert record.system_ns is not None
        assert record.user_ns + record.system_ns == record.cpu_ns
        assert record.execs is record.forks is record.exits is None
    return attributed


def test_it_is_a_meter(cgroup: Cgroup) -> None:
    meter: Meter = ProcMeter([cgroup])
    assert (meter.mode, meter.loader, meter.live()) == ("proc", None, 0)
    assert meter.harvest().records == []


def test_a_live_process_is_counted_exactly(cgroup: Cgroup, burn: Path) -> None:
    meter = ProcMeter([cgroup])
    burner = Burner(cgroup, burn, 50, 70, 1)
    burner.done()
    first = meter.harvest()
    burner.go()
    burner.done()
    second = meter.harvest()
    clock = procfs.clock(burner.process.pid)
    assert meter.live() == 1
    burner.end()
    for snapshot in (first, second):
        # The shell that entered the cgroup and executed it is there too, unseen.
        assert check(snapshot) > 0.9 * (snapshot.cgroup_cpu_ns or 0)
    assert cpu(second, burn) - cpu(first, burn) >= 70_000_000
    assert clock is not None
    assert cpu(second, burn) <= clock


def test_an_exec_between_samples_is_noticed(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copy(burn, other)
    meter = ProcMeter([cgroup])
    burner = Burner(cgroup, burn, 30, 20, "--", other, 40, 60, 1)
    burner.done()
    before = meter.harvest()
    for _ in range(2):
        burner.go()
        burner.done()
    noticed = meter.harvest()
    burner.go()
    burner.done()
    after = meter.harvest()
    burner.end()
    assert cpu(noticed, burn) == cpu(before, burn) == cpu(after, burn) >= 30_000_000
    assert noticed.unattributed_by[sampling.EXEC_AMBIGUOUS] >= 60_000_000
    assert (
        after.unattributed_by[sampling.EXEC_AMBIGUOUS]
        == noticed.unattributed_by[sampling.EXEC_AMBIGUOUS]
    )
    assert cpu(noticed, other) == 0
    assert 60_000_000 <= cpu(after, other) <= 80_000_000
    check(after)


def test_zombies_are_counted_to_their_end(cgroup: Cgroup, burn: Path) -> None:
    meter = ProcMeter([cgroup])
    burner = Burner(cgroup, burn, 20, 30)
    burner.done()
    alive, before = 0, -1
    # What it does after it has said so is soon over, but not at once.
    while (clock := procfs.clock(burner.process.pid) or 0) != before:
        before = clock
        alive = cpu(meter.harvest(), burn)
    entered = before - alive
    burner.go()
    burner.done()
    burner.stdin.close()
    os.waitid(os.P_PID, burner.process.pid, os.WEXITED | os.WNOWAIT)
    assert cgroups.processes(cgroup) == set()
    dead = meter.harvest()
    final = procfs.clock(burner.process.pid)
    burner.end()
    assert cpu(dead, burn) - alive >= 30_000_000
    # All but what its shell had used before it entered; v2 counts whole µs.
    assert final is not None
    assert 0 <= final - entered - cpu(dead, burn) < 1000
    assert check(meter.harvest()) == check(dead)


def test_short_commands_between_samples_stay_unattributed(cgroup: Cgroup) -> None:
    meter = ProcMeter([cgroup], listen=False)
    meter.harvest()
    process = start(cgroup, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do /bin/true; done")
    process.wait()
    snapshot = meter.harvest()
    assert check(snapshot) == 0
    assert snapshot.unattributed_by[sampling.DIED] == snapshot.cgroup_cpu_ns
    assert (snapshot.cgroup_cpu_ns or 0) > 1_000_000


def test_the_kernel_tells_of_the_dead(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    """Seen before and never seen; of one and of many threads; of known and of lost files."""
    meter = ProcMeter([cgroup])
    if KERNEL < NAMED:
        assert "which name no executables (12 and later do)" in meter.not_listening
        pytest.skip(meter.not_listening)
    assert meter.not_listening == ""
    conftest = tmp_path / "conftest"
    shutil.copy(burn, conftest)
    while time.time_ns() < burn.stat().st_ctime_ns + 1_100_000_000:
        time.sleep(0.1)
    program = (
        "import subprocess, sys, threading\n"
        "def work():\n"
        "    for command in [sys.argv[1], '60'], [sys.argv[2], '50']:\n"
        "        subprocess.run(command, stdin=subprocess.DEVNULL)\n"
        "    sum(range(2_000_000))\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    # Three are seen: one that goes on as it is, one that starts others, one that executes.
    seen = Burner(cgroup, burn, 20, 80)
    seen.done()
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    commands = (PYTHON.decode(), "-c", program, str(burn), str(conftest))
    parent = start(cgroup, "sh", "-c", 'read x; "$@"; true', "sh", *commands, **pipe)
    changing = start(cgroup, "sh", "-c", 'read x; exec "$@"', "sh", str(burn), "70", **pipe)
    first = meter.harvest()
    seen.go()
    seen.done()
    seen.end()
    # Somebody else's process of the same file, by a name that leads nowhere, dies first.
    subprocess.run([PYTHON, "-c", "open('/proc/self/comm', 'w').write('nowhere')"], check=True)
    for process in (parent, changing):
        process.communicate(b"\n")
    conftest.unlink()
    last = meter.harvest()
    # A dead task's counter is as old as its last tick or switch: at most 10 ms.
    assert cpu(last, burn) - cpu(first, burn) >= 70_000_000 + 3 * 50_000_000
    assert cpu(last, conftest) == 0
    assert last.unattributed_by[sampling.UNIDENTIFIED] >= 3 * 40_000_000
    assert last.unattributed_by[sampling.EXEC_AMBIGUOUS] >= 60_000_000
    assert cpu(last, PYTHON) >= 30_000_000
    assert last.lost == {}
    check(last)


def test_what_died_before_attach_is_told(cgroup: Cgroup) -> None:
    start(cgroup, "true").wait()
    snapshot = ProcMeter([cgroup]).harvest()
    assert snapshot.unattributed_by == {sampling.BEFORE_ATTACH: snapshot.cgroup_cpu_ns}


def test_moves_in_and_out_count_only_what_was_used_inside(cgroup: Cgroup, burn: Path) -> None:
    top = cgroups.at(cgroup.hierarchy.mount, [cgroup.hierarchy])
    assert top is not None
    meter = ProcMeter([cgroup])
    burner = Burner(cgroup, burn, *[20] * 8)
    pid = burner.process.pid
    for turn in range(4):
        burner.done()
        snapshot = meter.harvest()
        cgroups.enter(top if turn % 2 == 0 else cgroup, pid)
        burner.go()
    burner.done()
    snapshot = meter.harvest()
    burner.end()
    check(snapshot)
    # Whole intervals: inside, out, (back) in, out, in.
    assert cpu(snapshot, burn, wire.OUTSIDE) == 0
    assert cpu(snapshot, burn) >= 20_000_000
    assert (snapshot.cgroup_cpu_ns or 0) >= 60_000_000


def test_cpu_outside_has_a_row_of_its_own(cgroup: Cgroup, burn: Path) -> None:
    top = cgroups.at(cgroup.hierarchy.mount, [cgroup.hierarchy])
    assert top is not None
    meter = ProcMeter([cgroup])
    burner = Burner(cgroup, burn, 100, 150, 200)
    burner.done()
    meter.harvest()
    cgroups.enter(top, burner.process.pid)
    meter.harvest()
    moved = procfs.clock(burner.process.pid) or 0
    burner.go()
    burner.done()
    snapshot = meter.harvest()
    ended = procfs.clock(burner.process.pid) or 0
    burner.end()
    # How much starting costs is of the machine; what is of inside and of outside is not.
    assert 100_000_000 <= cpu(snapshot, burn) <= moved
    assert 150_000_000 <= cpu(snapshot, burn, wire.OUTSIDE) <= ended - 100_000_000
    check(snapshot)


def test_one_who_burned_elsewhere_brings_nothing_in(cgroup: Cgroup, burn: Path) -> None:
    top = cgroups.at(cgroup.hierarchy.mount, [cgroup.hierarchy])
    assert top is not None
    meter = ProcMeter([cgroup])
    burner = Burner(top, burn, 200, 20)
    burner.done()
    cgroups.enter(cgroup, burner.process.pid)
    meter.harvest()
    burner.go()
    burner.done()
    snapshot = meter.harvest()
    burner.end()
    assert check(snapshot) >= 19_000_000
    assert cpu(snapshot, burn) < 100_000_000


def test_deleted_and_memory_files_are_marked(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone (deleted)"
    kept = tmp_path / "kept (deleted)"
    for copy in (gone, kept):
        shutil.copy(burn, copy)
    memory = (
        "import os, sys; fd = os.memfd_create('in memory', 0);"
        "os.write(fd, open(sys.argv[1], 'rb').read());"
        "os.execv(f'/proc/self/fd/{fd}', ['burn', '20', '1'])"
    )
    commands = [(gone, 20, 1), (kept, 20, 1), (sys.executable, "-c", memory, burn)]
    burners = [Burner(cgroup, *command) for command in commands]
    for burner in burners:
        burner.done()
    gone.unlink()
    snapshot = ProcMeter([cgroup]).harvest()
    for burner in burners:
        burner.end()
    for path, flags in ((gone, wire.DELETED), (kept, 0), (b"/memfd:in memory", wire.MEMFD)):
        assert cpu(snapshot, path, flags) >= 15_000_000


def test_another_mount_namespace_is_marked(cgroup: Cgroup, burn: Path) -> None:
    burner = Burner(cgroup, "unshare", "--mount", burn, 20, 1)
    burner.done()
    snapshot = ProcMeter([cgroup]).harvest()
    burner.end()
    assert cpu(snapshot, burn, wire.FOREIGN) >= 20_000_000


def test_a_leader_that_left_before_its_threads(cgroup: Cgroup) -> None:
    program = (
        "import ctypes, threading, time, sys\n"
        "def work():\n"
        "    time.sleep(.1)\n"
        "    end = time.process_time() + .05\n"
        "    while time.process_time() < end: pass\n"
        "    print('x', flush=True)\n"
        "    sys.stdin.readline()\n"
        "threading.Thread(target=work).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    burner = Burner(cgroup, sys.executable, "-c", program)
    burner.done()
    meter = ProcMeter([cgroup])
    snapshot = meter.harvest()
    burner.end()
    assert cpu(snapshot, PYTHON) >= 50_000_000
    check(snapshot)


def test_a_cgroup_removed_and_made_again_is_one_job(cgroup: Cgroup, burn: Path) -> None:
    job = cgroups.at(f"{cgroup.folder}/job", [cgroup.hierarchy])
    assert job is not None
    meter = ProcMeter([job])
    assert meter.harvest().cgroup_cpu_ns in (0, None)
    for _ in range(2):
        Path(job.folder).mkdir()
        burner = Burner(job, burn, 30, 1)
        burner.done()
        snapshot = meter.harvest()
        burner.end()
        assert cgroups.remove(job)
    last = meter.harvest()
    assert cpu(last, burn) == cpu(snapshot, burn) >= 60_000_000
    assert last.age_ns > 0
    check(last)


def test_the_counter_is_read_when_the_last_process_has_left(cgroup: Cgroup, burn: Path) -> None:
    job = cgroups.at(f"{cgroup.folder}/job", [cgroup.hierarchy])
    assert job is not None
    Path(job.folder).mkdir()
    meter = ProcMeter([job])
    burner = Burner(job, burn, 20, 40)
    burner.done()
    meter.look([job])
    before = meter.harvest()
    burner.go()
    burner.done()
    burner.end()
    meter.look([job])
    assert cgroups.remove(job)
    meter.look([])
    last = meter.harvest()
    assert (last.cgroup_cpu_ns or 0) - (before.cgroup_cpu_ns or 0) >= 40_000_000
    if KERNEL < NAMED:
        assert last.unattributed_by[sampling.DIED] >= 30_000_000
    else:
        assert cpu(last, burn) - cpu(before, burn) >= 30_000_000
    check(last)


def test_a_restart_counts_no_live_process_twice(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    burner = Burner(cgroup, burn, *[30] * 6)
    epochs = set()
    for generation in range(1, 6):
        burner.done()
        # Each life of the collector ends without a word.
        meter = ProcMeter([cgroup], state)
        epochs.add(meter.epoch)
        assert meter.generation == generation
        if generation != 3:
            meter.harvest()
        burner.go()
    burner.done()
    snapshot = ProcMeter([cgroup], state).harvest()
    clock = procfs.clock(burner.process.pid) or 0
    burner.end()
    assert len(epochs) == 1
    assert 180_000_000 <= cpu(snapshot, burn) <= clock
    check(snapshot)
    ProcMeter([cgroup], state).close()
    assert list(tmp_path.iterdir()) == []


def test_killed_while_a_storm_runs(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    storm = start(cgroup, "sh", "-c", "while :; do /bin/true; done")
    burner = Burner(cgroup, burn, 500, 1)
    program = (
        "import sys, time; from pathlib import Path; from sams_ebpf import cgroups, procfs\n"
        "meter = procfs.ProcMeter([cgroups.resolve(sys.argv[1])], Path(sys.argv[2]))\n"
        "while True:\n"
        "    print(sum(r.cpu_ns for r in meter.harvest().records), flush=True)\n"
    )
    last = 0
    for life in range(6):
        collector = subprocess.Popen(
            [sys.executable, "-c", program, cgroup.folder, str(state)], stdout=subprocess.PIPE
        )
        assert collector.stdout is not None
        for _ in range(1 + life):
            last = int(collector.stdout.readline())
        collector.send_signal(signal.SIGKILL)
        collector.wait()
        collector.stdout.close()
        state_now = msgspec.json.decode(state.read_bytes(), type=procfs.State)
        assert state_now.account.attributed_ns >= last
    burner.done()
    meter = ProcMeter([cgroup], state)
    snapshot = meter.harvest()
    clocks = [procfs.clock(p.pid) or 0 for p in (burner.process, storm)]
    storm.kill()
    storm.wait()
    burner.end()
    assert meter.generation == 7
    assert last <= check(snapshot)
    assert cpu(snapshot, burn) <= clocks[0]
    assert cpu(snapshot, burn) >= 500_000_000
    assert cpu(snapshot, SHELL) >= 0.5 * clocks[1]


def test_another_boot_is_another_epoch(
    cgroup: Cgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    first = ProcMeter([cgroup], state)
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(procfs, "_BOOT_ID", str(boot))
    second = ProcMeter([cgroup], state)
    assert second.epoch != first.epoch
    assert second.generation == 1


def test_another_run_continues_nothing(cgroup: Cgroup, tmp_path: Path) -> None:
    """Requeued, and the first run's collector could not close its own."""
    state = tmp_path / "state"
    first = ProcMeter([cgroup], state, run="0/17")
    again = ProcMeter([cgroup], state, run="0/17")
    assert (again.epoch, again.generation, again.superseded) == (first.epoch, 2, None)
    # A run that is not known continues what is there.
    assert ProcMeter([cgroup], state).epoch == first.epoch
    second = ProcMeter([cgroup], state, run="1/99")
    assert second.epoch != first.epoch
    assert (second.generation, second.superseded) == (1, first.epoch)
    assert ProcMeter([cgroup], state, run="1/99").epoch == second.epoch


def test_a_broken_state_counts_nothing_twice(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    burner = Burner(cgroup, burn, 50, 20, 1)
    burner.done()
    first = ProcMeter([cgroup], state)
    first.harvest()
    state.write_bytes(state.read_bytes()[:-20])
    meter = ProcMeter([cgroup], state)
    assert meter.epoch != first.epoch
    before = meter.harvest()
    burner.go()
    burner.done()
    after = meter.harvest()
    burner.end()
    assert cpu(before, burn) == 0
    assert before.cgroup_cpu_ns is not None
    assert before.cgroup_cpu_ns < 50_000_000
    assert 20_000_000 <= cpu(after, burn) < 50_000_000
    assert after.lost == {"baselines_lost": 1}
    check(after)


def test_a_state_that_cannot_be_kept_is_a_usage_error(cgroup: Cgroup, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="baselines cannot be kept"):
        ProcMeter([cgroup], tmp_path / "no such folder" / "state")


def test_a_full_disk_loses_only_the_baselines(cgroup: Cgroup, burn: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(full)], check=True)
    try:
        (full / "filler").write_bytes(bytes(4096))
        meter = ProcMeter([cgroup], full / "state")
        burner = Burner(cgroup, burn, 20, 1)
        burner.done()
        snapshot = meter.harvest()
        burner.end()
    finally:
        subprocess.run(["umount", str(full)], check=True)
    assert cpu(snapshot, burn) >= 20_000_000
    assert snapshot.lost == {"baselines_not_written": 3}


def test_without_a_counter_there_is_nothing_to_compare_with(burn: Path) -> None:
    trees = [h for h in cgroups.mounted() if "freezer" in h.controllers]
    if not trees:
        pytest.skip("no freezer hierarchy is mounted")
    made = cgroups.create(f"sams-test-uncounted-{os.getpid()}", trees)
    burner = Burner(made, burn, 20, 1)
    burner.done()
    snapshot = ProcMeter([made], hierarchies=trees).harvest()
    burner.end()
    assert cgroups.remove(made)
    assert snapshot.cgroup_cpu_ns is None
    assert cpu(snapshot, burn) >= 20_000_000


def test_peak_memory_is_seen(cgroup: Cgroup) -> None:
    program = "import sys; x = b'x' * (50 << 20); print('x', flush=True); sys.stdin.readline()"
    burner = Burner(cgroup, sys.executable, "-c", program)
    burner.done()
    snapshot = ProcMeter([cgroup]).harvest()
    burner.end()
    (record,) = [r for r in snapshot.records if r.path == PYTHON]
    assert record.max_rss_bytes is not None
    assert record.max_rss_bytes >= 50 << 20
