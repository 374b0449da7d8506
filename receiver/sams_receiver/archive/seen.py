"""What a partition holds already: so that nothing that is sent twice is stored twice.

Per writer: the highest sequence, and for what lies below it the digests, of live
segments in memory and of sealed ones in their indexes. Which sealed segments a writer
is in, and from which sequence to which, is kept in a small database that is made again
from the indexes when it is missing. Memory holds no more than what is not sealed yet.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Final

from sams_receiver.archive import format as fmt
from sams_receiver.archive.reader import Archive, ArchiveError, Segment, numbers, partition_folder

log = logging.getLogger(__name__)

DATABASE: Final = "seen.sqlite"
_OPEN_INDEXES: Final = 8
_ASKED: Final = 4_096
_SCHEMA = """
create table if not exists segment (number integer primary key, last_ns integer not null);
create table if not exists writer (
    key blob, number integer, low integer not null, high integer not null,
    primary key (key, number)) without rowid;
"""


class Verdict(Enum):
    """What is known of a payload that has arrived."""

    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class Seen:
    """Duplicates of one partition. `check` and `add` belong to one thread.

    window_ns: how long after it was received a payload is recognised, at least.
    """

    def __init__(self, archive: Archive, partition: int, window_ns: int) -> None:
        self._archive = archive
        self._partition = partition
        self._folder = partition_folder(archive.folder, partition)
        self._window_ns = window_ns
        self._digests: dict[bytes, bytes] = {}
        self._marks: dict[bytes, tuple[int, int]] = {}
        self._live: dict[int, list[bytes]] = {}
        self._asked: dict[bytes, int] = {}
        self._indexes: OrderedDict[int, fmt.Index | None] = OrderedDict()
        self._database = self._connect()
        self._writing = threading.Lock()
        self._load()

    def check(self, tag: fmt.Tag) -> Verdict:
        """Compare with what is stored."""
        if tag.sequence > self._mark(tag.key)[0]:
            return Verdict.NEW
        digest = self._digests.get(_place(tag)) or self._sealed_digest(tag)
        if digest is None:
            return Verdict.NEW
        return Verdict.DUPLICATE if digest == tag.digest else Verdict.CONFLICT

    def add(self, tags: Iterable[fmt.Tag], number: int) -> None:
        """Remember what is on disk now in the live segment of that number."""
        live = self._live.setdefault(number, [])
        for tag in tags:
            place = _place(tag)
            self._digests[place] = tag.digest
            live.append(place)
            self._marks[tag.key] = (max(self._mark(tag.key)[0], tag.sequence), number)
            self._asked.pop(tag.key, None)

    def record_sealed(self, number: int) -> None:
        """Take up the index of a sealed segment. May run in a thread of its own."""
        segment = self._archive.segment(self._partition, number)
        try:
            index = segment.index()
        except fmt.FormatError as error:
            log.error("segment %s: %s; its duplicates are not known", segment.id, error)
            return
        with self._writing, contextlib.closing(self._connect()) as database, database:
            database.execute(
                "insert or replace into segment values (?, ?)", (number, index.last_ns)
            )
            database.executemany(
                "insert or replace into writer values (?, ?, ?, ?)",
                ((key, number, low, high) for key, low, high in index.writers()),
            )
            self._forget(database, index.last_ns - self._window_ns)

    def release(self, number: int) -> None:
        """Let go of what memory holds of a segment that `record_sealed` took up."""
        self._asked.clear()
        for place in self._live.pop(number, ()):
            self._digests.pop(place, None)
            mark = self._marks.get(place[:16])
            if mark is not None and mark[1] <= number:
                del self._marks[place[:16]]

    @property
    def in_memory(self) -> int:
        """How many payloads memory holds a digest of."""
        return len(self._digests)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _mark(self, key: bytes) -> tuple[int, int]:
        """Highest sequence of a writer (-1: none) and the live segment it was last in."""
        mark = self._marks.get(key)
        if mark is not None:
            return mark
        high = self._asked.get(key)
        if high is None:
            (high,) = self._database.execute(
                "select coalesce(max(high), -1) from writer where key = ?", (key,)
            ).fetchone()
            # A writer's first batch asks twice: before it is written and after.
            if len(self._asked) >= _ASKED:
                self._asked.clear()
            self._asked[key] = high
        return high, 0

    def _sealed_digest(self, tag: fmt.Tag) -> bytes | None:
        rows = self._database.execute(
            "select number from writer where key = ? and low <= ? and high >= ?",
            (tag.key, tag.sequence, tag.sequence),
        ).fetchall()
        for (number,) in rows:
            index = self._index(number)
            digest = index.digest(tag.key, tag.sequence) if index is not None else None
            if digest is not None:
                return digest
        return None

    def _index(self, number: int) -> fmt.Index | None:
        if number in self._indexes:
            self._indexes.move_to_end(number)
            return self._indexes[number]
        segment = self._archive.segment(self._partition, number)
        index: fmt.Index | None
        try:
            index = segment.index()
        except (ArchiveError, fmt.FormatError, OSError) as error:
            # Stored once more is harmless; acknowledged without being stored is not.
            log.warning("segment %s: %s; what it holds may be stored again", segment.id, error)
            index = None
        self._indexes[number] = index
        if len(self._indexes) > _OPEN_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _connect(self) -> sqlite3.Connection:
        path = self._folder / DATABASE
        try:
            return _open_database(path)
        except sqlite3.DatabaseError as error:
            log.warning("%s: %s; made again from the indexes", path, error)
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            return _open_database(path)

    def _load(self) -> None:
        known = {number for (number,) in self._database.execute("select number from segment")}
        for number in numbers(self._folder):
            segment = self._archive.segment(self._partition, number)
            if not segment.sealed:
                self._load_live(segment)
            elif number not in known:
                self.record_sealed(number)

    def _load_live(self, segment: Segment) -> None:
        frames = (item for item in segment.items() if isinstance(item, fmt.Frame))
        self.add(filter(None, map(fmt.tag_of_frame, frames)), segment.number)

    def _forget(self, database: sqlite3.Connection, before_ns: int) -> None:
        old = [
            number
            for (number,) in database.execute(
                "select number from segment where last_ns < ?", (before_ns,)
            )
        ]
        # The segment's own row stays: it says that its index has been taken up.
        database.executemany("delete from writer where number = ?", ((n,) for n in old))


def _place(tag: fmt.Tag) -> bytes:
    return tag.key + tag.sequence.to_bytes(8, "big")


def _open_database(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False, timeout=60)
    try:
        # WAL with NORMAL may lose the last transactions in a power cut, never mix them;
        # what is lost is taken from the indexes again at the next start.
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = normal")
        database.executescript(_SCHEMA)
        database.execute("select count(*) from segment").fetchone()
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database
