"""Reading an archive: segments, live or sealed, and the frames in them. Needs no lock.

A live segment is read up to what its writer has on disk (the mark beside it), so that
nobody builds on a frame that a power cut could still take away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

from sams_ebpf.errors import SamsError
from sams_receiver.archive import directory
from sams_receiver.archive import format as fmt
from sams_receiver.archive.directory import Directory

log = logging.getLogger(__name__)

MANIFEST: Final = "archive.json"
RAW: Final = ".raw"
SEALED: Final = ".seg"
MARK: Final = "committed"
MAX_SEGMENT: Final = 1 << 30

_NAME = re.compile(r"(\d{12})(\.raw|\.seg)")


class ArchiveError(SamsError):
    """An archive that is not there, is not one, or cannot be used as asked."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for an archive for ever. `archive` is its id, 32 hex digits."""

    format: int
    archive: str
    partitions: int

    @property
    def id(self) -> bytes:
        """16 bytes that stand in each segment of this archive."""
        return bytes.fromhex(self.archive)


class SegmentId(NamedTuple):
    """Partition and number; stays the same when the segment is sealed."""

    partition: int
    number: int

    def __str__(self) -> str:
        return f"{self.partition:04d}-{self.number:012d}"


class Problem(NamedTuple):
    """A damaged range of a segment, in bytes of its raw form, and what is wrong there."""

    segment: SegmentId
    offset: int
    length: int
    reason: str

    def __str__(self) -> str:
        return (
            f"segment {self.segment}: bytes {self.offset} to {self.offset + self.length}:"
            f" {self.reason}"
        )


OnDamage = Callable[[Problem], None]


def warn(problem: Problem) -> None:
    """Report damage to the log, where nobody asked for it."""
    log.warning("%s; passed over", problem)


