"""The HTTP side: who, how much, is it a batch, is it new; then the store, then the answer.

The order matters. Nothing of a body is read before it is settled who speaks, nothing is
decompressed beyond its bound, nothing is acknowledged before it is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import re
import ssl
import time
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.client_exceptions import ClientError
from aiohttp.web_protocol import RequestHandler
from msgspec import Meta

from sams_ebpf import wire
from sams_ebpf.settings import PLAIN_NAME
from sams_receiver.archive import Flag, Item, Kind, SyncFailedError
from sams_receiver.archive import format as fmt
from sams_receiver.archive.aside import Aside
from sams_receiver.archive.seen import Verdict
from sams_receiver.auth import Client, DeniedError, Door, Pass, read_proxy_secret, split_basic
from sams_receiver.config import Listener, Receiver
from sams_receiver.metrics import CONTENT_TYPE, Metrics
from sams_receiver.quota import Daily, Rate, short_name
from sams_receiver.store import NotStoredError, Store

log = logging.getLogger(__name__)

_UPSTREAM_PATH: Final = re.compile(r"/([0-9]{1,19})/([A-Za-z0-9][A-Za-z0-9._-]{0,200})")
# Bodies beyond this are decompressed in a thread and one at a time.
_SMALL: Final = 1 << 20
_RETRY_SECONDS: Final = 30
# A record has no fewer on the wire: only then is it worth while to count them beforehand.
_RECORD_BYTES: Final = 6
# Values that upstream's JSON may hold: 3 kB on the wire can become millions of them, whose
# objects would take a gigabyte and many seconds. 200,000 executables have as many.
_JSON_PARTS: Final = 600_000
_JSON: Final = {"Content-Type": "application/json"}


class Refusal(Exception):  # noqa: N818
    """An answer other than 2xx: status, reason, and seconds after which to come again."""

    def __init__(
        self, status: int, reason: str, *, retry: float | None = None, aside: bool = False
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry = retry
        self.aside = aside


class Payload(NamedTuple):
    """What passed every check and goes to the store."""

    kind: Kind
    data: bytes
    tag: fmt.Tag
    cluster: str | None
    node: str | None
    vouched: bool


class _Core(msgspec.Struct, frozen=True):
    jobid: Annotated[int, Meta(ge=0, le=wire.INT64_MAX)] | wire.Name
    node: wire.Name


class _Upstream(msgspec.Struct, frozen=True):
    core: _Core = msgspec.field(name="sams.sampler.Core")


_json = msgspec.json.Decoder(_Upstream)
_any_json = msgspec.json.Decoder()


class App:
    """Answers requests. One per process, with a `Front` for each listener."""

    def __init__(self, config: Receiver, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.stopping = False
        self.store: Store | None = None
        self.door = Door(config, log.warning)
        self.aside = Aside(config.archive / "aside", config.quotas.aside_bytes)
        limits = config.limits
        self._limits = limits
        self._rate = Rate(limits.requests_per_second, limits.burst, limits.clients)
        self._failures = Rate(
            limits.failures_per_minute / 60, limits.failures_per_minute, limits.clients
        )
        self.daily = Daily(config.quotas, limits.clients)
        self._in_flight = 0
        self._large = asyncio.Lock()
        self._passwords = asyncio.Semaphore(2)

    # -- who ---------------------------------------------------------------------------

    async def _admit(self, request: web.BaseRequest, connection: Connection) -> Client:
        held, peer = connection.held, connection.peer
        if held is not None and self.door.again(held, request.headers.get(hdrs.AUTHORIZATION, "")):
            client = held.client
        else:
            try:
                client = await self._identify(request, connection)
            except DeniedError as denied:
                seldom = self.denied(str(denied.status), peer or "a proxy's client", denied.reason)
                if peer is not None and not seldom:
                    raise self._too_many_failures() from denied
                text = "who are you?" if denied.status == 401 else "not allowed"
                raise Refusal(denied.status, text) from denied
        # Where nodes share one name the address tells them apart, if there is one.
        shared = peer if client.node is None else None
        wait = self._rate.take(f"{client.method} {client.name} {shared or ''}", time.monotonic())
        if wait:
            self.metrics.limited.labels("rate").inc()
            raise Refusal(429, "too many requests", retry=wait)
        connection.front.admitted(connection)
        return client

    async def _identify(self, request: web.BaseRequest, connection: Connection) -> Client:
        front = connection.front
        connection.held = None
        if front.listener.proxy is not None:
            client = self.door.by_proxy(
                request.headers, front.listener.proxy.header, front.proxy_secret
            )
            if client is not None:
                return client
        if front.listener.tls is not None:
            transport = request.transport
            certificate = transport.get_extra_info("peercert") if transport is not None else None
            client = self.door.by_certificate(certificate)
            if client is not None:
                return client
        header = request.headers.get(hdrs.AUTHORIZATION, "")
        kind, _, value = header.partition(" ")
        if kind.lower() == "bearer":
            found = self.door.by_token(header)
            if front.listener.proxy is None:
                # A proxy may name another client next time; a certificate stays what it is.
                connection.held = found
            return found.client
        if kind.lower() == "basic":
            user, password = split_basic(value.strip())
            known = self.door.by_known_password(user, password)
            if known is not None:
                return known
            # Whoever is known already is let in whatever others at this address do; only what
            # costs something to look at is not looked at any more.
            peer = connection.peer
            if peer is not None and self._failures.empty(peer, time.monotonic()):
                raise self._too_many_failures()
            async with self._passwords:
                return await asyncio.to_thread(self.door.check_password, user, password)
        raise DeniedError(401, "no credentials")

    def denied(self, status: str, who: str, reason: str) -> bool:
        """Count, and log unless `who` is denied too often to be news; False in that case."""
        self.metrics.denied.labels(status).inc()
        if self._failures.take(who, time.monotonic()):
            return False
        log.warning("%s denied: %s", short_name(who), reason)
        return True

    def _too_many_failures(self) -> Refusal:
        self.metrics.limited.labels("failures").inc()
        return Refusal(429, "too many failed attempts", retry=60)

    # -- what --------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest, connection: Connection) -> web.StreamResponse:
        """Answer one request."""
        what = "other"
        response: web.StreamResponse
        try:
            method, path = request.method, request.path
            if path == "/v1/batches":
                what = "batch"
                _wants(method, "POST")
                response = await self._take(request, connection, None)
            elif path == "/healthz":
                what = "health"
                _wants(method, "GET")
                response = self._health()
            elif path == "/metrics":
                what = "metrics"
                _wants(method, "GET")
                response = await self._metrics(request, connection)
            else:
                place = self._upstream_place(request.raw_path)
                what = "upstream"
                _wants(method, "POST")
                response = await self._take(request, connection, place)
        except Refusal as refusal:
            response = _refuse(refusal)
            if refusal.status in (401, 413) or self.stopping or not request.content.is_eof():
                # Whoever is refused is not listened to any longer.
                response.force_close()
        self.metrics.answered(what, response.status)
        return response

    def _upstream_place(self, raw_path: str) -> tuple[str, str]:
        """Job and file name of upstream's path. Raises Refusal for any other path."""
        match = _UPSTREAM_PATH.fullmatch(raw_path)
        if match is None or not self.config.upstream_json:
            raise Refusal(404, "nothing here")
        return match[1], match[2]

    async def _take(
        self,
        request: web.BaseRequest,
        connection: Connection,
        upstream: tuple[str, str] | None,
    ) -> web.StreamResponse:
        store = self.store
        if self.stopping or store is None:
            raise Refusal(503, "stopping", retry=_RETRY_SECONDS)
        client = await self._admit(request, connection)
        headers = request.headers
        if upstream is None:
            _check_type(headers.get(hdrs.CONTENT_TYPE, ""))
        encoding = _check_encoding(headers.get(hdrs.CONTENT_ENCODING, "identity"))
        length = request.content_length
        if length is not None and length > self._limits.body_bytes:
            raise Refusal(413, f"a body of {length} bytes: {self._limits.body_bytes} are taken")
        held = [0]
        try:
            body = await self._read(request, held)
            self.metrics.received_bytes.inc(len(body))
            payload = await self._check(client, body, encoding, upstream, held)
            return await self._store(request, store, client, payload)
        finally:
            self._in_flight -= held[0]

    async def _check(
        self,
        client: Client,
        body: bytes,
        encoding: str,
        upstream: tuple[str, str] | None,
        held: list[int],
    ) -> Payload:
        """Everything between the body as read and the store. Raises Refusal."""
        try:
            if encoding == "zstd":
                body = await self._decompress(body, held)
            quota_of = _quota_name(client.cluster, client.node or client.name)
            # A client that is known as a node pays for what it sends before anybody looks at
            # it. Clients that share one name are told apart by what they claim, after that.
            if client.node is not None:
                self._allow("bytes", self.daily.bytes_left(quota_of, len(body)))
            if upstream:
                payload = self._upstream(client, body, upstream)
            else:
                payload = self._batch(client, body)
        except DeniedError as denied:
            self.denied(str(denied.status), f"{client.method} {client.name}", denied.reason)
            text = "a node can only write as itself, in its own cluster"
            raise Refusal(denied.status, text) from denied
        except Refusal as refusal:
            if refusal.aside:
                self.metrics.invalid.inc()
                self._set_aside(client, "invalid", body, refusal.reason)
            raise
        if client.node is None:
            quota_of = _quota_name(payload.cluster, payload.node or client.name)
            self._allow("bytes", self.daily.bytes_left(quota_of, len(body)))
        self._allow("writers", self.daily.writer_left(quota_of, payload.tag.key))
        return payload

    def _allow(self, what: str, allowed: bool) -> None:
        if not allowed:
            self.metrics.limited.labels(what).inc()
            raise Refusal(429, f"more {what} than one node may have in a day", retry=3600)

    async def _store(
        self, request: web.BaseRequest, store: Store, client: Client, payload: Payload
    ) -> web.StreamResponse:
        flags = Flag.VOUCHED if payload.vouched else 0
        item = Item(payload.kind, payload.data, flags, time.time_ns())
        try:
            verdict = await store.put(payload.cluster, payload.node, item, payload.tag)
        except NotStoredError as error:
            status = 507 if error.full else 503
            raise Refusal(status, "cannot be stored now", retry=_RETRY_SECONDS) from error
        except SyncFailedError as error:
            raise Refusal(503, "cannot be stored", retry=_RETRY_SECONDS) from error
        if verdict is Verdict.CONFLICT:
            self.metrics.conflicts.inc()
            reason = "same identity, other content"
            self._set_aside(client, "conflict", payload.data, reason)
            raise Refusal(409, reason)
        if verdict is Verdict.DUPLICATE:
            self.metrics.duplicates.inc()
            return _acknowledge(request, b'{"status":"duplicate"}\n')
        self.metrics.stored.inc()
        if not payload.vouched:
            self.metrics.unvouched.inc()
        return _acknowledge(request, b'{"status":"stored"}\n')

    def _batch(self, client: Client, body: bytes) -> Payload:
        """Check a batch in full, records included. Raises Refusal or DeniedError."""
        most = self._limits.records
        try:
            if len(body) > most * _RECORD_BYTES and (count := wire.outline(body).records) > most:
                raise Refusal(413, f"{count} records: {most} are taken")
            header = wire.check(body)
        except wire.WireError as error:
            raise Refusal(400, f"{error!s:.300}", aside=True) from error
        claims = header.claims
        vouched = _check_claims(client, claims.cluster, claims.node)
        tag = fmt.batch_tag(header, body)
        return Payload(Kind.COUNTERS, body, tag, claims.cluster, claims.node, vouched)

    def _upstream(self, client: Client, body: bytes, path: tuple[str, str]) -> Payload:
        """Check upstream's JSON of one job on one node. Raises Refusal or DeniedError."""
        job, name = path
        if sum(map(body.count, (b",", b"[", b"{"))) > _JSON_PARTS:
            raise Refusal(413, f"more than {_JSON_PARTS} values in it")
        try:
            core = _json.decode(body).core
            _any_json.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise Refusal(400, f"not upstream's JSON: {error!s:.200}", aside=True) from error
        if str(core.jobid) != job:
            raise Refusal(400, "the path names another job than the body", aside=True)
        cluster = client.cluster or self.config.cluster
        vouched = _check_claims(client, cluster, core.node)
        held = fmt.UpstreamJson(
            cluster=cluster,
            job=job,
            node=core.node,
            digest=hashlib.sha256(body).digest(),
            name=name,
            body=body,
        )
        data = fmt.pack_upstream(held)
        if len(data) > fmt.MAX_PAYLOAD:
            raise Refusal(413, "more than the archive takes as one")
        return Payload(Kind.UPSTREAM_JSON, data, held.tag, cluster, core.node, vouched)

    # -- how much ----------------------------------------------------------------------

    async def _read(self, request: web.BaseRequest, held: list[int]) -> bytes:
        content = request.content
        if content.is_eof():
            whole = content.read_nowait()
            self._hold(held, len(whole))
            return whole
        if "100-continue" in request.headers.get(hdrs.EXPECT, "").lower():
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        # In one piece: a body that comes a byte at a time takes no more room than another.
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while part := await content.readany():
                    self._hold(held, len(part))
                    if held[0] > self._limits.body_bytes:
                        raise Refusal(413, f"more than {self._limits.body_bytes} bytes")
                    body += part
        except TimeoutError as error:
            raise Refusal(408, f"no body within {self._limits.body_seconds} s") from error
        except ClientError as error:
            raise Refusal(400, f"the body cannot be read: {type(error).__name__}") from error
        return bytes(body)

    async def _decompress(self, body: bytes, held: list[int]) -> bytes:
        limit = self._limits.batch_bytes
        if len(body) <= 64 << 10:
            data, problem = fmt.salvage(body, min(limit, _SMALL))
            if problem is None:
                self._hold(held, len(data))
                return data
        async with self._large:
            self._hold(held, limit)
            data, problem = await asyncio.to_thread(fmt.salvage, body, limit)
            self._hold(held, len(data) - limit)
        if problem is not None:
            too_big = problem.startswith("more than")
            raise Refusal(413 if too_big else 400, problem, aside=not too_big)
        return data

    def _hold(self, held: list[int], size: int) -> None:
        """Count bytes in memory; refuse when all clients together have too many."""
        if size > 0 and self._in_flight + size > self._limits.in_flight_bytes:
            self.metrics.limited.labels("in_flight").inc()
            raise Refusal(503, "busy", retry=2)
        held[0] += size
        self._in_flight += size

    def _set_aside(self, client: Client, kind: str, data: bytes, reason: str) -> None:
        facts = {"client": client.name, "method": client.method, "reason": reason}
        quota_of = _quota_name(client.cluster, client.node or client.name)
        if not self.daily.aside_left(quota_of, len(data)) or not self.aside.put(kind, data, facts):
            self.metrics.aside_dropped.inc()

    # -- about itself ------------------------------------------------------------------

    def _health(self) -> web.Response:
        store = self.store
        if store is None or self.stopping:
            return _answer(503, b'{"status":"stopping"}\n')
        if store.trouble is not None or store.free_bytes < self.config.min_free_bytes:
            return _answer(503, b'{"status":"cannot store"}\n')
        return _answer(200, b'{"status":"ok"}\n')

    async def _metrics(self, request: web.BaseRequest, connection: Connection) -> web.Response:
        if not connection.front.listener.local:
            await self._admit(request, connection)
        metrics = self.metrics
        metrics.in_flight.set(self._in_flight)
        metrics.aside.set(self.aside.bytes)
        if self.store is not None:
            metrics.free.set(self.store.free_bytes)
            metrics.digests.set(self.store.in_memory)
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})


