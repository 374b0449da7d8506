"""The split at exec: how near to the true boundary the CPU of one image ends.

A process reads its own CPU clock as its last act before `execve` and as its first act after
it: the true boundary lies between. What is reported of the second image, taken from the
process's final clock, is where the collector has put it.
"""

from __future__ import annotations

import statistics
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from groups import HIERARCHIES
from jobs import SETUPS, Job, Options, SetUp
from scale import times
from workloads import Programs

pytestmark = pytest.mark.kernel

EXECS = times(200, 40)
MEDIAN_NS = 50_000
P95_NS = 300_000
_SLOT = struct.Struct("qqq")


@contextmanager
def other_cpu_loaded(job: Job) -> Iterator[None]:
    """A stranger that keeps a CPU busy meanwhile."""
    load = job.outside(job.programs["burn"], "600000000")
    try:
        yield
    finally:
        load.kill()
        load.wait(60)


def measure(job: Job, programs: Programs, folder: Path, hold_ms: int) -> list[int]:
    """Give for every exec how many ns outside its bracket the reported boundary lies."""
    readings = folder / "readings"
    readings.write_bytes(bytes(_SLOT.size * EXECS))
    for slot in range(EXECS):
        programs.copy("split_second", folder / f"second-{slot}")

    def split(first: int, count: int, hold: int) -> None:
        job.run(
            programs["split"],
            *(str(first), str(count), str(hold), str(first + 1), str(folder), str(readings)),
            timeout_s=hold / 1000 + 120,
        )

    quarter = EXECS // 4
    split(0, quarter, 0)
    with other_cpu_loaded(job):
        split(quarter, quarter, 0)
    split(2 * quarter, quarter, hold_ms)
    with other_cpu_loaded(job):
        split(3 * quarter, quarter, hold_ms)
    result = job.finish()
    names = result.by_name()
    outside = []
    for slot, (before, after, total) in enumerate(_SLOT.iter_unpack(readings.read_bytes())):
        assert 0 < before < after <= total, f"exec {slot} did not run as planned"
        boundary = total - names[f"second-{slot}"]
        outside.append(max(before - boundary, boundary - after, 0))
    return outside


def check(outside: list[int], note: Callable[[str, object], None] = lambda *_: None) -> None:
    p95 = statistics.quantiles(outside, n=20)[-1]
    note("split_median_ns", round(statistics.median(outside)))
    note("split_p95_ns", round(p95))
    note("split_worst_ns", max(outside))
    found = f"median {statistics.median(outside)} ns, p95 {p95:.0f} ns, worst {max(outside)} ns"
    assert statistics.median(outside) <= MEDIAN_NS, found
    assert p95 <= P95_NS, found
    print(found)


@pytest.mark.parametrize("setup", SETUPS)
def test_the_boundary_lies_where_it_was(
    make_job: Callable[..., Job],
    programs: Programs,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    setup: SetUp,
) -> None:
    job = make_job(HIERARCHIES[-1], options=Options(setup=setup))
    check(measure(job, programs, tmp_path, 2000), record_property)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("setup", SETUPS)
def test_the_boundary_after_a_minute_without_a_fork(
    make_job: Callable[..., Job], programs: Programs, tmp_path: Path, setup: SetUp
) -> None:
    job = make_job(HIERARCHIES[-1], options=Options(setup=setup))
    check(measure(job, programs, tmp_path, 60_000))
