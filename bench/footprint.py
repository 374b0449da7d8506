"""What the collector itself needs: time to start, memory, CPU per harvest, wake-ups."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from workloads import until

from bench import node_install
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
    with rigs.rig([node_install.program()]) as rig:
        first, later, start_cpu = _starts(rig)
        one, private, many = _memory(rig)
        harvest_ms = _harvest(rig, "bpf")
        sample_ms = _harvest(rig, "proc")
        switches = _idle(rig)
    size = f"{EXECUTABLES} executables, {LIVE} live processes"
    rows: list[list[str | float]] = [
        ["start to attached, first on the node (programs loaded), ms, median", first],
        ["start to attached, the programs are there, ms, median", later],
        ["of that CPU of the collector, ms, median", start_cpu],
        ["memory of one collector, MB PSS", one],
        ["of that shared with no other process, MB", private],
        [f"memory of {MANY} collectors together, MB PSS", many],
        [f"CPU of a harvest ({size}), ms", harvest_ms],
        [f"the same in mode proc ({LIVE} live processes that all ran), ms", sample_ms],
        [f"wake-ups of an idle collector in {IDLE_S} s between harvests", switches],
    ]
    return Section(
        title="The collector itself",
        method=f"""The collector as a node has it: a wheel in a venv of its own, byte-compiled.
Start: from `exec` of Python to the collector's word that it accounts (`READY=1`), {STARTS}
starts, its CPU from `/proc/PID/schedstat`. Memory: `smaps_rollup` two seconds after that; what it
shares with the benchmark's own Python, from the same file, counts half. Harvest: CPU over
{HARVESTS} harvests one second apart, writing and syncing the batch included. Wake-ups: context
switches of all its threads between two harvests.""",
        tables=[Table(("", "measured"), rows)],
    )


def _starts(rig: rigs.Rig) -> tuple[float, float, float]:
    alone = []
    beside = []
    cpu = []
    for _ in range(STARTS):
        with rig.job() as job:
            assert job.collector is not None
            alone.append(job.collector.start_ns / 1e6)
            with rig.job() as second:
                assert second.collector is not None
                beside.append(second.collector.start_ns / 1e6)
                cpu.append(_cpu_ns(second.collector.process.pid) / 1e6)
    return statistics.median(alone), statistics.median(beside), statistics.median(cpu)


def _memory(rig: rigs.Rig) -> tuple[float, float, float]:
    with ExitStack() as stack:
        jobs = [stack.enter_context(rig.job()) for _ in range(MANY)]
        time.sleep(2)
        each = [_memory_mb(job.collector.process.pid, "Pss:") for job in jobs if job.collector]
    with rig.job() as job:
        time.sleep(2)
        assert job.collector is not None
        pid = job.collector.process.pid
        return _memory_mb(pid, "Pss:"), _memory_mb(pid, "Private_"), sum(each)


def _memory_mb(pid: int, kind: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def _harvest(rig: rigs.Rig, mode: str) -> float:
    files = rig.new_folder(f"executables-{mode}")
    with rig.job(interval_s=1, mode=mode) as job:
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