class _Protocol(RequestHandler):
    """A connection as aiohttp has it, but that parses again only after a pause.

    aiohttp feeds its parser once more whenever a body was read, a twentieth of a request's time.
    """

    __slots__ = ("_pauses",)

    def __init__(self, front: Front, *, loop: asyncio.AbstractEventLoop, **settings: Any) -> None:  # noqa: ANN401
        self._pauses = False
        super().__init__(front, loop=loop, **settings)

    def pause_reading(self) -> None:
        """The body comes faster than it is read."""
        self._pauses = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """There is room for more of the body."""
        if self._pauses:
            self._pauses = False
            super().resume_reading(resume_parser)


class Front(web.Server):
    """One listener: its connections, their number, and those who are too slow.

    `sweep` ends connections on which nothing has been asked for longer than they may be
    idle: that bounds a client that sends its headers one byte at a time.
    """

    def __init__(self, app: App, listener: Listener, *, budget: Budget) -> None:
        self.listener = listener
        proxy = listener.proxy
        self.proxy_secret = (
            read_proxy_secret(proxy.secret_file)
            if proxy is not None and proxy.secret_file
            else None
        )
        # By which connections are made from now on; None without TLS.
        self.context: ssl.SSLContext | None = None
        self._app = app
        self._budget = budget
        self._idle = app.config.limits.idle_seconds
        self._open: dict[RequestHandler, Connection] = {}
        self._settings: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": self._idle,
            "lingering_time": 2.0,
            "logger": logging.getLogger("sams_receiver.http"),
        }
        super().__init__(self._answer)

    def __call__(self) -> RequestHandler:
        """Make the protocol of a new connection."""
        return _Protocol(self, loop=asyncio.get_running_loop(), **self._settings)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Take a connection; if there are too many, a stranger's is closed for it."""
        super().connection_made(handler, transport)
        connection = Connection(self, transport)
        self._open[handler] = connection
        if transport.get_extra_info("sslcontext") is not self.context:
            transport.abort()  # shook hands by certificates that were replaced meanwhile
        if not self._budget.opened(connection):
            self._app.metrics.limited.labels("connections").inc()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        connection = self._open.pop(handler, None)
        if connection is not None:
            self._budget.closed(connection)
        super().connection_lost(handler, exc)

    def admitted(self, connection: Connection) -> None:
        """Note that the other side of a connection is known."""
        if not connection.known:
            connection.known = True
            self._budget.admitted(connection)

    def refused(self, reason: str) -> None:
        """Note a client whose certificate was not accepted; TLS does not tell its address."""
        self._app.denied("tls", f"a client's certificate at {self.listener.address}", reason)

    def sweep(self) -> None:
        """End connections that have been idle, or sending headers, for too long."""
        limit = time.monotonic() - self._idle - 5
        for connection in list(self._open.values()):
            if connection.since < limit:
                connection.transport.abort()

    def retire(self) -> None:
        """Let every connection end once it is idle: who holds it has to come in again."""
        for handler, connection in list(self._open.items()):
            if connection.since == math.inf:
                connection.retiring = True  # with its answer
            else:
                handler.force_close()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return any(connection.since == math.inf for connection in self._open.values())

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = self._open.get(request.protocol)
        if connection is None:  # It was closed meanwhile: nobody will read this.
            return _refuse(Refusal(503, "closed meanwhile"))
        # While a request is being answered it has its own time-outs.
        connection.since = math.inf
        try:
            response = await self._app.handle(request, connection)
            if connection.retiring:
                response.force_close()
            return response
        finally:
            connection.since = time.monotonic()


