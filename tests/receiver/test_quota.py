"""Quotas by themselves: days, restarts, and clocks that jump."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_receiver.config import Quotas
from sams_receiver.quota import DAY, Daily, Rate

QUOTAS = Quotas(bytes_per_day=100, writers_per_day=2, aside_bytes_per_day=10)


class Clock:
    """The wall's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 20_000.5 * DAY
        patch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def use(daily: Daily, node: str) -> list[bool]:
    """Whether all of a day's quotas are free; uses all of them up."""
    return [
        daily.bytes_left(node, 100),
        daily.writer_left(node, b"w" * 16),
        daily.writer_left(node, b"x" * 16),
        daily.aside_left(node, 10),
    ]


def left(daily: Daily, node: str) -> list[bool]:
    return [
        daily.bytes_left(node, 1),
        daily.writer_left(node, b"y" * 16),
        daily.aside_left(node, 1),
    ]


def test_a_node_has_its_own_quotas_and_new_ones_each_day(clock: Clock) -> None:
    daily = Daily(QUOTAS, nodes=10)
    assert use(daily, "n1") == [True] * 4
    assert left(daily, "n1") == [False] * 3
    assert daily.writer_left("n1", b"w" * 16), "one that is known already"
    assert use(daily, "n2") == [True] * 4
    clock.now += DAY / 2
    assert use(daily, "n1") == [True] * 4
    assert left(daily, "n1") == [False] * 3


def test_more_nodes_than_are_remembered_get_nothing(clock: Clock) -> None:
    daily = Daily(QUOTAS, nodes=2)
    assert daily.bytes_left("n1", 1)
    assert daily.bytes_left("n2", 1)
    assert left(daily, "n3") == [False] * 3
    clock.now += DAY
    assert daily.bytes_left("n3", 1)


@pytest.mark.parametrize(("later", "same"), [(0.1, True), (1.0, False), (-400.0, False)])
def test_what_a_restart_remembers_is_of_today(
    tmp_path: Path, clock: Clock, later: float, same: bool
) -> None:
    before = Daily(QUOTAS, nodes=10)
    use(before, "n1")
    file = tmp_path / "quotas.json"
    file.write_bytes(before.changes() or b"")
    assert before.changes() is None, "nothing new"
    clock.now += later * DAY
    after = Daily(QUOTAS, nodes=10)
    after.load(file)
    assert left(after, "n1") == [not same] * 3


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 5), st.integers(1, 8))
def test_a_bucket_gives_no_more_than_burst_and_rate(
    waits: list[float], per_second: int, burst: int
) -> None:
    rate = Rate(per_second, burst, clients=3)
    now, taken = 1000.0, 0
    for wait in waits:
        now += wait
        refused = rate.take("a", now)
        taken += not refused
        if refused:
            assert refused <= 1 / per_second
    assert taken <= burst + per_second * (now - 1000.0) + 1e-6


def test_clients_that_were_not_heard_of_for_longest_are_forgotten() -> None:
    rate = Rate(1, 1, clients=3)
    assert [rate.take(name, 0.0) for name in "abcd"] == [0.0] * 4
    assert len(rate) == 3
    assert rate.take("d", 0.0) > 0
    assert rate.take("a", 0.0) == 0.0, "as if it were new"
