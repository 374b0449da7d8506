"""What breaks on a node: the job runs on, one clear line says so, nothing is counted twice."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import USER, wait_for
from testbed.product import BIN, HOOKS, PROGRAM
from testbed.site import JOBS, SPOOL, WORK, Site, printed
from testbed.slurm import Slurm

from sams_ebpf import leftovers

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

DROP_IN = "/etc/systemd/system/sams-ebpf@.service.d/test.conf"
UNIT = "/etc/systemd/system/sams-ebpf@.service"


def main_pid(node: Site, job: int) -> int:
    """Host's PID of a job's collector."""
    inside = node.machine.systemctl("show", "-P", "MainPID", f"sams-ebpf@{job}.service")
    for pid, line in node.machine.processes().items():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if re.search(rf"^NSpid:.*\t{inside}$", status, re.MULTILINE) and "collect" in line:
            return pid
    return 0


def started(node: Site, script: str, *words: str) -> tuple[int, int]:
    """Submit a job; its id and its collector's PID, once that has claimed the job."""
    job = node.slurm.sbatch(script, "-o", "/tmp/out-%A", *words)
    node.slurm.wait_running(job)
    wait_for("the collector", lambda: main_pid(node, job))
    pid = main_pid(node, job)
    wait_for("the claim", lambda: any("taken up" in line for line in node.journal(job)))
    return job, pid


def check_counts(node: Site, job: int) -> None:
    """CPU and execs of the job's only epoch are what its workload printed."""
    run, figures = node.one(job), node.output(job)
    for name in ("work", "short", "burn"):
        assert run.execs(f"{BIN}/{name}") == figures[name], node.report(job)
    truth = figures["cpu_us"] * 1000
    assert abs(run.cpu_ns(f"{BIN}/") - truth) <= max(truth * 0.005, 5_000_000)


@pytest.fixture
def drop_in(node: Site) -> Iterator[None]:
    """Whatever the test puts at DROP_IN is gone after it."""
    yield
    node.machine.path(DROP_IN).unlink(missing_ok=True)
    node.machine.systemctl("daemon-reload")


def override(node: Site, text: str) -> None:
    node.machine.write(DROP_IN, f"[Service]\n{text}\n")
    node.machine.systemctl("daemon-reload")


def test_killed_collector_is_restarted_and_totals_are_exact(node: Site) -> None:
    script = f"#!/bin/bash\n{WORK} short=3000 burn=1500\n"
    job, pid = started(node, script)
    os.kill(pid, signal.SIGKILL)
    wait_for("another collector", lambda: main_pid(node, job) not in (0, pid))
    node.slurm.wait(job)
    check_counts(node, job)
    generations = {batch.generation for batch in node.of(job)[0].batches}
    identities = [batch.identity for batch in node.of(job)[0].batches]
    assert len(set(identities)) == len(identities)
    assert max(generations) >= 2


def test_reexecuted_manager_changes_nothing(node: Site) -> None:
    job, pid = started(node, f"#!/bin/bash\n{WORK} short=500 burn=1500\n")
    node.machine.systemctl("daemon-reexec")
    assert main_pid(node, job) == pid
    node.slurm.wait(job)
    check_counts(node, job)


def test_run_requeued_after_an_epilog_that_never_ran(node: Site) -> None:
    """The old run's unit is still there when the new run begins; each has what is its own."""
    epilog = node.machine.path(f"{HOOKS}/epilog.sh")
    text = epilog.read_text()
    epilog.write_text("#!/bin/sh\n")
    count = "short=${SLURM_RESTART_COUNT:-7}"
    end = '[ -n "$SLURM_RESTART_COUNT" ] || sleep 300'
    script = (
        f"#!/bin/bash\n{WORK} {count} burn=200 | tee /tmp/lost-${{SLURM_RESTART_COUNT:-0}}\n{end}\n"
    )
    try:
        job, _ = started(node, script, "--requeue")
        figures = node.machine.path("/tmp/lost-0")
        wait_for("the first run", lambda: figures.exists() and figures.read_text().endswith("}\n"))
        node.slurm.requeue(job)
    finally:
        epilog.write_text(text)
    assert node.units() == [f"sams-ebpf@{job}.service"]
    node.slurm.wait(job)
    node.wait_final(job, runs=2)
    first, second = node.of(job)
    assert (first.claims.restart_count, second.claims.restart_count) == (0, 1)
    for number, run in enumerate((first, second)):
        truth = printed(node.machine.path(f"/tmp/lost-{number}").read_text())
        assert run.execs(f"{BIN}/short") == truth["short"], node.report(job)
        assert abs(run.cpu_ns(f"{BIN}/") - truth["cpu_us"] * 1000) <= 5_000_000


