"""The process shapes for which the ledger has to close; each drives one job to its end.

A case launches its workloads in the job's cgroup and keeps `job.expected` right. What a
workload counts itself (forks, execs, exits in its truth file) is added by `Job.finish`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from groups import Group
from jobs import Job
from scale import times

Drive = Callable[[Job], None]
Check = Callable[[Job, Mapping[str, int]], None]


@dataclass(frozen=True)
class Case:
    """A process shape.

    before: runs before the collector is there. counts: forks, execs and exits are known
    exactly; else only that they balance. entered: at least how many came in is.
    moves: tasks change cgroup at work, and the kernel tells so a moment later: when a tick
    or a switch falls in between, it has charged that slice to the new cgroup already, which
    the default set-up does not see. So these read their clocks often, which keeps slices
    short, and have a tick more there. quota, total_entries: see `jobs.Options`.
    """

    name: str
    drive: Drive
    before: Drive | None = None
    counts: bool = True
    entered: bool = True
    moves: bool = False
    quota: int | None = None
    total_entries: int | None = None


def _runs(*command: str) -> Drive:
    """Run a workload; `@name` stands for the path of another one, `%` for a folder."""

    def drive(job: Job) -> None:
        files = job.folder / "files"
        files.mkdir()
        words = [str(files) if word == "%" else word for word in command]
        words = [job.programs[word[1:]] if word.startswith("@") else word for word in words]
        job.run(*words)
        job.group.wait_empty()

    return drive


def _zombies_at_the_end(job: Job) -> None:
    job.launch(job.programs["zombies"], "30", "2000", "1")
    job.truth.wait_for("ready")
    job.expected.live = 1


def _move(job: Job, away: Group, *, single: bool, moves: int, pid: int, pause_us: int) -> None:
    to, back = (job.group.tasks, away.tasks) if single else (job.group.procs, away.procs)
    mover = job.outside(
        job.programs["mover"],
        *(str(to), str(back), str(pid), str(moves), str(pause_us)),
        environ={"MOVE_THREADS_OF": str(pid)} if single else None,
    )
    assert mover.wait(120) == 0


def moved(
    threads: int,
    *,
    single: bool = False,
    moves: int | None = None,
    pause_us: int = 1500,
    clocks: bool = True,
) -> Drive:
    """A process, or its threads one by one, goes out of the job and comes back, many times.

    clocks: the threads read their clocks all the time, by which the kernel charges them.
    """
    count = times(30 if single else 100, 10) if moves is None else moves

    def drive(job: Job) -> None:
        process = job.launch(job.programs["waiter"], str(threads), str(int(clocks)))
        job.truth.wait_for("ready")
        away = job.another_group()
        _move(job, away, single=single, moves=count, pid=process.pid, pause_us=pause_us)
        job.expected.moved_in += count
        job.expected.moved_out += count
        job.stop.touch()
        job.ended(process)
        job.group.wait_empty()

    return drive


def _cloned_into(job: Job) -> None:
    """Children of a stranger, made inside the job; on v1 the flag reaches v2 only."""
    group = job.group if job.hierarchy == "v2" else job.another_group("v2")
    assert job.outside(job.programs["into_cgroup"], str(group.path), "50", "1000").wait(60) == 0
    if job.hierarchy == "v1":
        job.run(job.programs["burn"], "1000")
        return
    said = job.truth.read()
    job.expected.moved_in += said["cloned"]
    job.expected.forks += said["cloned_forks"]
    job.expected.exits += said["cloned"] + said["cloned_forks"]
    job.group.wait_empty()


def _cloned_out(job: Job) -> None:
    """Children made outside the job by one of its processes; on v1 they stay inside."""
    away = job.another_group("v2")
    job.run(job.programs["into_cgroup"], str(away.path), "50", "1000")
    said = job.truth.read()
    if job.hierarchy == "v1":
        job.expected.forks += said["cloned"] + said["cloned_forks"]
        job.expected.exits += said["cloned"] + said["cloned_forks"]
    job.group.wait_empty()


def _before_set_up(job: Job) -> None:
    process = job.launch(job.programs["waiter"], "3")
    job.run(job.programs["zombies"], "5", "3000", "0")
    job.truth.wait_for("ready")
    # None of these is seen to start; what is there is taken up.
    job.expected = type(job.expected)(adopted=1)
    job.truth.file.write_text("")
    assert process.poll() is None


def _before(job: Job) -> None:
    job.run(job.programs["burn"], "20000")
    job.stop.touch()
    job.ended(job.started[0])
    job.group.wait_empty()


def _nested(job: Job) -> None:
    """Work in cgroups inside the job's, and a process that goes from one to another."""
    step = job.group.child("step_0")
    task = step.child("task_0")
    job.run(job.programs["forks"], "10", "1000", into=task)
    process = job.launch(job.programs["waiter"], "2", into=step)
    job.truth.wait_for("ready")
    _move(job, task, single=False, moves=20, pid=process.pid, pause_us=1000)
    job.stop.touch()
    job.ended(process)
    job.group.wait_empty()


