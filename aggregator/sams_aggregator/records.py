"""Records of many batches at once: from msgpack to columns, without an object for each value.

All records are decoded together, one column after the other: numpy looks at the tag of
each, takes the value that follows, and steps to the next column. What is not exactly as
today's collectors write it is left to `wire.decode_rows`, batch by batch, which also says
what is wrong; so this decides nothing that the wire does not decide too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from sams_aggregator.tables import NULL, Column, integers
from sams_ebpf import wire

_PATH_MAX: Final = 4096
_ARRAY16: Final = 0xDC
_NIL: Final = 0xC0
_BIN8: Final = 0xC4
_BIN16: Final = 0xC5
_HEAD: Final = 3  # bytes of an array16's head; a record has more columns than a shorter one
_COLUMNS: Final = len(wire.FIELDS)
# So many at a time stay in the processor's cache.
_CHUNK: Final = 1 << 14
# Behind the last record, so that a whole word can be read anywhere.
_PADDING: Final = bytes(16)


def _integer_tables() -> tuple[Column, Column, Column]:
    """By tag: bytes taken, 0 where it is no integer; where its value starts; bits too many."""
    size, start = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
    shift = np.full(256, 56, dtype=np.uint64)
    size[:0x80] = size[_NIL] = 1
    for power, tag in enumerate((0xCC, 0xCD, 0xCE, 0xCF)):
        size[tag], start[tag], shift[tag] = 1 + (1 << power), 1, 64 - (8 << power)
    return size, start, shift


_SIZE, _START, _SHIFT = _integer_tables()


class Names(NamedTuple):
    """Paths or scripts: the different ones, and the number of each row's (-1: none)."""

    values: list[bytes]
    codes: Column

    def array(self, rows: Column) -> pa.Array:
        """Those of some rows, as a column of Arrow."""
        codes = self.codes[rows]
        numbers = pa.array(codes.astype(np.int32), mask=codes < 0)
        return pa.DictionaryArray.from_arrays(numbers, pa.array(self.values, pa.binary()))


class Records(NamedTuple):
    """Columns of all records of some batches, one batch after the other.

    first: the place of each batch's first record, and behind the last one the end.
    bad: numbers of batches that were refused, with the reason; they have no records.
    """

    first: Column
    path: Names
    script: Names
    numbers: dict[str, Column]
    bad: dict[int, str]


class _Columns(NamedTuple):
    """Records in any order: bounds of path and script in `buffer` (length -1: none)."""

    start: Column
    end: Column
    good: Any
    path_at: Column
    path_length: Column
    script_at: Column
    script_length: Column
    numbers: dict[str, Column]

    @property
    def plain(self) -> tuple[Any, ...]:
        """All but the numbers."""
        return self[:-1]


_COUNTED: Final = ("flags", *wire.COUNTERS)


def decode(
    areas: Sequence[bytes | memoryview],
    counts: Column,
    told: Column,
    rows_of: Callable[[int], list[wire.Row]],
) -> Records:
    """Columns of the records of some batches.

    areas: the bytes from each batch's first record to its end, empty where it is not told
    where that is (`told`); counts: how many there should be. rows_of decodes one batch by
    its number the slow way, or raises WireError.
    """
    quick = told.astype(bool)
    counts = counts.copy()
    buffer = b"".join([*areas, _PADDING])
    sizes = np.fromiter(map(len, areas), dtype=np.int64, count=len(areas))
    ends = np.cumsum(sizes)
    found = _columns(buffer)
    place = _in_order(found, ends - sizes, ends, counts, quick)
    slow, bad = _slowly(np.flatnonzero(~quick), rows_of)
    if slow:
        at = len(found.start)
        found, buffer = _appended(found, buffer, [row for rows in slow.values() for row in rows])
        for number, rows in slow.items():
            place[number], counts[number] = at, len(rows)
            at += len(rows)
    counts[list(bad)] = 0
    return _gathered(found, buffer, place, counts, bad)


