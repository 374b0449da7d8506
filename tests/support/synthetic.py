"""A synthetic site: jobs as sacct lists them, and the batches that their nodes sent.

Made from a seed, and true to the contract of the wire: counters only grow, a full batch
holds all records, sums are over all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from sams_ebpf import wire

SECOND = 10**9
PATHS = [
    b"/usr/bin/bash", b"/usr/bin/gzip", b"/opt/apps/gromacs/2024.1/bin/gmx_mpi",
    b"/opt/apps/python/3.12.4/bin/python3.12", b"/home/u1/a.out", b"/odd/\xff name\n=1+1",
    b"/opt/apps/orca/6.0/orca_scf_mpi",
]  # fmt: skip
HEAD = (
    "JobIDRaw|Cluster|User|UID|Account|Partition|Submit|Start|End|ElapsedRaw|Suspended|"
    "CPUTimeRAW|AllocCPUS|NNodes|NodeList|State|Restarts|SLUID|JobName"
)


@dataclass
class Epoch:
    """One life of a job's counters on a node, with the batches of it in order."""

    epoch: bytes
    claims: wire.Claims
    batches: list[wire.Batch] = field(default_factory=list)

    def encoded(self) -> list[bytes]:
        return [wire.encode(batch) for batch in self.batches]

    @property
    def last(self) -> wire.Batch:
        return self.batches[-1]


def epoch(
    chance: random.Random,
    claims: wire.Claims,
    begin_s: int,
    ends_s: list[int],
    *,
    paths: list[bytes] | None = None,
    unattributed: bool = True,
    outside: bool = False,
    final: bool = True,
    cgroup: bool = True,
    idle: bool = False,
    mode: str = "bpf",
) -> Epoch:
    """Batches that end at the given moments (Unix seconds)."""
    names = paths if paths is not None else chance.sample(PATHS, chance.randint(1, 4))
    keys = [(name, 0) for name in names]
    if outside:
        keys.append((b"/usr/bin/podman", wire.OUTSIDE))
    counters = {key: [0] * 4 for key in keys}
    known: set[tuple[bytes, int]] = set()
    lost = 0
    made = Epoch(chance.randbytes(16), claims)
    writer, generation, base = chance.randbytes(8), 1, 0
    for at, end_s in enumerate(ends_s):
        if at and chance.random() < 0.15:
            # The collector was restarted.
            writer, generation, base = chance.randbytes(8), generation + 1, at
        changed = set()
        for key in keys:
            if not idle and (chance.random() < 0.7 or not known):
                user, system = chance.randrange(10**11), chance.randrange(10**10)
                counter = counters[key]
                counter[0] += user + system
                counter[1] += user
                counter[2] += system
                counter[3] += chance.randrange(5)
                changed.add(key)
        known |= changed
        lost += chance.randrange(10**9) if unattributed and not idle else 0
        full = at % 10 == 0 or at == len(ends_s) - 1 or chance.random() < 0.1
        inside = sum(counters[key][0] for key in known if not key[1] & wire.OUTSIDE)
        beside = sum(counters[key][0] for key in known if key[1] & wire.OUTSIDE)
        records = [
            wire.Record(
                path, flags, None, *counters[path, flags][:3], execs=counters[path, flags][3]
            )
            for path, flags in sorted(known if full else changed)
        ]
        made.batches.append(
            wire.Batch(
                v=wire.VERSION, kind="counters", epoch=made.epoch, generation=generation,
                writer=writer, sequence=at - base, claims=claims, mode=mode,
                loader="libbpf" if mode == "bpf" else None, begin_ns=begin_s * SECOND,
                end_ns=end_s * SECOND, full=full, executables=len(known), fields=wire.FIELDS,
                final=wire.Closing(reason="signal", live=0)
                if final and at == len(ends_s) - 1 else None,
                ledger=wire.Ledger(
                    cgroup_cpu_ns=inside + lost if cgroup else None,
                    attributed_cpu_ns=inside,
                    unattributed_cpu_ns=lost if cgroup else None,
                    outside_cpu_ns=beside,
                ),
                records=records,
            )
        )  # fmt: skip
    return made


@dataclass
class Row:
    """One row of sacct. Times in Unix seconds; end None: still running."""

    job_id: int
    start: int
    end: int | None
    elapsed: int
    cpus: int
    node_list: str
    nodes: int
    state: str = "COMPLETED"
    submit: int | None = None
    cluster: str = "c1"
    user: str = "u1"
    account: str = "p1"
    partition: str = "main"
    restarts: int = 0
    sluid: str = ""
    name: str = "a|b"

    @property
    def cpu_time(self) -> int:
        return self.elapsed * self.cpus

    def line(self) -> str:
        end = "Unknown" if self.end is None else stamp(self.end)
        submit = stamp(self.submit if self.submit is not None else self.start - 10)
        return (
            f"{self.job_id}|{self.cluster}|{self.user}|1000|{self.account}|{self.partition}|"
            f"{submit}|{stamp(self.start)}|{end}|{self.elapsed}|00:00:00|{self.cpu_time}|"
            f"{self.cpus}|{self.nodes}|{self.node_list}|{self.state}|{self.restarts}|{self.sluid}|"
            f"{self.name}"
        )


def stamp(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def output(rows: list[Row]) -> bytes:
    """What sacct prints."""
    return "\n".join([HEAD, *[row.line() for row in rows], ""]).encode()


def claims(row: Row, node: str, **changes: object) -> wire.Claims:
    """What a collector says of a job, as it knows it from the prolog."""
    values: dict[str, object] = {
        "cluster": row.cluster, "node": node, "job_id": row.job_id,
        "restart_count": row.restarts, "start_ns": row.start * SECOND,
        "sluid": row.sluid or None, "user": row.user, "account": row.account,
        "partition": row.partition, "cpus": row.cpus, "nodes": row.nodes,
    }  # fmt: skip
    return wire.Claims(**(values | changes))  # type: ignore[arg-type]


def harvests(begin: int, end: int, every: int = 60) -> list[int]:
    """Moments of harvest, the last at the end."""
    return [*range(begin + every, end, every), end]


def site(seed: int, jobs: int, *, nodes: int = 2000, begin: int = 1_760_000_000) -> Iterator[Epoch]:
    """Epochs of many plain jobs of 5 to 120 batches, in order of their start."""
    chance = random.Random(seed)
    for number in range(jobs):
        node = f"n{chance.randrange(nodes):04d}"
        start = begin + number * 7
        row = Row(number + 1, start, None, 0, 16, node, 1, user=f"u{number % 97}",
                  account=f"p{number % 13}")  # fmt: skip
        count = chance.randint(5, 120)
        yield epoch(chance, claims(row, node), start, harvests(start, start + count * 60))
