"""The archive: what was received, as it was received, for as long as the site keeps it.

Append-only segments of checksummed frames, partitioned by node, sealed into zstd frames
with an index. The format is described in `docs/archive.md`. Nothing here knows of HTTP.

Reading:

    for segment in Archive.open(folder).segments():
        for frame in segment.frames(from_offset=0):
            ...  # frame.kind, frame.data; go on later from frame.end

Writing, one process at a time:

    with Appender.open(folder) as appender:
        appender.append([Item(Kind.SACCT, data)])  # on disk when it returns
        appender.seal()
"""

from __future__ import annotations

from sams_receiver.archive.directory import Directory
from sams_receiver.archive.format import (
    Damage,
    Flag,
    FormatError,
    Frame,
    Kind,
    UpstreamJson,
    partition_of,
    unpack_upstream,
)
from sams_receiver.archive.reader import Archive, ArchiveError, Problem, Segment, SegmentId
from sams_receiver.archive.writer import Appender, Item, Limits, SyncFailedError

__all__ = [
    "Appender",
    "Archive",
    "ArchiveError",
    "Damage",
    "Directory",
    "Flag",
    "FormatError",
    "Frame",
    "Item",
    "Kind",
    "Limits",
    "Problem",
    "Segment",
    "SegmentId",
    "SyncFailedError",
    "UpstreamJson",
    "partition_of",
    "unpack_upstream",
]
