"""Memory of the receiver over a million batches of ten thousand writers, one of them hostile."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import stampede

from bench.section import Section, Table

COUNT = 1_200_000


def run() -> Section:
    """One stampede."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        found = stampede.run(Path(name), COUNT, lambda line: print(line, file=sys.stderr))
    shown = found.points[:: max(1, len(found.points) // 10)]
    hostile = COUNT // stampede.HOSTILE
    return Section(
        "Receiver: memory",
        f"{COUNT:,} requests on 100 connections: {COUNT - hostile:,} of {stampede.WRITERS:,}"
        f" writers on {stampede.NODES:,} nodes, and {hostile:,} of one that is always a new writer"
        f" (its quota: {stampede.WRITERS_PER_DAY:,} writers a day, then 429). Default segments,"
        " sealed all the while. Resident memory of the one process.",
        [Table(("requests", "MB"), [(p.requests, p.rss >> 20) for p in shown])],
        [
            (
                f"{found.kept:,} stored, {found.statuses.get(b'429', 0):,} refused with 429,"
                f" {found.rate:,.0f} requests per second."
            )
        ],
    )
