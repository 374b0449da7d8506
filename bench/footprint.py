"""What the collector itself needs: time to start, memory, CPU per harvest, wake-ups."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from workloads import until

from bench import rig as rigs
from bench.section import Section, Table

STARTS = 5
MANY = 64
EXECUTABLES = 200
LIVE = 100
HARVESTS = 10
IDLE_S = 10


def run() -> Section:
    """Measure each on its own collector."""
    with rigs.rig() as rig:
        first, later = _starts(rig)
        one, many = _memory(rig)
        harvest_ms = _harvest(rig)
        switches = _idle(rig)
    rows: list[list[str | float]] = [
        ["start to attached, first on the node (programs loaded), ms, median", first],
        ["start to attached, the programs are there, ms, median", later],
        ["memory of one collector, MB PSS", one],
        [f"memory of {MANY} collectors together, MB PSS", many],
        [f"CPU of a harvest ({EXECUTABLES} executables, {LIVE} live processes), ms", harvest_ms],
        [f"wake-ups of an idle collector in {IDLE_S} s between harvests", switches],
    ]
    return Section(
        title="The collector itself",
        method=f"""Start: from `exec` of Python to the collector's word that it accounts
(`READY=1`), {STARTS} starts. Memory: `smaps_rollup` two seconds after that. Harvest: the
collector's CPU (`/proc/PID/schedstat`) over {HARVESTS} harvests one second apart, writing and
syncing the batch included. Wake-ups: context switches of all its threads between two harvests.""",
        tables=[Table(("", "measured"), rows)],
    )


def _starts(rig: rigs.Rig) -> tuple[float, float]:
    alone = []
    beside = []
    for _ in range(STARTS):
        with rig.job() as job:
            assert job.collector is not None
            alone.append(job.collector.start_ns / 1e6)
            with rig.job() as second:
                assert second.collector is not None
                beside.append(second.collector.start_ns / 1e6)
    return statistics.median(alone), statistics.median(beside)


def _memory(rig: rigs.Rig) -> tuple[float, float]:
    with ExitStack() as stack:
        jobs = [stack.enter_context(rig.job()) for _ in range(MANY)]
        time.sleep(2)
        each = [_pss_mb(job.collector.process.pid) for job in jobs if job.collector]
    with rig.job() as job:
        time.sleep(2)
        assert job.collector is not None
        return _pss_mb(job.collector.process.pid), sum(each)


def _pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"no Pss of {pid}")


def _harvest(rig: rigs.Rig) -> float:
    files = rig.new_folder("executables")
    with rig.job(interval_s=1) as job:
        assert job.collector is not None
        burn = job.programs["burn"]
        process = job.launch(
            job.programs["many_alive"], str(files), str(EXECUTABLES), str(LIVE), burn
        )
        job.truth.wait_for("ready")
        spool = job.collector.spool
        pid = job.collector.process.pid

        def harvests() -> int:
            return len(list(spool.glob("*.msgpack")))

        start = harvests() + 1
        until(lambda: harvests() >= start, "a harvest", pause_s=0.05)
        time.sleep(0.3)
        before, first = _cpu_ns(pid), harvests()
        until(lambda: harvests() >= first + HARVESTS, "harvests", pause_s=0.05)
        time.sleep(0.3)
        used, count = _cpu_ns(pid) - before, harvests() - first
        job.stop.touch()
        process.wait(60)
        return used / count / 1e6


def _cpu_ns(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def _idle(rig: rigs.Rig) -> int:
    with rig.job(interval_s=600) as job:
        assert job.collector is not None
        process = job.launch("/bin/sleep", "60")
        time.sleep(2)
        before = _switches(job.collector.process.pid)
        time.sleep(IDLE_S)
        count = _switches(job.collector.process.pid) - before
        process.kill()
        return count


def _switches(pid: int) -> int:
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "voluntary_ctxt_switches" in line:
                count += int(line.split()[1])
    return count
