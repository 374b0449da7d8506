"""The worker pool: every task is done once, whoever dies."""

from __future__ import annotations

from pathlib import Path

import pytest
from pool_tasks import Task, square

from sams_aggregator import pool


@pytest.mark.parametrize("workers", [1, 3])
def test_all_tasks_are_done(tmp_path: Path, workers: int) -> None:
    found = list(pool.run(square, [Task(n, tmp_path) for n in range(12)], workers))
    assert sorted(done.result or 0 for done in found) == [n * n for n in range(12)]


def test_a_killed_worker_takes_nothing_with_it(tmp_path: Path) -> None:
    tasks = [Task(n, tmp_path, die=2 if n in {3, 7} else 0) for n in range(10)]
    found = {done.task.number: done for done in pool.run(square, tasks, 2)}
    assert {number: done.result for number, done in found.items()} == {n: n * n for n in range(10)}
    assert (tmp_path / "deaths-3").read_text() == "2"


def test_a_task_that_always_kills_its_worker_is_named(tmp_path: Path) -> None:
    tasks = [Task(n, tmp_path, die=99 if n == 1 else 0) for n in range(4)]
    found = {done.task.number: done for done in pool.run(square, tasks, 2)}
    assert found[1].error is not None
    assert "its worker died 3 times" in found[1].error
    assert [found[n].result for n in (0, 2, 3)] == [0, 4, 9]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tasks_own_error_is_told(tmp_path: Path, workers: int) -> None:
    tasks = [Task(1, tmp_path, fail=True), Task(2, tmp_path)]
    found = {done.task.number: done for done in pool.run(square, tasks, workers)}
    assert found[1].error == "task 1 does not want to"
    assert found[2].result == 4
