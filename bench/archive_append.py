"""The archive's append path, against the disk's own limit and against a file per batch."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import batches

from bench.section import Section, Table
from sams_ebpf import durable
from sams_receiver.archive import Appender, Item, Kind

ROUNDS = 7
COUNT = 320
GROUPS = (1, 8, 32, 128)


def _rate(count: int, work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return count / (time.perf_counter() - begin)


def run() -> Section:
    """Interleave all of them, round by round."""
    payloads = [batches.encoded(sequence=n, records=23) for n in range(COUNT)]
    size = sum(map(len, payloads)) // COUNT
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, rate in _round(payloads, size):
            rates.setdefault(name, []).append(rate)
    disk = rates["the disk: append, fdatasync"]
    files = rates["a file per batch: fsync, rename, fsync of the folder"]

    def ratio(name: str, base: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], base, strict=True))

    rows = [
        (name, statistics.median(found), ratio(name, disk), ratio(name, files))
        for name, found in rates.items()
    ]
    return Section(
        "Archive: append path",
        f"{COUNT} batches of {size} bytes a round, one partition, one process, no HTTP; the disk's"
        " own rate is a plain append of as many bytes and fdatasync, each. Ratios are medians of"
        f" the ratios within {ROUNDS} interleaved rounds.",
        [Table(("way", "batches/s", "of the disk's", "of file per batch"), rows)],
    )


def _round(payloads: list[bytes], size: int) -> list[tuple[str, float]]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        found = [
            ("the disk: append, fdatasync", _rate(COUNT, lambda: _disk(folder / "f", size))),
            (
                "a file per batch: fsync, rename, fsync of the folder",
                _rate(COUNT, lambda: _files(folder, payloads)),
            ),
        ]
        for group in GROUPS:
            with Appender.open(folder / f"archive{group}", partitions=1) as appender:
                # The first commit makes the segment; it is not what is measured.
                appender.append([Item(Kind.RULES, b"begin")])
                rate = _rate(COUNT, lambda a=appender, g=group: _append(a, payloads, g))  # type: ignore[misc]
                found.append((f"archive, groups of {group}", rate))
        return found


def _disk(path: Path, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    data = os.urandom(size)
    for _ in range(COUNT):
        os.write(fd, data)
        os.fdatasync(fd)
    os.close(fd)


def _files(folder: Path, payloads: list[bytes]) -> None:
    for at, data in enumerate(payloads):
        durable.write(folder / f"{at}.msgpack", data)


def _append(appender: Appender, payloads: list[bytes], group: int) -> None:
    for at in range(0, len(payloads), group):
        appender.append([Item(Kind.COUNTERS, data) for data in payloads[at : at + group]])
