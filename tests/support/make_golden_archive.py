"""Make the golden archive of today's wire version: `python tests/support/make_golden_archive.py`.

Run once, when a version is new and before it is released. What is there stays for ever.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import golden_archives
import msgspec
import synthetic

from sams_aggregator import own_archive, sacct
from sams_aggregator.outbox import Entry, Remembered
from sams_aggregator.rules import Rules
from sams_ebpf import wire
from sams_receiver.archive import Appender, Item, Kind, UpstreamJson
from sams_receiver.archive import format as fmt

BEGIN = 1_764_543_000  # half an hour before December in UTC, half an hour into it in Stockholm
WIRE = Path(__file__).parents[1] / "collector" / "golden"
ROWS = [
    synthetic.Row(101, BEGIN, BEGIN + 3600, 3600, 8, "n[1-2]", 2),
    synthetic.Row(102, BEGIN, BEGIN + 900, 900, 4, "n3", 1, state="REQUEUED"),
    synthetic.Row(102, BEGIN + 1800, None, 600, 4, "n3", 1, restarts=1, state="RUNNING"),
]
RULES = {
    "rules": [
        {"match": "^/usr/", "software": "system", "version": "", "versionstr": "", "ignore": True},
        {"match": "^/opt/apps/(?P<n>[^/]+)/(?P<v>[^/]+)/", "software": "%(n)s",
         "version": "%(v)s", "versionstr": "%%(user)s"},
    ],
    "rewrite": [{"match": {"version": r"(?P<m>\d+)\."}, "update": {"version": "%(m)s"}}],
}  # fmt: skip
UPSTREAM = {
    "sams.sampler.Core": {"jobid": 103, "node": "n4"},
    "sams.sampler.SlurmInfo": {"account": "p1", "username": "u1", "cpus": "8", "nodes": "1",
                               "starttime": "2025-11-30T22:50:00"},
    "sams.sampler.Software": {"execs": {"/usr/bin/x": {"user": 1.5, "system": 0.25}},
                              "start_time": BEGIN, "end_time": BEGIN + 100},
}  # fmt: skip


def batches() -> list[bytes]:
    """Every kind of batch there is, those of the wire's own golden files among them."""
    chance = random.Random(1)
    two, first, second = ROWS

    def epoch(row: synthetic.Row, node: str, end: int, every: int, **more: Any) -> list[bytes]:
        said = synthetic.claims(row, node, **more.pop("said", {}))
        ends = synthetic.harvests(row.start, end, every)
        return synthetic.epoch(chance, said, row.start, ends, **more).encoded()

    found = [
        *epoch(two, "n1", BEGIN + 3600, 600, outside=True),
        *epoch(two, "n2", BEGIN + 3600, 600),
        *epoch(first, "n3", BEGIN + 900, 300, mode="proc", cgroup=False),
        *epoch(second, "n3", BEGIN + 2400, 300, final=False, said={"start_ns": None}),
    ]
    chance.shuffle(found)
    own = (path.read_bytes() for path in sorted(WIRE.glob(f"v{wire.VERSION}-*.msgpack")))
    return found + [data for data in own if readable(data)]


def readable(data: bytes) -> bool:
    try:
        wire.decode(data)
    except wire.WireError:
        return False
    return True


def make(folder: Path) -> None:
    body = json.dumps(UPSTREAM).encode()
    held = UpstreamJson(cluster="c1", job="103", node="n4", digest=bytes(32), name="103.n4.json",
                        body=body)  # fmt: skip
    found = batches()
    with Appender.open(folder / "received", partitions=2) as appender:
        for at, data in enumerate(found):
            claims = wire.decode_header(data).claims
            appender.append([Item(Kind.COUNTERS, data)], cluster=claims.cluster, node=claims.node)
            if at == len(found) // 2:
                item = Item(Kind.UPSTREAM_JSON, fmt.pack_upstream(held))
                appender.append([item], cluster="c1", node="n4")
                # One half is in sealed segments, the other in live ones.
                appender.seal(everything=True)
    rules = Rules.from_config(RULES, "rules")
    sent = Entry("20251201T000000Z-0.xml", BEGIN * 10**9,
                 [Remembered("c1:101:20251130235000", "d" * 64, "[]", partial=False)])  # fmt: skip
    rows = sacct.payloads(synthetic.output(ROWS), "c1", (BEGIN + 2400) * 10**9)
    own_archive.append(folder, [
        *[Item(Kind.SACCT, data) for data in rows],
        Item(Kind.RULES, json.dumps({"version": rules.version, **rules.document()}).encode()),
        Item(Kind.SENT, msgspec.msgpack.encode(sent)),
    ])  # fmt: skip


def main() -> None:
    folder = golden_archives.FOLDER / f"v{wire.VERSION}"
    if folder.exists():
        sys.exit(f"{folder}: is there, and stays for ever")
    make(folder)
    with tempfile.TemporaryDirectory() as scratch:
        said = golden_archives.said(folder, Path(scratch))
    (folder / "expected.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    for one in (*folder.rglob("lock"), folder / "archive.lock"):
        one.unlink()
    for one in folder.rglob("aside"):
        shutil.rmtree(one)


if __name__ == "__main__":
    main()
