"""Bounds per client: requests per second, and bytes, writers and refuse per day."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec

from sams_receiver.config import Quotas

DAY: Final = 86_400

log = logging.getLogger(__name__)


class Rate:
    """A token bucket per client; the clients longest unheard of are forgotten beyond `clients`."""

    def __init__(self, per_second: float, burst: int, clients: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clients = clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """0 if one more may come, else the seconds until it may. now: monotonic."""
        level, then = self._buckets.get(client, (float(self._burst), now))
        level = min(self._burst, level + (now - then) * self._per_second)
        wait = 0.0
        if level >= 1:
            level -= 1
        else:
            wait = (1 - level) / self._per_second
        self._buckets[client] = (level, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return wait

    def empty(self, client: str, now: float) -> bool:
        """Whether `take` would refuse, without taking."""
        level, then = self._buckets.get(client, (float(self._burst), now))
        return level + (now - then) * self._per_second < 1

    def __len__(self) -> int:
        return len(self._buckets)


class _Kept(msgspec.Struct, frozen=True):
    """Counts of a day as they are kept on disk: by node its bytes, aside, writers."""

    day: int
    nodes: dict[str, tuple[int, int, list[int]]]


class _Today:
    __slots__ = ("aside", "bytes", "writers")

    def __init__(self) -> None:
        self.bytes = 0
        self.aside = 0
        self.writers: set[int] = set()


class Daily:
    """What each node has had kept since midnight UTC.

    Kept in a file between lives of the process, so that a restart gives nobody a new day:
    `load` at the start, `save` now and then. What a kill leaves unsaved is not counted.
    """

    def __init__(self, quotas: Quotas, nodes: int) -> None:
        self._quotas = quotas
        self._nodes = nodes
        self._day = 0
        self._today: dict[str, _Today] = {}
        self._changed = False

    def load(self, file: Path) -> None:
        """Go on from a file, if it is of today; one that cannot be read is logged and left."""
        try:
            kept = msgspec.json.decode(file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s: cannot be read, today's quotas begin anew: %s", file, error)
            return
        if kept.day != int(time.time()) // DAY:
            return
        self._day = kept.day
        for node, (size, aside, writers) in kept.nodes.items():
            used = self._today[node] = _Today()
            used.bytes, used.aside, used.writers = size, aside, set(writers)

    def changes(self) -> bytes | None:
        """What `load` reads, if anything has been counted since the last call."""
        if not self._changed:
            return None
        self._changed = False
        nodes = {
            node: (used.bytes, used.aside, list(used.writers)) for node, used in self._today.items()
        }
        return msgspec.json.encode(_Kept(self._day, nodes))

    def bytes_left(self, node: str, size: int) -> bool:
        """Count size bytes of work done for the node; False if that is more than it may have."""
        used = self._of(node)
        if used is None or used.bytes + size > self._quotas.bytes_per_day:
            return False
        used.bytes += size
        return True

    def writer_left(self, node: str, key: bytes) -> bool:
        """Count a writer of the node; False if it is one too many."""
        used = self._of(node)
        if used is None:
            return False
        short = int.from_bytes(key[:7], "little")
        if short in used.writers:
            return True
        if len(used.writers) >= self._quotas.writers_per_day:
            return False
        used.writers.add(short)
        return True

    def aside_left(self, node: str, size: int) -> bool:
        """Count bytes to be set aside; False if they are too many."""
        used = self._of(node)
        if used is None or used.aside + size > self._quotas.aside_bytes_per_day:
            return False
        used.aside += size
        return True

    def _of(self, node: str) -> _Today | None:
        """None if more nodes speak than the receiver is set up for."""
        day = int(time.time()) // DAY
        if day != self._day:
            self._day = day
            self._today.clear()
        used = self._today.get(node)
        self._changed = True
        if used is None and len(self._today) < self._nodes:
            used = self._today[node] = _Today()
        return used


def short_name(name: str) -> str:
    """A client's name as a log line may show it."""
    if len(name) <= 80 and name.isprintable():
        return name
    return f"{name[:40]!r}… ({blake2b(name.encode('utf-8', 'replace'), digest_size=4).hexdigest()})"
