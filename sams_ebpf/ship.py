"""`sams-ebpf ship`: one unprivileged service per node that sends the spool to the receivers.

One thread per receiver, so that a slow or dead one holds up no other; the main thread
watches the folder, keeps its bounds, and ends it all on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import random
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

from sams_ebpf import config, inotify, program
from sams_ebpf.errors import PartialError, SamsError, UsageError
from sams_ebpf.outbox import Outbox
from sams_ebpf.post import Answer, Outcome, Sender, credentials

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

log = logging.getLogger(__name__)

# The folder is watched; this is for what the watch may miss, and for retries of deletions.
_RESCAN_S = 3600.0
_LOOK_S = 60.0
_CLOCK_S = 3600.0
_GRACE_S = 5.0
_REPEAT_S = 600.0
_SHORT_S = 60.0
# So many refusals without a success in between look like a receiver that is wrong, not
# batches that are: slow down rather than set the whole spool aside.
_REFUSALS = 8


def command(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM, or once through the spool."""
    settings = config.load(arguments.config)
    node = settings.site.node_name()
    program.start_log("sams-ebpf ship", f"node={node}")
    for name, receiver in settings.ship.receivers.items():
        try:
            credentials(receiver)
        except UsageError as error:
            raise UsageError(f"ship.receivers.{name}: {error}") from error
    outbox = Outbox(settings.spool, settings.site)
    try:
        service = Service(settings, outbox)
        return service.once() if arguments.once else service.run()
    except OSError as error:
        where = error.filename or settings.spool.folder
        raise SamsError(f"{where}: {error.strerror}: is the spool's disk there?") from error
    finally:
        outbox.close()


class Backoff:
    """Waits between attempts: exponential, with full jitter, never less than asked for."""

    def __init__(self, ship: config.Ship, chance: random.Random) -> None:
        self._first_s = ship.backoff_s
        self._most_s = ship.backoff_max_s
        self._chance = chance
        self.failures = 0

    def next_s(self, asked_s: float | None = None) -> float:
        """Seconds to wait after one more failure."""
        bound = min(self._most_s, self._first_s * 2 ** min(self.failures, 32))
        self.failures += 1
        # On top of what was asked for: all nodes were asked at the same time.
        return (asked_s or 0.0) + self._chance.uniform(0, max(bound, (asked_s or 0.0) / 4))

    def reset(self) -> None:
        """Start over: it worked."""
        self.failures = 0


def slot_s(node: str, spread_s: float, now_s: float, chance: random.Random) -> float:
    """Seconds until this node's own moment within every `spread_s`, plus a tenth of chance."""
    digest = hashlib.sha256(node.encode("utf-8", "surrogateescape")).digest()
    phase = int.from_bytes(digest[:8], "big") / 2**64 * spread_s
    return (phase - now_s) % spread_s + chance.uniform(0, spread_s / 10) if spread_s else 0.0


