"""`sams-receiver serve`: from configuration to listening, and down again in good order."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from sams_ebpf.errors import UsageError
from sams_ebpf.program import notify
from sams_ebpf.settings import check_secret
from sams_receiver import auth, config
from sams_receiver.app import App, Budget, Front
from sams_receiver.archive import Appender, SyncFailedError
from sams_receiver.config import Receiver, Tls
from sams_receiver.metrics import Metrics
from sams_receiver.store import Store

log = logging.getLogger(__name__)

_DAY_NS = 86_400 * 10**9
_SWEEP_SECONDS = 5.0
_BACKLOG = 2_048


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
    budget = Budget()
    fronts = [Front(app, listener, budget=budget) for listener in settings.listen]
    contexts = [tls_context(listener.tls) if listener.tls else None for listener in settings.listen]
    appender = Appender.open(
        settings.archive,
        partitions=settings.partitions,
        limits=settings.segments.limits(),
        aside_bytes=settings.quotas.aside_bytes,
    )
    store = Store(
        appender,
        window_ns=settings.duplicates_days * _DAY_NS,
        min_free_bytes=settings.min_free_bytes,
        observer=metrics,
        on_fatal=on_fatal,
    )
    store.start()
    app.store = store
    servers: list[asyncio.Server] = []
    try:
        for front, context in zip(fronts, contexts, strict=True):
            servers.append(await _listen(front, context))
        notify("READY=1")
        sweeper = asyncio.create_task(_sweep(fronts, budget, metrics))
        await stop.wait()
        sweeper.cancel()
        log.info("stopping")
        notify("STOPPING=1")
    finally:
        app.stopping = True
        for server in servers:
            server.close()
        await _finish(fronts, settings.shutdown_seconds)
        await store.close()
        for listener in settings.listen:
            if listener.unix is not None:
                listener.unix.unlink(missing_ok=True)
    if fatal:
        raise fatal[0]


async def _listen(front: Front, context: ssl.SSLContext | None) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    listener = front.listener
    path = listener.unix
    try:
        if path is not None:
            with _socket_mode(path, int(listener.mode, 8)):
                server = await loop.create_unix_server(front, str(path), backlog=_BACKLOG)
            log.info("listening on unix:%s", path)
        else:
            host, port = listener.tcp
            server = await loop.create_server(
                front,
                host,
                port,
                ssl=context,
                backlog=_BACKLOG,
                ssl_handshake_timeout=10.0 if context else None,
                reuse_address=True,
            )
            for bound in server.sockets:
                host, port = bound.getsockname()[:2]
                log.info("listening on %s:%d%s", host, port, " (TLS)" if context else "")
    except OSError as error:
        raise UsageError(f"cannot listen on {listener.address}: {error}") from error
    return server


@contextlib.contextmanager
def _socket_mode(path: Path, mode: int) -> Iterator[None]:
    """Make a socket that is never, not even for a moment, open to more than mode says."""
    if path.is_socket():
        path.unlink()
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


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


def tls_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or later; with client_ca a certificate is asked for, and verified if given.

    Raises UsageError. A client without certificate may still come with a token or a
    password; one with a wrong or expired certificate does not get through the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    check_secret(tls.key)
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{tls.certificate}, {tls.key}: cannot be used: {error}") from error
    for path in (tls.client_ca, tls.crl):
        try:
            if path is not None:
                context.load_verify_locations(path)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"{path}: cannot be used: {error}") from error
    if tls.client_ca is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
    if tls.crl is not None:
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context