def printed_yet(node: Site, job: int) -> bool:
    path = node.machine.path(f"/tmp/out-{job}")
    return path.exists() and path.read_text().endswith("}\n")


def run_job(node: Site) -> tuple[int, dict[str, int]]:
    """Run one job that must not be harmed; its id and what its workload printed."""
    done = node.machine.run(["srun", "-v", WORK, "short=20", "burn=100"], user=USER)
    return int(re.findall(r"job(?:id)? (\d+)", done.stderr)[0]), printed(done.stdout)


def clear_lines(node: Site, job: int) -> list[str]:
    """Warnings and errors that the job's collector wrote."""
    wait_for("the unit's end", lambda: f"sams-ebpf@{job}.service" not in node.units())
    return [line for line in node.journal(job) if re.match(r"sams-ebpf.*: (warning|error): ", line)]


def test_wrong_configuration(node: Site) -> None:
    node.machine.write("/etc/sams-ebpf/config.yaml", "collector: {intervall: 5}\n")
    try:
        job, figures = run_job(node)
        lines = clear_lines(node, job)
    finally:
        node.configure()
    assert figures["short"] == 20
    assert len(lines) == 1, node.journal(job)
    assert "config.yaml: collector.intervall: unknown key" in lines[0]
    assert "interval_s" in lines[0]


def test_missing_environment_file(node: Site) -> None:
    """Counted all the same, under the job id alone."""
    node.machine.path(JOBS).rename(node.machine.path(JOBS).with_name("away"))
    try:
        job, figures = run_job(node)
        run = node.one(job)
    finally:
        node.machine.run(["rm", "-rf", JOBS])
        node.machine.path(JOBS).with_name("away").rename(node.machine.path(JOBS))
    assert run.execs(f"{BIN}/short") == figures["short"]
    assert run.claims.job_id == job
    assert run.claims.user is None
    (line,) = clear_lines(node, job)
    assert f"{JOBS}/{job}/env: cannot be read" in line


def test_unknown_job(node: Site) -> None:
    """A unit that somebody starts by hand for a job that is not there."""
    node.machine.systemctl("start", "sams-ebpf@999999.service")
    wait_for("the collector", lambda: main_pid(node, 999999))
    node.machine.systemctl("stop", "sams-ebpf@999999.service")
    assert node.units() == []
    (line,) = clear_lines(node, 999999)
    assert "no cgroup of job 999999 was found" in line
    assert "999999/env: cannot be read" in line
    assert sum(run.ledger.attributed_cpu_ns for run in node.of(999999)) == 0


@pytest.mark.usefixtures("drop_in")
def test_spool_that_cannot_be_written(node: Site) -> None:
    override(node, f"ReadOnlyPaths={SPOOL}")
    node.configure(interval_s=600)
    try:
        job, figures = run_job(node)
        lines = clear_lines(node, job)
    finally:
        node.configure()
    assert figures["short"] == 20
    assert node.of(job) == []
    assert len(lines) == 1, node.journal(job)
    assert f"{SPOOL}: batch not written: Read-only file system; job {job} has ended" in lines[0]


@pytest.mark.usefixtures("drop_in")
def test_bpf_refused(node: Site) -> None:
    """Sampled instead, which the journal says and every batch too."""
    override(node, "SystemCallFilter=~bpf")
    job, figures = run_job(node)
    run = node.one(job)
    assert figures["short"] == 20
    assert {batch.mode for batch in run.batches} == {"proc"}
    lines = clear_lines(node, job)
    assert len(lines) == 1, node.journal(job)
    assert "proc" in lines[0]


