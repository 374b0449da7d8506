"""Sealing: a closed raw segment becomes zstd frames with an index, read back and compared."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from sams_ebpf import durable
from sams_receiver.archive import format as fmt
from sams_receiver.archive.directory import DirectoryBuilder
from sams_receiver.archive.reader import ArchiveError, Segment

_COMPARE = 1 << 20


def seal(segment: Segment) -> None:
    """Write the sealed copy of a segment, read it back, compare, then unlink the raw one.

    Raises OSError or ArchiveError; then the raw segment stays as it was. Decompressed,
    the sealed file is the raw one byte for byte, damage included.
    """
    target = segment.sealed_path
    temporary = target.with_name(f".{target.name}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        try:
            _write(segment.raw_path, fd)
            os.fsync(fd)
            # What is compared next has to come from the disk, not from memory.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        _verify(segment, temporary)
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    durable.sync_folder(target.parent)
    segment.raw_path.unlink()


def _verify(segment: Segment, copy: Path) -> None:
    if not same_content(segment, sealed=copy):
        raise ArchiveError(f"{segment.raw_path}: sealed copy differs when read back")


def same_content(segment: Segment, sealed: Path | None = None) -> bool:
    """Whether the sealed file, read as every reader reads it, gives the raw one's bytes."""
    copy = _Copy(segment, sealed or segment.sealed_path)
    with segment.raw_path.open("rb") as raw:
        try:
            for part in copy.raw_bytes():
                if raw.read(len(part)) != part:
                    return False
        except fmt.FormatError:
            return False
        return raw.read(1) == b""


class _Copy(Segment):
    """A sealed segment under a name of its own."""

    def __init__(self, segment: Segment, path: Path) -> None:
        super().__init__(path.parent, segment.id, b"")
        self._path = path

    @property
    def sealed_path(self) -> Path:
        return self._path


def _write(raw_path: Path, out: int) -> None:
    with raw_path.open("rb") as raw:
        fd = raw.fileno()
        size = os.fstat(fd).st_size
        header = fmt.parse_segment_header(raw.read(fmt.DATA_START))
        builder = fmt.IndexBuilder()
        directory = DirectoryBuilder()

        def read(at: int, length: int) -> bytes:
            return os.pread(fd, length, at)

        def counted() -> Iterator[fmt.Frame | fmt.Damage]:
            for item in fmt.scan(read, fmt.DATA_START, size, header.marker):
                if isinstance(item, fmt.Frame):
                    tag, outline = fmt.describe(item)
                    builder.add(item, tag)
                    directory.add_frame(item, outline, b"" if tag is None else tag.digest)
                yield item

        offset = 0
        # The header is a block of its own: what hits a frame does not hit the header as well.
        blocks = fmt.join_blocks(counted(), fmt.DATA_START)
        for begin, end in itertools.chain([(0, fmt.DATA_START)], blocks):
            packed = fmt.compress(_parts(read, begin, end))
            durable.write_all(out, packed)
            builder.blocks.append(fmt.Block(begin, offset, end - begin, len(packed)))
            offset += len(packed)
        durable.write_all(out, directory.pack() + builder.pack(size))


def _parts(read: fmt.Read, begin: int, end: int) -> list[bytes]:
    return [read(at, min(_COMPARE, end - at)) for at in range(begin, end, _COMPARE)]
