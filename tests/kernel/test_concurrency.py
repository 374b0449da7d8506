"""Many jobs at once: each ledger closes, and no job's CPU is in another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from groups import HIERARCHIES
from jobs import Job, allowed_ns
from workloads import Programs

pytestmark = pytest.mark.kernel

JOBS = 64
BURN_US = 5_000


def test_sixty_four_jobs_at_once(
    make_job: Callable[..., Job], programs: Programs, tmp_path: Path
) -> None:
    jobs = [make_job(HIERARCHIES[number % 2], job_id=1000 + number) for number in range(JOBS)]
    own = [programs.copy("burn", tmp_path / f"only-{job.job_id}") for job in jobs]
    running = [
        job.launch(programs["storm.sh"], "20", path, str(BURN_US))
        for job, path in zip(jobs, own, strict=True)
    ]
    for job, process in zip(jobs, running, strict=True):
        job.ended(process)
        job.group.wait_empty()
    for job in jobs:
        result = job.finish()
        ledger = result.ledger
        assert ledger.unattributed_cpu_ns is not None
        assert abs(ledger.unattributed_cpu_ns) <= allowed_ns(ledger), (job.job_id, ledger)
        names = result.by_name()
        strangers = [name for name in names if name.startswith("only-")]
        assert strangers == [f"only-{job.job_id}"]
        assert names[f"only-{job.job_id}"] >= 20 * BURN_US * 1000
        assert result.total("execs") == job.expected.execs
        assert result.processes.forks == job.expected.forks
        assert result.processes.exits == job.expected.exits
