"""What a context switch and a process cost with and without the programs."""

from __future__ import annotations

import statistics

from jobs import Job
from workloads import Truth

from bench import rig as rigs
from bench.section import Section, Table

ROUND_TRIPS = 20_000
LIVES = 300
ROUNDS = 5


def run() -> Section:
    """Pinned ping-pong and a storm of short lives: nothing loaded, default, exact."""
    with rigs.rig() as rig:
        kinds = {
            "pipe round trip (2 switches)": ("pingpong", ROUND_TRIPS, ()),
            "fork, exec, wait of /bin/true": ("lives", LIVES, ("/bin/true",)),
        }
        rows: list[list[str | float]] = []
        for kind, (workload, count, more) in kinds.items():

            def measure(case: rigs.Case) -> float:
                with rig.job(case) as job:
                    return _elapsed_ns(job, workload, count, more) / count  # noqa: B023

            found = rigs.interleaved(rigs.CASES, ROUNDS, measure)
            for case, values in found.items():
                against = 100 * (rigs.ratio(found, case, None) - 1)
                rows.append([f"{kind}: {rigs.NAMES[case]}", statistics.median(values), against])
        return Section(
            title="A context switch and a life, with and without",
            method=f"""Inside a job's cgroup: {ROUND_TRIPS:,} round trips over pipes between two
processes pinned to one CPU, and {LIVES:,} lives of `/bin/true`; {ROUNDS} rounds, without a
collector and with both set-ups in turn. The last column is the median, over the rounds, of the
ratio to the same round without.""",
            tables=[Table(("", "ns each, median", "% more than without"), rows)],
        )


def _elapsed_ns(job: Job, workload: str, count: int, more: tuple[str, ...]) -> int:
    truth = Truth(job.folder / "elapsed")
    process = job.launch(
        job.programs[workload], str(count), *more, environ={"TRUTH": str(truth.file)}
    )
    assert process.wait(120) == 0
    return truth.read()["elapsed_ns"]
