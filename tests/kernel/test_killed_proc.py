"""Killed at any moment in mode `proc`: no live process is counted twice, none is forgotten."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable

import pytest
from groups import Hierarchy
from jobs import Collector, Job, Options, read_spool, result_of

from sams_ebpf import procfs, wire

pytestmark = pytest.mark.kernel

BURN = "import os\nwhile not os.path.exists(os.environ['STOP']): sum(range(10000))"


def torture(make_job: Callable[..., Job], hierarchy: Hierarchy, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    options = Options(interval_s=1, mode="proc")
    job = make_job(hierarchy, options=options)
    assert job.collector is not None
    python = os.path.realpath(sys.executable)
    steady = job.launch(python, "-c", BURN)
    storm = job.launch(job.programs["storm_until.sh"])
    taken: dict[wire.Identity, wire.Batch] = {}
    while not any(job.collector.spool.iterdir()):
        time.sleep(0.05)
    for kill in range(kills):
        # From before the first line of Python to well after the first harvests.
        time.sleep(chance.uniform(0.0, 2.5))
        job.collector.kill()
        if kill % 2:
            for path in job.collector.spool.glob("*.msgpack"):
                batch = wire.decode(path.read_bytes())
                assert batch.identity not in taken
                taken[batch.identity] = batch
                path.unlink()
        wait = kill == kills - 1
        job.collector = Collector(job.group.path, job.folder, job.job_id, options, wait=wait)
    while not any(job.collector.spool.iterdir()):
        time.sleep(0.05)
    job.stop.touch()
    # A zombie's clock is its whole life; it is waited for only after the collector's end.
    os.waitid(os.P_PID, steady.pid, os.WEXITED | os.WNOWAIT)
    storm.wait(60)
    life_ns = procfs.clock(steady.pid)
    job.collector.end()
    assert steady.wait(60) == 0
    left = read_spool(job.collector.spool)
    assert not {batch.identity for batch in left} & set(taken)
    result = result_of([*taken.values(), *left])
    ledger = result.ledger
    assert result.final.mode == "proc"
    assert ledger.cgroup_cpu_ns is not None
    assert ledger.attributed_cpu_ns == result.total("cpu_ns") <= ledger.cgroup_cpu_ns
    assert ledger.attributed_cpu_ns + (ledger.unattributed_cpu_ns or 0) == ledger.cgroup_cpu_ns
    counted = result.by_name()[os.path.basename(python)]  # noqa: PTH119 - a name, no file
    assert life_ns is not None
    # All but what it used before it had entered the cgroup.
    assert life_ns - 20_000_000 <= counted <= life_ns
    generations = {batch.generation for batch in [*taken.values(), *left]}
    assert len({batch.writer for batch in [*taken.values(), *left]}) == len(generations) > 1


@pytest.mark.parametrize("hierarchy", ["v1", "v2"])
def test_killed_four_times(make_job: Callable[..., Job], hierarchy: Hierarchy) -> None:
    torture(make_job, hierarchy, kills=4, seed=3)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("hierarchy", ["v1", "v2"])
def test_killed_fifty_times(make_job: Callable[..., Job], hierarchy: Hierarchy) -> None:
    torture(make_job, hierarchy, kills=50, seed=4)