@pytest.mark.usefixtures("drop_in")
def test_hangup_before_the_collector_could_hear_it(node: Site) -> None:
    """As of a job that ends while Python still starts: another run closes the job."""
    override(node, "ExecStart=\nExecStart=/bin/sleep 1000")
    job, figures = run_job(node)
    run = node.one(job)
    assert run.execs(f"{BIN}/short") == figures["short"]
    assert len(run.finals) == 1
    assert run.claims.user == USER
    assert node.units() == []


def test_reboot_closes_what_was_open(node: Site) -> None:
    """The state folder as a crash leaves it: an open epoch, of a boot that is over."""
    node.configure(interval_s=1)
    job, _ = started(node, f"#!/bin/bash\n{WORK} short=30 burn=60000\n")
    opened = node.machine.path("/var/lib/sams-ebpf/open")
    wait_for("a batch", lambda: opened.exists() and any(opened.iterdir()))
    (path,) = (path for path in opened.iterdir() if path.suffix == ".msgpack")
    data = path.read_bytes()
    node.machine.run(["scancel", str(job)])
    node.slurm.wait(job)
    run = node.one(job)
    node.configure()
    boot = (run.claims.boot_id or "").encode()
    # The same crash on another boot, with everything shipped.
    for old in node.machine.path(SPOOL).glob(f"{run.last.epoch.hex()}*"):
        old.unlink()
    path.write_bytes(data.replace(boot, b"f" * len(boot)))
    node.machine.systemctl("restart", "sams-ebpf-load.service")
    (closed,) = node.of(job)
    assert closed.last.final is not None
    assert closed.last.final.reason == leftovers.REASON
    assert closed.ledger.lost[leftovers.WINDOW] > 0
    assert not path.exists()


def test_kill_switch_leaves_the_job_alone(node: Site) -> None:
    """What was counted until then is kept; processes that come after are not seen any more."""
    job, _ = started(node, f"#!/bin/bash\n{WORK} burn=3000\n{WORK} short=50\n")
    node.machine.run([PROGRAM, "unload"])
    assert node.pins() == []
    node.slurm.wait(job)
    assert node.output(job)["short"] == 50
    run = node.one(job)
    assert run.execs(f"{BIN}/burn") == 1
    assert run.execs(f"{BIN}/short") == 0
    assert len(run.finals) == 1
    node.machine.run([PROGRAM, "load"])


def test_upgrade_restarts_no_unit(node: Site) -> None:
    job, pid = started(node, f"#!/bin/bash\n{WORK} short=20 burn=1500\n")
    node.machine.run([PROGRAM, "install-units"])
    node.machine.systemctl("daemon-reload")
    node.machine.systemctl("restart", "sams-ebpf-load.service", "sams-ebpf-ship.service")
    assert main_pid(node, job) == pid
    node.slurm.wait(job)
    check_counts(node, job)


def test_slurm_is_well_after_all_this(node: Site) -> None:
    assert isinstance(node.slurm, Slurm)
    node.slurm.wait_idle()
    assert node.job_folders() == []
    assert node.units() == []


def test_killed_slurm_daemons_close_the_job_with_what_is_known(node: Site) -> None:
    """No Epilog comes; what ends the run is that its processes, or its cgroup, are gone.

    The last test of this node: Slurm does not get over it in the time of a test.
    """
    node.configure(grace_period_s=2)
    job, _ = started(node, f"#!/bin/bash\n{WORK} short=50 burn=400\nsleep 100\n", "--no-requeue")
    wait_for("the figures", lambda: printed_yet(node, job))
    slurm = {"slurmd", "slurmstepd"}
    for pid, line in node.machine.processes().items():
        if Path(line.split(" ")[0].rstrip(":")).name in slurm:
            os.kill(pid, signal.SIGKILL)
    for pid, line in node.machine.processes().items():
        if "sleep 100" in line:
            os.kill(pid, signal.SIGKILL)
    node.wait_final(job, seconds=60)
    check_counts(node, job)
    final = node.one(job).last.final
    assert final is not None
    assert final.reason in ("grace-period", "cgroup-removed")
    assert node.units() == []
    assert node.job_folders() == []
