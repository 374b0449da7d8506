"""A client that asks for nothing but speed: prepared requests on many connections."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import cast


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
        status = self._buffer[9:12]
        self._run.statuses[status] = self._run.statuses.get(status, 0) + 1
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
    """One run over an iterator of requests. `statuses` counts what was answered."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self.requests = requests
        self.times: list[float] = []
        self.statuses: dict[bytes, int] = {}
        self.counting = False
        self.done = asyncio.Event()

    async def connect(self, port: int, connections: int) -> list[asyncio.BaseTransport]:
        """Open the connections; each begins to send at once."""
        loop = asyncio.get_running_loop()
        made = [
            await loop.create_connection(lambda: Connection(self), "127.0.0.1", port)
            for _ in range(connections)
        ]
        return [transport for transport, _ in made]

    async def measure(self, port: int, connections: int, seconds: float) -> tuple[float, float]:
        """Answers per second and their 99th percentile in seconds, after half a second."""
        transports = await self.connect(port, connections)
        await asyncio.sleep(0.5)
        self.counting = True
        begin = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.done.wait()
        took = time.perf_counter() - begin
        self.counting = False
        for transport in transports:
            cast("asyncio.Transport", transport).abort()
        ordered = sorted(self.times)
        return len(ordered) / took, ordered[int(len(ordered) * 0.99)]
