"""What the programs in the kernel cost per life of a process."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jobs import SETUPS, Job
from workloads import Truth

from bench import bpfstats
from bench import rig as rigs
from bench.section import Section, Table

LIVES = 500
ROUNDS = 5
DEPTHS = (5, 20)
MANY = 64
LIVES_OF_MANY = 50


def run() -> Section:
    """Lives of a small program under paths of different depth, inside and outside a job."""
    with rigs.rig() as rig:
        shallow, deep = (_program(rig, depth) for depth in DEPTHS)
        rows: list[list[str | float]] = []
        for setup in SETUPS:
            others = set(bpfstats.programs())
            with rig.job(setup) as job:
                own = set(bpfstats.programs()) - others
                kinds = (
                    (f"inside, path of {DEPTHS[0]} components", True, shallow),
                    (f"inside, path of {DEPTHS[1]} components", True, deep),
                    ("inside, /bin/true", True, "/bin/true"),
                    ("outside any job, /bin/true", False, "/bin/true"),
                )
                found = rigs.interleaved(kinds, ROUNDS, partial(_bpf_us, job, own))
                life_us = statistics.median(_life_us(job) for _ in range(3))
            for (kind, *_), values in found.items():
                median = statistics.median(values)
                rows.append(
                    [f"{rigs.NAMES[setup]}: {kind}", median, min(values), 100 * median / life_us]
                )
            rows.append(
                [f"{rigs.NAMES[setup]}: fork, exec, wait of /bin/true", life_us, life_us, 100.0]
            )
        table = _jobs_at_once(rig)
        return Section(
            title="BPF time for the whole life of a process",
            method=f"""{LIVES} times fork, exec, exit and wait of a static program. Time is the
kernel's own statistics (`BPF_ENABLE_STATS`) added up over all programs of the set, so what other
processes of the machine cause meanwhile is in it, and the taking of the time
itself too; {ROUNDS} interleaved rounds. The last
column sets it against what fork, exec and wait of `/bin/true` take, the programs included.
The second table: {MANY} processes at once, each with {LIVES_OF_MANY} lives of `/bin/true`, all in
one job or each in a job of its own, after one life each that is not counted (it makes the rows
of the executables); {ROUNDS} rounds, the last column is the median of the ratio within a round.""",
            tables=[Table(("", "us, median", "us, least", "% of a life"), rows), table],
        )


def _jobs_at_once(rig: rigs.Rig) -> Table:
    def measure(count: int) -> float:
        others = set(bpfstats.programs())
        with ExitStack() as stack:
            jobs = [stack.enter_context(rig.job()) for _ in range(count)]
            return _at_once_us(jobs, set(bpfstats.programs()) - others)

    found = rigs.interleaved((1, MANY), ROUNDS, measure)
    rows: list[list[str | float]] = [
        [
            f"{MANY} at once in {count} job{'s' if count > 1 else ''}",
            statistics.median(values),
            min(values),
            100 * rigs.ratio(found, count, 1),
        ]
        for count, values in found.items()
    ]
    return Table(("default set-up", "us, median", "us, least", "% of that in one job"), rows)


def _at_once_us(jobs: Sequence[Job], own: set[int]) -> float:
    def act(lives: int) -> None:
        processes = [
            job.launch(job.programs["lives"], str(lives), "/bin/true", "0")
            for job in (jobs[number % len(jobs)] for number in range(MANY))
        ]
        assert [process.wait(120) for process in processes] == [0] * MANY

    act(1)
    spent_ns = rigs.program_time_ns(partial(act, LIVES_OF_MANY), own)
    assert spent_ns, "the set was there before: loaded to stay, or by somebody else's job"
    return spent_ns / (MANY * LIVES_OF_MANY) / 1000


def _program(rig: rigs.Rig, depth: int) -> str:
    # /tmp/sams-bench-x/deep-N/… : what is missing to `depth` components is made up.
    folder = rig.new_folder(f"depth-{depth}")
    missing = depth - len(folder.parts[1:]) - 1
    for number in range(missing):
        folder /= f"component-{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "program"
    shutil.copy2(rig.programs["burn"], target)
    assert len(Path(target).parts) == depth + 1
    return str(target)


def _bpf_us(job: Job, own: set[int], kind: tuple[str, bool, str]) -> float:
    _, inside, program = kind
    command = (job.programs["lives"], str(LIVES), program, "0")

    def act() -> None:
        process = job.launch(*command) if inside else job.outside(*command)
        assert process.wait(120) == 0

    return rigs.program_time_ns(act, own) / LIVES / 1000


def _life_us(job: Job) -> float:
    truth = Truth(job.folder / "life")
    truth.file.write_text("")
    process = job.launch(
        job.programs["lives"], str(LIVES), "/bin/true", environ={"TRUTH": str(truth.file)}
    )
    assert process.wait(120) == 0
    return truth.read()["elapsed_ns"] / LIVES / 1000
