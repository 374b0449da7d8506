"""Where facts come from: archives, folders of batches, folders of upstream's JSON.

A source is cut into units: a segment of an archive, or a group of files. A unit has a
name that stays, and an extent that grows while it is written: what was read up to the
same extent need not be read again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal, NamedTuple

from sams_aggregator import sams_facts
from sams_aggregator.batches import Picked, decompressed
from sams_aggregator.sams_json import Folders, Found
from sams_aggregator.work import KIND_COUNTERS, KIND_SAMS_JSON, Payload
from sams_ebpf.errors import SamsError, UsageError
from sams_receiver.archive import Archive, ArchiveError, Problem, Segment

log = logging.getLogger(__name__)

GROUP_BYTES: Final = 32 << 20
GROUP_FILES: Final = 5000
BATCH_FILES: Final = r"^.*\.msgpack$"
JSON_FILES: Final = r"^.*\.json$"

Kind = Literal["archive", "batches", "sams-json"]


class Source(NamedTuple):
    """One archive or folder."""

    kind: Kind
    path: Path


class SegmentRef(NamedTuple):
    """A segment that can be sent to another process or host, and read there."""

    unit: str
    archive: Path
    partition: int
    number: int
    extent: int


class Reading:
    """The payloads of one segment, up to the end of its last whole frame."""

    def __init__(self, ref: SegmentRef) -> None:
        self._ref = ref
        self.extent = 0
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Payload]:
        segment, name = self._segment()
        for frame in segment.frames(0, on_damage=self._damaged):
            self.extent = frame.end
            place = f"{name}, byte {frame.offset}"
            yield Payload(frame.kind, place, frame.data, frame.received_ns, frame.vouched)

    def picked(self) -> Picked | None:
        """The segment with its directory, if it has one: few of its frames need be read."""
        segment, name = self._segment()
        directory = segment.contents(decompressed)
        return None if directory is None else Picked(name, segment, directory)

    def _segment(self) -> tuple[Segment, str]:
        segment = Archive.open(self._ref.archive).segment(self._ref.partition, self._ref.number)
        return segment, f"{self._ref.archive}, segment {segment.id}"

    def _damaged(self, problem: Problem) -> None:
        self.problems.append(f"{self._ref.archive}, {problem}")


def segments(path: Path) -> list[SegmentRef]:
    """All segments of an archive with how far they reach now. Raises ArchiveError."""
    archive = Archive.open(path)
    refs = []
    for segment in archive.segments():
        unit = f"{archive.manifest.archive}:{segment.id}"
        refs.append(
            SegmentRef(unit, path.resolve(), segment.partition, segment.number, _end(segment))
        )
    return refs


def _end(segment: Segment) -> int:
    try:
        return segment.end()
    except (SamsError, OSError) as error:
        # Its index is damaged; the frames may still be read.
        log.warning("segment %s: %s", segment.id, error)
        return segment.stored_bytes()


class Group(NamedTuple):
    """Files of a folder that are read together."""

    unit: str
    files: tuple[Found, ...]
    kind: int

    def payloads(self, cluster: str | None) -> Iterator[Payload]:
        """What the files hold."""
        for found in self.files:
            data = found.data
            if self.kind == KIND_SAMS_JSON:
                data = sams_facts.frame_of(data, cluster)
            yield Payload(self.kind, str(found.name), data)


def folders(source: Source) -> Folders:
    """In-folder, archive and error folder below a source's path. Raises UsageError."""
    for name in ("in", "archive", "error"):
        folder = source.path / name
        if name == "in" and not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; it should hold the files to be read")
        folder.mkdir(exist_ok=True)
    pattern = JSON_FILES if source.kind == "sams-json" else BATCH_FILES
    return Folders(source.path / "in", source.path / "archive", source.path / "error", pattern)


def groups(source: Source, *, archived: bool = False) -> Iterator[Group]:
    """Files that wait in a folder, or those archived there, some at a time.

    Raises SamsError after all others if any could not be read.
    """
    pattern = JSON_FILES if source.kind == "sams-json" else BATCH_FILES
    here = (
        Folders(
            source.path / "archive",
            source.path,
            source.path,
            pattern + r"|" + pattern[:-1] + r"\.\d+$",
        )
        if archived
        else folders(source)
    )
    kind = KIND_SAMS_JSON if source.kind == "sams-json" else KIND_COUNTERS
    waiting: list[Found] = []
    size = 0
    unread = []
    for name in here.names():
        try:
            found = here.read(name)
        except OSError as error:
            unread.append(f"{name}: {error.strerror}")
            continue
        if found is None:
            continue
        waiting.append(found)
        size += len(found.data)
        if size >= GROUP_BYTES or len(waiting) >= GROUP_FILES:
            yield _group(waiting, kind)
            waiting, size = [], 0
    if waiting:
        yield _group(waiting, kind)
    if unread:
        raise SamsError(f"{source.path}: {len(unread)} files cannot be read, like {unread[0]}")


def _group(files: list[Found], kind: int) -> Group:
    digest = blake2b(digest_size=16)
    for found in sorted(files, key=lambda one: one.data):
        digest.update(blake2b(found.data, digest_size=16).digest())
    return Group(f"files:{kind}:{digest.hexdigest()}", tuple(files), kind)


__all__ = ["ArchiveError", "Group", "Reading", "SegmentRef", "Source", "groups", "segments"]
