"""Cgroup trees as other versions and set-ups of Slurm make them, made by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
from testbed import UID, wait_for
from testbed.product import BIN, PROGRAM
from testbed.site import CONFIG, WORK, Site, printed

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

SLUID = "s0123456789ABC"
TOP = "/sys/fs/cgroup"
JOB = 4711
ENV = "/run/tree.env"

TREES = {
    "SLUID, as from 26.05": ("system.slice/slurmstepd.scope", SLUID),
    "SLUID and node's name": ("system.slice/n1_slurmstepd.scope", SLUID),
    "job id, no node's name": ("system.slice/slurmstepd.scope", f"job_{JOB}"),
}


@pytest.fixture(params=TREES, name="folder")
def _folder(request: pytest.FixtureRequest, node: Site) -> Iterator[str]:
    parent, job = TREES[request.param]
    yield f"{TOP}/{parent}/{job}"
    node.machine.run(
        ["find", f"{TOP}/{parent}/{job}", "-depth", "-type", "d", "-delete"], check=False
    )


def run_in(node: Site, folder: str, *words: str) -> dict[str, int]:
    """Do what slurmstepd does: make the job's cgroups, and start the task within."""
    leaf = f"{folder}/step_0/user/task_0"
    command = f"mkdir -p {leaf}; echo $$ > {leaf}/cgroup.procs; exec {WORK} {shlex.join(words)}"
    shown = node.machine.run(["/bin/sh", "-c", command]).stdout
    node.machine.run(["find", folder, "-depth", "-type", "d", "-delete"])
    return printed(shown)


def test_is_found_from_the_first_process_on(node: Site, folder: str) -> None:
    """The collector comes after the job's end, and still has all of it."""
    figures = run_in(node, folder, "short=25", "burn=60")
    node.machine.write(ENV, f"SLURM_JOB_ID={JOB}\0SLURM_JOB_SLUID={SLUID}\0")
    command = [PROGRAM, "collect", "--finish", "--jobid", str(JOB), "--config", CONFIG]
    before = {run.last.epoch for run in node.runs()}
    node.machine.run([*command, "--env-file", ENV])
    (run,) = [run for run in node.runs() if run.last.epoch not in before]
    assert run.claims.job_id == JOB
    assert run.claims.sluid == SLUID
    for name in ("work", "short", "burn"):
        assert run.execs(f"{BIN}/{name}") == figures[name]
    truth = figures["cpu_us"] * 1000
    assert abs(run.cpu_ns(f"{BIN}/") - truth) <= max(truth * 0.005, 5_000_000)
    assert run.last.final is not None
    assert node.status()["programs"]["slots_used"] == 0


def test_a_users_own_folder_of_that_name_is_no_job(node: Site) -> None:
    parent = f"{TOP}/system.slice/slurmstepd.scope"
    node.machine.run(["mkdir", "-p", parent])
    node.machine.run(["chown", str(UID), parent])
    try:
        node.machine.run(["mkdir", f"{parent}/job_{JOB}"], user="hpcu")
        assert node.status()["programs"]["slots_used"] == 0
    finally:
        node.machine.run(["find", parent, "-depth", "-type", "d", "-delete"])


def test_a_job_that_nobody_claims_is_spooled_as_such(node: Site) -> None:
    """No Prolog ran. What is known of it is kept, and the slot freed."""
    node.configure(unclaimed_after_s=1)
    node.machine.run([PROGRAM, "load"])
    folder = f"{TOP}/system.slice/slurmstepd.scope/job_{JOB + 1}"
    figures = run_in(node, folder, "short=5", "burn=30")
    before = {run.last.epoch for run in node.runs()}

    def spooled() -> bool:
        node.machine.run([PROGRAM, "gc"])
        return any(run.last.epoch not in before for run in node.runs())

    try:
        wait_for("the unclaimed job in the spool", spooled)
    finally:
        node.configure()
    (run,) = [run for run in node.runs() if run.last.epoch not in before]
    assert run.last.unclaimed
    assert run.execs(f"{BIN}/short") == figures["short"]
    assert node.status()["programs"]["slots_used"] == 0