def _columns(buffer: bytes) -> _Columns:
    """Everything in the buffer that looks like a record."""
    octets = np.frombuffer(buffer, dtype=np.uint8)
    limit = len(buffer) - len(_PADDING)
    start = np.flatnonzero(octets[:limit] == _ARRAY16)
    start = start[(octets[start + 1] == 0) & (octets[start + 2] == _COLUMNS)]
    parts = [
        _parse(buffer, start[at : at + _CHUNK], limit) for at in range(0, len(start), _CHUNK)
    ] or [_parse(buffer, start, limit)]
    if len(parts) == 1:
        return parts[0]
    joined = map(np.concatenate, zip(*(part.plain for part in parts), strict=True))
    numbers = {name: np.concatenate([part.numbers[name] for part in parts]) for name in _COUNTED}
    return _Columns._make([*joined, numbers])


def _parse(buffer: bytes, start: Column, limit: int) -> _Columns:
    cursor = _Cursor(buffer, start + _HEAD, limit)
    path_at, path_length = cursor.texts(maybe=False)
    numbers = {"flags": cursor.integers(maybe=False)}
    script_at, script_length = cursor.texts(maybe=True)
    for name in wire.COUNTERS:
        numbers[name] = cursor.integers(maybe=name != "cpu_ns")
    return _Columns(
        start, cursor.at, cursor.good, path_at, path_length, script_at, script_length, numbers
    )


class _Cursor:
    """Places in a buffer, one for each record, that go on from column to column together.

    good: which of them have met nothing but what a record has.
    """

    def __init__(self, buffer: bytes, at: Column, limit: int) -> None:
        self._octets = np.frombuffer(buffer, dtype=np.uint8)
        # The 8 bytes from each byte on, as one integer.
        self._words = np.ndarray(shape=(len(buffer) - 7,), dtype=">u8", buffer=buffer, strides=(1,))
        self._limit = limit
        self.at = at
        self.good = np.ones(len(at), dtype=bool)
        self._step(0)

    def _step(self, by: Column | int) -> None:
        self.at = self.at + by
        # What runs out of the buffer was no record; it may read anything from here on.
        if len(self.at) and self.at.max() > self._limit:
            self.good &= self.at <= self._limit
            self.at = np.minimum(self.at, self._limit)

    def texts(self, *, maybe: bool) -> tuple[Column, Column]:
        """Where a column of bytes starts, and its lengths: -1 for nil, if that may be."""
        tag = self._octets[self.at]
        if maybe and (tag == _NIL).all():
            self._step(1)
            return self.at, np.full(len(tag), -1)
        wide = tag == _BIN16
        absent = (tag == _NIL) if maybe else np.zeros(len(tag), dtype=bool)
        self.good &= wide | absent | (tag == _BIN8)
        length = self._octets[self.at + 1].astype(np.int64)
        if wide.any():
            length = np.where(wide, length << 8 | self._octets[self.at + 2], length)
            self.good &= length <= _PATH_MAX
        begin = self.at + 2 + wide
        length[absent] = -1
        self._step(np.where(absent, 1, 2 + wide + length))
        return begin, length

    def integers(self, *, maybe: bool) -> Column:
        """A column of integers, NULL for nil, if that may be."""
        tag = self._octets[self.at]
        first = tag[0] if len(tag) else 0
        size: Any = _SIZE[first]
        if maybe and first == _NIL and (tag == _NIL).all():  # as what is not measured
            self._step(1)
            return np.full(len(tag), NULL)
        if (tag == first).all():  # as most columns are
            start: Any = _START[first]
            shift: Any = _SHIFT[first]
            absent: Any = np.bool_(first == _NIL)
        else:
            size, start, shift, absent = _SIZE[tag], _START[tag], _SHIFT[tag], tag == _NIL
        self.good &= (size > 0) & (maybe | ~absent)
        value: Column = (self._words[self.at + start].astype(np.uint64) >> shift).view(np.int64)
        self.good &= value >= 0
        if absent.any():
            value = np.where(absent, NULL, value)
        self._step(size)
        return value


def _in_order(
    found: _Columns,
    begins: Column,
    ends: Column,
    counts: Column,
    quick: Any,  # noqa: ANN401
) -> Column:
    """Place of each batch's first record; `quick` is cleared where they are not in a row.

    A batch is as it should be if as many records as it has follow one another from its
    first byte to its last. Bytes of a path that look like a record break that: rare, and
    then the slow way is taken.
    """
    place = np.searchsorted(found.start, begins)
    there = np.searchsorted(found.start, ends) - place
    quick &= there == counts
    # Each record ends where the next one begins, the last one where its batch ends.
    following = np.append(found.start[1:], -1)
    some = quick & (counts > 0)
    following[(place + counts - 1)[some]] = ends[some]
    chained = np.append(0, np.cumsum(found.good & (found.end == following)))
    whole = np.zeros(len(counts), dtype=bool)
    last = np.minimum(place + counts, len(found.start))
    whole[quick] = (chained[last] - chained[place] == counts)[quick]
    first = np.append(found.start, -1)[place]
    quick &= whole & np.where(counts > 0, first == begins, begins == ends)
    return place


