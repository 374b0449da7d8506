"""The batches of one unit: what each is, as columns, and its bytes when they are wanted.

They come one by one, or as a segment whose directory says what is in it. Of such a segment
only what is asked for is looked at, and its checksum compared then.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

import numpy as np

from sams_aggregator.tables import Column
from sams_ebpf import wire
from sams_receiver.archive import Directory
from sams_receiver.archive import directory as dr
from sams_receiver.archive import format as fmt

_NUMBERED: Final = ("source", "claims")


class Damaged(Exception):  # noqa: N818 - a reason to take another way, not an error
    """A segment is not what its directory says: its frames have to be searched."""


class Whole(NamedTuple):
    """A segment that can be picked from: its raw form and its directory; name: for people."""

    name: str
    raw: bytes
    directory: Directory


class Batches:
    """Batches that were added, by number from 0 on."""

    def __init__(self) -> None:
        self._singles = dr.DirectoryBuilder()
        self._data: list[bytes] = []
        self._said: list[tuple[str, str]] = []
        self._segment: _Segment | None = None
        self._headers: dict[int, wire.Header] = {}
        self._ties: dict[int, int] = {}

    def add(self, data: bytes, outline: wire.Outline, origin: str, place: str) -> None:
        """Take one batch."""
        self._singles.add(0, len(data), outline)
        self._data.append(data)
        self._said.append((origin, place))

    def add_segment(self, whole: Whole, origin: str) -> list[tuple[int, str, bytes]]:
        """Take the batches of a segment, at most once; returns kind, place, bytes of the rest."""
        self._segment = _Segment(whole, origin)
        return [
            (
                int(self._segment.kinds[at]),
                self._segment.place(at),
                bytes(self._segment.payload(at)),
            )
            for at in self._segment.others.tolist()
        ]

    def columns(self) -> dict[str, Column]:
        """What the batches are, those of the segment first; names as in its directory."""
        singles = {
            name: np.asarray(column, dtype=np.int64)
            for name, column in self._singles.columns.items()
        }
        if self._segment is None:
            return singles
        first = self._segment.columns
        for name in _NUMBERED:
            singles[name] += first[name].max(initial=-1) + 1
        return {name: np.append(first[name], singles[name]) for name in first}

    def data(self, number: int) -> bytes | memoryview:
        """One batch's bytes. Raises Damaged."""
        count = self.of_segment
        if self._segment is None or number >= count:
            return self._data[number - count]
        return self._segment.payload(self._segment.rows[number])

    def origin(self, number: int) -> str:
        """What it was that it was made from."""
        count = self.of_segment
        if self._segment is None or number >= count:
            return self._said[number - count][0]
        return self._segment.origin

    def place(self, number: int) -> str:
        """Where it stood, for people."""
        count = self.of_segment
        if self._segment is None or number >= count:
            return self._said[number - count][1]
        return self._segment.place(self._segment.rows[number])

    def header(self, number: int) -> wire.Header:
        """One batch's header. Raises Damaged."""
        found = self._headers.get(number)
        if found is None:
            try:
                found = wire.decode_header(self.data(number))
            except wire.WireError as error:
                # Another version of this program sealed it; this one says what it cannot read.
                raise Damaged from error
            self._headers[number] = found
        return found

    def tie(self, number: int) -> int:
        """A number of its bytes: tells which of two counts that claim to be the same batch."""
        found = self._ties.get(number)
        if found is None:
            digest = blake2b(self.data(number), digest_size=8).digest()
            found = self._ties[number] = int.from_bytes(digest, "little") & wire.INT64_MAX
        return found

    @property
    def of_segment(self) -> int:
        """How many of them are of the segment."""
        return 0 if self._segment is None else len(self._segment.rows)


class _Segment:
    def __init__(self, whole: Whole, origin: str) -> None:
        self.origin = origin
        self._name = whole.name
        self._raw = memoryview(whole.raw)
        every = {
            name: np.frombuffer(column, dtype=column.typecode).astype(np.int64)
            for name, column in whole.directory.columns.items()
        }
        ends = fmt.DATA_START + np.cumsum(every["length"] + fmt.FRAME_OVERHEAD)
        self._lengths: Sequence[int] = every["length"].tolist()
        self._offsets: Sequence[int] = (ends - every["length"] - fmt.FRAME_OVERHEAD).tolist()
        self.kinds = every["kind"]
        mine = (every["bits"] & dr.BATCH) > 0
        self.others = np.flatnonzero(~mine)
        self.rows: Sequence[int] = np.flatnonzero(mine).tolist()
        self.columns = {name: column[mine] for name, column in every.items()}

    def payload(self, at: int) -> memoryview:
        offset, length = self._offsets[at], self._lengths[at]
        if not fmt.intact(self._raw, offset, length):
            raise Damaged
        begin = offset + fmt.FRAME_HEAD
        return self._raw[begin : begin + length]

    def place(self, at: int) -> str:
        return f"{self._name}, byte {self._offsets[at]}"
