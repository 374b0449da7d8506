"""Killed at any moment: totals stay exact, nothing doubles, no identity comes twice."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from groups import Hierarchy
from jobs import Collector, Job, Options, allowed_ns, result_of
from workloads import until

from sams_ebpf import wire

pytestmark = pytest.mark.kernel

MakeJob = Callable[..., Job]


class Shipped:
    """What has left the spool, kept as a receiver keeps it."""

    def __init__(self) -> None:
        self.batches: dict[wire.Identity, bytes] = {}
        self.times: Counter[wire.Identity] = Counter()

    def take(self, spool: Path) -> None:
        """Take every whole batch out of the spool."""
        for path in sorted(spool.glob("*.msgpack")):
            data = path.read_bytes()
            identity = wire.decode_header(data).identity
            assert self.batches.setdefault(identity, data) == data, f"{identity} used twice"
            self.times[identity] += 1
            path.unlink()


def torture(make_job: MakeJob, hierarchy: Hierarchy, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    options = Options(interval_s=1)
    job = make_job(hierarchy, options=options)
    shipped = Shipped()
    assert job.collector is not None
    spool = job.collector.spool
    storms = [job.launch(job.programs["storm_until.sh"]) for _ in range(2)]
    for kill in range(kills):
        # From before the first line of Python to well after the first harvests; every third
        # life has written something, however slow the machine is.
        if kill % 3 == 0:
            before = len(list(spool.glob("*.msgpack")))
            until(lambda: len(list(spool.glob("*.msgpack"))) > before, "a batch")  # noqa: B023
        time.sleep(chance.uniform(0.0, 1.6))
        job.collector.kill()
        if kill % 2:
            shipped.take(spool)
        last = kill == kills - 1
        job.collector = Collector(job.group.path, job.folder, job.job_id, options, wait=last)
    job.stop.touch()
    for storm in storms:
        job.ended(storm)
    job.group.wait_empty()
    job.collector.end()
    shipped.take(spool)
    batches = [wire.decode(data) for data in shipped.batches.values()]
    assert max(shipped.times.values()) == 1, "an identity was spooled twice"
    assert len({batch.writer for batch in batches}) > 1, "more than one life has written"
    result = result_of(batches)
    ledger = result.ledger
    assert result.final.final is not None
    assert ledger.unattributed_cpu_ns is not None
    assert abs(ledger.unattributed_cpu_ns) <= allowed_ns(ledger), ledger
    assert ledger.attributed_cpu_ns == result.total("cpu_ns")
    said = job.truth.read()
    assert result.processes.forks == result.total("forks") == said["forks"]
    assert result.total("execs") == said["execs"] + len(storms)
    assert result.processes.exits == said["exits"] + len(storms)
    before = 0
    for batch in sorted(batches, key=lambda b: (b.generation, b.sequence)):
        assert batch.ledger is not None
        assert batch.ledger.attributed_cpu_ns >= before, "totals go forward with the identity"
        before = batch.ledger.attributed_cpu_ns
    writers: dict[int, set[bytes]] = {}
    for batch in batches:
        writers.setdefault(batch.generation, set()).add(batch.writer)
    assert all(len(found) == 1 for found in writers.values()), "a generation has one writer"


@pytest.mark.parametrize("hierarchy", ["v1", "v2"])
def test_killed_three_times_in_a_storm(make_job: MakeJob, hierarchy: Hierarchy) -> None:
    torture(make_job, hierarchy, kills=3, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("hierarchy", ["v1", "v2"])
def test_killed_fifty_times_in_a_storm(make_job: MakeJob, hierarchy: Hierarchy) -> None:
    torture(make_job, hierarchy, kills=50, seed=2)
