"""`sams-receiver serve`: from configuration to listening, and down again in good order."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

import uvloop

from sams_ebpf import durable
from sams_ebpf.errors import UsageError
from sams_ebpf.program import notify
from sams_receiver import auth, config
from sams_receiver.app import App, Budget, Front
from sams_receiver.archive import Appender, SyncFailedError
from sams_receiver.config import Receiver
from sams_receiver.listening import Listening, tls_context
from sams_receiver.metrics import Metrics
from sams_receiver.store import Store

log = logging.getLogger(__name__)

_DAY_NS = 86_400 * 10**9
_SWEEP_SECONDS = 5.0
_SAVE_SECONDS = 60.0
QUOTAS = "quotas.json"
# Open files beside the connections: of the program, and of a partition (segments, database).
_OWN_FILES = 64
_PARTITION_FILES = 8
# Objects made since the last collection; a batch of 23 records makes some 70.
_COLLECT_AFTER = 20_000


def command(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    settings = config.load(arguments.config)
    # The threads that sync want the interpreter for microseconds at a time.
    sys.setswitchinterval(0.001)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))
    return 0


def check_command(arguments: argparse.Namespace) -> int:
    """Read everything that `serve` would read, change nothing, and say that it is good."""
    settings = config.load(arguments.config)
    auth.Door(settings, log.warning)
    for listener in settings.listen:
        if listener.tls is not None:
            tls_context(listener.tls)
        if listener.proxy is not None and listener.proxy.secret_file is not None:
            auth.read_proxy_secret(listener.proxy.secret_file)
    archive = settings.archive
    if not archive.parent.is_dir() or (archive.exists() and not archive.is_dir()):
        raise UsageError(
            f"{arguments.config}: receiver.archive: {archive}: has to be a folder, or its parent"
            " one: is the disk mounted?"
        )
    print(f"{arguments.config}: good")
    return 0


async def serve(settings: Receiver) -> None:
    """Run a receiver. Raises SamsError when it cannot start, or when a sync failed."""
    stop = asyncio.Event()
    fatal: list[SyncFailedError] = []

    def on_fatal(error: SyncFailedError) -> None:
        fatal.append(error)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = Metrics()
    app = App(settings, metrics)
    budget = Budget(settings.limits.connections)
    fronts = [Front(app, listener, budget=budget) for listener in settings.listen]
    listening = [Listening(front) for front in fronts]
    appender = Appender.open(
        settings.archive,
        partitions=settings.partitions,
        limits=settings.segments.limits(),
        aside_bytes=settings.quotas.aside_bytes,
    )
    partitions = appender.archive.manifest.partitions
    if partitions != settings.partitions:
        log.info("%s: has %d partitions, which is fixed", settings.archive, partitions)
    budget.most = _connections(settings.limits.connections, partitions)
    store = Store(
        appender,
        window_ns=settings.duplicates_days * _DAY_NS,
        min_free_bytes=settings.min_free_bytes,
        observer=metrics,
        on_fatal=on_fatal,
    )
    store.start()
    app.store = store
    quotas = settings.archive / QUOTAS
    app.daily.load(quotas)
    again = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, again.set)
    try:
        for one in listening:
            await one.start()
        _collect_seldom()
        notify("READY=1")
        tasks = [
            asyncio.create_task(_sweep(fronts, budget, metrics)),
            asyncio.create_task(_save(app, quotas)),
            asyncio.create_task(_reload(again, listening)),
        ]
        await stop.wait()
        for task in tasks:
            task.cancel()
        log.info("stopping")
        notify("STOPPING=1")
    finally:
        app.stopping = True
        for one in listening:
            one.close()
        await _finish(fronts, settings.shutdown_seconds)
        await store.close()
        _write(quotas, app.daily.changes())
        for one in listening:
            one.remove()
    if fatal:
        raise fatal[0]


def _connections(wanted: int, partitions: int) -> int:
    """How many connections there can be, with the limit of open files raised as far as it goes."""
    own = _OWN_FILES + _PARTITION_FILES * partitions
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    if soft != infinite and soft < wanted + own:
        soft = wanted + own if hard == infinite else min(wanted + own, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == infinite or soft >= wanted + own:
        return wanted
    most = max(1, soft - own)
    log.warning(
        "limits.connections: %d need %d open files, %d are allowed (LimitNOFILE=):"
        " %d connections are taken", wanted, wanted + own, soft, most
    )  # fmt: skip
    return most


def _collect_seldom() -> None:
    """A fifth of the time would go into looking for cycles where there are hardly any."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


async def _finish(fronts: list[Front], seconds: float) -> None:
    """Wait for what is under way, at most so long; then close every connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while any(front.busy for front in fronts):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    for front in fronts:
        front.pre_shutdown()
    for front in fronts:
        await front.shutdown(1.0)


async def _sweep(fronts: list[Front], budget: Budget, metrics: Metrics) -> None:
    watchdog = "WATCHDOG_USEC" in os.environ
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        metrics.connections.set(budget.open)
        for front in fronts:
            front.sweep()
        if watchdog:
            notify("WATCHDOG=1")


async def _reload(again: asyncio.Event, listening: list[Listening]) -> None:
    """Read again at SIGHUP what a site rotates; the configuration itself needs a restart."""
    while True:
        await again.wait()
        again.clear()
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        notify(f"RELOADING=1\nMONOTONIC_USEC={now_us}")
        good = [await one.reload() for one in listening]
        log.info("certificates and secrets read again%s", "" if all(good) else ", not all of them")
        notify("READY=1")


async def _save(app: App, file: Path) -> None:
    """Keep the day's quotas, so that a restart does not forget them."""
    while True:
        await asyncio.sleep(_SAVE_SECONDS)
        await asyncio.to_thread(_write, file, app.daily.changes())


def _write(file: Path, data: bytes | None) -> None:
    if data is not None:
        try:
            durable.write(file, data)
        except OSError as error:
            log.warning("%s: cannot be kept: %s", file, error.strerror)
