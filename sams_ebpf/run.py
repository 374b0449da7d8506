"""`sams-ebpf run`: any command in a cgroup of its own, and where its CPU time went."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

from sams_ebpf import (
    cgroups,
    config,
    durable,
    meters,
    privileges,
    report,
    wire,
    writer,
)
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.errors import NotPossibleError, UsageError
from sams_ebpf.procfs import ProcMeter
from sams_ebpf.tracing import BpfMeter

_log = logging.getLogger(__name__)

# What the kernel does with a dead task takes an RCU grace period; long enough for one.
SETTLE_S: Final = 0.25
FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126


def command(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status is ours."""
    argv: list[str] = (
        arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    )
    if not argv:
        raise UsageError("run: no command; use sams-ebpf run -- COMMAND [ARGUMENT…]")
    if os.geteuid() != 0:
        raise NotPossibleError(
            f"run: needs root for a cgroup and BPF; try: sudo {sys.argv[0]} run -- {argv[0]} …"
        )
    output: Path | None = arguments.output
    if output is not None:
        _check_output(output)
    spool: Path | None = arguments.spool
    if spool is not None and not (spool.is_dir() and os.access(spool, os.W_OK)):
        raise UsageError(f"--spool {spool}: not a folder that can be written to")
    cgroup = cgroups.create(f"{cgroups.OF_RUN}{os.getpid()}", _trees(arguments.cgroup_tree))
    try:
        return _measured(arguments, argv, cgroup)
    finally:
        _move_out(cgroup)
        cgroups.remove(cgroup)


def _check_output(output: Path) -> None:
    """Tell before the command runs what can be told of where its report is to go."""
    if output.is_dir():
        raise UsageError(f"-o {output}: is a folder; name a file")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"-o {output}: its folder cannot be written to")


def _trees(name: str | None) -> list[cgroups.Hierarchy] | None:
    return None if name is None else [meters.tree_of_jobs(name)]


def _measured(arguments: argparse.Namespace, argv: list[str], cgroup: Cgroup) -> int:
    meter = meters.private(
        cgroup, mode=arguments.mode, loader=arguments.loader, exact=arguments.exact
    )
    child, go = _fork(argv, cgroup)
    # The folder above our cgroup is read-only even to its owner: DAC_OVERRIDE removes it.
    kept = ("CAP_DAC_OVERRIDE",)
    if isinstance(meter, ProcMeter):
        privileges.drop((*kept, "CAP_SYS_PTRACE"))
    else:
        # Before 5.19 look-ups on open maps may need one.
        privileges.drop_all_but_needed(
            meter.works, keep=kept, candidates=("CAP_BPF", "CAP_SYS_ADMIN")
        )
    interval_s = arguments.interval or (60.0 if isinstance(meter, BpfMeter) else 1.0)
    claims = wire.Claims(
        node=config.Site().node_name(),
        boot_id=writer.boot_id(),
        user=os.environ.get("SUDO_USER"),
        cgroup=os.fsencode(cgroup.path),
    )
    batches = _Batches(meter, claims, arguments.spool)
    os.close(go)
    status = _wait(child, batches, interval_s)
    _settle(meter)
    final = batches.last(wire.Closing(reason="command-ended", live=meter.live()))
    made = report.of_batch(final)
    _show(report.to_json(made) if arguments.json else report.table(made), arguments.output)
    meter.close()
    return status


class _Batches:
    """Harvests, into a spool if one was named."""

    def __init__(
        self, meter: BpfMeter | ProcMeter, claims: wire.Claims, folder: Path | None
    ) -> None:
        self._meter = meter
        self._composer = writer.Composer(meter, claims, full_every=10)
        self._folder = folder
        self.samples = folder is not None or isinstance(meter, ProcMeter)

    def next(self) -> None:
        self._put(self._composer.compose(self._meter.harvest(), time.time_ns(), None))

    def before_reaping(self) -> None:
        """Sample the dead command: its clock tells everything until it is waited for."""
        if isinstance(self._meter, ProcMeter):
            self.next()

    def last(self, closing: wire.Closing) -> wire.Batch:
        batch = self._composer.compose(self._meter.harvest(), time.time_ns(), closing)
        self._put(batch)
        return batch

    def _put(self, batch: wire.Batch) -> None:
        if self._folder is None:
            self._composer.kept(batch)
        else:
            writer.put(self._composer, self._folder, batch)


def _fork(argv: list[str], cgroup: Cgroup) -> tuple[int, int]:
    """Make the child that becomes the command once the returned descriptor is closed."""
    path = shutil.which(argv[0])
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        _become(argv, path, cgroup, wait)
    os.close(wait)
    return child, go


def _become(argv: list[str], path: str | None, cgroup: Cgroup, wait: int) -> NoReturn:
    """Turn into the command; whatever goes wrong, nothing of the parent's is done twice."""
    code, problem = NOT_EXECUTABLE, ""
    try:
        os.read(wait, 1)
        os.close(wait)
        cgroups.enter(cgroup)
        # Python ignores these, and what is ignored stays so over exec.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execv(path or argv[0], argv)  # noqa: S606 (no shell is what is meant)
    except FileNotFoundError:
        code, problem = NOT_FOUND, "command not found"
    except OSError as error:
        problem = error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):  # nobody listens
            os.write(2, b"sams-ebpf run: %b: %b\n" % (os.fsencode(argv[0]), problem.encode()))
        os._exit(code)


def _wait(child: int, batches: _Batches, interval_s: float) -> int:
    """Sleep until the command has ended, harvesting at the interval where that is of use."""
    # The terminal sends INT and QUIT to the command as well: it decides, we report.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    for number in FORWARDED:
        signal.signal(number, lambda got, _: _send(child, got))
    poll = select.poll()
    ended = os.pidfd_open(child)
    poll.register(ended, select.POLLIN)
    due = time.monotonic() + interval_s
    while not poll.poll(max(0.0, due - time.monotonic()) * 1000 if batches.samples else None):
        if time.monotonic() >= due:
            batches.next()
            due = max(due + interval_s, time.monotonic())
    os.close(ended)
    batches.before_reaping()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _send(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _settle(meter: BpfMeter | ProcMeter) -> None:
    """Give the kernel a moment to let go of the dead tasks, each with its last word."""
    if isinstance(meter, ProcMeter) or meter.live():
        return
    end = time.monotonic() + SETTLE_S
    while meter.pending() and time.monotonic() < end:
        time.sleep(0.002)


def _show(text: str, output: Path | None) -> None:
    if output is not None:
        try:
            durable.write_output(output, text.encode(), mode=0o644)
        except OSError as error:
            _log.error("-o %s: %s; the report follows", output, error.strerror)
        else:
            return
    with contextlib.suppress(OSError):  # nobody is left to be told: the exit status stands
        sys.stderr.write(text)


def _move_out(cgroup: Cgroup) -> None:
    """Give what still runs back to the cgroup we are in: ours is about to go."""
    mine = cgroups.own(cgroup.hierarchy)
    if mine is None:
        return
    for pid in cgroups.processes(cgroup):
        with contextlib.suppress(OSError):  # it has died meanwhile
            cgroups.enter(mine, pid)
