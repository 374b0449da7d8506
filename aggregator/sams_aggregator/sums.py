"""Exact sums by small numbers over rows that come in the order of their runs.

A part at a time, so that no more is held than a part and the groups. Amounts may be larger
than 64 bits: where that could be, they are added up in pieces of 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from sams_aggregator import latest
from sams_aggregator.tables import Column

_BITS: Final = 32
_LOW: Final = (1 << _BITS) - 1
_FITS: Final = 2**62  # no sum of some of the rows is more than 64 bits hold, rounding included
_GROUPS: Final = 4_000_000  # so many are merged before more rows are taken


# An amount of each row as columns of 64 bits, the lowest first; the last one has the sign.
Words = tuple[Column, ...]


class Rows(NamedTuple):
    """Rows of some runs: keys are integers from 0 on; amounts as of `words`."""

    run: Column
    keys: list[Column]
    amounts: list[Words]

    def only(self, where: Column | slice) -> Rows:
        """Some of them: by a mask, or from one to another."""
        return Rows(
            self.run[where],
            [key[where] for key in self.keys],
            [tuple(word[where] for word in amount) for amount in self.amounts],
        )


class Numbering:
    """Numbers from 0 on for integers, in the order in which they come up."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def __call__(self, values: Column) -> Column:
        """The number of each."""
        found = pa.array(values).dictionary_encode()
        known = self._known
        numbers = [known.setdefault(value, len(known)) for value in found.dictionary.to_pylist()]
        column: Column = np.array(numbers, dtype=np.int64)[found.indices.to_numpy()]
        return column

    @property
    def values(self) -> list[int]:
        """What the numbers stand for."""
        return list(self._known)


class Sums(NamedTuple):
    """Groups: their keys, how many runs they are of, of these those that are marked, amounts."""

    keys: list[Column]
    runs: Column
    marked: list[Column]
    amounts: list[Column]

    def amount(self, first: int, count: int) -> list[int]:
        """Whole numbers out of `count` pieces of an amount, the lowest of which is `first`."""
        *lower, last = self.amounts[first : first + count]
        parts: list[Column] = []
        carry: Column = np.zeros(len(last), dtype=np.int64)
        for piece in lower:
            parts.append((piece + carry) & _LOW)
            carry = (piece + carry) >> _BITS
        parts.append(last + carry)
        words = (parts[1] << _BITS) | parts[0]
        sign = words >> 63
        # What 64 bits hold is there already; the rest is put together one by one.
        odd = parts[-1] != (sign if count > 2 else words >> _BITS)
        for part in parts[2:-1]:
            odd |= part != sign & _LOW
        whole: list[int] = words.tolist()
        for at in np.flatnonzero(odd).tolist():
            whole[at] = sum(int(part[at]) << _BITS * n for n, part in enumerate(parts))
        return whole


def words(column: pa.ChunkedArray | pa.Array) -> Words:
    """An amount as words: of int64 one, of decimals two. No row is null."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    count = 2 if pa.types.is_decimal(column.type) else 1
    begin, end = column.offset * count, (column.offset + len(column)) * count
    plain = np.frombuffer(column.buffers()[1], dtype="<i8")[begin:end]
    return tuple(plain[word::count] for word in range(count))


def _pieces(amount: Words) -> list[Column]:
    """Words in pieces of 32 bits, which can be added up without getting too large."""
    *lower, last = amount
    found = []
    for word in lower:
        found += [word & _LOW, (word >> _BITS) & _LOW]
    return [*found, last & _LOW, last >> _BITS]


def by_keys(parts: Iterable[Rows], marks: Sequence[Column]) -> Sums | None:
    """Sums over all rows by their keys; marks: masks of runs, by number. None of no rows.

    A run counts once in each group. Raises ValueError for rows in another order.
    """
    done: list[Sums] = []
    for rows in _whole_runs(parts):
        done.append(_grouped(rows, marks))
        if sum(len(one.runs) for one in done) > _GROUPS:
            done = [_merged(done)]
    return _merged(done) if done else None


def _whole_runs(parts: Iterable[Rows]) -> Iterable[Rows]:
    """The same rows, cut between runs."""
    rest: Rows | None = None
    for part in parts:
        rows = part if rest is None else _joined(rest, part)
        if not len(rows.run):
            continue
        if (rows.run[1:] < rows.run[:-1]).any():
            raise ValueError("rows are not in the order of their runs")
        cut = int(np.searchsorted(rows.run, rows.run[-1]))
        if cut:
            yield rows.only(slice(cut))
        rest = rows.only(slice(cut, None))
    if rest is not None:
        yield rest


def _joined(one: Rows, other: Rows) -> Rows:
    return Rows(
        np.append(one.run, other.run),
        [np.append(*pair) for pair in zip(one.keys, other.keys, strict=True)],
        [
            tuple(np.append(*pair) for pair in zip(*both, strict=True))
            for both in zip(one.amounts, other.amounts, strict=True)
        ],
    )


def _grouped(rows: Rows, marks: Sequence[Column]) -> Sums:
    number = latest.numbered(rows.keys)
    order = latest.order_of(number)
    ordered, run = number[order], rows.run[order]
    first = np.flatnonzero(latest.starts(ordered))
    # Within a group, too, the rows of a run stand together.
    once = latest.starts(ordered, run)
    return Sums(
        [key[order[first]] for key in rows.keys],
        _added(once.astype(np.int64), first),
        [_added((once & mark[run]).astype(np.int64), first) for mark in marks],
        [piece for amount in rows.amounts for piece in _sums(amount, order, first)],
    )


def _sums(amount: Words, order: Column, first: Column) -> list[Column]:
    """Pieces of the sums of groups of rows."""
    low, *rest = amount
    sign = low >> 63
    if not any((word != sign).any() for word in rest) and np.abs(low, dtype=float).sum() < _FITS:
        total = _added(low[order], first)
        return _pieces((total, *(total >> 63 for _ in rest)))
    return [_added(piece[order], first) for piece in _pieces(amount)]


def _merged(done: list[Sums]) -> Sums:
    if len(done) == 1:
        return done[0]
    keys, (runs,), marked, amounts = (
        [np.concatenate(columns) for columns in zip(*several, strict=True)]
        for several in (
            [one.keys for one in done],
            [[one.runs] for one in done],
            [one.marked for one in done],
            [one.amounts for one in done],
        )
    )
    number = latest.numbered(keys)
    order = latest.order_of(number)
    first = np.flatnonzero(latest.starts(number[order]))
    return Sums(
        [key[order[first]] for key in keys],
        _added(runs[order], first),
        [_added(one[order], first) for one in marked],
        [_added(one[order], first) for one in amounts],
    )


def _added(values: Column, first: Column) -> Column:
    found: Column = np.add.reduceat(values, first)
    return found
