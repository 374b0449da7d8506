"""Records decoded all at once are what the wire's own decoder says, one batch at a time."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sams_aggregator import records
from sams_aggregator.tables import NULL
from sams_ebpf import wire

# What a record starts with: in a path it looks like one.
HEAD = b"\xdc\x00\x10"
COUNT = st.one_of(
    st.integers(0, 300), st.integers(0, wire.INT64_MAX), st.just(0xDC0010), st.just(wire.INT64_MAX)
)
PATH = st.one_of(st.binary(max_size=40), st.binary(min_size=250, max_size=300), st.just(HEAD * 9))


@st.composite
def rows(draw: st.DrawFn) -> list[wire.Row]:
    made = draw(
        st.lists(
            st.tuples(
                PATH, COUNT, st.none() | PATH, COUNT, *[st.none() | COUNT for _ in range(12)]
            ),
            max_size=6,
        )
    )
    if made and draw(st.booleans()):  # One whole record inside a path of another.
        made[0] = (msgspec.msgpack.encode(made[-1])[:4096], *made[0][1:])
    return made


def batch(found: list[wire.Row]) -> bytes:
    return wire.encode(
        wire.Batch(
            v=1, kind="counters", epoch=bytes(16), generation=1, writer=bytes(8), sequence=0,
            claims=wire.Claims(), fields=wire.FIELDS, full=True, executables=len(found),
            ledger=wire.Ledger(cgroup_cpu_ns=None, attributed_cpu_ns=0, unattributed_cpu_ns=None),
            records=[wire.Record(*row) for row in found],
        )
    )  # fmt: skip


def decoded(data: list[bytes], *, quick_only: bool = False) -> list[list[wire.Row] | str]:
    """What `records.decode` makes of batches, as rows again."""
    outlines = [wire.outline(one) for one in data]

    def rows_of(number: int) -> list[wire.Row]:
        assert not quick_only
        return wire.decode_rows(data[number])

    found = records.decode(
        [one[told.at :] if told.at else b"" for one, told in zip(data, outlines, strict=True)],
        np.array([outline.records for outline in outlines], dtype=np.int64),
        np.array([outline.at > 0 for outline in outlines]),
        rows_of,
    )

    def text(names: records.Names, at: int) -> bytes | None:
        code = int(names.codes[at])
        return None if code < 0 else names.values[code]

    numbers = {name: column.tolist() for name, column in found.numbers.items()}
    every: list[wire.Row] = [
        (
            text(found.path, at),
            numbers["flags"][at],
            text(found.script, at),
            *(None if numbers[n][at] == NULL else numbers[n][at] for n in wire.COUNTERS),
        )
        for at in range(len(found.path.codes))
    ]  # type: ignore[misc]
    first = found.first.tolist()
    return [
        found.bad.get(number, every[first[number] : first[number + 1]])
        for number in range(len(data))
    ]


@given(st.lists(rows(), max_size=5))
@example([[(HEAD, 0, None, 1, *[None] * 12)], [(b"/x", 220, HEAD, 0xDC0010, *[0] * 12)]])
@settings(max_examples=150, deadline=None)
def test_all_at_once_is_as_one_by_one(found: list[list[wire.Row]]) -> None:
    assert decoded([batch(one) for one in found]) == found


def test_what_collectors_write_needs_no_object_for_a_record() -> None:
    many = [
        [(b"/bin/x%d" % at, at % 3, b"s" if at % 5 == 0 else None, 1 << at % 60, *[at] * 12)
         for at in range(count)]
        for count in (0, 1, 7, 40_000)
    ]  # fmt: skip
    assert decoded([batch(one) for one in many], quick_only=True) == many


@given(
    st.lists(rows(), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_read_as_the_wire_does(
    found: list[list[wire.Row]], changes: list[tuple[int, int]]
) -> None:
    data = [bytearray(batch(one)) for one in found]
    starts = [wire.outline(bytes(one)).at for one in data]
    for at, value in changes:
        one, start = data[at % len(data)], starts[at % len(data)]
        if start < len(one):
            one[start + at % (len(one) - start)] = value
    expected: list[list[wire.Row] | str] = []
    kept = []
    for one in map(bytes, data):
        try:
            wire.decode_header(one)
        except wire.WireError:
            continue
        kept.append(one)
        try:
            expected.append(wire.decode_rows(one))
        except wire.WireError as error:
            expected.append(str(error))
    assert decoded(kept) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"fields": [*wire.FIELDS[:3], "cpu_ns"], "records": [[b"/x", 0, None, 5]]},
        {"records": [[b"/x", 0, None, 5]]},
        {"records": [], "later": 1},
        {"fields": [*wire.FIELDS, "later"], "records": [[b"/x", 0, None, 5, *[None] * 12, 9]]},
    ],
)
def test_other_columns_are_read_by_their_names(change: dict[str, object]) -> None:
    plain = msgspec.msgpack.decode(batch([(b"/y", 0, None, 1, *[None] * 12)])) | change
    data = msgspec.msgpack.encode(plain)
    assert decoded([data, batch([(b"/z", 0, None, 2, *[7] * 12)])]) == [
        wire.decode_rows(data),
        [(b"/z", 0, None, 2, *[7] * 12)],
    ]