def _made_again(job: Job) -> None:
    """A step's cgroup goes, and another of the same name comes, five times."""
    for _ in range(5):
        step = job.group.child("step_0")
        job.run(job.programs["forks"], "5", "1000", into=step)
        step.wait_empty()
        step.remove()


def _python_pool(job: Job) -> None:
    job.run(sys.executable, job.programs["pool.py"], "4", "60")
    job.group.wait_empty()


def _killed_by_driver(job: Job) -> None:
    """A whole threaded process killed from outside the job."""
    for _ in range(5):
        before = job.truth.read()["ready"]
        process = job.launch(job.programs["waiter"], "8")
        job.truth.wait_for("ready", before + 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        job.expected.exits += 1
    job.group.wait_empty()


# More than the quota and the map below have room for, however slow the machine.
_MANY = _runs("@many_names", "%", str(times(150, 100)), "@burn")

CASES: tuple[Case, ...] = (
    Case("true_from_a_shell", _runs("@storm.sh", str(times(1000)))),
    Case("fork_without_exec", _runs("@forks", "50", "1000")),
    Case("python_pool", _python_pool),
    Case("leader_first", _runs("@leader_first", "16", "10000")),
    Case("detached_threads", _runs("@detached", str(times(1000)), "50")),
    Case("sigchld_ignored", _runs("@sigchld", str(times(100)), "1000")),
    Case("exec_from_a_thread", _runs("@thread_exec", "20", "2000", "@burn")),
    Case("exec_chain", _runs("@chain", str(times(200)), "200")),
    Case("memory_touched", _runs("@touch_memory", str(times(1000)))),
    Case("threads_killed", _runs("@killed", "20", "4")),
    Case("killed_from_outside", _killed_by_driver),
    Case("zombies_running", _runs("@zombies", "30", "2000", "0")),
    Case("zombies_at_the_end", _zombies_at_the_end),
    Case("daemons", _runs("@daemons", "10", "20000")),
    Case("vfork_and_spawn", _runs("@spawn", str(times(100)), "/bin/true")),
    Case("memfd_and_deleted", _runs("@nameless", "10", "@burn", "%")),
    Case("script", _runs("@storm.sh", "20", "@script.sh")),
    Case("process_moved", moved(1), moves=True),
    Case("group_moved", moved(8), moves=True),
    Case("threads_moved_singly", moved(8, single=True), counts=False, entered=False, moves=True),
    Case("cloned_into", _cloned_into, counts=False),
    Case("cloned_out", _cloned_out, counts=False, entered=False),
    Case("pid_again", _runs("@pid_again", str(times(100)), "500")),
    Case("before_attach", _before, before=_before_set_up),
    Case("io_uring_workers", _runs("@uring", str(times(500)), "64")),
    Case("nested_cgroups", _nested),
    Case("cgroup_made_again", _made_again),
    Case("quota_too_small", _MANY, quota=20),
    Case("map_too_small", _MANY, total_entries=64),
)
