"""The aggregator's own archive: what cannot be had again and no node has sent.

Rows of sacct as they were read, versions of the rules, what was sent. Any command may have
something to keep; they take turns.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sams_receiver.archive import Appender, Archive, ArchiveError, Frame, Item, Kind

FOLDER: Final = "archive"
_LOCK: Final = "archive.lock"


def append(data: Path, items: Iterable[Item]) -> None:
    """Keep items in the archive below `data`: on disk when it returns. Raises SamsError."""
    try:
        data.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock = os.open(data / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ArchiveError(f"{data}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Appender.open(data / FOLDER, partitions=1) as appender:
            for item in items:
                appender.append([item])
            appender.seal()
    except OSError as error:
        raise ArchiveError(f"{data / FOLDER}: cannot be written: {error.strerror}") from error
    finally:
        os.close(lock)


def frames(data: Path, kind: Kind) -> Iterator[Frame]:
    """All that was kept of a kind, oldest first; nothing where there is no archive yet."""
    if not (data / FOLDER).exists():
        return
    for segment in Archive.open(data / FOLDER).segments():
        yield from (frame for frame in segment.frames() if frame.kind == kind)