class Connection:
    """What is known of an open connection.

    peer: address of the other side, None for a proxy, behind which there are many. since:
    when it became idle (monotonic), infinite while a request is answered. held: by what its
    last request was let in. known: whether one was.
    """

    __slots__ = ("front", "held", "known", "peer", "retiring", "since", "transport")

    def __init__(self, front: Front, transport: asyncio.Transport) -> None:
        self.front = front
        self.transport = transport
        self.peer: str | None = None
        if front.listener.proxy is None and front.listener.unix is None:
            name = transport.get_extra_info("peername")
            self.peer = str(name[0]) if name else "gone"
        self.since = time.monotonic()
        self.held: Pass | None = None
        self.known = False
        self.retiring = False


class Budget:
    """Connections open on all listeners together, and how many there may be.

    Beyond that the oldest goes of those on which nobody has been let in yet: strangers who
    hold as many as they can shut out nobody who has a credential.
    """

    def __init__(self, most: int) -> None:
        self.open = 0
        self.most = most
        # In the order in which they came.
        self._strangers: dict[Connection, None] = {}

    def opened(self, connection: Connection) -> bool:
        """Count a connection; False if one had to be closed, maybe this one."""
        self.open += 1
        self._strangers[connection] = None
        if self.open <= self.most:
            return True
        oldest = next(iter(self._strangers))
        del self._strangers[oldest]
        oldest.transport.abort()
        return False

    def admitted(self, connection: Connection) -> None:
        """Its client is known."""
        self._strangers.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self.open -= 1
        self._strangers.pop(connection, None)


