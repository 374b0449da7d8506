"""Sums by small numbers are those of a plain loop, however the rows are cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_aggregator import latest, sums

CPU = st.integers(-(10**37), 10**37) | st.integers(-5, 5) | st.sampled_from([2**63, -(2**63) - 1])
CORE = st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5)
KEY = st.integers(0, 2) | st.sampled_from([2**40, 2**62])
Line = tuple[int, int, int, int, int]
LINES = st.lists(st.tuples(st.integers(0, 4), KEY, KEY, CPU, CORE), min_size=1, max_size=25).map(
    lambda lines: sorted(lines, key=lambda line: line[0])
)


def parts(lines: list[Line], size: int) -> Iterator[sums.Rows]:
    for at in range(0, len(lines), size):
        run, one, other, cpu, core = zip(*lines[at : at + size], strict=True)
        # Sliced, as DuckDB hands them out.
        decimals = pa.array([Decimal(0), *map(Decimal, cpu)], pa.decimal128(38, 0))[1:]
        integers = pa.array([0, *core], pa.int64())[1:]
        yield sums.Rows(
            np.array(run), [np.array(one), np.array(other)],
            [sums.words(decimals), sums.words(integers)],
        )  # fmt: skip


@given(lines=LINES, size=st.integers(1, 30), merged=st.booleans())
def test_as_a_plain_loop(lines: list[Line], size: int, merged: bool) -> None:
    marked = [run % 2 == 0 for run in range(5)]
    groups: dict[Any, list[Any]] = defaultdict(lambda: [set(), 0, 0])
    for run, one, other, cpu, core in lines:
        group = groups[one, other]
        group[0].add(run)
        group[1] += cpu
        group[2] += core
    expected = {
        key: (len(runs), sum(marked[run] for run in runs), cpu, core)
        for key, (runs, cpu, core) in groups.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        if merged:
            patch.setattr(sums, "_GROUPS", 1)
        found = sums.by_keys(parts(lines, size), [np.array(marked)])
    assert found is not None
    columns = (found.runs.tolist(), found.marked[0].tolist(), found.amount(0, 4),
               found.amount(4, 2))  # fmt: skip
    keys = zip(*(key.tolist() for key in found.keys), strict=True)
    assert dict(zip(keys, zip(*columns, strict=True), strict=True)) == expected
    assert len(found.runs) == len(expected)


def test_nothing_and_rows_in_disorder() -> None:
    assert sums.by_keys(iter(()), []) is None
    lines = [(3, 0, 0, 1, 1), (2, 0, 0, 1, 1)]
    with pytest.raises(ValueError, match="order"):
        sums.by_keys(parts(lines, 2), [])
    with pytest.raises(ValueError, match="order"):
        sums.by_keys(parts(lines, 1), [])


@given(st.lists(st.tuples(*[st.integers(0, 3) | st.sampled_from([2**30, 2**62])] * 5), min_size=1))
def test_numbers_tell_apart_what_keys_do(rows: list[tuple[int, ...]]) -> None:
    number = latest.numbered([np.array(column) for column in zip(*rows, strict=True)]).tolist()
    assert len(set(number)) == len(set(rows)) == len(set(zip(number, rows, strict=True)))


@given(st.lists(st.integers(-1, 3) | st.sampled_from([2**62, 2**63 - 1, -(2**63)]), max_size=40))
def test_an_order_leaves_equal_ones_as_they_are(numbers: list[int]) -> None:
    plain = sorted(range(len(numbers)), key=lambda at: numbers[at])
    assert latest.order_of(np.array(numbers, dtype=np.int64)).tolist() == plain


@given(st.lists(st.lists(st.integers(-1, 2**63 - 1), max_size=5), max_size=4))
def test_a_numbering_goes_on_from_part_to_part(parts_: list[list[int]]) -> None:
    numbering = sums.Numbering()
    found = [numbering(np.array(part, dtype=np.int64)).tolist() for part in parts_]
    assert [[numbering.values[n] for n in part] for part in found] == parts_
