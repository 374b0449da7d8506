"""What measures a job: the interface that `bpf` and `proc` mode share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from sams_ebpf import wire
from sams_ebpf.cgroups import Cgroup


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All counters of one job on this node at one moment, cumulative since the epoch began.

    records: one per executable, rows with the flag OUTSIDE included.
    cgroup_cpu_ns: the kernel's own counter of the job's cgroups, read around the
        records, None where it keeps none; age_ns: how much older than the records.
    unattributed_by: ns whose cause is known, by cause. lost: counted losses, by cause.
    """

    records: list[wire.Record]
    cgroup_cpu_ns: int | None
    age_ns: int = 0
    unattributed_by: dict[str, int] = {}
    lost: dict[str, int] = {}
    processes: wire.Processes = wire.Processes()


class Meter(Protocol):
    """Measures one job from its creation until `close`."""

    mode: Literal["bpf", "proc"]
    loader: Literal["libbpf", "bcc"] | None

    @property
    def epoch(self) -> bytes:
        """Identity of this uninterrupted life of the counters."""
        ...

    @property
    def generation(self) -> int:
        """Which writer of the epoch this is."""
        ...

    @property
    def begin_ns(self) -> int:
        """Wall clock at which the epoch began, ns since the Unix epoch."""
        ...

    def harvest(self) -> Snapshot:
        """Read every counter now; wakes nobody and changes nothing that is counted."""
        ...

    def look(self, found: Sequence[Cgroup]) -> None:
        """Be told which cgroups the job has now: told at each waking."""
        ...

    def live(self) -> int:
        """Count the live processes (tgids) of the job; 0 starts the grace period."""
        ...

    def close(self) -> None:
        """Let go of everything this meter made in the kernel or on disk for the job."""
        ...
