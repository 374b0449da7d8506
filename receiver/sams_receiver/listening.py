"""One listener of the receiver: its sockets, its certificates, and how both are renewed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from sams_ebpf.errors import UsageError
from sams_ebpf.settings import check_secret
from sams_receiver.app import Front
from sams_receiver.auth import read_proxy_secret
from sams_receiver.config import Tls

log = logging.getLogger(__name__)

BACKLOG: Final = 2_048
_HANDSHAKE_SECONDS: Final = 10.0


class Listening:
    """A front that listens, and can take up new certificates while it does.

    Raises UsageError if the certificates cannot be used.
    """

    def __init__(self, front: Front) -> None:
        tls = front.listener.tls
        self._front = front
        front.context = None if tls is None else tls_context(tls, front.refused)
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen. Raises UsageError."""
        listener = self._front.listener
        path = listener.unix
        loop = asyncio.get_running_loop()
        try:
            if path is not None:
                with _socket_mode(path, int(listener.mode, 8)):
                    server = await loop.create_unix_server(self._front, str(path), backlog=BACKLOG)
                log.info("listening on unix:%s", path)
            else:
                host, port = listener.tcp
                server = await loop.create_server(
                    self._front,
                    host,
                    port,
                    ssl=self._front.context,
                    backlog=BACKLOG,
                    ssl_handshake_timeout=_HANDSHAKE_SECONDS if self._front.context else None,
                    reuse_address=True,
                )
                for bound in server.sockets:
                    host, port = bound.getsockname()[:2]
                    secured = " (TLS)" if self._front.context else ""
                    log.info("listening on %s:%d%s", host, port, secured)
        except OSError as error:
            raise UsageError(f"cannot listen on {listener.address}: {error}") from error
        self._servers = [server]

    async def reload(self) -> bool:
        """Read certificates, authorities, revocations and the proxy's secret again.

        False, logged, if they cannot be used: what was read before stays in force. Nobody is
        turned away meanwhile; but who came in by what was read before has to come in again.
        """
        listener = self._front.listener
        secret_file = None if listener.proxy is None else listener.proxy.secret_file
        if listener.tls is None and secret_file is None:
            return True
        try:
            context = None
            if listener.tls is not None:
                context = tls_context(listener.tls, self._front.refused)
            if secret_file is not None:
                self._front.proxy_secret = read_proxy_secret(secret_file)
        except UsageError as error:
            log.error("%s: %s; what was read before stays in force", listener.address, error)
            return False
        if context is not None:
            await self._renew(context)
        self._front.retire()
        return True

    async def _renew(self, context: ssl.SSLContext) -> None:
        """Accept with the new context on the same sockets: their queues of clients stay."""
        loop = asyncio.get_running_loop()
        old = self._servers
        self._front.context = context
        self._servers = [
            await loop.create_server(
                self._front,
                sock=socket.socket(fileno=os.dup(bound.fileno())),
                ssl=context,
                backlog=BACKLOG,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS,
            )
            for server in old
            for bound in server.sockets
        ]
        for server in old:
            server.close()

    def close(self) -> None:
        """Take no new connections."""
        for server in self._servers:
            server.close()

    def remove(self) -> None:
        """Leave no socket of its own behind in the file system."""
        if self._front.listener.unix is not None and self._servers:
            self._front.listener.unix.unlink(missing_ok=True)


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


def tls_context(tls: Tls, refused: Callable[[str], None] | None = None) -> ssl.SSLContext:
    """TLS 1.2 or later; with client_ca a certificate is asked for, and verified if given.

    Raises UsageError. A client without certificate may still come with a token or a
    password; one with a wrong or expired certificate does not get through the handshake,
    and `refused` is called with the reason.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if refused is not None:
        context.sslobject_class = _telling(refused)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    check_secret(tls.key)
    try:
        # An empty passphrase: nobody is there to be asked for one.
        context.load_cert_chain(tls.certificate, tls.key, password="")
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


def _telling(refused: Callable[[str], None]) -> type[ssl.SSLObject]:
    """A connection's TLS that says to both sides why a certificate is not accepted.

    asyncio ends such a connection without a word, and drops the alert by which TLS tells the
    client. "Wants to read" makes it send the alert and wait for the client to go, which it
    does, or has to within the time that a handshake may take.
    """

    class Telling(ssl.SSLObject):
        _error: ssl.SSLCertVerificationError | None = None
        # What the client had on its way by then is read, or the reset would overtake the alert.
        _reads = 16

        def do_handshake(self) -> None:
            if self._error is None:
                try:
                    super().do_handshake()
                except ssl.SSLCertVerificationError as error:
                    self._error = error
                    refused(error.verify_message)
                else:
                    return
            self._reads -= 1
            if not self._reads:
                raise self._error
            raise ssl.SSLWantReadError

    return Telling
