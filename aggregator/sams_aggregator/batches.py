"""The batches of one unit: what each is, as columns, and its bytes when they are wanted.

They come one by one, or as a segment whose directory says what is in it. Of such a segment
only what is asked for is read.
"""

from __future__ import annotations

import itertools
from array import array
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from backports import zstd

from sams_aggregator.latest import starts
from sams_aggregator.tables import Column
from sams_ebpf import wire
from sams_ebpf.errors import SamsError
from sams_receiver.archive import Directory, Segment
from sams_receiver.archive import directory as dr
from sams_receiver.archive import format as fmt

_CODEC: Final = pa.Codec("zstd")
_NUMBERED: Final = ("source", "claims")


class DirectoryError(SamsError):
    """A segment is not what its directory says: its frames have to be read."""


class Picked(NamedTuple):
    """A segment that is read by its directory; name: for people."""

    name: str
    segment: Segment
    directory: Directory


class Batches:
    """Batches by number from 0 on, in the order in which they were added."""

    def __init__(self) -> None:
        self._segment: _Segment | None = None
        # How many of them are of the segment: the first ones.
        self.of_segment = 0
        self._singles = dr.DirectoryBuilder()
        self._said: list[tuple[str, str]] = []
        # None: not read yet.
        self._data: list[bytes | None] = []
        self._headers: dict[int, wire.Header] = {}

    def add_segment(self, picked: Picked, origin: str) -> list[tuple[int, str, bytes, bool]]:
        """Take the batches of a segment, before all others.

        Gives kind, place, bytes of the rest, and whether their sender was proved.

        Raises DirectoryError.
        """
        self._segment = _Segment(picked, origin)
        self.of_segment = len(self._segment.rows)
        self._data = [None] * self.of_segment
        others = self._segment.others
        return [
            (int(of.kinds[at]), of.place(at), data, not of.bits[at] & dr.UNVOUCHED)
            for of in [self._segment]
            for at, data in of.read(others).items()
        ]

    def add(
        self, data: bytes, outline: wire.Outline, origin: str, place: str, *, vouched: bool
    ) -> None:
        """Take one batch."""
        self._singles.add(len(data), outline, fmt.content_digest(data), vouched=vouched)
        self._data.append(data)
        self._said.append((origin, place))

    def columns(self) -> dict[str, Column]:
        """What the batches are; names as in a directory.

        `digest` tells which of two counts that claim to be the same batch.
        """
        singles = _columns(self._singles.columns)
        if self._segment is None:
            return singles
        first = self._segment.columns
        for name in _NUMBERED:
            singles[name] += first[name].max(initial=-1) + 1
        return {name: np.append(first[name], singles[name]) for name in first}

    def fetch(self, numbers: Column) -> None:
        """Read batches that will be wanted, each block of the segment once.

        Raises DirectoryError.
        """
        if self._segment is None:
            return
        end, data = self.of_segment, self._data
        missing = [n for n in numbers.tolist() if n < end and data[n] is None]
        if missing:
            rows = self._segment.rows[missing]
            found = self._segment.read(rows)
            for number, row in zip(missing, rows.tolist(), strict=True):
                self._data[number] = found[row]

    def data(self, number: int) -> bytes:
        """One batch's bytes. Raises DirectoryError."""
        found = self._data[number]
        if found is None:
            self.fetch(np.array([number]))
            found = self._data[number]
            assert found is not None  # noqa: S101 - fetched, or it has raised
        return found

    def headers(self, numbers: Column) -> list[wire.Header]:
        """Headers of batches, but for `sums` and `fields`. Raises DirectoryError."""
        known = self._headers
        headers = []
        for number in numbers.tolist():
            found = known.get(number)
            if found is None:
                try:
                    found = known[number] = wire.decode_head(
                        self._data[number] or self.data(number)
                    )
                except wire.WireError as error:
                    # Another version of this program sealed it; this one says why it cannot.
                    raise DirectoryError(str(error)) from error
            headers.append(found)
        return headers

    def origin(self, number: int) -> str:
        """What it was that it was made from."""
        first = self.of_segment
        if self._segment is not None and number < first:
            return self._segment.origin
        return self._said[number - first][0]

    def place(self, number: int) -> str:
        """Where it stood, for people."""
        if self._segment is not None and number < self.of_segment:
            return self._segment.place(self._segment.rows[number])
        return self._said[number - self.of_segment][1]


class _Segment:
    def __init__(self, picked: Picked, origin: str) -> None:
        self.origin = origin
        self._name = picked.name
        self._segment = picked.segment
        every = _columns(picked.directory.columns)
        ends = fmt.DATA_START + np.cumsum(every["length"] + fmt.FRAME_OVERHEAD)
        self._offsets = ends - every["length"] - fmt.FRAME_OVERHEAD
        blocks = np.array([block.raw_offset for block in picked.segment.index().blocks])
        self._block = np.searchsorted(blocks, self._offsets, side="right") - 1
        self._begin = self._offsets - blocks[self._block] + fmt.FRAME_HEAD
        self._end = self._begin + every["length"]
        self.kinds, self.bits = every["kind"], every["bits"]
        mine = (every["bits"] & dr.BATCH) > 0
        self.others = np.flatnonzero(~mine)
        self.rows = np.flatnonzero(mine)
        self.columns = {name: column[mine] for name, column in every.items()}

    def read(self, rows: Column) -> dict[int, bytes]:
        """Payloads of frames: block after block, of which nothing else is kept."""
        rows = np.sort(rows)
        firsts = np.flatnonzero(starts(self._block[rows])).tolist()
        found: dict[int, bytes] = {}
        for first, last in itertools.pairwise([*firsts, len(rows)]):
            chosen = rows[first:last]
            try:
                data = self._segment.block(int(self._block[chosen[0]]), decompressed)
            except fmt.FormatError as error:
                raise DirectoryError(str(error)) from error
            begins, ends = self._begin[chosen].tolist(), self._end[chosen].tolist()
            for row, begin, end in zip(chosen.tolist(), begins, ends, strict=True):
                found[row] = data[begin:end]
        return found

    def place(self, at: int) -> str:
        return f"{self._name}, byte {self._offsets[at]}"


def decompressed(packed: bytes, length: int) -> bytes:
    """As the archive does, with Arrow: into one piece of a known length it takes half the time."""
    try:
        if zstd.get_frame_info(packed).decompressed_size != length:
            raise fmt.FormatError("block has another length than its index says")
        data: bytes = _CODEC.decompress(packed, decompressed_size=length, asbytes=True)
    except (zstd.ZstdError, OSError) as error:
        raise fmt.FormatError(f"not valid zstd: {error}") from error
    return data


def _columns(columns: dict[str, array[int]]) -> dict[str, Column]:
    # Of the digests the highest bit is lost: they are integers of the facts, too.
    return {
        name: np.frombuffer(column, dtype=column.typecode).astype(np.int64) & wire.INT64_MAX
        for name, column in columns.items()
    }
