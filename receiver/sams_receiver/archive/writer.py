"""Writing an archive: group commit, rolling, recovery. One writing process at a time.

Nothing here knows of HTTP. `Appender.commit` returns when its frames are on disk.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from sams_ebpf import durable
from sams_ebpf.errors import SamsError
from sams_receiver.archive import format as fmt
from sams_receiver.archive import reader
from sams_receiver.archive.aside import Aside
from sams_receiver.archive.reader import ArchiveError, SegmentId
from sams_receiver.archive.seal import same_content, seal

log = logging.getLogger(__name__)

LOCK: Final = "lock"
# With these the file or the disk is gone: trying again would not bring it back.
_GONE: Final = frozenset(
    {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EUCLEAN, errno.EBADF}
)


class SyncFailedError(SamsError):
    """The disk did not confirm a write: what is on it is not known. Stop, look, restart."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When a live segment is closed: by bytes, by frames, by age in seconds."""

    segment_bytes: int = 64 << 20
    segment_frames: int = 32_768
    segment_seconds: int = 3_600


class Item(NamedTuple):
    """One payload to be appended."""

    kind: int
    data: bytes
    flags: int = 0
    received_ns: int = 0


class PartitionWriter:
    """The one live segment of a partition. Not thread-safe: one commit at a time.

    to_seal: numbers of the segments that are closed and wait to be sealed.
    """

    def __init__(
        self, folder: Path, partition: int, archive: bytes, limits: Limits, aside: Aside
    ) -> None:
        self.folder = folder
        self.partition = partition
        self.to_seal: list[int] = []
        self.failed = False
        self._archive = archive
        self._limits = limits
        self._aside = aside
        self._fd = -1
        self._mark_fd = -1
        self._number = 0
        self._length = 0
        self._frames = 0
        self._marker = b""
        self._created = 0.0
        self._dirty = False

    @property
    def number(self) -> int | None:
        """Number of the live segment, None if there is none."""
        return self._number if self._fd >= 0 else None

    def open(self) -> None:
        """Recover what an earlier life left. Raises OSError or ArchiveError."""
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o750)
            durable.sync_folder(self.folder.parent)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        mark = reader.read_mark(self.folder)
        found = reader.numbers(self.folder)
        self._number = max([*found, mark[0] if mark else 0], default=0)
        raws = [number for number in found if self._recover(number, mark)]
        self._mark_fd = os.open(
            self.folder / reader.MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640
        )
        self.to_seal = raws
        if raws and raws[-1] == self._number:
            self._resume(raws[-1])

    def commit(self, items: Sequence[Item]) -> list[int]:
        """Append all items and return when they are on disk: the offset of each.

        Raises OSError with nothing of them kept (full, read-only: try again later), and
        SyncFailedError when the disk is gone or does not confirm; after that nothing is taken.
        """
        if self.failed:
            raise SyncFailedError(f"{self.folder}: an earlier sync failed; nothing is written")
        try:
            packed = self._write(items)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.failed = True
            raise SyncFailedError(
                f"{self.folder}: write failed: {error.strerror}; nothing more is acknowledged"
            ) from error
        try:
            os.fdatasync(self._fd)
            removed = os.fstat(self._fd).st_nlink == 0
        except OSError as error:
            self.failed = True
            raise SyncFailedError(
                f"{self._path()}: fdatasync failed: {error.strerror}; nothing more is acknowledged"
            ) from error
        if removed:
            # On the disk, but without a name: gone as soon as it is closed.
            self.failed = True
            raise SyncFailedError(
                f"{self._path()}: was removed while in use; nothing more is acknowledged"
            )
        offsets = []
        at = self._length
        for frame in packed:
            offsets.append(at)
            at += len(frame)
        self._length = at
        self._frames += len(items)
        self._set_mark()
        return offsets

    def _write(self, items: Sequence[Item]) -> list[bytes]:
        """Put the items behind what is there, or leave it as it was. Raises OSError."""
        if self._fd < 0:
            self._create()
        if self._dirty:
            os.ftruncate(self._fd, self._length)
            self._dirty = False
        now = time.time_ns()
        packed = [
            fmt.pack_frame(self._marker, kind, flags, received_ns or now, data)
            for kind, data, flags, received_ns in items
        ]
        try:
            _pwrite_all(self._fd, b"".join(packed), self._length)
        except OSError:
            self._undo()
            raise
        return packed

    def roll_if_due(self) -> None:
        """Close the live segment if it is big or old enough."""
        limits = self._limits
        if self._fd >= 0 and (
            self._length >= limits.segment_bytes
            or self._frames >= limits.segment_frames
            or time.time() - self._created >= limits.segment_seconds
        ):
            self.roll()

    def roll(self) -> None:
        """Close the live segment, if it holds anything, so that it can be sealed."""
        if self._fd >= 0 and self._frames and not self._dirty:
            os.close(self._fd)
            self._fd = -1
            self.to_seal.append(self._number)

    def close(self) -> None:
        """Let go of the files; nothing is lost by not calling it."""
        for fd in (self._fd, self._mark_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._mark_fd = -1

    def _create(self) -> None:
        number = self._number + 1
        header = fmt.SegmentHeader(
            self._archive, self.partition, number, time.time_ns(), fmt.new_marker()
        )
        path = self._segment(number).raw_path
        durable.write(path, fmt.pack_segment_header(header))
        self._use(path, header, fmt.DATA_START, 0)

    def _resume(self, number: int) -> None:
        path = self._segment(number).raw_path
        with path.open("rb") as file:
            header = fmt.parse_segment_header(file.read(fmt.DATA_START))
        frames = sum(1 for _ in self._segment(number).items())
        self.to_seal.remove(number)
        self._use(path, header, path.stat().st_size, frames)

    def _use(self, path: Path, header: fmt.SegmentHeader, length: int, frames: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._number = header.number
        self._marker = header.marker
        self._created = header.created_ns / 1e9
        self._length = length
        self._frames = frames
        self._dirty = False
        os.fdatasync(self._fd)
        self._set_mark()

    def _undo(self) -> None:
        self._dirty = True
        try:
            os.ftruncate(self._fd, self._length)
            self._dirty = False
        except OSError as error:
            log.error("%s: cannot be cut back yet: %s", self._path(), error.strerror)

    def _set_mark(self) -> None:
        # The mark is not synced: it only ever names what is on disk already.
        try:
            os.pwrite(self._mark_fd, fmt.pack_mark(self._number, self._length), 0)
        except OSError as error:
            log.warning("%s: readers lag: %s", self.folder / reader.MARK, error.strerror)

    def _recover(self, number: int, mark: tuple[int, int] | None) -> bool:
        """Make a segment of an earlier life good. True if it is still to be sealed."""
        segment = self._segment(number)
        if not segment.raw_path.exists():
            return False
        if segment.sealed_path.exists():
            return self._settle_copies(segment)
        path = segment.raw_path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                header = fmt.parse_segment_header(file.read(fmt.DATA_START))
            except fmt.FormatError as error:
                self._aside.take_file(path, f"segment {segment.id}: {error}")
                return False
            if (header.archive, header.partition, header.number) != (self._archive, *segment.id):
                raise ArchiveError(f"{path}: belongs elsewhere, by its header: move it there")
            durable_end = mark[1] if mark and mark[0] == number else 0
            cut = size
            for item in fmt.scan(
                lambda at, n: os.pread(file.fileno(), n, at), fmt.DATA_START, size, header.marker
            ):
                if isinstance(item, fmt.Frame):
                    continue
                begin, end = item.offset, item.offset + item.length
                if item.tail:
                    cut = max(begin, min(durable_end, size))
                    if cut == begin:
                        self._keep(segment.id, file.fileno(), begin, end, "torn tail, cut")
                        continue
                    end = cut
                self._keep(segment.id, file.fileno(), begin, end, "damaged, passed over")
        if cut < size:
            os.truncate(path, cut)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return True

    def _keep(self, segment: SegmentId, fd: int, begin: int, end: int, reason: str) -> None:
        problem = reader.Problem(segment, begin, end - begin, reason)
        log.error("%s", problem)
        self._aside.put(
            "damage",
            os.pread(fd, end - begin, begin),
            {"segment": str(segment), "offset": begin, "reason": reason},
            name=f"{segment}-{begin}",
        )

    def _settle_copies(self, segment: reader.Segment) -> bool:
        """Raw and sealed both stand: the sealed one stays only if it equals the raw one."""
        if same_content(segment):
            segment.raw_path.unlink()
            return False
        self._aside.take_file(segment.sealed_path, f"segment {segment.id}: differs from its source")
        return self._recover(segment.number, None)

    def _segment(self, number: int) -> reader.Segment:
        return reader.Segment(self.folder, SegmentId(self.partition, number), self._archive)

    def _path(self) -> Path:
        return self._segment(self._number).raw_path


class Appender:
    """The writing side of a whole archive, for one process at a time."""

    def __init__(self, archive: reader.Archive, writers: list[PartitionWriter], lock: int) -> None:
        self.archive = archive
        self.writers = writers
        self._lock = lock

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        partitions: int = 4,
        limits: Limits | None = None,
        aside_bytes: int = 1 << 30,
    ) -> Self:
        """Lock the archive in folder, make it if there is none, and recover it.

        partitions counts only for a new archive; they are fixed in its manifest.
        Raises ArchiveError.
        """
        try:
            # Not its parents: where a disk is not mounted, another one must not fill up.
            folder.mkdir(mode=0o750, exist_ok=True)
            lock = _lock(folder)
        except OSError as error:
            raise ArchiveError(f"{folder}: cannot be written: {error.strerror}") from error
        try:
            if not (folder / reader.MANIFEST).exists():
                if any(folder.glob("p[0-9][0-9][0-9][0-9]")):
                    raise ArchiveError(
                        f"{folder}: segments, but no {reader.MANIFEST}: restore it; with a new"
                        " one they could not be read any more"
                    )
                _make_manifest(folder, partitions)
                log.warning("%s: a new archive was made, there was none", folder)
            archive = reader.Archive.open(folder)
            aside = Aside(folder / "aside", aside_bytes)
            writers = [
                PartitionWriter(
                    reader.partition_folder(folder, number),
                    number,
                    archive.manifest.id,
                    limits or Limits(),
                    aside,
                )
                for number in range(archive.manifest.partitions)
            ]
            for writer in writers:
                writer.open()
        except OSError as error:
            os.close(lock)
            raise ArchiveError(f"{folder}: cannot be opened: {error}") from error
        except SamsError:
            os.close(lock)
            raise
        return cls(archive, writers, lock)

    def append(
        self, items: Sequence[Item], *, cluster: str | None = None, node: str | None = None
    ) -> None:
        """Append to the partition of cluster and node; on disk when this returns."""
        partitions = self.archive.manifest.partitions
        writer = self.writers[fmt.partition_of(cluster, node, partitions)]
        writer.commit(items)
        writer.roll_if_due()

    def seal(self, *, everything: bool = False) -> int:
        """Seal what is closed, with `everything` the live segments too; how many it were."""
        sealed = 0
        for writer in self.writers:
            if everything:
                writer.roll()
            while writer.to_seal:
                seal(self.archive.segment(writer.partition, writer.to_seal[0]))
                writer.to_seal.pop(0)
                sealed += 1
        return sealed

    def close(self) -> None:
        """Release the lock and the files."""
        for writer in self.writers:
            writer.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _make_manifest(folder: Path, partitions: int) -> None:
    if not 0 < partitions <= 4096:
        raise ArchiveError(f"{partitions} partitions: 1 to 4096 are possible")
    manifest = reader.Manifest(fmt.FORMAT, secrets.token_hex(16), partitions)
    durable.write(folder / reader.MANIFEST, msgspec.json.encode(manifest) + b"\n")


def _lock(folder: Path) -> int:
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ArchiveError(f"{folder}: another process writes to this archive") from None
    return fd


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
