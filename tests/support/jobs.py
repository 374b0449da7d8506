"""A job under a real collector: the one place that knows how a test starts `collect`.

Tests and benchmarks say which hierarchy, which set-up, and what runs; they get the final
batch as `sams_ebpf.wire` reads it. If the collector's options change, only `_config`,
`_command` and `Collector` here have to.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml
from groups import Group, Hierarchy
from scale import SCALE
from workloads import Programs, Truth

from sams_ebpf import pins, slots, wire

SetUp = Literal["default", "exact"]
SETUPS: tuple[SetUp, ...] = ("default", "exact")
COLLECTOR = (sys.executable, "-m", "sams_ebpf")
START_S = float(os.environ.get("SAMS_TEST_START_S", "30"))
END_S = 60


@dataclass(frozen=True)
class Options:
    """How a job is to be measured; None: as the collector does by itself.

    program: what to start, up to the command.
    """

    setup: SetUp = "default"
    interval_s: float = 3600
    quota: int | None = None
    total_entries: int | None = None
    mode: str = "bpf"
    loader: str | None = None
    program: Sequence[str] = COLLECTOR


class Collector:
    """One life of `sams-ebpf collect`, up to its end or its death."""

    def __init__(
        self,
        cgroup: Path,
        folder: Path,
        job_id: int,
        options: Options = Options(),
        *,
        wait: bool = True,
    ) -> None:
        self.spool = folder / "spool"
        self.spool.mkdir(exist_ok=True)
        self.log = folder / f"collector-{job_id}.log"
        config = folder / f"config-{job_id}.yaml"
        config.write_text(yaml.safe_dump(_config(self.spool, folder, options)))
        address = folder / f"notify-{job_id}"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("ab") as log:
            ready.bind(str(address))
            ready.settimeout(0.05)
            self.began_ns = time.monotonic_ns()
            self.process = subprocess.Popen(
                _command(options.program, cgroup, job_id, config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"NOTIFY_SOCKET": str(address)},
            )
            if wait:
                self._wait_ready(ready)
        self.start_ns = time.monotonic_ns() - self.began_ns

    def _wait_ready(self, ready: socket.socket) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                if b"READY=1" in ready.recv(4096):
                    return
            except TimeoutError:
                if self.process.poll() is not None:
                    break
        self.kill()
        raise RuntimeError(f"the collector did not come up:\n{self.log.read_text()}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask for the final batch and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        if self.process.wait(END_S) not in (0, 4):
            raise RuntimeError(f"the collector failed:\n{self.log.read_text()}")

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self.process.kill()
        self.process.wait(END_S)


def _config(spool: Path, folder: Path, options: Options) -> dict[str, Any]:
    collector: dict[str, Any] = {
        "interval_s": options.interval_s,
        "mode": options.mode,
        "loader": options.loader or os.environ.get("SAMS_TEST_LOADER", "auto"),
        "exact": options.setup == "exact",
        "state": str(folder),
    }
    if SCALE > 1:
        # Programs that are slower by as much are no reason to switch them off.
        collector["programs_limit_percent"] = 100
    if options.quota is not None:
        collector["executables_per_job"] = options.quota
    if options.total_entries is not None:
        collector["executables"] = options.total_entries
    return {"collector": collector, "spool": {"folder": str(spool), "keep_free_bytes": 0}}


def _command(program: Sequence[str], cgroup: Path, job_id: int, config: Path) -> list[str]:
    return [
        *program,
        *("collect", "--cgroup", str(cgroup), "--jobid", str(job_id), "--config", str(config)),
    ]


def forget(cgroup: str) -> None:
    """Take out of the kernel what a collector left that was killed and not started again."""
    with pins.lock():
        for folder in pins.folders():
            programs = pins.open_set(folder)
            for slot in list(slots.used(programs)):
                if slot.path.rpartition(b"/")[2] == os.fsencode(cgroup):
                    slots.release(programs, slot.id)
            programs.close()
        pins.collect_garbage()


@dataclass(frozen=True)
class Result:
    """What the collector says at the end, all batches of the spool put together."""

    final: wire.Batch
    batches: Sequence[wire.Batch]
    records: Mapping[tuple[bytes, int], wire.Record]

    @property
    def ledger(self) -> wire.Ledger:
        """The final batch's ledger."""
        assert self.final.ledger is not None
        return self.final.ledger

    @property
    def processes(self) -> wire.Processes:
        """The final batch's count of processes."""
        assert self.final.processes is not None
        return self.final.processes

    def total(self, column: str, *, outside: bool = False) -> int:
        """Sum of a column over the rows inside the job's cgroup (or those outside)."""
        return sum(
            getattr(record, column) or 0
            for record in self.records.values()
            if bool(record.flags & wire.OUTSIDE) == outside
        )

    def by_name(self) -> Counter[str]:
        """CPU in ns by the last component of the path."""
        found: Counter[str] = Counter()
        for record in self.records.values():
            found[record.path.decode("utf-8", "replace").rpartition("/")[2]] += record.cpu_ns
        return found


