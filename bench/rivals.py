"""What other ways of looking see of the same job, and at what cost.

All look at one run of the demo's job at the same time, each from a cgroup of its own, so that
what each of them uses is known from its cgroup's counter; what their BPF programs use is known
from the kernel's statistics. A tool that cannot run here is in the table with its reason.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from groups import Group
from jobs import Job, Result, read_spool, result_of
from workloads import until

from bench import bpfstats
from bench import rig as rigs
from bench.section import Section, Table

DEMO = Path(__file__).resolve().parent / "demo" / "job.sh"
START_S = 20
LIVES = 300
ROUNDS = 9
# A private mount namespace with tracefs: these tools find tracepoints there only.
TRACING = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    """mount -t debugfs debugfs /sys/kernel/debug && mount -t tracefs tracefs /sys/kernel/tracing
    exec "$@" """,
    "sh",
)
# The bare counter at exit, as it is found in many scripts.
SCRIPT = """tracepoint:sched:sched_process_exit /cgroup == GROUP/
{ @cpu[comm] = sum(curtask->se.sum_exec_runtime); }
tracepoint:sched:sched_process_exec /cgroup == GROUP/ { @execs = count(); }"""

ACCOUNTED = """accton "$1" >/dev/null
sh "$2" "$3" >/dev/null
result=$?
accton off >/dev/null
exit $result"""
EXECSNOOP_LINE = r"^.{16} +[0-9]+ +[0-9]+ +-?[0-9]+ "
REMARKS = (
    (
        "Process accounting rounds each process to ticks of 10 ms and keeps 16 characters of "
        "the command; a program that became another is booked under its last name."
    ),
    (
        "The bpftrace script reads the task's counter at its exit as such scripts do: it is "
        "stale by up to a tick there, and what follows (teardown) is missing."
    ),
    (
        "A poller's phase is luck: it looks when the job starts, every interval, and once "
        "more at the end."
    ),
    "execsnoop tells commands, exitsnoop life times; neither tells CPU.",
)


@dataclass
class Rival:
    """A tool that looks at the whole machine or at one cgroup, and writes to a file."""

    name: str
    command: Sequence[str]
    ready: str = ""  # what its output holds when it looks
    output: Path = Path()
    errors: Path = Path()
    group: Group | None = None
    process: subprocess.Popen[bytes] | None = None
    programs: set[int] = field(default_factory=set)
    broken: str | None = None
    cpu_ns: int = 0
    cpu_ready_ns: int = 0

    def start(self, rig: rigs.Rig, folder: Path) -> None:
        """Start it in a cgroup of its own and wait until it looks."""
        label = re.sub(r"\W+", "-", self.name)
        self.output, self.errors = folder / f"{label}.out", folder / f"{label}.err"
        self.group = Group.make("v2", label)
        before = set(bpfstats.programs())
        try:
            with self.output.open("wb") as out, self.errors.open("wb") as errors:
                self.process = subprocess.Popen(
                    [rig.programs["enter"], str(self.group.procs), *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                )
            self._wait_ready(before)
        except (OSError, TimeoutError) as error:
            self.broken = str(error)
        self.programs = set(bpfstats.programs()) - before
        self.cpu_ready_ns = self.group.cpu_ns()

    def _wait_ready(self, before: set[int]) -> None:
        process = self.process
        assert process is not None

        def ready() -> bool:
            if process.poll() is not None:
                raise OSError(self._last_words() or f"ended with {process.returncode}")
            if self.ready == "bpf":
                return bool(set(bpfstats.programs()) - before)
            return not self.ready or self.ready in self.output.read_text("utf-8", "replace")

        until(ready, f"{self.name} to come up", START_S, pause_s=0.05)
        time.sleep(1)
        ready()

    def _last_words(self) -> str:
        lines = self.errors.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][:160] if lines else ""

    def stop(self) -> None:
        """End it as a person would, and take down what it used."""
        if self.process is not None and self.process.poll() is None:
            for pid in self.group.pids() if self.group else ():
                os.kill(pid, signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
        if self.group is not None:
            self.cpu_ns = self.group.cpu_ns() - self.cpu_ready_ns
            self.group.remove()

    def text(self) -> str:
        """Give what it has written."""
        return self.output.read_text("utf-8", "replace")


@dataclass(frozen=True)
class Seen:
    """What a rival saw: CPU in ns and number of commands, None where it does not tell."""

    cpu_ns: int | None
    commands: int | None
    names: str


def run() -> Section:
    """One job, all eyes on it; then what each costs a storm of short lives."""
    with rigs.rig() as rig:
        rows, truth = _one_job(rig)
        slower = _slow_down(rig)
    return Section(
        title="The same job seen by others",
        method=f"""The demo's job (a compile, a pipeline of thousands of short commands, a threaded
