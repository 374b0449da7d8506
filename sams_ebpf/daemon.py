"""The life of a collector: sleep, harvest, and know when the job has ended.

It sleeps in one poll for what can happen: a signal, a cgroup that was made, removed or
emptied, the next harvest, the end of the grace period. Nothing else wakes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from sams_ebpf import wire
from sams_ebpf.cgroups import Cgroup, Watch
from sams_ebpf.meter import Meter
from sams_ebpf.writer import Writer

# How long the signal to end may come after the mark that says so.
MARK_S: Final = 10.0
# How long a run that has ended, by mark and signal, may take to be rid of its processes.
LINGER_S: Final = 2.0
# Nothing tells on cgroup v1 that the last process has left.
_GLANCE_S: Final = 0.05
SIGNALS: Final = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


class Signals:
    """Turns HUP, TERM and INT into a descriptor to poll and a flag.

    The program starts with them blocked (see `__main__`), so that one which came before
    is delivered here and not lost.
    """

    def __init__(self) -> None:
        self.came: str | None = None

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        # The end has begun: a second signal changes nothing about it.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, _: object) -> None:
        self.came = self.came or signal.Signals(number).name

    def fileno(self) -> int:
        """Descriptor that is readable when one came."""
        return self._read

    def drain(self) -> None:
        """Take what made the descriptor readable."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)


class Places:
    """Where the job's cgroups are now, and what tells of a change.

    locate: gives those that are there. above: folders in which one can appear. mark: a
    file that is made when the run has ended, if there is such a one.
    """

    def __init__(
        self,
        locate: Callable[[], list[Cgroup]],
        above: Callable[[], list[str]],
        watch: Watch,
        mark: Path | None = None,
    ) -> None:
        self._locate = locate
        self._above = above
        self._watch = watch
        self._mark = mark

    def ended(self) -> bool:
        """Tell whether the run's mark is there; wakes when it is made."""
        if self._mark is None:
            return False
        self._watch.add(str(self._mark.parent))
        return self._mark.exists()

    def look(self, *, around: bool = True) -> list[Cgroup]:
        """Watch, then look: what happens in between is seen by one of the two.

        around: wake also when a cgroup is made or removed. Every job of the node wakes
        this one then, so only where something would be lost without it.
        """
        if around:
            for folder in self._above():
                self._watch.add(folder)
        found = self._locate()
        for cgroup in found:
            if around:
                self._watch.add(os.path.dirname(cgroup.folder))  # noqa: PTH120 - as in cgroups
            self._watch.add_populated(cgroup)
        return found

    def leave(self) -> None:
        """Watch nothing any more."""
        self._watch.clear()


class Sleeper:
    """One poll for signals and cgroups."""

    def __init__(self, signals: Signals, watch: Watch) -> None:
        self._signals = signals
        self._watch = watch
        self._poll = select.poll()
        self._poll.register(signals, select.POLLIN)
        self._poll.register(watch, select.POLLIN)

    def until(self, moment: float) -> None:
        """Sleep until something happened, or until `moment` (time.monotonic())."""
        self._poll.poll(max(0.0, moment - time.monotonic()) * 1000 + 1)
        self._signals.drain()
        self._watch.drain()


@contextlib.contextmanager
def sleeping() -> Iterator[tuple[Signals, Watch, Sleeper]]:
    """Open what a collector sleeps on."""
    with Signals() as signals, Watch() as watch:
        yield signals, watch, Sleeper(signals, watch)


def wait_for_job(
    places: Places, signals: Signals, sleeper: Sleeper, grace_period_s: float
) -> list[Cgroup]:
    """Sleep until the job has a cgroup; [] if a signal or the grace period came first."""
    deadline = time.monotonic() + grace_period_s
    while True:
        found = places.look()
        if found or signals.came or places.ended() or time.monotonic() >= deadline:
            return found
        sleeper.until(deadline)


def measure(
    meter: Meter,
    writer: Writer,
    places: Places,
    signals: Signals,
    sleeper: Sleeper,
    *,
    interval_s: float,
    grace_period_s: float,
    in_kernel: bool,
    on_mark: Callable[[], None] = lambda: None,
) -> wire.Closing:
    """Harvest at the interval until the job has ended; gives why, for the final batch.

    in_kernel: the kernel side counts in whatever cgroup the job gets, so that what comes
    and goes between two harvests needs no waking. on_mark: called when the run's mark
    tells that it is over, before the signal that should follow.
    """
    if in_kernel:
        places.leave()
    # A moment of its own: collectors that started together do not harvest together.
    harvest_at = time.monotonic() + interval_s * (0.5 + int.from_bytes(os.urandom(2)) / 131072)
    empty_since: float | None = None
    mark_at: float | None = None
    told_at: float | None = None
    while True:
        found = places.look(around=not in_kernel)
        meter.look(found)
        live = meter.live()
        now = time.monotonic()
        if mark_at is None and places.ended():
            mark_at = now
            on_mark()
        if told_at is None and signals.came is not None:
            told_at = now
        last_at = _last_moment(told_at, mark_at)
        if last_at is not None:
            if not live or now >= last_at:
                return wire.Closing(reason="signal", live=live)
            sleeper.until(min(last_at, now + _GLANCE_S))
            continue
        if live:
            empty_since = None
        elif empty_since is None:
            empty_since = now
        if empty_since is not None and now >= empty_since + grace_period_s:
            return wire.Closing(reason="grace-period" if found else "cgroup-removed", live=0)
        if now >= harvest_at:
            writer.write()
            harvest_at += interval_s * (1 + (now - harvest_at) // interval_s)
        end_of_grace = harvest_at if empty_since is None else empty_since + grace_period_s
        sleeper.until(min(harvest_at, end_of_grace))


def _last_moment(told_at: float | None, mark_at: float | None) -> float | None:
    """Tell until when to wait for the job's last processes; None: its end has not come.

    Slurm's own, a slurmstepd, may outlive the job's Epilog by a moment, and its CPU is the
    job's. Whoever sends a signal without the Epilog's mark wants the end at once.
    """
    if mark_at is None:
        return told_at
    if told_at is None:
        return mark_at + MARK_S
    return min(told_at + LINGER_S, mark_at + MARK_S)