def _slowly(
    numbers: Iterable[int], rows_of: Callable[[int], list[wire.Row]]
) -> tuple[dict[int, list[wire.Row]], dict[int, str]]:
    rows: dict[int, list[wire.Row]] = {}
    bad: dict[int, str] = {}
    for number in map(int, numbers):
        try:
            rows[number] = rows_of(number)
        except wire.WireError as error:
            bad[number] = str(error)
    return rows, bad


def _appended(found: _Columns, buffer: bytes, rows: Sequence[wire.Row]) -> tuple[_Columns, bytes]:
    """The columns with rows of plain Python behind them."""
    if not rows:
        return found, buffer
    path, flags, script, *counters = zip(*rows, strict=True)
    texts = [*path, *(name for name in script if name is not None)]
    length = np.array([*map(len, path), *(-1 if s is None else len(s) for s in script)])
    at = len(buffer) + np.cumsum(np.maximum(length, 0)) - np.maximum(length, 0)
    n = len(rows)
    # Scripts that are there lie behind the paths, in the order of their rows.
    new = [at[:n], length[:n], at[n:], length[n:]]
    nothing = np.zeros(n, dtype=np.int64)
    columns = [nothing, nothing, nothing.astype(bool), *new]
    joined = (np.append(old, more) for old, more in zip(found.plain, columns, strict=True))
    numbers = {
        name: np.append(found.numbers[name], integers(values))
        for name, values in zip(_COUNTED, (flags, *counters), strict=True)
    }
    return _Columns._make([*joined, numbers]), b"".join([buffer, *texts, _PADDING])


def _gathered(
    found: _Columns, buffer: bytes, place: Column, counts: Column, bad: dict[int, str]
) -> Records:
    first = np.append(0, np.cumsum(counts))
    rows = ranges(place, counts)
    as_is = len(rows) == len(found.start) and (rows == np.arange(len(rows))).all()

    def pick(column: Column) -> Column:
        return column if as_is else column[rows]

    return Records(
        first,
        _names(buffer, pick(found.path_at), pick(found.path_length)),
        _names(buffer, pick(found.script_at), pick(found.script_length)),
        {name: pick(column) for name, column in found.numbers.items()},
        bad,
    )


def ranges(starts: Column, counts: Column) -> Column:
    """All integers from each start, as many as its count, one range after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    found: Column = np.arange(total) + np.repeat(starts - ends + counts, counts)
    return found


_SHORT: Final = 12  # what a view holds itself
_MASKS: Final = np.array([0, 0xFF, 0xFFFF, 0xFFFFFF, -1], dtype=np.int64).astype(np.int32)


def _names(buffer: bytes, at: Column, length: Column) -> Names:
    """Number texts of the buffer; they are only looked at, not taken out one by one."""
    here = length >= 0
    codes = np.full(len(at), -1, dtype=np.int64)
    if not here.any():
        return Names([], codes)
    if not here.all():
        at, length = at[here], length[here]
    words = np.ndarray(shape=(len(buffer) - 3,), dtype="<i4", buffer=buffer, strides=(1,))
    views = np.zeros((len(at), 4), dtype="<i4")
    views[:, 0] = length
    views[:, 1] = words[at]
    views[:, 3] = at
    short = np.flatnonzero(length <= _SHORT)
    for part in range(3):
        taken = np.clip(length[short] - 4 * part, 0, 4)
        views[short, 1 + part] = words[at[short] + 4 * part] & _MASKS[taken]
    seen = pa.Array.from_buffers(
        pa.binary_view(), len(at), [None, pa.py_buffer(views), pa.py_buffer(buffer)]
    )
    numbered = seen.cast(pa.binary()).dictionary_encode()
    codes[here] = numbered.indices.to_numpy(zero_copy_only=False)
    return Names(numbered.dictionary.to_pylist(), codes)