solver, a program that becomes another), once, with every tool looking at the same time. Share: CPU
that the tool attributes to the job's processes, of what the kernel charged to the job's cgroup
({truth}). Execs: of those that happened. Own CPU: what the tool's processes used while it looked
(start left out, its report at the end included); BPF: run time of its programs over the whole
machine. The second table: {LIVES:,} lives of `/bin/true`, each tool alone and each time right
after the same without any, {ROUNDS} rounds in turn: median of the ratios, and between which the
middle half of them lies.""",
        tables=[
            Table(
                ("", "CPU seen, %", "execs seen, %", "keeps apart by", "own CPU, ms", "BPF, ms"),
                rows,
            ),
            Table(("", "longer than without, %", "middle half"), slower),
        ],
        remarks=REMARKS,
    )


def _rivals(job: Job, rig: rigs.Rig) -> dict[str, Rival]:
    script = SCRIPT.replace("GROUP", str(job.group.path.stat().st_ino))
    poll = (sys.executable, "-m", "bench.poller", str(job.group.path), "--interval")
    found = (
        Rival("/proc poller, 30 s", (*poll, "30")),
        Rival("/proc poller, 1 s", (*poll, "1")),
        Rival("execsnoop", (*TRACING, "execsnoop", "-c", str(job.group.path)), "bpf"),
        Rival("exitsnoop", (*TRACING, "exitsnoop", "-c", str(job.group.path)), "bpf"),
        Rival("bpftrace at sched_process_exit", (*TRACING, "bpftrace", "-e", script), "Attaching"),
    )
    del rig
    return {rival.name: rival for rival in found}


def _one_job(rig: rigs.Rig) -> tuple[list[list[str | float | None]], str]:
    folder = rig.new_folder("rivals")
    account = folder / "acct"
    account.touch()
    before = set(bpfstats.programs())
    with rig.job(interval_s=60) as job, bpfstats.counting():
        ours = set(bpfstats.programs()) - before
        assert job.collector is not None
        rivals = _rivals(job, rig)
        try:
            for rival in rivals.values():
                rival.start(rig, folder)
            collector = Path(f"/proc/{job.collector.process.pid}/schedstat")
            own_ns = int(collector.read_text().split()[0])
            counts = bpfstats.programs()
            # Accounting works per pid namespace: the job gets one, and the machine is spared.
            process = job.launch(
                "unshare",
                "--pid",
                "--fork",
                "sh",
                "-c",
                ACCOUNTED,
                "sh",
                *(str(account), str(DEMO), str(folder / "work")),
            )
            assert process.wait(280) == 0
            job.group.wait_empty()
            counts = bpfstats.spent(counts, bpfstats.programs())
            own_ns = int(collector.read_text().split()[0]) - own_ns
        finally:
            for rival in rivals.values():
                rival.stop()
        job.collector.end()
        result = result_of(read_spool(job.collector.spool, job.job_id))
    charged = result.ledger.cgroup_cpu_ns
    assert charged is not None
    execs = result.total("execs")

    def row(
        name: str, seen: Seen, cpu_ns: int | None, programs: set[int]
    ) -> list[str | float | None]:
        bpf = sum(runs.time_ns for number, runs in counts.items() if number in programs)
        return [
            name,
            None if seen.cpu_ns is None else 100 * seen.cpu_ns / charged,
            None if seen.commands is None else 100 * seen.commands / execs,
            seen.names,
            None if cpu_ns is None else cpu_ns / 1e6,
            bpf / 1e6 if programs else None,
        ]

    rows = [row("sams-ebpf", _ours(result), own_ns, ours)]
    for name, rival in rivals.items():
        if rival.broken is not None:
            rows.append([name, None, None, f"cannot run here: {rival.broken}", None, None])
        else:
            rows.append(row(name, _seen(rival), rival.cpu_ns, rival.programs))
    rows.append(row("process accounting (acct)", _accounted(account), None, set()))
    return rows, f"{charged / 1e9:.3f} s, {execs:,} execs"


def _ours(result: Result) -> Seen:
    return Seen(result.ledger.attributed_cpu_ns, result.total("execs"), "path of the executable")


def _seen(rival: Rival) -> Seen:
    text = rival.text()
    if "poller" in rival.name:
        executables = json.loads(text)["executables"]
        return Seen(sum(executables.values()), None, "path at first sight")
    if rival.name == "execsnoop":
        return Seen(None, len(re.findall(EXECSNOOP_LINE, text, re.MULTILINE)), "command line")
    if rival.name == "exitsnoop":
        return Seen(None, None, "command name, life time only")
    cpu_ns = sum(int(found) for found in re.findall(r"@cpu\[.*\]: (\d+)", text))
    execs = re.search(r"@execs: (\d+)", text)
    return Seen(cpu_ns, int(execs[1]) if execs else None, "command name")


def _accounted(file: Path) -> Seen:
    """Read `struct acct_v3` records: user and system time are in ticks of 1/100 s."""
    data = file.read_bytes()
    total = count = 0
    for at in range(0, len(data) - 63, 64):
        total += sum(_comp(data[at + place : at + place + 2]) for place in (32, 34))
        count += 1
    return Seen(total * 10_000_000, None, f"command name, {count:,} processes")


def _comp(data: bytes) -> int:
    # comp_t: 3 bits of exponent (base 8), 13 bits of fraction.
    value = int.from_bytes(data, "little")
    return (value & 0x1FFF) << (3 * (value >> 13))


def _slow_down(rig: rigs.Rig) -> list[list[str | float | None]]:
    names = ("sams-ebpf", "sams-ebpf, exact set-up")

    def measure(name: str) -> float:
        setup: rigs.Case = {"sams-ebpf": "default", "sams-ebpf, exact set-up": "exact"}.get(name)  # type: ignore[assignment]
        with rig.job(setup) as job:
            rival = _rivals(job, rig).get(name)
            folder = rig.new_folder(f"slow-{time.monotonic_ns()}")
            if rival is not None:
                rival.start(rig, folder)
            try:
                if rival is not None and rival.broken is not None:
                    return float("nan")
                process = job.launch(job.programs["lives"], str(LIVES), "/bin/true")
                assert process.wait(120) == 0
                return float(job.truth.read()["elapsed_ns"])
            finally:
                if rival is not None:
                    rival.stop()

    with rig.job(None) as probe:
        tools = (*names, *_rivals(probe, rig))
    changes: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(ROUNDS):
        for name in tools:
            without = measure("nothing")
            changes[name].append(100 * (measure(name) / without - 1))
    rows: list[list[str | float | None]] = []
    for name, found in changes.items():
        if any(change != change for change in found):  # noqa: PLR0124  (NaN: it does not run here)
            rows.append([name, None, None])
            continue
        low, median, high = statistics.quantiles(found, n=4)
        rows.append([name, median, f"{low:.1f} to {high:.1f}"])
    return rows