class Segment:
    """One segment of an archive, to be read as often as wanted."""

    def __init__(self, folder: Path, segment_id: SegmentId, archive: bytes) -> None:
        self._folder = folder
        self._id = segment_id
        self._archive = archive
        self._index: fmt.Index | None = None
        self._index_at = 0

    @property
    def id(self) -> SegmentId:
        """Stable name; `str(id)` is what people and states use."""
        return self._id

    @property
    def partition(self) -> int:
        """Which partition it belongs to."""
        return self._id.partition

    @property
    def number(self) -> int:
        """Place in its partition: higher is later."""
        return self._id.number

    @property
    def raw_path(self) -> Path:
        """Where it stands while it is live."""
        return self._folder / f"{self._id.number:012d}{RAW}"

    @property
    def sealed_path(self) -> Path:
        """Where it stands once it is sealed."""
        return self._folder / f"{self._id.number:012d}{SEALED}"

    @property
    def sealed(self) -> bool:
        """Whether nothing will be added to it any more."""
        return self.sealed_path.exists()

    def stored_bytes(self) -> int:
        """Size of its file on disk."""
        for path in (self.sealed_path, self.raw_path):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        raise ArchiveError(f"segment {self._id}: is not there any more")

    def end(self) -> int:
        """Offset at which there is nothing to read yet (bytes of the raw form)."""
        if self.sealed:
            return self.index().raw_length
        try:
            size = self.raw_path.stat().st_size
        except FileNotFoundError:
            return self.index().raw_length
        return self._durable(size)

    def index(self) -> fmt.Index:
        """Index of a sealed segment. Raises fmt.FormatError if it is damaged."""
        if self._index is None:
            with self._open(self.sealed_path) as file:
                size = file.seek(0, os.SEEK_END)
                found = fmt.skippable_before(_of(file), size, fmt.INDEX_MAGIC)
            if found is None:
                raise fmt.FormatError("sealed segment does not end in an index")
            self._index_at, packed = found
            self._index = fmt.Index(packed)
        return self._index

    def directory(self, decompress: fmt.Decompress = fmt.decompress) -> Directory | None:
        """Directory of a sealed segment; None if it has none that can be used."""
        try:
            found = self._packed_directory()
            return None if found is None else Directory(found[1], self.index().frames, decompress)
        except fmt.FormatError as error:
            log.warning("segment %s: %s; read without it", self._id, error)
            return None

    def check_ending(self) -> None:
        """Look at what stands behind the blocks of a sealed segment, which readers can do without.

        Raises fmt.FormatError if it is damaged.
        """
        index = self.index()
        found = self._packed_directory()
        if found is not None:
            Directory(found[1], index.frames)
        end = sum(block.length for block in index.blocks)
        if end != (self._index_at if found is None else found[0]):
            raise fmt.FormatError("directory cannot be found")

    def _packed_directory(self) -> tuple[int, bytes] | None:
        """Where the directory begins, and its bytes. Raises fmt.FormatError."""
        self.index()
        with self._open(self.sealed_path) as file:
            return fmt.skippable_before(_of(file), self._index_at, directory.MAGIC)

    def frames(self, from_offset: int = 0, on_damage: OnDamage = warn) -> Iterator[fmt.Frame]:
        """Frames that start at or after from_offset; a damaged range is reported and passed.

        A live segment gives what is on disk by now; go on later from the last `end`.
        Raises ArchiveError for a segment that is not of this archive or is gone.
        """
        for item in self.items(from_offset):
            if isinstance(item, fmt.Frame):
                yield item
            else:
                on_damage(Problem(self._id, item.offset, item.length, "no valid frame"))

    def items(self, from_offset: int = 0) -> Iterator[fmt.Frame | fmt.Damage]:
        """Frames and the damaged ranges between them."""
        if not self.sealed:
            try:
                raw = self.raw_path.open("rb")
            except FileNotFoundError:
                pass  # It was sealed at this moment.
            else:
                with raw:
                    yield from self._raw_items(raw.fileno(), from_offset)
                return
        yield from self._sealed_items(from_offset)

    def raw_bytes(self) -> Iterator[bytes]:
        """Parts of the raw form of a sealed segment, as the read-back compares them."""
        index = self.index()
        with self._open(self.sealed_path) as file:
            for block in index.blocks:
                file.seek(block.offset)
                yield fmt.decompress(file.read(block.length), block.raw_length)

    def contents(self, decompress: fmt.Decompress = fmt.decompress) -> Directory | None:
        """Directory of a sealed segment of which each block can be read alone, with `block`.

        None for a segment that is live, was damaged when it was sealed, or has no
        directory: read its frames. Raises ArchiveError for one that is not of this archive.
        """
        found = self.directory(decompress) if self.sealed else None
        if found is None or not found.covers(self.index().raw_length):
            return None
        try:
            self._check(self.block(0, decompress)[: fmt.DATA_START])
        except fmt.FormatError:
            return None
        return found

    def block(self, number: int, decompress: fmt.Decompress = fmt.decompress) -> bytes:
        """One block of the raw form, its frames as they were. Raises fmt.FormatError.

        It has been compared with its checksum, so those of its frames need not be.
        """
        if not self.index().blocks:
            raise fmt.FormatError("segment without blocks")
        block = self.index().blocks[number]
        with self._open(self.sealed_path) as file:
            packed = os.pread(file.fileno(), block.length, block.offset)
        if not fmt.self_checking(packed):
            raise fmt.FormatError("block without a checksum")
        data = decompress(packed, block.raw_length)
        if len(data) != block.raw_length:
            raise fmt.FormatError("block is shorter than its index says")
        return data

    def _raw_items(self, fd: int, from_offset: int) -> Iterator[fmt.Frame | fmt.Damage]:
        size = os.fstat(fd).st_size
        end = self._durable(size)
        header = self._check(os.pread(fd, fmt.DATA_START, 0))
        start = max(from_offset, fmt.DATA_START)
        for item in fmt.scan(lambda at, n: os.pread(fd, n, at), start, end, header.marker):
            if isinstance(item, fmt.Damage) and item.tail and self._mark() is None:
                return  # A frame that is being written looks like this.
            yield item

    def _sealed_items(self, from_offset: int) -> Iterator[fmt.Frame | fmt.Damage]:
        try:
            index = self.index()
        except fmt.FormatError as error:
            log.warning("segment %s: %s; read without it", self._id, error)
            yield from self._unindexed_items(from_offset)
            return
        with self._open(self.sealed_path) as file:
            marker: bytes | None = None
            for block in index.blocks:
                if marker is not None and block.raw_offset + block.raw_length <= from_offset:
                    continue
                file.seek(block.offset)
                packed = file.read(block.length)
                try:
                    data, problem = fmt.decompress(packed, block.raw_length), None
                except fmt.FormatError:
                    data, problem = fmt.salvage(packed, block.raw_length)
                if marker is None:
                    marker = self._marker(data)
                if len(data) < block.raw_length:
                    log.warning("segment %s: block at %d: %s", self._id, block.offset, problem)
                    data += bytes(block.raw_length - len(data))
                begin = max(from_offset, block.raw_offset, fmt.DATA_START)
                end = block.raw_offset + block.raw_length
                yield from fmt.scan(_within(data, block.raw_offset), begin, end, marker)

    def _marker(self, data: bytes) -> bytes:
        """Marker of a sealed segment by its first block, or, if that is damaged, by another."""
        try:
            fmt.parse_segment_header(data)
        except fmt.FormatError as error:
            for number in range(1, len(self.index().blocks)):
                with contextlib.suppress(fmt.FormatError):
                    # A block starts with a frame, and a frame with the marker.
                    block = self.block(number)
                    found = block[: fmt.MARKER_BYTES]
                    if fmt.needs(block, 0, found):
                        log.warning("segment %s: %s; read without it", self._id, error)
                        return found
        return self._check(data).marker

    def _unindexed_items(self, from_offset: int) -> Iterator[fmt.Frame | fmt.Damage]:
        with self._open(self.sealed_path) as file:
            packed = file.read(MAX_SEGMENT)
        data = bytearray()
        problem: fmt.FormatError | None = None
        try:
            for part in fmt.walk(packed, MAX_SEGMENT):
                data += part
        except fmt.FormatError as error:
            problem = error
        header = self._check(data[: fmt.DATA_START])
        begin = max(from_offset, fmt.DATA_START)
        whole = bytes(data)
        yield from fmt.scan(_within(whole, 0), begin, len(whole), header.marker)
        if problem is not None:
            # Nothing tells any more how much there was.
            log.warning("segment %s: %s; what came after is lost", self._id, problem)
            yield fmt.Damage(len(whole), 0, tail=True)

    def _check(self, data: bytes | bytearray) -> fmt.SegmentHeader:
        try:
            header = fmt.parse_segment_header(data)
        except fmt.FormatError as error:
            raise ArchiveError(f"segment {self._id}: {error}") from error
        if (header.archive, header.partition, header.number) != (self._archive, *self._id):
            raise ArchiveError(f"segment {self._id}: belongs elsewhere, by its header")
        return header

    def _durable(self, size: int) -> int:
        mark = self._mark()
        if mark is None or mark[0] > self._id.number:
            return size
        return min(size, mark[1]) if mark[0] == self._id.number else 0

    def _mark(self) -> tuple[int, int] | None:
        return read_mark(self._folder)

    def _open(self, path: Path) -> BinaryIO:
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise ArchiveError(f"segment {self._id}: is not there any more") from error