class Courier:
    """Brings to one receiver what waits for it, in a thread of its own."""

    def __init__(
        self,
        name: str,
        settings: config.Config,
        outbox: Outbox,
        chance: random.Random,
        changed: Callable[[], None],
    ) -> None:
        receiver = settings.ship.receivers[name]
        self.name = name
        # failing: its last attempt failed. away: besides, it is left alone for now; what
        # is not required does not wait for it.
        self.failing = False
        self.away = False
        self._required = receiver.required
        self._node = settings.site.node_name()
        self._spread_s = settings.ship.spread_s
        self._level = settings.ship.zstd_level
        self._outbox = outbox
        self._chance = chance
        self._tell_service = changed
        self._backoff = Backoff(settings.ship, chance)
        self._sender = Sender(receiver, settings.ship)
        self._queue: deque[str] = deque()
        self._queued: set[str] = set()
        self._changed = threading.Condition(outbox.lock)
        self._stopped = False
        self._hurry = False
        self._refusals = 0
        self._since = 0.0
        # Reason and time of the last complaint, and whether it was about this failure.
        self._said: tuple[str, float] = ("", float("-inf"))
        self._told = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        outbox.register(name, required=receiver.required, offer=self.offer, away=lambda: self.away)

    def offer(self, name: str) -> None:
        """Put a batch at the end of the queue, unless it is in it. Called under the lock."""
        if name not in self._queued:
            self._queued.add(name)
            self._queue.append(name)
            self._changed.notify_all()

    def hurry(self) -> None:
        """Try now, whatever the waiting time."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Cut the attempt under way."""
        self._sender.abort()

    def once(self) -> None:
        """Try each batch that waits once; stop at the first failure of the receiver."""
        while (name := self._next()) is not None:
            answer = self._deliver(name)
            if answer is not None and self._failed(answer):
                self._leave()
                break
            if self._refusals >= _REFUSALS:
                log.warning(
                    "receiver %s refused %d batches in a row: the rest is kept",
                    self.name,
                    self._refusals,
                )
                break
        self._sender.close()

    def _run(self) -> None:
        try:
            while not self._stopped:
                name = self._next()
                if name is None:
                    self._sleep_until_work()
                    continue
                answer = self._deliver(name)
                if answer is None:
                    continue
                if self._failed(answer):
                    self._leave()
                    self._pause(self._backoff.next_s(answer.retry_after_s))
                    self.away = False
                elif self._refusals >= _REFUSALS:
                    self._pause(self._backoff.next_s())
        finally:
            self._sender.close()
            self._tell_service()

    def _leave(self) -> None:
        """Nobody has to wait for a receiver that fails and is not required."""
        self.away = True
        if not self._required:
            self._outbox.sweep()

    def _next(self) -> str | None:
        with self._changed:
            while self._queue:
                name = self._queue.popleft()
                self._queued.discard(name)
                if self._outbox.waits_for(self.name, name):
                    return name
        return None

    def _sleep_until_work(self) -> None:
        self._tell_service()
        with self._changed:
            while not self._queue and not self._stopped:
                self._changed.wait()
        self._pause(slot_s(self._node, self._spread_s, time.time(), self._chance))

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            while not self._stopped and not self._hurry:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._hurry = False

    def _deliver(self, name: str) -> Answer | None:
        """Make one attempt; None if there was nothing to send."""
        data = self._outbox.read(name)
        if data is None:
            return None
        answer = self._sender.send(zstd.compress(data, self._level))
        if answer.outcome is Outcome.STORED:
            self._refusals = 0
            self._backoff.reset()
            self._outbox.settle(self.name, name)
        elif answer.outcome is Outcome.REFUSED:
            self._refusals += 1
            if self._refusals < _REFUSALS:
                self._backoff.reset()
            if not self._outbox.refuse(self.name, name, data, answer.reason):
                self._again(name)
                return answer._replace(outcome=Outcome.LATER)
        else:
            self._again(name)
        return answer

    def _again(self, name: str) -> None:
        """Behind the others: one batch that never gets through must not hold them up."""
        with self._changed:
            self.offer(name)

    def _failed(self, answer: Answer) -> bool:
        """Note and tell how the receiver is doing; True if it is better left alone a while."""
        now = time.monotonic()
        if answer.outcome in (Outcome.STORED, Outcome.REFUSED):
            if self.failing:
                self.failing = False
                if self._told:
                    log.info("receiver %s: works again after %.0f s", self.name, now - self._since)
                # One that says "not so fast" while it is sent a backlog is no news each time.
                if now - self._since > _SHORT_S:
                    self._said = ("", float("-inf"))
                self._told = False
            return False
        if self._stopped:
            return True
        if not self.failing:
            self.failing = True
            self._since = now
        reason, said = self._said
        if answer.reason != reason or now - said > _REPEAT_S:
            self._said = (answer.reason, now)
            self._told = True
            denied = "does not let this node in" if answer.outcome is Outcome.DENIED else "failed"
            kept = "kept, will be tried again" if self._required else "not required, dropped for it"
            log.warning(
                "receiver %s %s: %s; batches are %s", self.name, denied, answer.reason, kept
            )
        return True


