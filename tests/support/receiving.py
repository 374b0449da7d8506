"""A receiver as a process of its own, and clients that retry like nodes do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
import batches
import yaml

from sams_ebpf import wire
from sams_receiver import auth
from sams_receiver.archive import Archive, Kind
from sams_receiver.archive import format as fmt

TOKEN = "t" * 40
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/msgpack"}


def private(path: Path, text: str) -> Path:
    """A file that holds a secret."""
    path.write_text(text)
    path.chmod(0o600)
    return path


def tokens(path: Path, names: Mapping[str, str]) -> Path:
    """A tokens file: token by name."""
    return private(path, "".join(f"{n} {auth.hash_token(t)}\n" for n, t in names.items()))


class Receiver:
    """`sams-receiver serve` on free ports of loopback."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.archive = Path(settings.pop("archive", folder / "archive"))
        self.section: dict[str, Any] = {
            "archive": str(self.archive),
            "listen": [{"address": "127.0.0.1:0"}],
            "min_free_bytes": 0,
            "limits": {"requests_per_second": 100_000, "burst": 100_000},
            **settings,
        }
        if "tokens_file" not in self.section:
            self.section["tokens_file"] = str(tokens(folder / "tokens", {"any": TOKEN}))
            self.section.setdefault("node_binding", False)
        self.config = folder / "config.yaml"
        self.log = folder / "receiver.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: list[int] = []
        self._read_from = 0

    def start(
        self, *, prefix: tuple[str, ...] = (), module: str = "sams_receiver", **environment: str
    ) -> Receiver:
        """Start and wait until it listens everywhere."""
        self.config.write_text(yaml.safe_dump({"receiver": self.section}))
        self._read_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, "serve",
                 "--config", str(self.config)],
                stderr=log, env={**os.environ, **environment},
            )  # fmt: skip
        wanted = len(self.section["listen"])
        for _ in range(600):
            lines = [line for line in self.lines() if "listening on " in line]
            if len(lines) >= wanted:
                self._fix_ports(lines)
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"receiver did not start: {self.lines()}")

    def _fix_ports(self, lines: list[str]) -> None:
        """Keep the ports for the next start, as a site's receiver does."""
        places = [line.partition("listening on ")[2].partition(" ")[0] for line in lines]
        self.ports = [int(p.rpartition(":")[2]) for p in places if not p.startswith("unix:")]
        for listener, place in zip(self.section["listen"], places, strict=True):
            listener["address"] = place

    def lines(self) -> list[str]:
        """The log since the last start."""
        if not self.log.exists():
            return []
        return self.log.read_bytes()[self._read_from :].decode().splitlines()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def rss(self) -> int:
        """Resident bytes."""
        return self._status("VmRSS")

    def peak(self) -> int:
        """Most resident bytes that there ever were."""
        return self._status("VmHWM")

    def _status(self, key: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) << 10
        raise AssertionError(f"no {key}")

    def kill(self) -> None:
        """SIGKILL, as the kernel's memory killer does."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        process = self.process
        if process is None:
            return 0
        self.process = None
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def stored(archive: Path) -> list[wire.Identity]:
    """Identities of every batch in an archive, as often as they are there."""
    return [
        wire.decode_header(frame.data).identity
        for segment in Archive.open(archive).segments()
        for frame in segment.frames()
        if frame.kind == Kind.COUNTERS
    ]


def check(archive: Path, acknowledged: set[wire.Identity]) -> int:
    """No acknowledged one is missing, none is there twice; how many are stored in all."""
    found = stored(archive)
    assert len(found) == len(set(found)), f"{len(found) - len(set(found))} stored twice"
    missing = acknowledged - set(found)
    assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged are lost"
    return len(found)


class Load:
    """Clients that each send one batch after the other, and each again until acknowledged."""

    def __init__(self, url: str, clients: int = 50, seed: int = 0) -> None:
        self.url = url
        self.acknowledged: set[wire.Identity] = set()
        self.statuses: dict[int, int] = {}
        self.duplicates = 0
        self.retries = 0
        self._clients = clients
        self._seed = seed
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Send until `stop`; what is under way then is seen through."""
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for client in range(self._clients):
                group.create_task(self._client(session, client))

    def stop(self) -> None:
        """No new batches from now on."""
        self._stop.set()

    async def _client(self, session: aiohttp.ClientSession, client: int) -> None:
        sequence = 0
        chance = random.Random(client)
        while not self._stop.is_set():
            batch = batches.batch(
                node=f"n{client}", job=self._seed, sequence=sequence, records=chance.randrange(30)
            )
            await self._send(session, batch)
            sequence += 1

    async def _send(self, session: aiohttp.ClientSession, batch: wire.Batch) -> None:
        data = wire.encode(batch)
        headers = dict(HEADERS)
        if batch.sequence % 2:
            data = fmt.compress([data])
            headers["Content-Encoding"] = "zstd"
        for _ in range(2000):
            # A client gives up waiting now and then: the answer is lost, the batch is not.
            timeout = aiohttp.ClientTimeout(total=10 if self.retries % 7 else 0.5)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.post(
                    f"{self.url}/v1/batches", data=data, headers=headers, timeout=timeout
                ) as answer:
                    body = await answer.json()
                    self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
                    if answer.status == 200:
                        self.duplicates += body["status"] == "duplicate"
                        self.acknowledged.add(batch.identity)
                        return
                    assert answer.status in (429, 503, 507), (answer.status, body)
            self.retries += 1
            await asyncio.sleep(0.05)
        raise AssertionError("never acknowledged")


def get(url: str, path: str) -> tuple[int, str]:
    """One GET."""
    import requests  # noqa: PLC0415

    answer = requests.get(url + path, timeout=10)
    return answer.status_code, answer.text


def metric(url: str, name: str) -> float:
    """Sum of a metric's samples."""
    total = 0.0
    for line in get(url, "/metrics")[1].splitlines():
        if line.startswith((f"sams_receiver_{name} ", f"sams_receiver_{name}{{")):
            total += float(line.rpartition(" ")[2])
    return total
