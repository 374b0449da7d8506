"""One receiver as the shipper sees it: a kept-alive session, and what its answers mean."""

from __future__ import annotations

import base64
import email.utils
import enum
import http.client
import json
import re
import socket
import ssl
import threading
import time
from typing import Any, Final, NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from sams_ebpf import __version__, config, settings
from sams_ebpf.errors import UsageError

MAX_ANSWER_BYTES: Final = 64 << 10
MAX_REASON: Final = 200
MAX_RETRY_AFTER_S: Final = 3600.0
# What a receiver says about this batch alone; asking again would change nothing.
_REFUSED: Final = frozenset({400, 409, 413, 415, 422})
_DENIED: Final = frozenset({401, 403, 407})


class Outcome(enum.Enum):
    """What to do with a batch after an attempt."""

    STORED = "stored"  # it is on the receiver's disk
    REFUSED = "refused"  # never again: set it aside
    DENIED = "denied"  # this node is not let in: keep it, say so
    LATER = "later"  # keep it, try again


class Answer(NamedTuple):
    """An outcome, its reason in one line, and how long the receiver asked to be left alone."""

    outcome: Outcome
    reason: str
    retry_after_s: float | None = None


class _Handles(threading.local):
    """This thread's connection, held by a descriptor of its own so that it can be cut."""

    sender: Sender | None = None


_handles = _Handles()


