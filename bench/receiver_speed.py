"""Durable acknowledged batches per second, against a file per batch in the same handler."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

import batches
import driving
import receiving
import uvloop

from bench.section import Section, Table

ROUNDS = 9
SECONDS = 4.0
CONNECTIONS = 200
BATCHES = 150_000
RECORDS = 23


def prepared() -> list[bytes]:
    """Requests with batches of 2.1 kB on average, of 2,000 nodes."""
    made = []
    head = "".join(f"{name}: {value}\r\n" for name, value in receiving.HEADERS.items())
    bodies = [batches.encoded(node=f"n{n}", records=RECORDS) for n in range(2000)]
    for at in range(BATCHES):
        node, sequence = at % 2000, at // 2000
        body = bodies[node]
        if sequence:
            body = batches.encoded(node=f"n{node}", sequence=sequence, records=RECORDS)
        made.append(
            f"POST /v1/batches HTTP/1.1\r\nHost: r\r\n{head}Content-Length: {len(body)}"
            "\r\n\r\n".encode()
            + body
        )
    return made


def once(requests: list[bytes], store: str) -> tuple[float, float]:
    """One fresh receiver, one measurement."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        receiver = receiving.Receiver(folder)
        module = "sams_receiver" if store == "group" else "bench.file_per_batch"
        with (
            receiver.start(prefix=("taskset", "-c", "1"), module=module),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            run = driving.Run(iter(requests))
            found = runner.run(run.measure(receiver.ports[0], CONNECTIONS, SECONDS))
            assert run.statuses.keys() == {b"200"}, run.statuses
            return found


def run() -> Section:
    """Measure both in turn."""
    os.sched_setaffinity(0, {0})
    requests = prepared()
    size = sum(len(r.partition(b"\r\n\r\n")[2]) for r in requests) // len(requests)
    found: dict[str, list[tuple[float, float]]] = {"file": [], "group": []}
    for _ in range(ROUNDS):
        for store, values in found.items():
            values.append(once(requests, store))
            print(store, values[-1], file=sys.stderr)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    rows = [
        (
            {"file": "a file per batch in the handler", "group": "group commit"}[store],
            statistics.median(rate for rate, _ in values),
            1000 * statistics.median(p99 for _, p99 in values),
        )
        for store, values in found.items()
    ]
    ratio = statistics.median(
        group[0] / file[0] for group, file in zip(found["group"], found["file"], strict=True)
    )
    return Section(
        "Receiver: durable acknowledged batches",
        f"{CONNECTIONS} connections on one core, each with one batch under way, to the receiver"
        f" on the other; batches of {RECORDS} records, {size} bytes, bearer token, full"
        " validation, no TLS. Both kinds run through the same handler; `a file per batch` is"
        " temporary file, fsync, rename, fsync of the folder, right there. Median of"
        f" {ROUNDS} interleaved rounds of {SECONDS:.0f} s.",
        [Table(("store", "batches/s", "p99, ms"), rows)],
        [f"Group commit is {ratio:.1f} times as fast (median of the rounds' ratios)."],
    )
