"""What kernel tests share: the compiled workloads, and jobs that leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import workloads
from groups import Hierarchy
from jobs import Job


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> workloads.Programs:
    made = os.environ.get("SAMS_TEST_PROGRAMS")  # compiled elsewhere, for a slow machine
    return (
        workloads.Programs(Path(made))
        if made
        else workloads.compile_all(tmp_path_factory.mktemp("programs"))
    )


@pytest.fixture
def make_job(tmp_path: Path, programs: workloads.Programs) -> Iterator[Callable[..., Job]]:
    """Jobs entered here end with the test, whatever happens in it."""
    count = 0
    with ExitStack() as stack:

        def make(hierarchy: Hierarchy, **options: Any) -> Job:
            nonlocal count
            count += 1
            options.setdefault("job_id", count)
            folder = options.pop("folder", tmp_path / f"job{count}")
            return stack.enter_context(Job(folder, programs, hierarchy, **options))

        yield make
