"""How much of the disk a sealed archive takes, on the corpus in the repository."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from backports import zstd

from bench import make_corpus
from bench.section import Section, Table
from sams_receiver.archive import Appender, Archive, Item, Kind


def measure(folder: Path) -> dict[str, int]:
    """Bytes of the corpus in each form."""
    payloads = make_corpus.load()
    maps = [make_corpus.as_maps(data) for data in payloads]
    with Appender.open(folder, partitions=1) as appender:
        for at in range(0, len(payloads), 32):
            appender.append([Item(Kind.COUNTERS, data) for data in payloads[at : at + 32]])
        raw = sum(segment.stored_bytes() for segment in appender.archive.segments())
        appender.seal(everything=True)
    segments = Archive.open(folder).segments()
    assert [frame.data for s in segments for frame in s.frames()] == payloads
    return {
        "maps": sum(map(len, maps)),
        "arrays": sum(map(len, payloads)),
        "raw": raw,
        "sealed": sum(segment.stored_bytes() for segment in segments),
        "each": sum(len(zstd.compress(data)) for data in payloads),
        "batches": len(payloads),
    }


def run() -> Section:
    """Seal the corpus."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        sizes = measure(Path(name))
    took = time.perf_counter() - begin
    names = {
        "maps": "records as maps",
        "arrays": "records as arrays, as they travel",
        "raw": "live segment",
        "each": "each batch as a zstd file of its own",
        "sealed": "sealed segment, index included",
    }
    rows = [(names[key], sizes[key], sizes[key] / sizes["maps"]) for key in names]
    return Section(
        "Archive: size",
        f"{sizes['batches']} batches of 60 job runs (`bench/corpus.msgpack.zst`, made by"
        f" `bench/make_corpus.py`), counters to the ns; {took:.1f} s in all.",
        [Table(("form", "bytes", "of maps"), rows)],
    )
