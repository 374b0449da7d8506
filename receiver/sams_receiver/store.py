"""Group commit for an asyncio program: many waiters, one write and one sync per group."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from sams_ebpf.errors import SamsError
from sams_receiver.archive import (
    Appender,
    ArchiveError,
    FormatError,
    Item,
    SyncFailedError,
    partition_of,
)
from sams_receiver.archive.format import Tag
from sams_receiver.archive.seal import seal
from sams_receiver.archive.seen import Seen, Verdict
from sams_receiver.archive.writer import PartitionWriter

log = logging.getLogger(__name__)

GROUP_BYTES: Final = 32 << 20
_BUSY: Final = 4
_GATHER_SECONDS: Final = 0.005
_TICK_SECONDS: Final = 5.0
_SEAL_RETRY_SECONDS: Final = 60.0


class NotStoredError(SamsError):
    """Nothing was kept: the disk is full or cannot be written now. Try again later."""

    def __init__(self, reason: str, *, full: bool) -> None:
        super().__init__(reason)
        self.full = full


class _Waiting(NamedTuple):
    item: Item
    tag: Tag
    done: asyncio.Future[None]


class _Partition:
    def __init__(self, writer: PartitionWriter, seen: Seen) -> None:
        self.writer = writer
        self.seen = seen
        self.queue: list[_Waiting] = []
        self.pending: dict[tuple[bytes, int], _Waiting] = {}
        self.wake = asyncio.Event()
        self.last_group = 0
        self.sealing = False
        self.seal_after = 0.0


class Observer:
    """What happens in a store, for those who count it."""

    def committed(self, frames: int, size: int, seconds: float) -> None:
        """A group is on disk."""

    def write_failed(self) -> None:
        """A group could not be written."""

    def sealed(self, seconds: float) -> None:
        """A segment was sealed."""

    def seal_failed(self) -> None:
        """A segment could not be sealed; it will be tried again."""


class Store:
    """Owns the archive's writing side and its duplicates.

    on_fatal is called once, when the disk did not confirm a write: the program has to end.
    """

    def __init__(
        self,
        appender: Appender,
        *,
        window_ns: int,
        min_free_bytes: int,
        observer: Observer,
        on_fatal: Callable[[SyncFailedError], None],
    ) -> None:
        self._appender = appender
        self._folder = appender.archive.folder
        self._count = appender.archive.manifest.partitions
        self._min_free = min_free_bytes
        self._observer = observer
        self._on_fatal = on_fatal
        self._partitions = [
            _Partition(writer, Seen(appender.archive, writer.partition, window_ns))
            for writer in appender.writers
        ]
        self._commits = ThreadPoolExecutor(self._count, thread_name_prefix="commit")
        self._seals = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._tasks: list[asyncio.Task[None]] = []
        self._sealers: set[asyncio.Task[None]] = set()
        self._closing = False
        self.free_bytes = 0
        self.trouble: str | None = None
        self._short = False

    def start(self) -> None:
        """Begin to take batches. Needs a running event loop."""
        self._look_at_disk()
        for partition in self._partitions:
            self._tasks.append(asyncio.create_task(self._commit_loop(partition)))
        self._tasks.append(asyncio.create_task(self._tick_loop()))
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def put(self, cluster: str | None, node: str | None, item: Item, tag: Tag) -> Verdict:
        """Store unless it is there already; what is NEW or DUPLICATE is on disk on return.

        Raises NotStoredError or SyncFailedError.
        """
        partition = self._partitions[partition_of(cluster, node, self._count)]
        place = (tag.key, tag.sequence)
        waiting = partition.pending.get(place)
        if waiting is not None:
            if waiting.tag.digest != tag.digest:
                return Verdict.CONFLICT
            # Not awaited itself: the one who waits must not end with the other's request.
            await asyncio.wait([waiting.done])
            waiting.done.result()
            return Verdict.DUPLICATE
        verdict = partition.seen.check(tag)
        if verdict is not Verdict.NEW:
            return verdict
        if self.free_bytes < self._min_free:
            raise NotStoredError(
                f"{self._folder}: {self.free_bytes} bytes free, fewer than min_free_bytes",
                full=True,
            )
        waiting = _Waiting(item, tag, asyncio.get_running_loop().create_future())
        partition.pending[place] = waiting
        partition.queue.append(waiting)
        partition.wake.set()
        await waiting.done
        return Verdict.NEW

    async def close(self) -> None:
        """Finish what is queued, then let go of everything."""
        self._closing = True
        for partition in self._partitions:
            partition.wake.set()
        await asyncio.gather(*self._tasks[:-1], return_exceptions=True)
        self._tasks[-1].cancel()
        if self._sealers:
            await asyncio.wait(self._sealers)
        self._commits.shutdown()
        self._seals.shutdown()
        for partition in self._partitions:
            partition.seen.close()
        self._appender.close()

    @property
    def in_memory(self) -> int:
        """Digests of what is not sealed yet."""
        return sum(partition.seen.in_memory for partition in self._partitions)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A loop that ends by an error nobody foresaw takes the program along: no silence."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.trouble = f"{self._folder}: writing ended: {error!r}"
            self._on_fatal(SyncFailedError(f"{self.trouble}; nothing more is acknowledged"))

    async def _commit_loop(self, partition: _Partition) -> None:
        while True:
            await partition.wake.wait()
            partition.wake.clear()
            while partition.queue:
                if partition.last_group > _BUSY and not self._closing:
                    # Many wait for each sync: a moment more makes the groups larger, and a
                    # group costs as much as several batches do.
                    await asyncio.sleep(_GATHER_SECONDS)
                await self._commit_group(partition)
            if self._closing:
                return

    async def _commit_group(self, partition: _Partition) -> None:
        size = count = 0
        for waiting in partition.queue:
            size += len(waiting.item.data)
            count += 1
            if size >= GROUP_BYTES:
                break
        group = partition.queue[:count]
        del partition.queue[:count]
        partition.last_group = count
        begin = time.perf_counter()
        problem = await asyncio.get_running_loop().run_in_executor(
            self._commits, _commit, partition.writer, [waiting.item for waiting in group]
        )
        if problem is None:
            number = partition.writer.number
            if number is not None:
                partition.seen.add((waiting.tag for waiting in group), number)
            for waiting in group:
                del partition.pending[waiting.tag.key, waiting.tag.sequence]
                if not waiting.done.done():
                    waiting.done.set_result(None)
            self._observer.committed(count, size, time.perf_counter() - begin)
            if self.trouble is not None:
                log.warning("%s: can be written again", self._folder)
                self.trouble = None
            self._roll(partition)
            return
        if self.trouble is None and isinstance(problem, NotStoredError):
            log.error("%s: senders are refused, and keep theirs, until it can be", problem)
        self.trouble = str(problem)
        self._observer.write_failed()
        for waiting in group:
            del partition.pending[waiting.tag.key, waiting.tag.sequence]
            if not waiting.done.done():
                waiting.done.set_exception(problem)
        if isinstance(problem, SyncFailedError):
            self._on_fatal(problem)

    def _roll(self, partition: _Partition) -> None:
        partition.writer.roll_if_due()
        if partition.writer.to_seal and not partition.sealing:
            if time.monotonic() < partition.seal_after or self._closing:
                return
            partition.sealing = True
            task = asyncio.create_task(self._seal(partition))
            self._sealers.add(task)
            task.add_done_callback(self._sealers.discard)

    async def _seal(self, partition: _Partition) -> None:
        loop = asyncio.get_running_loop()
        try:
            while partition.writer.to_seal and not self._closing:
                number = partition.writer.to_seal[0]
                segment = self._appender.archive.segment(partition.writer.partition, number)
                begin = time.perf_counter()
                if not segment.sealed:
                    await loop.run_in_executor(self._seals, seal, segment)
                await loop.run_in_executor(self._seals, partition.seen.record_sealed, number)
                partition.seen.release(number)
                partition.writer.to_seal.remove(number)
                self._observer.sealed(time.perf_counter() - begin)
        except (OSError, ArchiveError, FormatError, sqlite3.Error) as error:
            log.error("sealing segment %s failed: %s; it stays as it is for now", number, error)
            partition.seal_after = time.monotonic() + _SEAL_RETRY_SECONDS
            self._observer.seal_failed()
        finally:
            partition.sealing = False

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS if self.free_bytes >= self._min_free else 1.0)
            self._look_at_disk()
            for partition in self._partitions:
                # A commit may be under way in its thread: rolling is for the idle.
                if not partition.pending:
                    self._roll(partition)

    def _look_at_disk(self) -> None:
        try:
            self.free_bytes = shutil.disk_usage(self._folder).free
        except OSError as error:
            log.warning("%s: cannot tell the free space: %s", self._folder, error.strerror)
            return
        short = self.free_bytes < self._min_free
        if short != self._short:
            self._short = short
            log.log(
                logging.ERROR if short else logging.WARNING,
                "%s: %d bytes free, min_free_bytes is %d: %s",
                self._folder,
                self.free_bytes,
                self._min_free,
                "make room; senders are refused, and keep theirs" if short else "taken again",
            )


def _commit(writer: PartitionWriter, items: list[Item]) -> NotStoredError | SyncFailedError | None:
    try:
        writer.commit(items)
    except OSError as error:
        # ENOSPC and EDQUOT; everything else is no matter of space.
        full = error.errno in (28, 122)
        return NotStoredError(f"{writer.folder}: cannot be written: {error.strerror}", full=full)
    except SyncFailedError as error:
        return error
    return None