def _wants(method: str, wanted: str) -> None:
    if method != wanted:
        raise Refusal(405, f"only {wanted} is possible here")


@lru_cache(maxsize=64)
def _check_type(given: str) -> None:
    if given.partition(";")[0].strip().lower() != "application/msgpack":
        raise Refusal(415, "Content-Type has to be application/msgpack")


@lru_cache(maxsize=64)
def _check_encoding(given: str) -> str:
    encoding = given.strip().lower()
    if encoding not in ("identity", "zstd"):
        raise Refusal(415, "Content-Encoding has to be zstd or none")
    return encoding


@lru_cache(maxsize=1 << 14)
def _is_plain(name: str) -> bool:
    return PLAIN_NAME.fullmatch(name) is not None


def _check_claims(client: Client, cluster: str | None, node: str | None) -> bool:
    """Whether the client is the node it writes as. Raises DeniedError for anyone else's node."""
    for name, value in (("node", node), ("cluster", cluster)):
        if value is not None and not _is_plain(value):
            raise Refusal(400, f"{name}: only letters, digits, '.', '_', '-'", aside=True)
    if client.node is None:
        return False
    if client.node != node:
        mine, other = short_name(client.node), short_name(str(node))
        raise DeniedError(403, f"may write as node {mine}, not as {other}")
    if client.cluster is not None and client.cluster != cluster:
        mine, other = short_name(client.cluster), short_name(str(cluster))
        raise DeniedError(403, f"may write as a node of cluster {mine}, not of {other}")
    return True


