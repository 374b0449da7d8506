"""A synthetic site's archive: 2,000 nodes, jobs of 5 to 120 batches, 20,000 paths.

Made once for each size and kept in `.cache/bench`.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

from sams_aggregator import sacct
from sams_ebpf import wire
from sams_receiver.archive import Appender, Archive, Item, Kind, Limits

ROOT = Path(__file__).resolve().parent.parent / ".cache" / "bench"
JOBS = int(os.environ.get("BENCH_JOBS", "200000"))
PATHS = 20_000
NODES = 2_000
SECOND = 10**9
BEGIN = 1_767_000_000  # 2025-12-29: jobs lie in three months
SPACING = 25  # seconds between two jobs' starts


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


def rules() -> dict[str, object]:
    """Rules that name most of the paths; the rest stays undetermined."""
    named = [
        {"match": f"^/{top}/(?P<s>soft{n}\\d*)/(?P<v>[^/]+)/", "software": "%(s)s",
         "version": "%(v)s", "versionstr": ""}
        for n in range(1, 10) for top in ("sw/apps", "cvmfs/repo")
    ]  # fmt: skip
    return {
        "rules": [
            *named,
            {"match": "^/usr/bin/cmd[0-4]", "software": "system", "version": "", "versionstr": "",
             "ignore": True},
        ]
    }  # fmt: skip


def archive() -> tuple[Path, dict[str, int]]:
    """The folder of the archive and what is in it."""
    folder = ROOT / f"site-{JOBS}"
    note = folder / "note"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        counts = _make(folder)
        note.write_text(repr(counts))
    counts = dict(eval(note.read_text(), {}))  # noqa: S307 - our own note
    return folder / "archive", counts


def _make(folder: Path) -> dict[str, int]:
    chance = random.Random(7)
    names = paths()
    batches = records = 0
    lines = [("JobIDRaw|Cluster|User|Account|Partition|Submit|Start|End|ElapsedRaw|CPUTimeRAW|"
              "AllocCPUS|NNodes|NodeList|State|JobName")]  # fmt: skip
    limits = Limits(segment_bytes=32 << 20, segment_frames=1 << 30)
    with Appender.open(folder / "archive", partitions=2, limits=limits) as appender:
        waiting: list[list[Item]] = [[], []]
        for job in range(JOBS):
            start = BEGIN + job * SPACING
            count = min(120, 5 + int(chance.expovariate(1 / 6)))
            node = chance.randrange(NODES)
            made, held = _job(chance, names, job + 1, f"n{node:04d}", start, count)
            records += held
            batches += len(made)
            waiting[node % 2] += made
            end = start + count * 60
            stamps = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(t))
                      for t in (start - 5, start, end)]  # fmt: skip
            wall = end - start
            lines.append(
                f"{job + 1}|c1|u{job % 700}|p{job % 60}|main|{'|'.join(stamps)}|"
                f"{wall}|{wall * 16}|16|1|n{node:04d}|COMPLETED|j"
            )
            for side in (0, 1):
                if len(waiting[side]) >= 2000:
                    appender.writers[side].commit(waiting[side])
                    appender.writers[side].roll_if_due()
                    waiting[side] = []
        for side in (0, 1):
            if waiting[side]:
                appender.writers[side].commit(waiting[side])
        for output in sacct.payloads("\n".join([*lines, ""]).encode(), "c1", BEGIN * SECOND * 2):
            appender.append([Item(Kind.SACCT, output)])
        appender.seal(everything=True)
    size = sum(s.stored_bytes() for s in Archive.open(folder / "archive").segments())
    raw = sum(s.end() for s in Archive.open(folder / "archive").segments())
    return {"jobs": JOBS, "batches": batches, "records": records, "bytes": size, "raw": raw}


def _record(path: bytes, counter: list[int], at: int) -> wire.Record:
    cpu, user, system = counter
    return wire.Record(path, 0, None, cpu, user, system, at, at, at, 1 << 28, at << 12, at << 12)


def _job(  # noqa: PLR0917 - a job is all of these
    chance: random.Random, names: list[bytes], job: int, node: str, start: int, count: int
) -> tuple[list[Item], int]:
    own = sorted({names[min(PATHS - 1, int(chance.paretovariate(0.35)) - 1)]
                  for _ in range(chance.randint(3, 12))})  # fmt: skip
    counters = {path: [0] * 3 for path in own}
    epoch, writer = chance.randbytes(16), chance.randbytes(8)
    claims = wire.Claims(
        cluster="c1", node=node, job_id=job, start_ns=start * SECOND, user=f"u{job % 700}",
        account=f"p{job % 60}", cpus=16, nodes=1,
    )  # fmt: skip
    made = []
    records = 0
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
        records += len(rows)
        batch = wire.Batch(
            v=1, kind="counters", epoch=epoch, generation=1, writer=writer, sequence=at,
            claims=claims, mode="bpf", loader="libbpf", begin_ns=start * SECOND,
            end_ns=(start + (at + 1) * 60) * SECOND, full=full, executables=len(own),
            final=wire.Closing(reason="signal", live=0) if at == count - 1 else None,
            ledger=wire.Ledger(cgroup_cpu_ns=total + 7 * at, attributed_cpu_ns=total,
                               unattributed_cpu_ns=7 * at),
            fields=wire.FIELDS, records=rows,
        )  # fmt: skip
        made.append(Item(Kind.COUNTERS, wire.encode(batch), 0, start * SECOND))
    return made, records
