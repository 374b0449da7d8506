"""Batches for tests of what lies behind the collector: plausible, small, reproducible."""

from __future__ import annotations

import random

from sams_ebpf import wire

PATHS = [
    b"/usr/bin/bash",
    b"/usr/bin/gzip",
    b"/opt/apps/gromacs/2024.1/bin/gmx_mpi",
    b"/opt/apps/python/3.12.4/bin/python3.12",
    b"/home/u1/build/a.out",
    b"/opt/apps/orca/6.0/orca_scf_mpi",
]


def batch(
    node: str = "n1",
    job: int = 1,
    sequence: int = 0,
    *,
    epoch: bytes | None = None,
    writer: bytes | None = None,
    cluster: str | None = "c1",
    records: int = 3,
    seed: int = 0,
) -> wire.Batch:
    """One batch; epoch and writer follow from cluster, node and job unless given."""
    chance = random.Random(f"{cluster}/{node}/{job}/{sequence}/{seed}")
    rows = []
    for at in range(records):
        base = PATHS[at % len(PATHS)]
        path = base if at < len(PATHS) else base + b"-%d" % at
        user, system = chance.randrange(10**11), chance.randrange(10**9)
        rows.append(
            wire.Record(
                path, 0, None, user + system, user, system,
                chance.randrange(1000), chance.randrange(1000), chance.randrange(1000),
                chance.randrange(1 << 34),
            )
        )  # fmt: skip
    total = sum(row.cpu_ns for row in rows)
    start = 1_760_000_000_000_000_000 + job * 10**9
    return wire.Batch(
        v=wire.VERSION,
        kind="counters",
        epoch=epoch or random.Random(f"e{cluster}/{node}/{job}").randbytes(16),
        generation=1,
        writer=writer or random.Random(f"w{cluster}/{node}/{job}").randbytes(8),
        sequence=sequence,
        claims=wire.Claims(cluster=cluster, node=node, job_id=job, start_ns=start, user="u1"),
        mode="bpf",
        loader="libbpf",
        begin_ns=start,
        end_ns=start + sequence * 60 * 10**9,
        full=True,
        ledger=wire.Ledger(cgroup_cpu_ns=total, attributed_cpu_ns=total, unattributed_cpu_ns=0),
        executables=len(rows),
        fields=wire.FIELDS,
        sums=[total, *[None] * (len(wire.COUNTERS) - 1)],
        records=rows,
    )


def encoded(*args: object, **kwargs: object) -> bytes:
    """The same as bytes on the wire."""
    return wire.encode(batch(*args, **kwargs))  # type: ignore[arg-type]