class _Plain(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _watched(super()._new_conn())


class _Encrypted(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _watched(super()._new_conn())


def _watched(connection: socket.socket) -> socket.socket:
    if _handles.sender is not None:
        _handles.sender.hold(connection)
    return connection


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _EncryptedPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Encrypted


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().init_poolmanager(*args, **kwargs)
        _adopt(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        manager = super().proxy_manager_for(*args, **kwargs)
        _adopt(manager)
        return manager


def _adopt(manager: urllib3.PoolManager) -> None:
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _EncryptedPool}


class Sender:
    """Sends bodies to one receiver. Not to be shared by threads, but for `abort`."""

    def __init__(self, receiver: config.Receiver, ship: config.Ship) -> None:
        self._receiver = receiver
        self._url = receiver.url.rstrip("/") + "/v1/batches"
        self._timeouts = (ship.connect_timeout_s, ship.read_timeout_s)
        self._total_s = ship.total_timeout_s
        self._lock = threading.Lock()
        self._handle: socket.socket | None = None
        self._stopped = False
        self._session = requests.Session()
        # No proxies, passwords (.netrc) or certificates from the environment.
        self._session.trust_env = False
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(pool_connections=1, pool_maxsize=1))
        self._session.verify = str(receiver.ca_file) if receiver.ca_file else _system_ca()
        if receiver.client_certificate is not None:
            self._session.cert = (str(receiver.client_certificate), str(receiver.client_key))
        if receiver.proxy is not None:
            self._session.proxies = {"http": receiver.proxy, "https": receiver.proxy}
        self._session.headers.update(
            {
                "User-Agent": f"sams-ebpf/{__version__}",
                "Content-Type": "application/msgpack",
                "Content-Encoding": "zstd",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
            }
        )

    def send(self, body: bytes) -> Answer:
        """Make one attempt, which ends within the configured time-outs whatever happens."""
        try:
            headers = credentials(self._receiver)
        except UsageError as error:
            return Answer(Outcome.LATER, str(error))
        overdue = threading.Event()
        timer = threading.Timer(self._total_s, self._cut, (overdue,))
        timer.daemon = True
        _handles.sender = self
        timer.start()
        try:
            answer = self._post(body, headers)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            self._let_go()
            answer = Answer(Outcome.LATER, unusable(self._receiver) or explain(error))
        finally:
            timer.cancel()
        # A header that is cut short can still read as an answer.
        if overdue.is_set() and answer.outcome is not Outcome.STORED:
            return Answer(Outcome.LATER, f"no answer within {self._total_s:g} s in all")
        return answer

    def abort(self) -> None:
        """Cut the attempt that another thread is making now, and all later ones."""
        self._stopped = True
        self._let_go()

    def close(self) -> None:
        """Close the connection."""
        self._session.close()
        self._let_go()

    def hold(self, connection: socket.socket) -> None:
        """Keep a handle on a connection this sender has just made."""
        handle = connection.dup()
        with self._lock:
            former, self._handle = self._handle, handle
        if former is not None:
            former.close()
        if self._stopped:
            self._let_go()

    def _post(self, body: bytes, headers: dict[str, str]) -> Answer:
        response = self._session.post(
            self._url,
            data=body,
            headers=headers,
            timeout=self._timeouts,
            allow_redirects=False,
            stream=True,
        )
        try:
            status = response.status_code
            text = _read(response)
        finally:
            response.close()
        error = _error(text)
        said = error or _title(text).removeprefix(f"{status} ") or response.reason or ""
        reason = f"{status} {said}".strip()
        if 200 <= status < 300:
            if _acknowledged(text):
                return Answer(Outcome.STORED, reason)
            # A web server that says 200 to anything must not empty the spool.
            reason = f"{reason}: not what a receiver answers; check the url"
            return Answer(Outcome.LATER, reason)
        if status in _REFUSED:
            if error:
                return Answer(Outcome.REFUSED, reason)
            # A proxy that takes offence at this node's certificate, say: no word on the batch.
            reason = f"{reason}: not what a receiver answers; what is in front of it?"
            return Answer(Outcome.LATER, reason)
        if status in _DENIED:
            return Answer(Outcome.DENIED, reason)
        if 300 <= status < 400:
            reason = f"{reason}: redirects are not followed; check the url"
        if status == 404:
            reason = f"{reason}: check the url"
        return Answer(Outcome.LATER, reason, retry_after(response.headers.get("Retry-After")))

    def _cut(self, overdue: threading.Event) -> None:
        overdue.set()
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            handle.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed by the other side already
        finally:
            handle.close()


def credentials(receiver: config.Receiver) -> dict[str, str]:
    """Read what this node proves itself with. Raises UsageError with file and fix."""
    if receiver.client_key is not None:
        settings.check_secret(receiver.client_key)
    if receiver.token_file is not None:
        return {"Authorization": f"Bearer {settings.read_secret(receiver.token_file)}"}
    if receiver.basic_file is not None:
        pair = settings.read_secret(receiver.basic_file)
        if ":" not in pair:
            raise UsageError(f"{receiver.basic_file}: has to hold user:password")
        return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
    return {}


def unusable(receiver: config.Receiver) -> str | None:
    """Tell which file for TLS cannot be used, and why: OpenSSL's own words name none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    path = receiver.ca_file
    try:
        if path is not None and not path.is_dir():
            context.load_verify_locations(path)
    except ssl.SSLError:
        return f"{path}: holds no certificate in PEM"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    certificate, key = receiver.client_certificate, receiver.client_key
    if certificate is None or key is None:
        return None
    try:
        # An empty passphrase: nobody is there to be asked for one.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{key}: is not the key of {certificate}"
        return f"{certificate}, {key}: not a certificate and its key in PEM without a passphrase"
    except OSError as error:
        return f"{certificate}, {key}: cannot be read: {error.strerror}"
    return None


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, at most an hour; None if it says nothing."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_S)
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, moment - (time.time() if now is None else now)), MAX_RETRY_AFTER_S)


def explain(error: BaseException) -> str:
    """Give the innermost cause that says something, in one short line."""
    cause: BaseException = error
    while True:
        inner = cause.__cause__ or cause.__context__ or getattr(cause, "reason", None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    if type(cause) is http.client.BadStatusLine:  # and not one that was closed
        return _line(f"not an answer in HTTP: {cause}")
    text = re.sub(r" \(_ssl\.c:\d+\)$", "", str(cause))
    if isinstance(cause, ssl.SSLCertVerificationError) and re.search("expired|not yet valid", text):
        text += " by this node's clock"
    return _line(text or type(cause).__name__)


def _system_ca() -> str | bool:
    """Where this system keeps the certificates it trusts; else those of requests."""
    places = ssl.get_default_verify_paths()
    return places.cafile or places.capath or True


def _read(response: requests.Response) -> bytes:
    """Read the answer's body, bounded; the connection is kept if it was read to its end."""
    text = b""
    while len(text) <= MAX_ANSWER_BYTES:
        piece: bytes = response.raw.read(8192, decode_content=False)
        if not piece:
            return text
        text += piece
    return text[:MAX_ANSWER_BYTES]


def _error(text: bytes) -> str:
    """What a receiver says is wrong; empty if it was none that spoke."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    found = document.get("error") if isinstance(document, dict) else None
    return _line(found) if isinstance(found, str) else ""


def _title(text: bytes) -> str:
    """What a web server's page of HTML says in short."""
    found = re.search(rb"<title>([^<]{1,200})</title>", text, re.IGNORECASE)
    return _line(found[1].decode("utf-8", "replace")) if found else ""


def _acknowledged(text: bytes) -> bool:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("status") in ("stored", "duplicate")


def _line(text: str) -> str:
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= MAX_REASON else f"{shown[: MAX_REASON - 1]}…"
