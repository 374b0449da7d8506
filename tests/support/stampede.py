"""Very many batches of very many writers, and one client that is a new writer each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import batches
import driving
import uvloop
from receiving import Receiver, private

from sams_ebpf import wire

NODES = 2_000
WRITERS = 10_000
SECRET = "s" * 64
# One request in so many comes from the client that means no good.
HOSTILE = 6
WRITERS_PER_DAY = 20_000


class Point(NamedTuple):
    """Resident bytes of the receiver after so many requests."""

    requests: int
    rss: int


class Result(NamedTuple):
    """What a stampede gave: memory over time, answers by status, answers per second."""

    points: list[Point]
    statuses: dict[bytes, int]
    rate: float
    kept: int


def receiver(folder: Path) -> Receiver:
    """A receiver that knows each node by what its proxy says, with the default quotas."""
    secret = private(folder / "secret", SECRET)
    return Receiver(
        folder,
        listen=[{"address": "127.0.0.1:0", "proxy": {"secret_file": str(secret)}}],
        tokens_file=None,
        node_binding=True,
        quotas={"writers_per_day": WRITERS_PER_DAY},
    )


def requests(count: int) -> Iterator[bytes]:
    """Each of the writers in turn, with its next sequence."""
    epoch, writer, sequence = b"EPOCH-OF-16-BYTE", b"WRITER-8", 0x00717171
    node = "n0000000"
    template = wire.encode(
        batches.batch(node=node, epoch=epoch, writer=writer, sequence=sequence, records=4)
    )
    mark = sequence.to_bytes(4, "big")
    for piece in (epoch, writer, mark, node.encode()):
        assert template.count(piece) == 1
    for at in range(count):
        if at % HOSTILE == HOSTILE - 1:
            name, who, number = "evil0000", at, 0
        else:
            who = at % WRITERS
            name, number = f"n{who % NODES:07d}", at // WRITERS
        body = (
            template.replace(epoch, who.to_bytes(16, "big"))
            .replace(writer, who.to_bytes(8, "big"))
            .replace(mark, number.to_bytes(4, "big"))
            .replace(node.encode(), name.encode())
        )
        yield (
            f"POST /v1/batches HTTP/1.1\r\nHost: r\r\nContent-Type: application/msgpack\r\n"
            f"X-Sams-Client: {name}\r\nX-Sams-Proxy-Secret: {SECRET}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body


def run(folder: Path, count: int, say: Callable[[str], None] = print) -> Result:
    """Send so many and watch the receiver's memory."""
    points: list[Point] = []

    async def main(made: Receiver) -> driving.Run:
        driven = driving.Run(requests(count))
        transports = await driven.connect(made.ports[0], 100)
        begin = asyncio.get_running_loop().time()
        done = 0
        while done < count:
            await asyncio.sleep(1)
            done = sum(driven.statuses.values())
            if not points or done - points[-1].requests >= count // 20 or done == count:
                points.append(Point(done, made.rss()))
                say(f"{done} {points[-1].rss >> 20} MB")
        took.append(asyncio.get_running_loop().time() - begin)
        for transport in transports:
            transport.close()
        return driven

    took: list[float] = []
    with receiver(folder).start() as made:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            driven = runner.run(main(made))
        assert made.stop() == 0
    kept = driven.statuses.get(b"200", 0)
    return Result(points, driven.statuses, count / took[0], kept)
