"""What the benchmarks share: compiled workloads, jobs with or without a collector, medians."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import workloads
from groups import Hierarchy
from jobs import COLLECTOR, Job, Options, SetUp

from bench import bpfstats

K = TypeVar("K")
Case = SetUp | None
CASES: tuple[Case, ...] = (None, "default", "exact")
NAMES: dict[Case, str] = {None: "without", "default": "default set-up", "exact": "exact set-up"}


class Rig:
    """A folder with the compiled workloads, and jobs in it; program: the collector's."""

    def __init__(self, folder: Path, program: Sequence[str] = COLLECTOR) -> None:
        self.folder = folder
        self.program = program
        self.programs = workloads.compile_all(folder / "programs")
        self._jobs = 0

    def job(
        self,
        setup: Case = "default",
        *,
        hierarchy: Hierarchy = "v2",
        interval_s: float = 3600,
        mode: str = "bpf",
    ) -> Job:
        """Make a job with a collector of that set-up on it, or without one for None."""
        self._jobs += 1
        return Job(
            self.folder / f"job-{self._jobs}",
            self.programs,
            hierarchy,
            options=Options(
                setup=setup or "default", interval_s=interval_s, mode=mode, program=self.program
            ),
            job_id=self._jobs,
            collected=setup is not None,
        )

    def new_folder(self, name: str) -> Path:
        """Make a folder below the rig's."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder


@contextmanager
def rig(program: Sequence[str] = COLLECTOR) -> Iterator[Rig]:
    """Set up, and clean up."""
    with tempfile.TemporaryDirectory(prefix="sams-bench-") as folder:
        yield Rig(Path(folder), program)


def interleaved(
    cases: Sequence[K], rounds: int, measure: Callable[[K], float]
) -> dict[K, list[float]]:
    """Measure every case once per round, in turn: what drifts, drifts for all."""
    found: dict[K, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(measure(case))
    return found


def medians(found: dict[K, list[float]]) -> dict[K, float]:
    """Take the median of each case."""
    return {case: statistics.median(values) for case, values in found.items()}


def ratio(found: dict[K, list[float]], case: K, base: K) -> float:
    """Median over rounds of case / base within the round."""
    return statistics.median(a / b for a, b in zip(found[case], found[base], strict=True))


def program_time_ns(act: Callable[[], object], only: set[int]) -> int:
    """How long these BPF programs (all, if none are named) ran while something was done."""
    with bpfstats.counting():
        before = bpfstats.programs()
        act()
        spent = bpfstats.spent(before, bpfstats.programs())
        return sum(runs.time_ns for number, runs in spent.items() if not only or number in only)