def _quota_name(cluster: str | None, node: str) -> str:
    return f"{cluster or ''}/{node}"


class _Ready(web.StreamResponse):
    """The answer that nearly every request gets: sent as it is, in one piece.

    aiohttp takes as long to put an answer together as to read a request.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._text = body
        self._to: web.BaseRequest | None = None

    @property
    def keep_alive(self) -> bool:
        """Whether the connection goes on; it does unless `force_close` was called."""
        return super().keep_alive is not False

    async def prepare(self, request: web.BaseRequest) -> None:
        """Take the request that is answered."""
        self._to = request

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002
        """Send it."""
        request = self._to
        transport = request.transport if request is not None else None
        if request is None or transport is None or transport.is_closing():
            raise ConnectionResetError("closed meanwhile")
        transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n%b\r\n%b"
            % (len(self._text), b"" if self.keep_alive else b"Connection: close\r\n", self._text)
        )
        await request.writer.drain()


def _acknowledge(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
    if request.keep_alive and request.version == HttpVersion11:
        return _Ready(body)
    return _answer(200, body)


def _answer(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, headers=_JSON)


def _refuse(refusal: Refusal) -> web.Response:
    response = _answer(refusal.status, msgspec.json.encode({"error": refusal.reason}) + b"\n")
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer, Basic realm="sams"'
    if refusal.retry is not None:
        # Spread out, so that those who were refused together do not come back together.
        wait = refusal.retry * random.uniform(1.0, 2.0)  # noqa: S311
        response.headers["Retry-After"] = str(math.ceil(wait))
    return response
