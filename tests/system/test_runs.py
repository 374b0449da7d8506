"""Two runs of one job on a node: the same cgroup path, and yet each has what is its own.

Cgroups and the Prolog's files are made by hand, so that the order of events, which on a real
node is a race, is the one that is to be tried.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from testbed import wait_for
from testbed.product import BIN, PROGRAM
from testbed.site import CONFIG, JOBS, WORK, Run, Site, printed

from sams_ebpf import tracing

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

PARENT = "/sys/fs/cgroup/system.slice/n1_slurmstepd.scope"
IDS = count(5000)
# How long the kernel side takes an unclaimed job's new cgroup for the same run's.
SAME_RUN_S = 5


def uptime() -> str:
    return Path("/proc/uptime").read_text().split()[0]


class Job:
    """One job id, its runs' files as the Prolog makes them, and its cgroup."""

    def __init__(self, node: Site) -> None:
        self.node = node
        self.id = next(IDS)
        self.folder = f"{PARENT}/job_{self.id}"
        self.runs = 0

    def prolog(self, restart: int | None = None) -> str:
        """Give the new run's instance."""
        instance = f"{self.id}.{self.runs}" if self.runs else str(self.id)
        lines = {
            "SAMS_EBPF_UPTIME": uptime(),
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_RESTART_COUNT": str(self.runs if restart is None else restart),
        }
        text = "".join(f"{key}={value}\0" for key, value in lines.items())
        self.node.machine.write(f"{JOBS}/{instance}/env", text)
        self.runs += 1
        return instance

    def epilog(self, instance: str) -> None:
        self.node.machine.write(f"{JOBS}/{instance}/ended", f"{uptime()}\n")
        # The kernel's word is rounded to hundredths: what comes next comes in a later one.
        time.sleep(0.02)

    def work(self, *words: str) -> dict[str, int]:
        """Run a step: the job's cgroup comes and goes with it."""
        leaf = f"{self.folder}/step_0/user/task_0"
        command = f"mkdir -p {leaf}; echo $$ > {leaf}/cgroup.procs; exec {WORK} {shlex.join(words)}"
        shown = self.node.machine.run(["/bin/sh", "-c", command]).stdout
        self.remove()
        return printed(shown)

    def remove(self) -> None:
        """Busy for as long as a process in it has not quite died."""
        find = ["find", self.folder, "-depth", "-type", "d", "-delete"]

        def gone() -> bool:
            self.node.machine.run(find, check=False)
            return not self.node.machine.path(self.folder).exists()

        wait_for("the cgroup's end", gone)

    def command(self, instance: str) -> list[str]:
        words = ["--jobid", instance, "--config", CONFIG, "--env-file", f"{JOBS}/{instance}/env"]
        return [PROGRAM, "collect", *words]

    def collect(self, instance: str) -> None:
        """Run the collector of a run that has ended."""
        self.node.machine.run(self.command(instance))

    def run_of(self, number: int) -> list[Run]:
        """Epochs of one run."""
        return [run for run in self.node.of(self.id) if run.claims.restart_count == number]


def collectors(job: Job, instance: str) -> list[int]:
    """Host PIDs of the collectors of a run."""
    found = job.node.machine.processes().items()
    line = f"--jobid {instance} "
    return [pid for pid, text in found if "collect" in text and line in text]


@contextmanager
def busy(job: Job) -> Iterator[list[int]]:
    """A process in the job's cgroup for as long as this lasts; host PIDs."""
    leaf = f"{job.folder}/step_0/user/task_0"
    command = f"mkdir -p {leaf}; echo $$ > {leaf}/cgroup.procs; exec {BIN}/burn 600000"
    process = job.node.machine.spawn(["/bin/sh", "-c", command])

    def pids() -> list[int]:
        found = job.node.machine.processes().items()
        return [pid for pid, text in found if f"{BIN}/burn 600000" in text]

    try:
        wait_for("the process", pids)
        yield pids()
    finally:
        for pid in pids():
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        job.remove()


@pytest.fixture
def job(node: Site) -> Iterator[Job]:
    made = Job(node)
    yield made
    made.remove()
    node.machine.run(["sh", "-c", f"rm -rf {JOBS}/{made.id} {JOBS}/{made.id}.*"])
    assert node.status()["programs"]["slots_used"] == 0


def check(run: Run, figures: dict[str, int]) -> None:
    for name in ("work", "short", "burn"):
        assert run.execs(f"{BIN}/{name}") == figures[name], name
    truth = figures["cpu_us"] * 1000
    assert abs(run.cpu_ns(f"{BIN}/") - truth) <= max(truth * 0.005, 5_000_000)
    assert len(run.finals) == 1
    assert set(run.ledger.lost) <= {"missed_deaths"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "second first"])
def test_collectors_that_come_when_both_runs_are_over(job: Job, order: tuple[int, int]) -> None:
    instances, figures = [], []
    for number in range(2):
        instances.append(job.prolog())
        figures.append(job.work(f"short={10 + 7 * number}", "burn=60"))
        job.epilog(instances[-1])
        time.sleep(0 if number else SAME_RUN_S)
    for number in order:
        job.collect(instances[number])
    for number in range(2):
        (run,) = job.run_of(number)
        check(run, figures[number])


