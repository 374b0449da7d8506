"""The spool as the shipper keeps it: what waits, who has it, what is set aside or given up.

Nothing is deleted here but what every required receiver is done with, what a later full
batch supersedes when room is needed, and what a tombstone on disk stands for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from sams_ebpf import __version__, config, durable, pressure, rejected, spool, wire
from sams_ebpf.errors import SamsError, UsageError
from sams_ebpf.progress import Progress

log = logging.getLogger(__name__)

_BLOCK = rejected.BLOCK
# Why a tombstone: `size` and `age` are those of `pressure`; this one is for what was set
# aside and found no room there.
REJECTED = "rejected"
_RESERVE_BYTES = 64 << 10
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_TEMPORARY_AGE_S = 600
_AGE_CHECK_S = 60.0
_MAX_CHECKED_BYTES = 8 << 20


class BusyError(SamsError):
    """Another shipper works on this spool."""


class CorruptError(Exception):
    """A file of the spool that is not the batch its name says."""


class _Waiting(NamedTuple):
    entry: spool.Entry
    bytes: int
    # Age when it was first seen, the moment of that on a clock that nobody sets, and when it
    # was written.
    age_s: float
    seen_s: float
    mtime_s: float

    def age_now_s(self, wall_s: float, now_s: float) -> float:
        """Age by the kinder clock: the wall's may have jumped since, or been wrong then."""
        return min(self.age_s + now_s - self.seen_s, max(0.0, wall_s - self.mtime_s))


class _Reader(NamedTuple):
    required: bool
    offer: Callable[[str], None]
    away: Callable[[], bool]


