"""What Prolog and Epilog cost a job, from submission to its end, in the testbed."""

from __future__ import annotations

import resource
import statistics
import time

import testbed
from testbed import USER, Machine, product
from testbed.site import Site

from bench.section import Cell, Section, Table

ROUNDS = 15
SWITCH = "/run/with-hooks"
METHOD = f"""\
Slurm 22.05 in the testbed (cgroup v2 layout), `srun -n1 true` from submission to its end, which
includes Prolog and Epilog of the node: {ROUNDS} pairs with and without the product's two scripts,
interleaved, the order within a pair changing. Without: the same wrapper, which then runs
nothing. Median and range, ms. `script alone`: each script run by hand with the environment of a
job, waiting for it. `CPU of both scripts`: what the two and all they start take, which does not
depend on how busy the machine is; the manager's and the collector's own work is not in it."""
WRAPPER = """#!/bin/sh
[ ! -e {switch} ] || exec {hooks}/{hook}.sh
"""


def run() -> Section:
    """Measure both, interleaved."""
    with product.installed() as layer, testbed.boot("v2", layer=layer) as machine:
        site = Site(machine)
        for hook in ("prolog", "epilog"):
            text = WRAPPER.format(switch=SWITCH, hooks=product.HOOKS, hook=hook)
            machine.write(f"/opt/testbed/{hook}.sh", text, mode=0o755)
        site.slurm.start(prolog="/opt/testbed/prolog.sh", epilog="/opt/testbed/epilog.sh")
        with_ms, without_ms = _pairs(site)
        alone = {hook: _alone(machine, hook) for hook in ("prolog", "epilog")}
        cpu_ms = _cpu_ms(machine)
    rows: list[tuple[Cell, ...]] = [
        ("job without", *_figures(without_ms)),
        ("job with", *_figures(with_ms)),
        *((f"{hook} script alone", *_figures(times)) for hook, times in alone.items()),
    ]
    rows.append(("CPU of both scripts", cpu_ms, None, None))
    cost = statistics.median(with_ms) - statistics.median(without_ms)
    remark = f"Cost to a job: {cost:.1f} ms (difference of the medians); the bar is 100 ms."
    return Section(
        title="Prolog and Epilog",
        method=METHOD,
        tables=[Table(("", "median ms", "fastest", "slowest"), rows)],
        remarks=[remark],
    )


def _figures(times: list[float]) -> tuple[float, float, float]:
    return statistics.median(times), min(times), max(times)


def _pairs(site: Site) -> tuple[list[float], list[float]]:
    flag = site.machine.path(SWITCH)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS):
        for wanted in (True, False) if number % 2 else (False, True):
            flag.touch() if wanted else flag.unlink(missing_ok=True)
            site.slurm.wait_idle()
            times[wanted].append(_job_ms(site.machine))
    return times[True], times[False]


def _job_ms(machine: Machine) -> float:
    """Submission to the end of the job: `srun` waits for the Epilog of a job of its own."""
    begin = time.monotonic()
    machine.run(["srun", "-n1", "true"], user=USER)
    return (time.monotonic() - begin) * 1000


def _alone(machine: Machine, hook: str) -> list[float]:
    """Run a hook by one shell inside, which tells the time before and after each."""
    loop = (
        'for i in $(seq 20); do a=$(date +%s%N); SLURM_JOB_ID=$((900000 + i)) sh "$0"; '
        "b=$(date +%s%N); echo $(( (b - a) / 1000 )); done"
    )
    script = f"{product.HOOKS}/{hook}.sh"
    shown = machine.run(["/bin/bash", "-c", loop, script]).stdout
    return [int(line) / 1000 for line in shown.split()]


def _cpu_ms(machine: Machine, runs: int = 20) -> float:
    """CPU time of one Prolog and one Epilog, the shell that counts them taken off."""

    def spent(body: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        loop = f"i=0; while [ $i -lt {runs} ]; do i=$((i + 1)); {body}; done"
        machine.run(["/bin/sh", "-c", loop, product.HOOKS])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    both = 'export SLURM_JOB_ID=$((800000 + i)); sh "$0/prolog.sh"; sh "$0/epilog.sh"'
    return 1000 * (spent(both) - spent(":")) / runs
