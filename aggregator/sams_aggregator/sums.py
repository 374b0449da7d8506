"""Exact sums by small numbers over rows that come in the order of their runs.

A part at a time, so that no more is held than a part and the groups. Amounts may be larger
than 64 bits: they are added up in pieces of 32.
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
_GROUPS: Final = 4_000_000  # so many are merged before more rows are taken


class Rows(NamedTuple):
    """Rows of some runs: keys are integers from 0 on; amounts as of `pieces`."""

    run: Column
    keys: list[Column]
    amounts: list[Column]

    def only(self, where: Column | slice) -> Rows:
        """Some of them: by a mask, or from one to another."""
        return Rows(
            self.run[where],
            [key[where] for key in self.keys],
            [amount[where] for amount in self.amounts],
        )


class Numbering:
    """Numbers from 0 on for integers, in the order in which they come up."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def __call__(self, values: Column) -> Column:
        """The number of each."""
        found, where = np.unique(values, return_inverse=True)
        known = self._known
        numbers = [known.setdefault(value, len(known)) for value in found.tolist()]
        return np.array(numbers, dtype=np.int64)[where]

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


def pieces(column: pa.ChunkedArray | pa.Array) -> list[Column]:
    """An amount as columns of its lowest 32 bits, the next, …: of int64 two, of decimals four.

    The last one has the sign; no row is null.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    words = 2 if pa.types.is_decimal(column.type) else 1
    begin, end = column.offset * words, (column.offset + len(column)) * words
    plain = np.frombuffer(column.buffers()[1], dtype="<i8")[begin:end]
    found = []
    for word in range(words):
        value = plain[word::words]
        found += [value & _LOW, value >> _BITS]
        if word < words - 1:
            found[-1] &= _LOW
    return found


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
        [np.append(*pair) for pair in zip(one.amounts, other.amounts, strict=True)],
    )


def _grouped(rows: Rows, marks: Sequence[Column]) -> Sums:
    number = latest.numbered(rows.keys)
    order = np.argsort(number, kind="stable")
    ordered, run = number[order], rows.run[order]
    first = np.flatnonzero(latest.starts(ordered))
    # Within a group, too, the rows of a run stand together.
    once = latest.starts(ordered, run)
    return Sums(
        [key[order[first]] for key in rows.keys],
        _added(once.astype(np.int64), first),
        [_added((once & mark[run]).astype(np.int64), first) for mark in marks],
        [_added(amount[order], first) for amount in rows.amounts],
    )


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
    order = np.argsort(number, kind="stable")
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