class Outbox:
    """All methods may be called by any thread.

    lock: guards everything here and in the couriers that are registered.
    """

    def __init__(self, settings: config.Spool, site: config.Site) -> None:
        """Take the spool for this process. Raises UsageError or BusyError."""
        self.folder = settings.folder
        self.lock = threading.RLock()
        self.rejected = 0
        self._settings = settings
        self._site = site
        self._waiting: dict[str, _Waiting] = {}
        self._bytes = 0
        self._looked_s = float("-inf")
        self._readers: dict[str, _Reader] = {}
        self._settled: dict[str, set[str]] = {}
        self._progress: dict[str, Progress] = {}
        self._unreadable: set[str] = set()
        self._said: set[str] = set()
        self._writer = os.urandom(8)
        self._sequence = 0
        self._own = settings.folder / "shipper"
        self._rejected_folder = settings.folder / rejected.FOLDER
        try:
            for folder in (self._own, self._rejected_folder):
                folder.mkdir(mode=0o750, exist_ok=True)
            self._lock_fd = os.open(
                self._own / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o640
            )
        except OSError as error:
            raise UsageError(
                f"spool.folder: {error.filename}: {error.strerror}: "
                "the folder has to exist and be writable by the shipper"
            ) from error
        if not os.access(settings.folder, os.W_OK | os.X_OK):
            # Sent without end: what was acknowledged could not be deleted.
            os.close(self._lock_fd)
            raise UsageError(
                f"spool.folder: {settings.folder}: user {os.geteuid()} cannot write to it:"
                " it has to belong to the shipper's group, mode 2770"
            )
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_fd)
            raise BusyError(f"{self.folder}: another shipper is at work here") from None
        self._keep_reserve()

    def register(
        self,
        name: str,
        *,
        required: bool,
        offer: Callable[[str], None],
        away: Callable[[], bool],
    ) -> None:
        """Add a receiver before the first `scan`.

        offer: called with each name that waits. away: whether nobody has to wait for it now.
        """
        self._readers[name] = _Reader(required, offer, away)

    def scan(self) -> None:
        """Look through the whole folder."""
        with self.lock:
            present = set()
            moment, now = time.time(), _clock()
            found = []
            with os.scandir(self.folder) as files:
                for file in files:
                    present.add(file.name)
                    if file.name not in self._waiting:
                        with contextlib.suppress(FileNotFoundError):
                            found.append((file.stat(follow_symlinks=False), file.name))
            for name in set(self._waiting) - present:
                self._gone(name)
            self._unreadable.clear()
            for status, name in sorted(found, key=lambda pair: (pair[0].st_mtime, pair[1])):
                self._take(name, status, moment, now)
            if not self._progress:
                self._load_progress()
            for name in list(self._waiting):
                for reader_name, reader in self._readers.items():
                    if not self._has(reader_name, name):
                        reader.offer(name)
                self._delete_if_done(name)

    def arrived(self, names: Iterable[str]) -> None:
        """Take up files that came in since the scan."""
        with self.lock:
            moment, now = time.time(), _clock()
            for name in sorted(names):
                if name in self._waiting:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = (self.folder / name).stat(follow_symlinks=False)
                    if self._take(name, status, moment, now):
                        for reader in self._readers.values():
                            reader.offer(name)

    def waits_for(self, reader: str, name: str) -> bool:
        """Tell whether a receiver still has to get this batch."""
        with self.lock:
            return (
                name in self._waiting
                and name not in self._unreadable
                and not self._has(reader, name)
            )

    def count(self) -> tuple[int, int]:
        """Batches that wait, and the bytes of disk they take."""
        with self.lock:
            return len(self._waiting), self._bytes

    def read(self, name: str) -> bytes | None:
        """Give the bytes of a batch, checked; None if there is nothing to send.

        What is corrupt is set aside on the way.
        """
        try:
            return self._load(name)
        except FileNotFoundError:
            with self.lock:
                self._gone(name)
        except CorruptError as error:
            self._set_aside_file(name, str(error))
        except OSError as error:
            with self.lock:
                self._unreadable.add(name)
                self._say(f"{self.folder / name}: cannot be read, left alone: {error.strerror}")
        return None

    def settle(self, reader: str, name: str) -> None:
        """A receiver has this batch, durably; it goes when all have."""
        with self.lock:
            if name not in self._waiting:
                return
            self._settled.setdefault(name, set()).add(reader)
            if not self._delete_if_done(name) and reader in self._progress:
                try:
                    self._progress[reader].add(name)
                except OSError as error:
                    self._say(f"progress of {reader} is kept in memory only: {error.strerror}")

    def refuse(self, reader: str, name: str, data: bytes, reason: str) -> bool:
        """Set a copy aside that a receiver refused for good; False if that cannot be done."""
        target = self._rejected_folder / f"{name.removesuffix('.msgpack')}.{reader}.msgpack"
        try:
            durable.write(target, data)
        except OSError as error:
            self._say(f"{target}: cannot be set aside, kept in the spool: {error.strerror}")
            return False
        rejected.put_reason(target, reader, reason)
        self.rejected += 1
        log.warning("receiver %s refused %s, set aside: %s", reader, name, reason)
        self.settle(reader, name)
        self._trim_rejected()
        return True

    def sweep(self) -> None:
        """Delete what waited only for receivers that are not required and now fail."""
        with self.lock:
            for name in list(self._waiting):
                self._delete_if_done(name)

    def keep_bounds(self, *, by_age: bool = True) -> None:
        """Give up what does not fit, as `pressure.plan` says; leave a tombstone for losses.

        by_age: whether the clock can be believed, for the bound on age.
        """
        with self.lock:
            now = _clock()
            shortage = self._shortage()
            within = self._bytes <= self._settings.max_bytes and shortage == 0
            if within and now - self._looked_s < _AGE_CHECK_S:
                return
            self._looked_s = now
            wall = time.time()
            items = [
                pressure.Item(item.entry, item.bytes, item.age_now_s(wall, now))
                for item in self._waiting.values()
            ]
            plan = pressure.plan(
                items,
                max_bytes=self._settings.max_bytes,
                max_age_s=self._settings.max_age_s if by_age else math.inf,
                shortage=shortage,
                holds_all=self._holds_all,
            )
            for entry in plan.superseded:
                self._delete(entry.name)
            if plan.superseded:
                log.info("%d superseded batches deleted to make room", len(plan.superseded))
            for loss in plan.lost:
                self._lose(loss)
            for entry in plan.forgotten:
                self._delete(entry.name)
            if plan.forgotten:
                log.error("no room for %d tombstones: forgotten", len(plan.forgotten))

    def finish_losses(self) -> None:
        """Delete what a tombstone of an interrupted shipper already stands for."""
        with self.lock:
            for tombstone in [n for n, w in self._waiting.items() if w.entry.kind == "tombstone"]:
                data = self.read(tombstone)
                dropped = wire.decode_header(data).dropped if data is not None else None
                if data is None or dropped is None or dropped.reason == REJECTED:
                    continue  # of a batch set aside, another receiver may still get the original
                epoch = self._waiting[tombstone].entry.identity.epoch
                for name, waiting in list(self._waiting.items()):
                    one = waiting.entry.identity
                    if (
                        (one.epoch, one.generation, one.writer)
                        == (epoch, dropped.generation, dropped.writer)
                        and dropped.first_sequence <= one.sequence <= dropped.last_sequence
                        and waiting.entry.kind != "tombstone"
                    ):
                        self._delete(name)

    def clean(self) -> None:
        """Remove temporary files whose writers were killed."""
        for folder in (self.folder, self._rejected_folder, self._own):
            with os.scandir(folder) as files:
                for file in files:
                    match = _TEMPORARY.fullmatch(file.name)
                    if match is None or _alive(int(match[1])):
                        continue
                    with contextlib.suppress(OSError):
                        written_s = file.stat(follow_symlinks=False).st_mtime
                        if time.time() - written_s > _TEMPORARY_AGE_S:
                            Path(file.path).unlink()

    def close(self) -> None:
        """Give the spool back."""
        with self.lock:
            for progress in self._progress.values():
                progress.close()
            os.close(self._lock_fd)

    # Everything below is called with the lock held, or touches no shared state.

    def _take(self, name: str, status: os.stat_result, moment: float, now: float) -> bool:
        if name.startswith("."):
            return False
        if not stat.S_ISREG(status.st_mode):
            if name not in (rejected.FOLDER, self._own.name):
                self._say(f"{self.folder / name}: not a file, left alone")
            return False
        if not name.endswith(".msgpack"):
            self._say(f"{self.folder / name}: not a batch, left alone")
            return False
        entry = spool.parse(name)
        if entry is None or entry.name != name:
            self._set_aside_file(name, "its name is not that of a batch")
            return False
        size = -(-status.st_size // _BLOCK) * _BLOCK
        self._bytes += size
        age_s = max(0.0, moment - status.st_mtime)
        self._waiting[name] = _Waiting(entry, size, age_s, now, status.st_mtime)
        return True

    def _load_progress(self) -> None:
        """With one receiver a batch that it has is deleted at once: nothing to remember."""
        if len(self._readers) < 2:
            return
        for name in self._readers:
            progress = self._progress[name] = Progress(self._own / f"{name}.done")
            try:
                progress.load(self._waiting)
            except OSError as error:
                self._say(f"progress of {name} cannot be kept: {error.strerror}")
        for file in self._own.glob("*.done"):
            if file.stem not in self._readers:
                file.unlink(missing_ok=True)

    def _has(self, reader: str, name: str) -> bool:
        progress = self._progress.get(reader)
        return reader in self._settled.get(name, ()) or (progress is not None and name in progress)

    def _delete_if_done(self, name: str) -> bool:
        """Delete what all required readers have, and the others have or cannot get."""
        if not any(reader.required for reader in self._readers.values()):
            return False
        for reader_name, reader in self._readers.items():
            if not self._has(reader_name, name) and (reader.required or not reader.away()):
                return False
        self._delete(name)
        return True

    def _delete(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._say(f"{self.folder / name}: cannot be deleted: {error.strerror}")
            return
        self._gone(name)

    def _gone(self, name: str) -> None:
        waiting = self._waiting.pop(name, None)
        if waiting is not None:
            self._bytes -= waiting.bytes
        self._settled.pop(name, None)
        self._unreadable.discard(name)
        for reader, progress in self._progress.items():
            try:
                progress.forget(name)
            except OSError as error:
                self._say(f"progress of {reader} cannot be kept: {error.strerror}")

    def _load(self, name: str) -> bytes:
        fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as file:
            data = file.read(wire.MAX_BYTES + 1)
        try:
            # The records are skipped over: a receiver checks them, and a shipper that had
            # to hold a million of them would need more memory than its unit gives it.
            entry = spool.entry_of(wire.decode_header(data))
        except wire.WireError as error:
            raise CorruptError(str(error)) from error
        if entry.name != name:
            raise CorruptError(f"it holds another batch: {entry.name}")
        return data

    def _holds_all(self, entry: spool.Entry) -> bool:
        """Whether it is whole and full; what is too large to be looked at is taken not to be."""
        if self._waiting[entry.name].bytes > _MAX_CHECKED_BYTES:
            return False
        try:
            return wire.decode(self._load(entry.name)).full
        except (OSError, CorruptError, wire.WireError):
            return False

    def _set_aside_file(self, name: str, reason: str) -> None:
        target = self._rejected_folder / name
        try:
            (self.folder / name).rename(target)
        except OSError as error:
            with self.lock:
                self._unreadable.add(name)
            self._say(f"{self.folder / name}: cannot be set aside: {error.strerror}")
            return
        rejected.put_reason(target, None, reason)
        self.rejected += 1
        log.warning("%s: set aside: %s", name, reason)
        with self.lock:
            self._gone(name)
        self._trim_rejected()

    def _trim_rejected(self) -> None:
        """Keep the bound of `rejected/`; what goes is told by tombstones first."""
        with self.lock:
            try:
                gone = rejected.over(self._rejected_folder, self._settings.rejected_max_bytes)
                for run in rejected.runs(gone):
                    self._tell_rejected(run)
                if gone:
                    rejected.remove(gone, self._own / rejected.TALLY)
            except OSError as error:
                self._say(f"{self._rejected_folder}: cannot be trimmed: {error.strerror}")

    def _tell_rejected(self, run: list[rejected.Kept]) -> None:
        entries = [one.entry for one in run if one.entry is not None]
        size = sum(one.bytes for one in run)
        claims = None
        for one in (run[-1], run[0]):
            with contextlib.suppress(OSError, wire.WireError):
                if one.batch is not None and one.bytes <= wire.MAX_BYTES:
                    claims = wire.decode_header(one.batch.read_bytes()).claims
                    break
        tombstone = self._put(self._tombstone(entries, size, REJECTED, claims or self._mine()))
        self.arrived([tombstone.name])

    def _shortage(self) -> int:
        disk = os.statvfs(self.folder)
        wanted = min(self._settings.keep_free_bytes, disk.f_blocks * disk.f_frsize // 10)
        return max(0, wanted - disk.f_bavail * disk.f_frsize)

    def _lose(self, loss: pressure.Loss) -> None:
        first = loss.items[0].entry.identity
        size = sum(item.bytes for item in loss.items)
        entries = [item.entry for item in loss.items]
        batch = self._tombstone(entries, size, loss.reason, self._claims(loss.items))
        try:
            tombstone = self._put(batch)
        except OSError as error:
            self._say(
                f"{self.folder}: no tombstone can be written, nothing dropped: {error.strerror}"
            )
            return
        log.warning(
            "%d batches of epoch %s given up (%s), a tombstone tells",
            len(loss.items),
            first.epoch.hex(),
            loss.reason,
        )
        for item in loss.items:
            self._delete(item.entry.name)
        self._keep_reserve()
        self.arrived([tombstone.name])

    def _tombstone(
        self, entries: list[spool.Entry], size: int, reason: str, claims: wire.Claims
    ) -> wire.Batch:
        """Make a tombstone for batches of one writer, in order; size in bytes of disk."""
        first, last = entries[0].identity, entries[-1].identity
        # A number is used up even when the writing fails: it may have reached the disk.
        sequence = self._sequence
        self._sequence += 1
        return wire.Batch(
            v=wire.VERSION,
            kind="tombstone",
            epoch=first.epoch,
            generation=first.generation,
            writer=self._writer,
            sequence=sequence,
            claims=claims,
            software=f"sams-ebpf {__version__}",
            end_ns=time.time_ns(),
            dropped=wire.Dropped(
                generation=first.generation,
                writer=first.writer,
                first_sequence=first.sequence,
                last_sequence=last.sequence,
                batches=len(entries),
                bytes=size,
                reason=reason,
            ),
        )

    def _put(self, tombstone: wire.Batch) -> Path:
        try:
            return spool.put(self.folder, tombstone)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        (self._own / "reserve").unlink(missing_ok=True)
        return spool.put(self.folder, tombstone)

    def _keep_reserve(self) -> None:
        """Hold some room, so that a tombstone can be written on a disk that is full."""
        path = self._own / "reserve"
        with contextlib.suppress(OSError):
            if path.exists():
                return
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            try:
                os.posix_fallocate(fd, 0, _RESERVE_BYTES)
            finally:
                os.close(fd)

    def _claims(self, items: list[pressure.Item]) -> wire.Claims:
        """What the lost batches themselves claimed; else what this node is."""
        for item in (items[-1], items[0]):
            with contextlib.suppress(OSError, CorruptError):
                return wire.decode_header(self._load(item.entry.name)).claims
        return self._mine()

    def _mine(self) -> wire.Claims:
        return wire.Claims(cluster=self._site.cluster, node=self._site.node_name())

    def _say(self, text: str) -> None:
        """Complain about a thing once."""
        if text not in self._said and len(self._said) < 1000:
            self._said.add(text)
            log.warning("%s", text)


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
