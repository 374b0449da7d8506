"""Durable acknowledged batches per second, against a file per batch in the same handler."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import batches
import receiving
import uvloop

from bench.section import Section, Table

ROUNDS = 5
SECONDS = 4.0
CONNECTIONS = 200
BATCHES = 60_000
RECORDS = 23


class Connection(asyncio.Protocol):
    """Sends one prepared request after the other, each when the last was acknowledged."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._sent = 0.0
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        """Take an answer, send the next."""
        self._buffer += data
        if not self._buffer.endswith(b"}\n"):
            return
        if not self._buffer.startswith(b"HTTP/1.1 200") or b'"stored"' not in self._buffer:
            self._run.wrong += 1
        self._buffer = b""
        now = time.perf_counter()
        if self._run.counting:
            self._run.times.append(now - self._sent)
        self._next()

    def _next(self) -> None:
        request = next(self._run.requests, None)
        if request is None:
            self._run.done.set()
            return
        self._sent = time.perf_counter()
        self._transport.write(request)


class Run:
    """One measurement."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self.requests = requests
        self.times: list[float] = []
        self.wrong = 0
        self.counting = False
        self.done = asyncio.Event()

    async def measure(self, port: int) -> tuple[float, float]:
        """Batches per second and 99th percentile in seconds, after half a second to warm up."""
        loop = asyncio.get_running_loop()
        made = [
            await loop.create_connection(lambda: Connection(self), "127.0.0.1", port)
            for _ in range(CONNECTIONS)
        ]
        await asyncio.sleep(0.5)
        self.counting = True
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(SECONDS):
                await self.done.wait()
        except TimeoutError:
            pass
        took = time.perf_counter() - begin
        self.counting = False
        for transport, _ in made:
            transport.abort()
        assert self.wrong == 0, f"{self.wrong} wrong answers"
        ordered = sorted(self.times)
        return len(ordered) / took, ordered[int(len(ordered) * 0.99)]


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
            return runner.run(Run(iter(requests)).measure(receiver.ports[0]))


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
