"""What a spool under pressure gives up: never silently, unless a later full batch has it all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_ebpf import pressure, wire
from sams_ebpf.pressure import Item, Plan
from sams_ebpf.spool import Entry

DAY = 86400.0


def entry(epoch: int, generation: int, sequence: int, kind: str) -> Entry:
    writer = bytes([epoch, generation]) * 4
    return Entry(wire.Identity(bytes([epoch]) * 16, generation, writer, sequence), kind)


@st.composite
def spools(draw: st.DrawFn) -> list[Item]:
    """Epochs, generations, sequences with holes; ages that clocks have made nonsense of."""
    items = {}
    for _ in range(draw(st.integers(0, 40))):
        kind = draw(st.sampled_from(["delta", "delta", "full", "final", "tombstone"]))
        one = entry(
            draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 12)), kind
        )
        size = draw(st.integers(1, 5)) * 4096
        age = draw(st.floats(0, 3 * DAY, allow_nan=False))
        items[one.identity, kind == "tombstone"] = Item(one, size, age)
    return list(items.values())


def settle(items: list[Item], plan: Plan) -> list[Item]:
    gone = {*plan.superseded, *plan.forgotten}
    gone |= {item.entry for loss in plan.lost for item in loss.items}
    return [item for item in items if item.entry not in gone]


def counters(items: list[Item]) -> list[Item]:
    return [item for item in items if item.entry.kind != "tombstone"]


def size(items: list[Item]) -> int:
    return sum(item.bytes for item in items)


unreadable = st.functions(like=lambda _entry: None, returns=st.booleans(), pure=True)


@given(spools(), st.integers(16, 400), st.integers(0, 100), unreadable)
def test_nothing_vanishes_without_a_tombstone_or_a_full_batch_that_has_it_all(
    items: list[Item], kilobytes: int, shortage: int, holds_all: Callable[[Entry], bool]
) -> None:
    plan = pressure.plan(
        items,
        max_bytes=kilobytes * 1024,
        max_age_s=2 * DAY,
        shortage=shortage * 1024,
        holds_all=holds_all,
    )
    kept = {item.entry for item in settle(items, plan)}
    told = {item.entry for loss in plan.lost for item in loss.items}
    everything = {item.entry for item in items}
    gone = everything - kept
    assert gone == {*plan.superseded, *told, *plan.forgotten}
    assert len(plan.superseded) + len(told) + len(plan.forgotten) == len(gone)
    for one in plan.superseded:
        # A full batch of the same epoch, later, readable, and itself still there or told of.
        assert any(
            other.kind in ("full", "final")
            and holds_all(other)
            and pressure.order(other)[0] == pressure.order(one)[0]
            and pressure.order(other) > pressure.order(one)
            for other in kept | told
        )
    for loss in plan.lost:
        assert [item.entry.identity[:3] for item in loss.items] == [
            loss.items[0].entry.identity[:3]
        ] * len(loss.items)
        sequences = [item.entry.identity.sequence for item in loss.items]
        assert sequences == sorted(sequences)
        # The range that the tombstone names holds nothing that is kept.
        assert not [
            other
            for other in kept
            if other.kind != "tombstone"
            and other.identity[:3] == loss.items[0].entry.identity[:3]
            and other.identity.sequence <= sequences[-1]
        ]
    assert {one.kind for one in plan.forgotten} <= {"tombstone"}


@given(spools(), st.integers(16, 400), unreadable)
def test_the_rest_is_within_its_bounds(
    items: list[Item], kilobytes: int, holds_all: Callable[[Entry], bool]
) -> None:
    bound = kilobytes * 1024
    plan = pressure.plan(items, max_bytes=bound, max_age_s=2 * DAY, shortage=0, holds_all=holds_all)
    kept = settle(items, plan)
    assert size(kept) <= bound
    assert all(item.age_s <= 2 * DAY for item in counters(kept))
    # And it stays: the second look finds nothing to do.
    again = pressure.plan(kept, max_bytes=bound, max_age_s=2 * DAY, shortage=0, holds_all=holds_all)
    assert again == Plan([], [], [])


@given(spools(), unreadable)
def test_without_pressure_nothing_goes(
    items: list[Item], holds_all: Callable[[Entry], bool]
) -> None:
    plan = pressure.plan(
        items, max_bytes=1 << 40, max_age_s=4 * DAY, shortage=0, holds_all=holds_all
    )
    assert plan == Plan([], [], [])


@given(spools(), st.integers(1, 400), unreadable)
def test_a_disk_that_others_fill_costs_only_what_is_superseded(
    items: list[Item], shortage: int, holds_all: Callable[[Entry], bool]
) -> None:
    plan = pressure.plan(
        items, max_bytes=1 << 40, max_age_s=4 * DAY, shortage=shortage * 1024, holds_all=holds_all
    )
    assert (plan.lost, plan.forgotten) == ([], [])


def test_the_superseded_go_first_however_young() -> None:
    old = Item(entry(1, 1, 0, "delta"), 4096, 9.0)
    young = [Item(entry(2, 1, n, "delta"), 4096, 1.0) for n in range(3)]
    full = Item(entry(2, 1, 3, "full"), 4096, 0.5)
    plan = pressure.plan(
        [old, *young, full],
        max_bytes=4 * 4096,
        max_age_s=DAY,
        shortage=0,
        holds_all=lambda _entry: True,
    )
    assert plan.superseded == [item.entry for item in young[:2]]
    assert plan.lost == []


def test_a_full_batch_that_cannot_be_read_supersedes_nothing() -> None:
    delta = Item(entry(1, 1, 0, "delta"), 4096, 2.0)
    full = Item(entry(1, 1, 1, "full"), 4096, 1.0)
    plan = pressure.plan(
        [delta, full], max_bytes=4096, max_age_s=DAY, shortage=0, holds_all=lambda _entry: False
    )
    assert plan.superseded == []
    assert [item.entry for loss in plan.lost for item in loss.items] == [delta.entry, full.entry]


@pytest.mark.parametrize("generations", [(1, 1), (1, 2)])
def test_a_tombstone_per_writer(generations: tuple[int, int]) -> None:
    items = [
        Item(entry(1, generation, at, "delta"), 4096, 9.0 - at)
        for at, generation in enumerate(generations)
    ]
    plan = pressure.plan(
        items, max_bytes=2048, max_age_s=DAY, shortage=0, holds_all=lambda _entry: True
    )
    assert [loss.reason for loss in plan.lost] == ["size"] * len(set(generations))
