"""Makes `bench/corpus.msgpack.zst`: batches as a mixed site writes them, from a fixed seed.

60 job runs on 20 nodes: compile jobs of many short programs, one long MPI program, Python
workflows. Counters are cumulative, to the ns as the kernel counts them, every tenth batch
and the last are full, the others hold what changed. Run as `python -m bench.make_corpus`.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
from backports import zstd

from sams_ebpf import wire

CORPUS = Path(__file__).with_name("corpus.msgpack.zst")
_TOOLS = [f"/usr/bin/{name}" for name in (
    "bash", "gcc", "ld", "as", "make", "cat", "grep", "sed", "awk", "rm", "mkdir", "ls", "date",
    "python3.11", "perl", "tar", "gzip", "sort", "tee", "env", "hostname", "srun", "sleep", "cp",
)]  # fmt: skip
_SOFTWARE = [
    "/opt/apps/gromacs/2024.1-foss-2023b/bin/gmx_mpi",
    "/opt/apps/vasp/6.4.2/bin/vasp_std",
    "/opt/apps/openfoam/v2312/platforms/linux64GccDPInt32Opt/bin/simpleFoam",
    "/opt/apps/python/3.12.4-GCCcore-13.3.0/bin/python3.12",
    "/opt/apps/r/4.4.1/lib64/R/bin/exec/R",
    "/home/u%d/project/build/solver.x",
    "/opt/apps/orca/6.0.0/orca_scf_mpi",
]


class _Row:
    def __init__(self, chance: random.Random, path: str, weight: int) -> None:
        self.path = path.encode()
        self.weight = weight
        self.values = [0] * len(wire.COUNTERS)
        self.rss = chance.randrange(1 << 20, 1 << 32) & ~0xFFF

    def grow(self, chance: random.Random) -> None:
        execs = chance.randrange(1, 20) if self.weight < 10 else 0
        user = chance.randrange(self.weight * 10**7, self.weight * 10**9)
        system = chance.randrange(user // 50 + 1)
        growth = {
            "cpu_ns": user + system, "user_ns": user, "system_ns": system, "execs": execs,
            "forks": execs + chance.randrange(3), "exits": execs,
            "read_bytes": chance.choice((0, 4096 * chance.randrange(5000))),
            "write_bytes": 4096 * chance.randrange(500), "minor_faults": chance.randrange(90000),
            "major_faults": chance.choice((0, 0, 3)), "voluntary_switches": chance.randrange(9000),
            "involuntary_switches": chance.randrange(500),
        }  # fmt: skip
        for at, name in enumerate(wire.COUNTERS):
            self.values[at] += growth.get(name, 0)
        self.values[wire.COUNTERS.index("max_rss_bytes")] = self.rss

    def record(self) -> wire.Record:
        return wire.Record(self.path, 0, None, *self.values)


def _job(chance: random.Random, number: int) -> list[wire.Batch]:
    tools = chance.sample(_TOOLS, chance.randrange(4, len(_TOOLS)))
    rows = [_Row(chance, path, chance.randrange(1, 8)) for path in tools]
    software = chance.choice(_SOFTWARE)
    software = software % number if "%" in software else software
    rows.append(_Row(chance, software, chance.randrange(200, 2000)))
    rows += [
        _Row(chance, f"/tmp/conftest-{number}/a{n}.out", 1) for n in range(chance.randrange(12))
    ]
    start = 1_760_000_000_000_000_000 + number * 977 * 10**9 + chance.randrange(10**9)
    node = f"b-cn{chance.randrange(1, 21):04d}"
    epoch, writer = chance.randbytes(16), chance.randbytes(8)
    claims = wire.Claims(
        cluster="alpha", node=node, job_id=4_000_000 + number * 7, start_ns=start,
        uid=1000 + number, user=f"u{number}", account=f"proj-2026-{number % 9}",
        partition="cpu", job_name="run",
        boot_id=f"9c3c5c8e-5d6e-4a1c-9f0a-{number % 20:012d}", cpus=32, nodes=1,
        cgroup=f"/system.slice/slurmstepd.scope/job_{4_000_000 + number * 7}".encode(),
        cgroup_birth_ns=start + 10**8,
    )  # fmt: skip
    made = []
    closing = wire.Closing(reason="signal", live=0)
    last = chance.randrange(8, 60)
    for sequence in range(last + 1):
        full = sequence % 10 == 0 or sequence == last
        busy = [row for row in rows if row.weight > 100 or chance.random() < 0.5]
        for row in busy:
            row.grow(chance)
        records = [row.record() for row in (rows if full else busy)]
        sums: list[int | None] = [sum(column) for column in zip(*(r.values for r in rows))]  # noqa: B905
        cpu = sum(row.values[0] for row in rows)
        gap = chance.randrange(10**6)
        made.append(
            wire.Batch(
                v=1, kind="counters", epoch=epoch, generation=1, writer=writer, sequence=sequence,
                claims=claims, software="sams-ebpf 1.0.0", mode="bpf", loader="libbpf",
                begin_ns=start, end_ns=start + sequence * 60 * 10**9 + chance.randrange(10**8),
                full=full, final=closing if sequence == last else None,
                ledger=wire.Ledger(cgroup_cpu_ns=cpu + gap, attributed_cpu_ns=cpu,
                                   unattributed_cpu_ns=gap, age_ns=chance.randrange(10**6)),
                processes=wire.Processes(forks=sums[4], adopted=1, moved_in=0, exits=sums[5],
                                         live=1, moved_out=0),
                executables=len(rows), sums=sums, fields=wire.FIELDS, records=records,
            )
        )  # fmt: skip
    return made


def main() -> None:
    """Write the corpus: batches of all jobs in the order in which they would arrive."""
    chance = random.Random(20_260_101)
    made = [batch for number in range(60) for batch in _job(chance, number)]
    made.sort(key=lambda batch: batch.end_ns or 0)
    data = msgspec.msgpack.encode([wire.encode(batch) for batch in made])
    CORPUS.write_bytes(zstd.compress(data, 19))


def load() -> list[bytes]:
    """The batches of the corpus as they would stand on the wire."""
    return msgspec.msgpack.decode(zstd.decompress(CORPUS.read_bytes()), type=list[bytes])


def as_maps(data: bytes) -> bytes:
    """The same batch with each record as a map, every name spelled out: the naive way."""
    batch = wire.decode(data)
    plain = wire.to_plain(data)
    plain.pop("fields")
    plain["records"] = [
        dict(zip(wire.FIELDS, msgspec.structs.astuple(record), strict=True))
        for record in batch.records
    ]
    return msgspec.msgpack.encode(plain)


if __name__ == "__main__":
    main()
