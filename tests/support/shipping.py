"""A stand-in receiver that can misbehave, and spools to ship from."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from backports import zstd

from sams_ebpf import spool, wire


def batch(
    sequence: int = 0,
    *,
    epoch: bytes = bytes(16),
    generation: int = 1,
    writer: bytes = b"collectr",
    full: bool = False,
    final: bool = False,
    records: int = 1,
    node: str = "n1",
) -> wire.Batch:
    """A plausible batch."""
    rows = [wire.Record(b"/bin/%d" % at, 0, None, 10 + sequence) for at in range(records)]
    total = (10 + sequence) * records
    return wire.Batch(
        v=1,
        kind="counters",
        epoch=epoch,
        generation=generation,
        writer=writer,
        sequence=sequence,
        claims=wire.Claims(cluster="c1", node=node, job_id=5),
        mode="bpf",
        loader="libbpf",
        full=full or final,
        final=wire.Closing(reason="signal", live=0) if final else None,
        ledger=wire.Ledger(cgroup_cpu_ns=total, attributed_cpu_ns=total, unattributed_cpu_ns=0),
        executables=records,
        fields=wire.FIELDS,
        sums=[total, *[None] * (len(wire.COUNTERS) - 1)],
        records=rows,
    )


def fill(folder: Path, count: int, *, first: int = 0, **options: Any) -> list[wire.Identity]:
    """Put `count` batches of one writer into a spool."""
    identities = []
    for sequence in range(first, first + count):
        one = batch(sequence, **options)
        spool.put(folder, one)
        identities.append(one.identity)
    return identities


def waiting(folder: Path) -> list[str]:
    """Names of the batches in a spool."""
    return sorted(file.name for file in folder.iterdir() if file.suffix == ".msgpack")


def configure(
    file: Path, folder: Path, receivers: dict[str, Any], **sections: dict[str, Any]
) -> Path:
    """Write a configuration with quick waits; `sections` change single keys."""
    ship = {
        "spread_s": 0,
        "connect_timeout_s": 2,
        "read_timeout_s": 2,
        "total_timeout_s": 4,
        "backoff_s": 0.05,
        "backoff_max_s": 0.4,
        "receivers": receivers,
    } | sections.get("ship", {})
    document = {
        "site": {"cluster": "c1", "node": "n1"},
        "spool": {"folder": str(folder), "keep_free_bytes": 0} | sections.get("spool", {}),
        "ship": ship,
    }
    file.write_text(json.dumps(document))
    return file


COMMAND = [sys.executable, "-m", "sams_ebpf", "ship", "--config"]


def once(config: Path) -> subprocess.CompletedProcess[str]:
    """Run `sams-ebpf ship --once`."""
    return subprocess.run(
        [*COMMAND, str(config), "--once"], capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def service(config: Path, *prefix: str, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run the service while the block lasts."""
    with (log or Path(os.devnull)).open("a") as stderr:
        process = subprocess.Popen([*prefix, *COMMAND, str(config)], text=True, stderr=stderr)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait for a condition, and fail when it does not come."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited in vain")
        time.sleep(0.02)


_REASON = {"error": "because"}
Behaviour = Callable[["Handler", bytes], None]


class Receiver:
    """Stores what it is sent. `behave` decides about each request; None: as it should.

    attempts: arrivals of whole bodies. stored: identities in order of storing.
    duplicates: how often the same came again. moments: when requests came (monotonic).
    """

    def __init__(self, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self.behave: Callable[[int], Behaviour | None] = lambda _number: None
        self.attempts = 0
        self.connections = 0
        self.stored: list[wire.Identity] = []
        self.batches: dict[wire.Identity, bytes] = {}
        self.duplicates = 0
        self.conflicts = 0
        self.moments: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self._address = address
        self._tls = tls
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        scheme = "https" if self._tls else "http"
        host = "localhost" if self._tls else self._address
        return f"{scheme}://{host}:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        outer = self

        class Bound(Handler):
            receiver = outer

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def finish_request(self, request: Any, client_address: Any) -> None:
                if outer._tls is not None:
                    request.settimeout(10)
                    request = outer._tls.wrap_socket(request, server_side=True)
                super().finish_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Broken connections are what these tests are made of."""

        self._server = Server((self._address, self.port), Bound)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening; connections that are open stay so."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def store(self, data: bytes) -> str:
        """Store a batch as the contract has it; what the answer says."""
        identity = wire.decode(data).identity
        with self.lock:
            known = self.batches.get(identity)
            if known is None:
                self.batches[identity] = data
                self.stored.append(identity)
                return "stored"
            if known != data:
                self.conflicts += 1
                return "conflict"
            self.duplicates += 1
            return "duplicate"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    receiver: Receiver
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def setup(self) -> None:
        super().setup()
        with self.receiver.lock:
            self.receiver.connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        receiver = self.receiver
        with receiver.lock:
            number = receiver.attempts
            receiver.attempts += 1
            receiver.moments.append(time.monotonic())
            receiver.headers.append(dict(self.headers.items()))
        assert self.path == "/v1/batches", self.path
        assert self.headers["Content-Encoding"] == "zstd"
        assert self.headers["Content-Type"] == "application/msgpack"
        behaviour = receiver.behave(number)
        data = zstd.decompress(body)
        if behaviour is not None:
            behaviour(self, data)
        else:
            self.answer(200, {"status": receiver.store(data)})

    def answer(self, status: int, document: object = None, **headers: str) -> None:
        """Send a whole answer: JSON, or text as it is."""
        page = document if isinstance(document, str) else json.dumps(document or _REASON)
        text = page.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def status(code: int, **headers: str) -> Behaviour:
    """Answer with a status, storing nothing."""
    return lambda handler, _data: handler.answer(code, **headers)


def reset(handler: Handler, data: bytes) -> None:
    """Store, then cut the connection (RST) before any answer."""
    handler.receiver.store(data)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.rfile.close()
    handler.connection.close()


def drip(handler: Handler, _data: bytes) -> None:
    """Send an endless header, a byte at a time: never silent, never done."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(600):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        handler.close_connection = True


def hang(seconds: float, *, store: bool = True) -> Behaviour:
    """Store, but let the client wait for the answer in vain."""

    def behave(handler: Handler, data: bytes) -> None:
        if store:
            handler.receiver.store(data)
        time.sleep(seconds)
        handler.close_connection = True

    return behave


def mostly(chance: random.Random, share: float, *behaviours: Behaviour) -> Callable[[int], Any]:
    """Misbehave in this share of requests, in one of these ways."""
    return lambda _number: chance.choice(behaviours) if chance.random() < share else None