def test_steps_before_the_collector_came_are_its_run_s(job: Job) -> None:
    """A cgroup that came and went long before the one that is there now: another epoch."""
    instance = job.prolog()
    first = job.work("short=10", "burn=60")
    time.sleep(SAME_RUN_S)
    second = job.work("short=20", "burn=60")
    job.epilog(instance)
    job.collect(instance)
    both = sorted(job.run_of(0), key=lambda run: run.execs(f"{BIN}/short"))
    assert len(both) == 2
    for run, figures in zip(both, (first, second), strict=True):
        check(run, figures)


def test_a_collector_ends_by_the_mark_before_the_next_run_begins(job: Job) -> None:
    """systemd need not have carried out the Epilog's request."""
    first, figures = job.prolog(), []
    collector = job.node.machine.spawn(job.command(first))
    try:
        figures.append(job.work("short=10", "burn=60"))
        wait_for("the claim", lambda: job.node.status()["programs"]["sets"][0]["unclaimed"] == 0)
        job.epilog(first)
        assert collector.wait(60) == 0
    finally:
        collector.kill()
        collector.communicate()
    second = job.prolog()
    figures.append(job.work("short=20", "burn=60"))
    job.epilog(second)
    job.collect(second)
    for number in range(2):
        (run,) = job.run_of(number)
        check(run, figures[number])


def test_a_collector_that_was_deaf_when_the_next_run_began(job: Job) -> None:
    """Nothing can tell the two apart then; the first run's ledger says how much is in doubt."""
    first = job.prolog()
    Path(job.node.machine.path(PARENT)).mkdir(parents=True, exist_ok=True)
    collector = job.node.machine.spawn(job.command(first))
    try:
        job.work("short=10", "burn=60")
        wait_for("the collector", lambda: collectors(job, first))
        wait_for("the claim", lambda: job.node.status()["programs"]["sets"][0]["unclaimed"] == 0)
        for pid in collectors(job, first):
            os.kill(pid, signal.SIGSTOP)
        job.epilog(first)
        second = job.prolog()
        job.work("short=20", "burn=400")
        # nsenter(1) has stopped itself along with it.
        collector.send_signal(signal.SIGCONT)
        for pid in collectors(job, first):
            os.kill(pid, signal.SIGCONT)
        assert collector.wait(60) == 0
    finally:
        collector.kill()
        collector.communicate()
    (run,) = job.run_of(0)
    assert run.execs(f"{BIN}/short") == 30
    # The later run's cgroup has gone unread: all of it is in doubt.
    assert run.ledger.lost[tracing.LATER_RUN] == run.ledger.attributed_cpu_ns
    job.epilog(second)
    job.collect(second)
    assert job.run_of(1) == []


def test_a_run_that_began_in_the_slot_of_one_whose_collector_was_lost(job: Job) -> None:
    """The first run is closed as far as it is known, the second counted from there on."""
    node = job.node
    first = job.prolog()
    job.node.machine.path(PARENT).mkdir(parents=True, exist_ok=True)
    lost = node.machine.spawn(job.command(first))
    figures = job.work("short=10", "burn=60")
    wait_for("the claim", lambda: node.status()["programs"]["sets"][0]["unclaimed"] == 0)
    for pid in collectors(job, first):
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    job.epilog(first)
    second = job.prolog()
    with busy(job):
        time.sleep(0.3)  # counted where nobody can tell it from the first run's
        collector = node.machine.spawn(job.command(second))
        wait_for("the second run's batch", lambda: job.run_of(1))
        job.epilog(second)
    _, errors = collector.communicate(timeout=60)
    assert collector.returncode == 0, errors
    (one,) = [run for run in node.of(job.id) if run.last.unclaimed]
    assert one.execs(f"{BIN}/short") == figures["short"]
    assert one.ledger.lost[tracing.LATER_RUN] > 0
    (run,) = job.run_of(1)
    assert len(run.finals) == 1
    assert run.execs(f"{BIN}/short") == 0
    assert run.cpu_ns(f"{BIN}/burn") > 0
    assert run.ledger.unattributed_by["before_attach"] > 0
    assert tracing.LATER_RUN not in run.ledger.lost


def test_sampled_runs_do_not_continue_each_other(job: Job) -> None:
    """The first run's collector was lost for good; the second run's unit has the same name."""
    node = job.node
    node.configure(mode="proc", interval_s=1)
    node.machine.run([PROGRAM, "unload"])
    try:
        first = job.prolog()
        with busy(job) as processes:
            collector = node.machine.spawn(job.command(first))
            wait_for("a batch", lambda: job.run_of(0))
            for pid in collectors(job, first):
                os.kill(pid, signal.SIGKILL)
            collector.communicate()
        assert processes
        node.machine.run(["rm", "-r", f"{JOBS}/{first}"])
        job.runs = 0  # the folder is gone: the name is free
        second = job.prolog(restart=1)
        assert second == first
        collector = node.machine.spawn(job.command(second))
        with busy(job):
            wait_for("a batch of the second run", lambda: job.run_of(1))
            job.epilog(second)
        _, errors = collector.communicate(timeout=60)
        assert collector.returncode == 0, errors
    finally:
        node.configure()
        node.machine.run([PROGRAM, "load"])
    (lost,), (run,) = job.run_of(0), job.run_of(1)
    assert lost.last.final is not None
    assert lost.last.final.reason == "collector-lost"
    assert lost.ledger.lost["collector_lost_window_ns"] > 0
    assert "an earlier run's collector was lost" in errors
    assert run.last.epoch != lost.last.epoch
    assert run.last.generation == 1
    assert len(run.finals) == len(lost.finals) == 1
    assert not list(node.machine.path("/var/lib/sams-ebpf").glob("proc-*"))