def allowed_ns(ledger: wire.Ledger) -> int:
    """How far `attributed` may be from what the kernel charged, in the default set-up.

    0.1 % or 1 ms; 0.5 % where the programs themselves have counted a death they missed.
    """
    assert ledger.cgroup_cpu_ns is not None
    missed = ledger.lost.get("missed_deaths", 0)
    return max(ledger.cgroup_cpu_ns // (200 if missed else 1000), 1_000_000)


def read_spool(folder: Path, job_id: int | None = None) -> list[wire.Batch]:
    """Every batch of a spool (of one job), in the order of their names."""
    batches = [wire.decode(path.read_bytes()) for path in sorted(folder.glob("*.msgpack"))]
    return [b for b in batches if job_id is None or b.claims.job_id == job_id]


def latest(batches: Iterable[wire.Batch]) -> dict[tuple[bytes, int], wire.Record]:
    """Per executable of one epoch, the record with the highest (generation, sequence)."""
    found: dict[tuple[bytes, int], wire.Record] = {}
    for batch in sorted(batches, key=lambda b: (b.generation, b.sequence)):
        if batch.full:
            found.clear()
        found.update((record.key, record) for record in batch.records)
    return found


def result_of(batches: Sequence[wire.Batch]) -> Result:
    """Put the batches of one epoch together as a reader would."""
    # What other jobs left in the kernel when they were killed is spooled as unclaimed.
    counters = [b for b in batches if b.kind == "counters" and not b.unclaimed]
    assert counters, "no batch in the spool"
    assert len({b.epoch for b in counters}) == 1, "more than one epoch"
    final = max(counters, key=lambda b: (b.generation, b.sequence))
    return Result(final=final, batches=counters, records=latest(counters))


@dataclass
class Expected:
    """What must be counted; the workloads' truth is added to it at the end."""

    forks: int = 0
    execs: int = 0
    exits: int = 0
    moved_in: int = 0
    moved_out: int = 0
    live: int = 0
    adopted: int = 0


@dataclass
class Job:
    """A cgroup with a collector on it, in which workloads are started.

    Use as a context manager: whatever happens, no process and no cgroup stays behind.
    """

    folder: Path
    programs: Programs
    hierarchy: Hierarchy
    options: Options = field(default_factory=Options)
    job_id: int = 1
    collected: bool = True
    expected: Expected = field(default_factory=Expected)
    collector: Collector | None = None
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.truth = Truth(self.folder / "truth")
        self.stop = self.folder / "stop"
        self.group = self.another_group()

    def __enter__(self) -> Self:
        if self.collected:
            try:
                self.attach()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait(END_S)
        if self.collector is not None and self.collector.process.poll() is None:
            self.collector.kill()
            forget(self.group.path.name)
        for group in reversed(self.groups):
            group.remove()

    def another_group(self, hierarchy: Hierarchy | None = None) -> Group:
        """Make a cgroup beside the job's that goes with the job."""
        group = Group.make(hierarchy or self.hierarchy, str(self.job_id))
        self.groups.append(group)
        return group

    def attach(self) -> None:
        """Start the collector and wait until it accounts."""
        self.collector = Collector(self.group.path, self.folder, self.job_id, self.options)

    def launch(
        self, *command: str, into: Group | None = None, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command inside the job's cgroup: one process moved in, one exec."""
        self.expected.moved_in += 1
        self.expected.execs += 1
        return self.outside(
            self.programs["enter"], str((into or self.group).procs), *command, environ=environ
        )

    def outside(
        self, *command: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command outside the job's cgroup."""
        environment = {**os.environ, "TRUTH": str(self.truth.file), "STOP": str(self.stop)}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment | dict(environ or {}),
        )
        self.started.append(process)
        return process

    def ended(self, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
        """Wait for a launched command that has to succeed, and for all it left in the cgroup."""
        status = process.wait(timeout_s)
        assert status == 0, f"{process.args!r} ended with {status}"
        self.expected.exits += 1

    def run(self, *command: str, into: Group | None = None, timeout_s: float = 120) -> None:
        """Launch, and wait for the end."""
        self.ended(self.launch(*command, into=into), timeout_s)

    def finish(self) -> Result:
        """End the collector and read its spool."""
        assert self.collector is not None
        self.collector.end()
        said = self.truth.read()
        self.expected.forks += said["forks"]
        self.expected.execs += said["execs"]
        self.expected.exits += said["exits"]
        return result_of(read_spool(self.collector.spool, self.job_id))
