"""From the node's spool to the archive with the real receiver, whoever is killed in between."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import netns
import pki
import pytest
import receiving
import shipping
from receiving import Receiver
from shipping import configure, fill, once, service, until, waiting

from sams_ebpf import paths, spool, wire
from sams_receiver import auth
from sams_receiver.archive import Archive

pytestmark = pytest.mark.system

PASSWORD = "correct horse battery"  # noqa: S105


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    place = tmp_path / "receiver"
    place.mkdir()
    with Receiver(place).start() as receiver:
        yield receiver


def target(receiver: Receiver, tmp_path: Path, **more: Any) -> dict[str, Any]:
    token = receiving.private(tmp_path / "token", receiving.TOKEN)
    return {"url": receiver.url, "token_file": str(token)} | more


@pytest.fixture
def config(tmp_path: Path, folder: Path, receiver: Receiver) -> Path:
    return configure(tmp_path / "c.yaml", folder, {"main": target(receiver, tmp_path)})


def documents(archive: Path) -> list[bytes]:
    return [
        bytes(frame.data)
        for segment in Archive.open(archive).segments()
        for frame in segment.frames()
    ]


def identities(archive: Path) -> list[wire.Identity]:
    return sorted(wire.decode_header(data).identity for data in documents(archive))


def test_what_a_collector_wrote_is_in_the_archive_byte_for_byte(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    fill(folder, 10, records=200)
    fill(folder, 1, first=10, final=True)
    written = sorted((folder / name).read_bytes() for name in waiting(folder))
    ran = once(config)
    assert (ran.returncode, ran.stderr, waiting(folder)) == (0, "", [])
    assert sorted(documents(receiver.archive)) == written


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["bpf", "proc"])
def test_what_a_command_did_is_in_the_archive(
    folder: Path, receiver: Receiver, config: Path, mode: str
) -> None:
    """The whole way: kernel, collector, spool, shipper, receiver, archive."""
    work = "for i in 1 2 3; do gzip -c /bin/bash > /dev/null; done; sleep 1.2"
    run = [sys.executable, "-m", "sams_ebpf", "run", "--mode", mode, "--interval", "1", "--json"]
    measured = subprocess.run(
        [*run, "--spool", str(folder), "--", "sh", "-c", work],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    report = json.loads(measured.stderr)
    assert once(config).returncode == 0
    assert waiting(folder) == []
    batches = sorted(map(wire.decode, documents(receiver.archive)), key=lambda b: b.sequence)
    assert [batch.sequence for batch in batches] == list(range(len(batches)))
    last = batches[-1]
    assert last.final is not None
    assert last.ledger is not None
    assert last.ledger.attributed_cpu_ns == report["ledger"]["attributed_cpu_ns"]
    shown = {row["path"]: row["cpu_ns"] for row in report["executables"]}
    assert {paths.show(r.path): r.cpu_ns for r in last.records} == shown
    assert any(path.endswith("/gzip") for path in shown)


def test_tombstones_arrive_like_batches(tmp_path: Path, folder: Path, receiver: Receiver) -> None:
    config = configure(
        tmp_path / "c.yaml",
        folder,
        {"main": target(receiver, tmp_path)},
        spool={"max_bytes": 64 << 10},
    )
    fill(folder, 40)
    assert once(config).returncode == 0
    headers = [wire.decode_header(data) for data in documents(receiver.archive)]
    (dropped,) = [header.dropped for header in headers if header.dropped is not None]
    assert dropped.batches == 40 - sum(header.kind == "counters" for header in headers)
    assert (waiting(folder), dropped.first_sequence) == ([], 0)


def test_the_same_identity_with_other_bytes_is_set_aside_on_both_sides(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    fill(folder, 3)
    assert once(config).returncode == 0
    fill(folder, 1, first=1, records=2)
    ran = once(config)
    assert ran.returncode == 4
    assert "409 same identity, other content" in ran.stderr
    assert waiting(folder) == []
    assert len(list((folder / "rejected").glob("*.main.msgpack"))) == 1
    assert len(identities(receiver.archive)) == 3


def kills(
    folder: Path, receiver: Receiver, config: Path, *, rounds: int, seed: int, batches: int
) -> list[wire.Identity]:
    """Kill now the shipper, now the receiver, now both, while batches come in."""
    chance = random.Random(seed)
    sent = []
    for round_ in range(rounds):
        with service(config) as process:
            sent += fill(folder, batches, first=round_ * batches)
            time.sleep(chance.random())
            if round_ % 3 != 0:
                receiver.kill()
                sent_before = len(sent)
                fill_first = 10_000 + round_
                sent += fill(folder, 1, first=fill_first)
                assert len(sent) == sent_before + 1
                time.sleep(chance.random() * 0.5)
                receiver.start()
            if round_ % 3 != 1:
                process.kill()
                process.wait()
    with service(config):
        until(lambda: not waiting(folder), 240)
    return sent


def test_kills_on_both_sides(folder: Path, receiver: Receiver, config: Path) -> None:
    sent = kills(folder, receiver, config, rounds=3, seed=1, batches=60)
    assert identities(receiver.archive) == sorted(sent)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_on_both_sides(
    folder: Path, receiver: Receiver, config: Path, seed: int
) -> None:
    sent = kills(folder, receiver, config, rounds=12, seed=seed, batches=100)
    assert identities(receiver.archive) == sorted(sent)
    print(f"8 kills of each side, {len(sent)} batches, none lost or doubled")


# What lies between -----------------------------------------------------------------------


class Proxy:
    """A proxy that passes what the client sends, and what comes back as `answer` decides."""

    def __init__(self, port: int, answer: Callable[[int, socket.socket, bytes], bool]) -> None:
        self._port = port
        self._answer = answer
        self._count = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            forward = threading.Thread(target=_copy, args=(client, server), daemon=True)
            forward.start()
            try:
                while data := server.recv(65536):
                    with self._lock:
                        number = self._count
                        self._count += 1
                    if not self._answer(number, client, data):
                        return
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()


def _copy(source: socket.socket, to: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        return


@contextmanager
def proxy(receiver: Receiver, answer: Callable[[int, socket.socket, bytes], bool]) -> Iterator[str]:
    made = Proxy(receiver.ports[0], answer)
    try:
        yield made.url
    finally:
        made.close()


def reset(_number: int, client: socket.socket, _data: bytes) -> bool:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def gateway_timeout(_number: int, client: socket.socket, _data: bytes) -> bool:
    client.sendall(b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n")
    return True


def silence(_number: int, _client: socket.socket, _data: bytes) -> bool:
    time.sleep(2.5)
    return False


@pytest.mark.parametrize("way", [reset, gateway_timeout, silence])
def test_the_answer_is_lost_on_the_way(
    tmp_path: Path,
    folder: Path,
    receiver: Receiver,
    way: Callable[[int, socket.socket, bytes], bool],
) -> None:
    """Stored, but the node is not told: it asks again, and nothing is stored twice."""
    lost = []

    def answer(number: int, client: socket.socket, data: bytes) -> bool:
        if number % 8 == 0 and len(lost) < 3:
            lost.append(data)
            return way(number, client, data)
        client.sendall(data)
        return True

    with proxy(receiver, answer) as url:
        main = target(receiver, tmp_path, url=url)
        config = configure(tmp_path / "c.yaml", folder, {"main": main})
        sent = fill(folder, 25)
        with service(config):
            until(lambda: not waiting(folder))
    assert len(lost) == 3
    # 25 stored, 3 of them known when they came again.
    assert receiving.metric(receiver.url, "batches_total") == 28
    assert identities(receiver.archive) == sorted(sent)


def test_a_full_disk_behind_the_receiver(tmp_path: Path, folder: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "sams-ship-test", str(disk)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        with Receiver(tmp_path, archive=disk / "archive").start() as receiver:
            main = target(receiver, tmp_path)
            config = configure(tmp_path / "c.yaml", folder, {"main": main})
            sent = fill(folder, 5)
            assert once(config).returncode == 0
            filler = disk / "filler"
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"],
                check=False,
                capture_output=True,
                timeout=60,
            )
            sent += fill(folder, 20, first=5, records=400)
            ran = once(config)
            assert ran.returncode == 4
            assert "507 cannot be stored now" in ran.stderr
            left = len(waiting(folder))
            assert left > 0
            filler.unlink()
            # The receiver recovers by itself; the Retry-After it gave is not waited for here.
            until(lambda: once(config).returncode == 0)
            assert waiting(folder) == []
            receiver.stop()
            assert identities(disk / "archive") == sorted(sent)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)


@pytest.mark.timeout(600)
def test_partition_and_loss(tmp_path: Path, folder: Path) -> None:
    """Two network namespaces, 30 % lost each way all the while, the link cut and restored."""
    bound = 4 << 20
    authority = pki.authority(tmp_path, "ca")
    server = pki.certificate(
        tmp_path, "ca", "server", "/CN=server", alternative=f"IP:{netns.Link.server_address}"
    )
    with netns.link() as link:
        listen = {
            "address": f"{link.server_address}:0",
            "tls": {"certificate": server[0], "key": server[1]},
        }
        with Receiver(tmp_path, listen=[listen]) as receiver:
            receiver.start(prefix=("ip", "netns", "exec", link.server))
            url = f"https://{link.server_address}:{receiver.ports[0]}"
            main = target(receiver, tmp_path, url=url, ca_file=str(authority))
            limits = {"max_bytes": bound}
            config = configure(tmp_path / "c.yaml", folder, {"main": main}, spool=limits)
            with service(config, "ip", "netns", "exec", link.node, log=tmp_path / "log"):
                link.lose(0.3)
                sent = fill(folder, 80)
                until(lambda: len(waiting(folder)) <= 20, 200)
                assert link.lost() > 0
                link.cut()
                sent += fill(folder, 60, first=80)
                # Longer than every time-out of the shipper.
                before = len(waiting(folder))
                time.sleep(5)
                assert before - 1 <= len(waiting(folder)) <= before
                link.restore()
                sent += fill(folder, 60, first=140)
                assert 4096 * len(waiting(folder)) <= bound
                until(lambda: not waiting(folder), 300)
                lost = link.lost()
            assert receiver.stop() == 0
            assert identities(receiver.archive) == sorted(sent)
    assert len(sent) == 200
    assert not list((folder / "rejected").iterdir())
    print(f"{len(sent)} batches, all delivered; {lost} packets lost on the server's side")


# Who gets in, seen from the node ---------------------------------------------------------


def test_who_gets_in_with_a_token(tmp_path: Path, folder: Path) -> None:
    tokens = receiving.private(
        tmp_path / "t",
        f"n1 {auth.hash_token('a' * 40)}\n"
        f"n2 {auth.hash_token('b' * 40)}\n"
        f"n1 {auth.hash_token('c' * 40)} 2020-01-01\n",
    )
    with Receiver(tmp_path, tokens_file=str(tokens)).start() as receiver:
        for token, reason in [
            ("x" * 40, "401"),
            ("c" * 40, "401"),
            ("b" * 40, "403 a node can only write as itself"),
            (None, "401"),
            ("a" * 40, None),
        ]:
            main: dict[str, Any] = {"url": receiver.url}
            if token:
                main["token_file"] = str(receiving.private(tmp_path / "token", token))
            verify(tmp_path, folder, receiver, main, reason)


def test_who_gets_in_with_a_password(tmp_path: Path, folder: Path) -> None:
    passwords = receiving.private(
        tmp_path / "p",
        f"n1 {auth.hash_password(PASSWORD)}\n"
        f"n2 {auth.hash_password(PASSWORD)}\n"
        f"n1 {auth.hash_password('of long ago')} 2020-01-01\n",
    )
    section = {"passwords_file": str(passwords), "tokens_file": None}
    with Receiver(tmp_path, **section).start() as receiver:
        for pair, reason in [
            ("n1:wrong", "401"),
            ("n1:of long ago", "401"),
            (f"n2:{PASSWORD}", "403 a node can only write as itself"),
            (None, "401"),
            (f"n1:{PASSWORD}", None),
        ]:
            main: dict[str, Any] = {"url": receiver.url}
            if pair:
                main["basic_file"] = str(receiving.private(tmp_path / "basic", pair))
            verify(tmp_path, folder, receiver, main, reason)


def test_who_gets_in_with_a_certificate(tmp_path: Path, folder: Path) -> None:
    authority = pki.authority(tmp_path, "ca")
    pki.authority(tmp_path, "other")
    names = "DNS:localhost,IP:127.0.0.1"
    server = pki.certificate(tmp_path, "ca", "server", "/CN=localhost", alternative=names)
    tls = {"certificate": server[0], "key": server[1], "client_ca": str(authority)}
    section = {"listen": [{"address": "127.0.0.1:0", "tls": tls}], "tokens_file": None}
    with Receiver(tmp_path, **section).start() as receiver:
        url = f"https://127.0.0.1:{receiver.ports[0]}"
        for made, reason in [
            (pki.certificate(tmp_path, "ca", "old", "/CN=n1", days=-1), "certificate expired"),
            (pki.certificate(tmp_path, "other", "stranger", "/CN=n1"), "unknown ca"),
            (pki.certificate(tmp_path, "ca", "n2", "/CN=n2"), "403"),
            (None, "401"),
            (pki.certificate(tmp_path, "ca", "n1", "/CN=n1"), None),
        ]:
            main = {"url": url, "ca_file": str(authority)}
            if made:
                main |= {"client_certificate": made[0], "client_key": made[1]}
            verify(tmp_path, folder, receiver, main, reason)


def verify(
    tmp_path: Path, folder: Path, receiver: Receiver, main: dict[str, Any], reason: str | None
) -> None:
    """One try; reason: what the log has to say, None if the batches have to get in."""
    config = configure(tmp_path / "c.yaml", folder, {"main": main})
    sent = [shipping.batch(number) for number in range(3)]
    for batch in sent:
        spool.put(folder, batch)
    ran = once(config)
    if reason is None:
        assert (ran.returncode, ran.stderr, waiting(folder)) == (0, "", [])
        assert identities(receiver.archive) == sorted(batch.identity for batch in sent)
    else:
        assert ran.returncode == 4, ran.stderr
        first, last = ran.stderr.splitlines()
        denied = reason.startswith("4")
        assert f"receiver main {'does not let this node in' if denied else 'failed'}: " in first
        assert reason in first
        assert "3 batches still wait" in last
        assert len(waiting(folder)) == 3
        assert list((folder / "rejected").iterdir()) == []
        assert documents(receiver.archive) == []
