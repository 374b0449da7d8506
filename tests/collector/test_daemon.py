"""The loop: what ends it, what it harvests, and that it sleeps in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sams_ebpf import daemon, wire
from sams_ebpf.cgroups import Cgroup, Hierarchy

HERE = Cgroup(folder="/nowhere", path="/", hierarchy=Hierarchy(version=1, mount="/nowhere"))


class FakeMeter:
    """Has processes as long as it is told."""

    def __init__(self, live: Callable[[], int]) -> None:
        self._live = live
        self.looks = 0

    def look(self, found: Sequence[Cgroup]) -> None:
        del found
        self.looks += 1

    def live(self) -> int:
        return self._live()


class FakeWriter:
    def __init__(self) -> None:
        self.written = 0

    def write(self, final: wire.Closing | None = None) -> bool:
        assert final is None
        self.written += 1
        return True


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    old = {number: signal.getsignal(number) for number in daemon.SIGNALS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def run(
    live: Callable[[], int],
    *,
    found: Callable[[], list[Cgroup]] = lambda: [HERE],
    interval_s: float = 60,
    grace_period_s: float = 60,
) -> tuple[wire.Closing, FakeMeter, FakeWriter]:
    meter: Any = FakeMeter(live)
    writer: Any = FakeWriter()
    with daemon.sleeping() as (signals, watch, sleeper):
        closing = daemon.measure(
            meter,
            writer,
            daemon.Places(found, list, watch),
            signals,
            sleeper,
            interval_s=interval_s,
            grace_period_s=grace_period_s,
            in_kernel=True,
        )
    return closing, meter, writer


def send(number: signal.Signals, after_s: float) -> None:
    timer = threading.Timer(after_s, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


@pytest.mark.parametrize("number", daemon.SIGNALS)
def test_a_signal_ends_it_at_once(number: signal.Signals) -> None:
    send(number, 0.2)
    closing, meter, writer = run(lambda: 3)
    assert closing == wire.Closing(reason="signal", live=3)
    # Once at the start, once when the signal came: it slept in between.
    assert (meter.looks, writer.written) == (2, 0)


def test_a_signal_that_came_before_is_not_lost() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, daemon.SIGNALS)
    # To this thread: those that other tests' libraries have started do not block it.
    signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
    closing, _, _ = run(lambda: 1)
    assert closing.reason == "signal"


def test_a_second_signal_does_not_disturb_the_end() -> None:
    send(signal.SIGHUP, 0.1)
    run(lambda: 1)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("there", "reason"), [([HERE], "grace-period"), ([], "cgroup-removed")])
def test_no_processes_for_the_grace_period(there: list[Cgroup], reason: str) -> None:
    closing, _, _ = run(lambda: 0, found=lambda: there, grace_period_s=0.2)
    assert closing == wire.Closing(reason=reason, live=0)


def test_processes_that_come_back_end_the_grace_period() -> None:
    lives = iter([1, 0, 1, 0])
    begin = time.monotonic()
    closing, meter, _ = run(lambda: next(lives, 0), interval_s=0.05, grace_period_s=0.3)
    assert closing.reason == "grace-period"
    assert meter.looks > 4
    assert time.monotonic() - begin >= 0.3


def test_harvests_at_the_interval() -> None:
    send(signal.SIGTERM, 1.0)
    _, _, writer = run(lambda: 1, interval_s=0.1)
    assert 2 <= writer.written <= 10


def test_the_run_s_mark_ends_it_with_the_last_process(tmp_path: Path) -> None:
    """As the Epilog makes it, where the manager is slow to send the signal."""
    mark = tmp_path / "ended"
    timer = threading.Timer(0.2, mark.touch)
    timer.start()
    lives = iter([1, 1, 1])
    told: list[bool] = []
    with daemon.sleeping() as (signals, watch, sleeper):
        closing = daemon.measure(
            FakeMeter(lambda: next(lives, 0)),  # type: ignore[arg-type]
            FakeWriter(),  # type: ignore[arg-type]
            daemon.Places(lambda: [HERE], list, watch, mark),
            signals,
            sleeper,
            interval_s=60,
            grace_period_s=60,
            in_kernel=True,
            on_mark=lambda: told.append(mark.exists()),
        )
    timer.join()
    assert closing == wire.Closing(reason="signal", live=0)
    assert told == [True]


def test_processes_that_stay_after_mark_and_signal_do_not_hold_it_up(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    mark.touch()
    send(signal.SIGHUP, 0.1)
    with daemon.sleeping() as (signals, watch, sleeper):
        closing = daemon.measure(
            FakeMeter(lambda: 3),  # type: ignore[arg-type]
            FakeWriter(),  # type: ignore[arg-type]
            daemon.Places(lambda: [HERE], list, watch, mark),
            signals,
            sleeper,
            interval_s=60,
            grace_period_s=60,
            in_kernel=True,
        )
    assert closing == wire.Closing(reason="signal", live=3)


def test_the_mark_ends_the_waiting_for_a_job(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    timer = threading.Timer(0.2, mark.touch)
    timer.start()
    with daemon.sleeping() as (signals, watch, sleeper):
        places = daemon.Places(list, list, watch, mark)
        assert daemon.wait_for_job(places, signals, sleeper, 60) == []
    timer.join()
    assert mark.exists()


def test_waits_for_the_job() -> None:
    seen: list[list[Cgroup]] = [[], [HERE]]
    with daemon.sleeping() as (signals, watch, sleeper):
        places = daemon.Places(lambda: seen.pop(0), lambda: ["/tmp"], watch)
        touch = threading.Timer(0.2, lambda: _made().rmdir())
        touch.start()
        assert daemon.wait_for_job(places, signals, sleeper, 30) == [HERE]
        touch.join()


def _made() -> Path:
    path = Path(f"/tmp/sams-slurm-test-{os.getpid()}")
    path.mkdir()
    return path


def test_gives_up_waiting_after_the_grace_period() -> None:
    with daemon.sleeping() as (signals, watch, sleeper):
        places = daemon.Places(list, list, watch)
        assert daemon.wait_for_job(places, signals, sleeper, 0.1) == []