class Service:
    """The shipper of a node: couriers, the watch on the spool, and its bounds."""

    def __init__(self, settings: config.Config, outbox: Outbox) -> None:
        self._settings = settings
        self._outbox = outbox
        self._stopping = False
        self._began_s = time.monotonic()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Jitter only has to differ from node to node.
        self._chance = random.Random()  # noqa: S311
        self._couriers = [
            Courier(name, settings, outbox, self._chance, self._on_change)
            for name in settings.ship.receivers
        ]

    def once(self) -> int:
        """One pass; raises PartialError if anything is left or was set aside."""
        if not self._couriers:
            raise UsageError("ship.receivers: none is configured, so there is nowhere to send to")
        self._begin()
        self._outbox.keep_bounds()
        threads = [threading.Thread(target=one.once, daemon=True) for one in self._couriers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._outbox.sweep()
        left, _ = self._outbox.count()
        if left or self._outbox.rejected:
            raise PartialError(
                f"{self._outbox.folder}: {left} batches still wait, "
                f"{self._outbox.rejected} were set aside in rejected/"
            )
        return 0

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; SIGHUP: try every receiver now."""
        watch = inotify.Arrivals(self._outbox.folder)
        signal.set_wakeup_fd(self._wake)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_hurry)
        try:
            self._begin()
            self._keep_bounds()
            for courier in self._couriers:
                courier.thread.start()
            if not self._couriers:
                log.warning("no receiver is configured: batches wait in %s", self._outbox.folder)
            program.notify("READY=1")
            self._watch(watch)
        finally:
            program.notify("STOPPING=1")
            self._end()
            signal.set_wakeup_fd(-1)
            watch.close()
        return 0

    def _begin(self) -> None:
        self._outbox.scan()
        self._outbox.finish_losses()
        self._outbox.clean()

    def _keep_bounds(self) -> None:
        """At boot the wall clock may be wrong: nothing is too old before it was put right."""
        self._outbox.keep_bounds(by_age=time.monotonic() - self._began_s > _CLOCK_S)

    def _watch(self, watch: inotify.Arrivals) -> None:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        rescan = time.monotonic() + _RESCAN_S
        while not self._stopping:
            self._tell()
            poll.poll(_LOOK_S * (1 + self._chance.random()) * 1000)
            _empty(self._woken)
            names = watch.take()
            if names is None or time.monotonic() > rescan:
                rescan = time.monotonic() + _RESCAN_S
                self._outbox.clean()
                self._outbox.scan()
            else:
                self._outbox.arrived(names)
            self._keep_bounds()
            for courier in self._couriers:
                if not courier.thread.is_alive() and not self._stopping:
                    raise SamsError(
                        f"receiver {courier.name}: its thread ended; restart the service"
                    )

    def _tell(self) -> None:
        count, size = self._outbox.count()
        failing = [courier.name for courier in self._couriers if courier.failing]
        text = f"{count} batches wait ({size} bytes)"
        program.notify(f"STATUS={text}{'; failing: ' + ', '.join(failing) if failing else ''}")

    def _end(self) -> None:
        for courier in self._couriers:
            courier.stop()
        end = time.monotonic() + _GRACE_S
        for courier in self._couriers:
            if courier.thread.is_alive():
                courier.thread.join(max(0.0, end - time.monotonic()))
        for courier in self._couriers:
            if courier.thread.is_alive():
                courier.abort()
                courier.thread.join(1)

    def _on_change(self) -> None:
        """A courier has nothing left to do, or its thread ends: the main thread looks."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake up anyway
            os.write(self._wake, b"\0")

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _on_hurry(self, _number: int, _frame: FrameType | None) -> None:
        for courier in self._couriers:
            courier.hurry()


def _empty(pipe: int) -> None:
    try:
        while os.read(pipe, 4096):
            pass
    except BlockingIOError:
        return
