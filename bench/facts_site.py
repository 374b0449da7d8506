"""A synthetic site's archive: 2,000 nodes, jobs of 5 to 120 batches, 20,000 paths.

Made once for each size and kept in `$BENCH_CACHE`, or `.cache/bench` of this repository: 520 MB
and some three minutes for all jobs.
For a quick look, fewer: `BENCH_JOBS=20000 python -m bench facts -o /tmp/quick.md`.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from sams_aggregator import sacct
from sams_ebpf import wire
from sams_receiver.archive import Appender, Archive, Item, Kind, partition_of

HERE = Path(__file__).resolve().parent.parent
ROOT = Path(os.environ.get("BENCH_CACHE") or HERE / ".cache" / "bench")
JOBS = int(os.environ.get("BENCH_JOBS", "200000"))
PATHS = 20_000
NODES = 2_000
SECOND = 10**9
PARTITIONS = 4  # a receiver's default
VERSION = 2  # another one makes another site
# Some 2,000 jobs run at any time. They go on for 18 hours, over the end of 2025.
SPACING_NS = SECOND // 3
BEGIN = 1_767_225_600 - 9 * 3600
SACCT_HEAD = (
    "JobIDRaw|Cluster|User|Account|Partition|Submit|Start|End|ElapsedRaw|CPUTimeRAW|"
    "AllocCPUS|NNodes|NodeList|State|JobName"
)


def paths() -> list[bytes]:
    """Paths as sites have them, the first ones run far more often."""
    made = []
    for n in range(PATHS):
        match n % 4:
            case 0:
                made.append(b"/sw/apps/soft%d/%d.%d/bin/tool%d" % (n // 40, n % 7, n % 5, n % 11))
            case 1:
                made.append(b"/usr/bin/cmd%d" % n)
            case 2:
                made.append(b"/home/u%d/build-%d/a.out" % (n % 700, n))
            case _:
                made.append(b"/cvmfs/repo/soft%d/%d.%d/bin/x%d" % (n // 40, n % 9, n % 4, n))
    return made


def rules(change: int = 0) -> dict[str, object]:
    """Rules that name most of the paths; the rest stays undetermined."""
    named = [
        {"match": f"^/{top}/(?P<s>soft{n}\\d*)/(?P<v>[^/]+)/", "software": "%(s)s",
         "version": "%(v)s", "versionstr": ""}
        for n in range(1, 10) for top in ("sw/apps", "cvmfs/repo")
    ]  # fmt: skip
    return {
        "rules": [
            *named,
            {"match": f"^/usr/bin/cmd[0-4]|^/changed{change}/", "software": "system",
             "version": "", "versionstr": "", "ignore": True},
        ]
    }  # fmt: skip


def archives() -> tuple[Path, Path, dict[str, int]]:
    """The receiver's archive, the one with sacct's rows, and what is in the first."""
    folder = ROOT / f"site-{JOBS}-{VERSION}"
    note = folder / "note.json"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        note.write_text(json.dumps(_make(folder)))
    return folder / "archive", folder / "sacct", json.loads(note.read_text())


def _make(folder: Path) -> dict[str, int]:
    """Batches in the order in which the nodes send them, the default segments, sealed."""
    batches = records = 0
    rows: list[str] = []
    with Appender.open(folder / "archive", partitions=PARTITIONS) as appender:
        waiting: list[list[Item]] = [[] for _ in range(PARTITIONS)]

        def commit(least: int) -> None:
            for writer, items in zip(appender.writers, waiting, strict=True):
                if len(items) >= least:
                    writer.commit(items)
                    writer.roll_if_due()
                    items.clear()

        for partition, item, held in _sent(rows):
            batches += 1
            records += held
            waiting[partition].append(item)
            if batches % 1000 == 0:
                commit(1000)
        commit(1)
        appender.seal(everything=True)
    with Appender.open(folder / "sacct", partitions=1) as appender:
        output = "\n".join([SACCT_HEAD, *rows, ""]).encode()
        for payload in sacct.payloads(output, "c1", BEGIN * SECOND * 2):
            appender.append([Item(Kind.SACCT, payload)])
        appender.seal(everything=True)
    segments = Archive.open(folder / "archive").segments()
    return {
        "jobs": JOBS,
        "batches": batches,
        "records": records,
        "segments": len(segments),
        "bytes": sum(segment.stored_bytes() for segment in segments),
        "raw": sum(segment.end() for segment in segments),
    }


def _sent(rows: list[str]) -> Iterator[tuple[int, Item, int]]:
    """Partition, batch and its number of records; rows of sacct are added to `rows`."""
    chance = random.Random(7)
    names = paths()
    partitions = [partition_of("c1", f"n{node:04d}", PARTITIONS) for node in range(NODES)]
    waiting: list[tuple[int, int, int, int, Item, int]] = []  # by the time at which they are sent
    for job in range(1, JOBS + 1):
        start = BEGIN * SECOND + job * SPACING_NS
        count = min(120, 5 + int(chance.expovariate(1 / 6)))
        node = chance.randrange(NODES)
        made = _job(chance, names, job, f"n{node:04d}", start, count)
        for at, (item, held) in enumerate(made):
            heapq.heappush(waiting, (item.received_ns, job, at, partitions[node], item, held))
        rows.append(_sacct_row(job, node, start // SECOND, start // SECOND + count * 60))
        while waiting and waiting[0][0] < start:
            yield waiting[0][3:]
            heapq.heappop(waiting)
    while waiting:
        yield heapq.heappop(waiting)[3:]


def _sacct_row(job: int, node: int, start: int, end: int) -> str:
    stamps = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(t)) for t in (start - 5, start, end)]
    wall = end - start
    return (
        f"{job}|c1|u{job % 700}|p{job % 60}|main|{'|'.join(stamps)}|"
        f"{wall}|{wall * 16}|16|1|n{node:04d}|COMPLETED|j"
    )


def _record(path: bytes, counter: list[int], at: int) -> wire.Record:
    cpu, user, system = counter
    return wire.Record(path, 0, None, cpu, user, system, at, at, at, 1 << 28, at << 12, at << 12)


def _job(  # noqa: PLR0917 - a job is all of these
    chance: random.Random, names: list[bytes], job: int, node: str, start: int, count: int
) -> list[tuple[Item, int]]:
    """Batches of one minute each, and how many records each holds; start in ns."""
    own = sorted({names[min(PATHS - 1, int(chance.paretovariate(0.35)) - 1)]
                  for _ in range(chance.randint(3, 13))})  # fmt: skip
    counters = {path: [0] * 3 for path in own}
    epoch, writer = chance.randbytes(16), chance.randbytes(8)
    claims = wire.Claims(
        cluster="c1", node=node, job_id=job, start_ns=start, user=f"u{job % 700}",
        account=f"p{job % 60}", cpus=16, nodes=1,
    )  # fmt: skip
    made = []
    for at in range(count):
        full = at % 10 == 0 or at == count - 1
        changed = []
        for path in own:
            if at == 0 or chance.random() < 0.7:
                user = chance.randrange(5 * 10**10)
                counter = counters[path]
                counter[0] += user + user // 20
                counter[1] += user
                counter[2] += user // 20
                changed.append(path)
        total = sum(counter[0] for counter in counters.values())
        rows = [_record(path, counters[path], at) for path in (own if full else changed)]
        end = start + (at + 1) * 60 * SECOND
        batch = wire.Batch(
            v=1, kind="counters", epoch=epoch, generation=1, writer=writer, sequence=at,
            claims=claims, mode="bpf", loader="libbpf", begin_ns=start,
            end_ns=end, full=full, executables=len(own),
            final=wire.Closing(reason="signal", live=0) if at == count - 1 else None,
            ledger=wire.Ledger(cgroup_cpu_ns=total + 7 * at, attributed_cpu_ns=total,
                               unattributed_cpu_ns=7 * at),
            fields=wire.FIELDS, records=rows,
        )  # fmt: skip
        made.append((Item(Kind.COUNTERS, wire.encode(batch), 0, end), len(rows)))
    return made
