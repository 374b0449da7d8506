"""Both loaders on one job, at the same time: what one counts, the other counts.

A second collector of one cgroup would go on with the first one's counters. So one has the
job's cgroup, the other the only one in it, where everything runs.

Only where the kernel has BTF and headers: not on every machine that runs the other kernel
tests, so a skip is no failure. `make test-vm` runs it on several kernels.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from groups import HIERARCHIES
from jobs import COLLECTOR, Collector, Job, Options, Result, forget, read_spool, result_of
from scale import SCALE, times

from sams_ebpf import probe

MISSING = [one.detail for one in (probe._btf(), probe._bcc(), probe._headers()) if not one.ok]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))

SECOND = 99
CPU_SHARE = 1000


def counts(result: Result) -> Counter[tuple[bytes, str]]:
    """Execs, forks and exits of every executable."""
    return Counter(
        {
            (record.path, column): getattr(record, column)
            for record in result.records.values()
            for column in ("execs", "forks", "exits")
        }
    )


def sams(*words: str) -> None:
    subprocess.run([*COLLECTOR, *words], check=True, timeout=300)


def load(loader: str, folder: Path) -> None:
    """Load a set to stay: collectors do not compile."""
    collector: dict[str, object] = {"loader": loader, "mode": "bpf"}
    if SCALE > 1:
        collector["programs_limit_percent"] = 100
    config = folder / f"{loader}.json"
    config.write_text(json.dumps({"collector": collector}))
    sams("load", "--config", str(config))


def test_the_same_job_under_both_loaders(
    make_job: Callable[..., Job],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    load("bcc", tmp_path)
    job = make_job(HIERARCHIES[-1], options=Options(loader="bcc"))
    # Takes the place of the set that stays; the first keeps the job that it has.
    load("libbpf", tmp_path)
    folder = job.folder / "libbpf"
    folder.mkdir()
    inner = job.group.child("inner")
    second = Collector(inner.path, folder, SECOND, Options(loader="libbpf"))
    try:
        job.run(job.programs["burn"], "3000000", into=inner)
        job.run(job.programs["storm.sh"], str(times(2000)), into=inner)
        job.run(job.programs["forks"], "20", "20000", into=inner)
        job.run(job.programs["chain"], str(times(500)), "2000", into=inner)
        job.run(job.programs["leader_first"], "8", "20000", into=inner)
        job.group.wait_empty()
        two = job.finish()
        second.end()
        one = result_of(read_spool(second.spool, SECOND))
    finally:
        if second.process.poll() is None:
            second.kill()
            forget(inner.path.name)
        sams("unload")
    for name, result in (("libbpf", one), ("bcc", two)):
        record_property(f"{name}_cpu_ns", result.ledger.attributed_cpu_ns)
        record_property(f"{name}_uncertain_splits", result.ledger.lost.get("splits", 0))
        record_property(f"{name}_execs", result.total("execs"))
    assert (one.final.loader, two.final.loader) == ("libbpf", "bcc")
    assert counts(one) == counts(two)
    assert one.processes == two.processes
    cpu = one.ledger.attributed_cpu_ns, two.ledger.attributed_cpu_ns
    assert abs(cpu[0] - cpu[1]) <= max(cpu) // CPU_SHARE
    assert one.ledger.cgroup_cpu_ns is not None
    assert one.ledger.cgroup_cpu_ns // 100 < cpu[0], "something was measured"