class Archive:
    """An archive as it is now; `segments()` looks again each time it is asked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Archive:
        """Read the manifest. Raises ArchiveError if there is none."""
        return cls(folder, read_manifest(folder))

    def segments(self) -> list[Segment]:
        """All segments by partition and number.

        Raises ArchiveError where a whole partition is not there: what is read without it
        would look complete.
        """
        found = []
        for partition, folder in self._partitions():
            if not folder.is_dir():
                raise ArchiveError(f"{folder}: is not there: restore it, or mount its disk")
            found += [
                Segment(folder, SegmentId(partition, number), self.manifest.id)
                for number in numbers(folder)
            ]
        return found

    def segment(self, partition: int, number: int) -> Segment:
        """One segment by its id; reading it fails if it is not there."""
        folder = partition_folder(self.folder, partition)
        return Segment(folder, SegmentId(partition, number), self.manifest.id)

    def _partitions(self) -> Iterator[tuple[int, Path]]:
        for partition in range(self.manifest.partitions):
            yield partition, partition_folder(self.folder, partition)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in folder. Raises ArchiveError."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        if len(manifest.id) != 16 or not 0 < manifest.partitions <= 4096:
            raise ArchiveError(f"{path}: not a manifest")
    except FileNotFoundError as error:
        raise ArchiveError(f"{folder}: no archive here (no {MANIFEST})") from error
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ArchiveError(f"{path}: not a manifest: {error}") from error
    if manifest.format != fmt.FORMAT:
        raise ArchiveError(f"{path}: format {manifest.format}; this program reads {fmt.FORMAT}")
    return manifest


def partition_folder(folder: Path, partition: int) -> Path:
    """Where the segments of a partition are."""
    return folder / f"p{partition:04d}"


def numbers(folder: Path) -> list[int]:
    """Numbers of the segments in a partition's folder, lowest first. Raises ArchiveError."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be read: {error.strerror}") from error
    return sorted({int(match[1]) for match in map(_NAME.fullmatch, names) if match})


def read_mark(folder: Path) -> tuple[int, int] | None:
    """Segment number and length that are known to be on disk; None if not told.

    Raises ArchiveError.
    """
    try:
        data = (folder / MARK).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArchiveError(f"{folder / MARK}: cannot be read: {error.strerror}") from error
    return fmt.parse_mark(data)


def _of(file: BinaryIO) -> fmt.Read:
    return lambda at, length: os.pread(file.fileno(), length, at)


def _within(data: bytes, base: int) -> Callable[[int, int], bytes]:
    return lambda at, length: data[at - base : at - base + length]
