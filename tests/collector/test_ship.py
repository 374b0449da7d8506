"""The shipper against receivers that misbehave: nothing lost, nothing deleted too early."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pki
import pytest
import shipping
from shipping import Receiver, configure, fill, once, service, until, waiting

from sams_ebpf import spool, wire


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def config(tmp_path: Path, folder: Path, receiver: Receiver) -> Path:
    return configure(tmp_path / "c.yaml", folder, {"main": {"url": receiver.url}})


def test_once_delivers_everything_over_one_connection(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    sent = fill(folder, 20)
    ran = once(config)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert sorted(receiver.stored) == sorted(sent)
    assert (receiver.connections, receiver.duplicates, waiting(folder)) == (1, 0, [])


def test_once_with_nobody_there_keeps_everything(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    receiver.stop()
    fill(folder, 3)
    ran = once(config)
    assert ran.returncode == 4
    assert len(waiting(folder)) == 3
    first, last = ran.stderr.splitlines()
    assert "node=n1: warning: receiver main failed: " in first
    assert "Connection refused" in first
    assert "3 batches still wait" in last


def test_the_service_sends_what_arrives_while_it_runs(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    early = fill(folder, 2)
    with service(config) as process:
        until(lambda: not waiting(folder))
        late = fill(folder, 3, first=2)
        until(lambda: not waiting(folder))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert sorted(receiver.stored) == sorted(early + late)


def test_tells_systemd(
    tmp_path: Path, folder: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with service(config):
            assert manager.recv(200) == b"READY=1"
            assert manager.recv(200).startswith(b"STATUS=")
        while (said := manager.recv(200)) != b"STOPPING=1":
            assert said.startswith(b"STATUS=")


@pytest.mark.parametrize("code", [500, 502, 503, 507, 429, 408, 404, 302])
def test_what_may_pass_is_kept_and_tried_again(
    folder: Path, receiver: Receiver, config: Path, code: int
) -> None:
    receiver.behave = lambda number: shipping.status(code) if number < 3 else None
    fill(folder, 2)
    with service(config):
        until(lambda: not waiting(folder))
    assert len(receiver.stored) == 2
    assert not list((folder / "rejected").iterdir())


@pytest.mark.parametrize("code", [400, 409, 413, 415])
def test_what_is_refused_is_set_aside_with_its_reason(
    folder: Path, receiver: Receiver, config: Path, code: int
) -> None:
    receiver.behave = lambda number: shipping.status(code) if number == 1 else None
    fill(folder, 3)
    ran = once(config)
    assert ran.returncode == 4
    assert "1 were set aside" in ran.stderr
    assert (waiting(folder), len(receiver.stored)) == ([], 2)
    (copy,) = (folder / "rejected").glob("*.msgpack")
    assert wire.decode(copy.read_bytes()).identity not in receiver.stored
    note = json.loads(copy.with_suffix(".reason").read_text())
    assert (note["receiver"], note["reason"]) == ("main", f"{code} because")


@pytest.mark.parametrize("code", [400, 409, 413, 415])
def test_what_something_in_front_refuses_is_kept(
    folder: Path, receiver: Receiver, config: Path, code: int
) -> None:
    """nginx says 400 to a certificate that has expired: that is no word on the batch."""
    page = f"<html>\r\n<head><title>{code} The SSL certificate error</title></head></html>"
    receiver.behave = lambda _n: lambda handler, _data: handler.answer(code, page)
    fill(folder, 3)
    ran = once(config)
    assert ran.returncode == 4
    first, last = ran.stderr.splitlines()
    assert f"{code} The SSL certificate error: not what a receiver answers" in first
    assert "3 batches still wait, 0 were set aside" in last
    assert (len(waiting(folder)), list((folder / "rejected").iterdir())) == (3, [])


def test_a_receiver_that_refuses_all_does_not_empty_the_spool(
    tmp_path: Path, folder: Path, receiver: Receiver
) -> None:
    config = configure(
        tmp_path / "c.yaml",
        folder,
        {"main": {"url": receiver.url}},
        ship={"backoff_s": 3000, "backoff_max_s": 3000},
    )
    receiver.behave = lambda _number: shipping.status(400)
    fill(folder, 40)
    with service(config):
        until(lambda: receiver.attempts >= 8)
        # The ninth comes after up to 50 minutes; what is looked at is that it is not at once.
        time.sleep(1)
    assert receiver.attempts <= 9
    assert len(waiting(folder)) >= 31


@pytest.mark.parametrize("code", [401, 403])
def test_who_is_not_let_in_keeps_everything_and_says_so(
    tmp_path: Path, folder: Path, receiver: Receiver, config: Path, code: int
) -> None:
    receiver.behave = lambda _number: shipping.status(code)
    fill(folder, 3)
    log = tmp_path / "log"
    with service(config, log=log):
        until(lambda: receiver.attempts > 6)
        assert len(waiting(folder)) == 3
        receiver.behave = lambda _number: None
        until(lambda: not waiting(folder))
    lines = log.read_text().splitlines()
    assert len([line for line in lines if f"does not let this node in: {code}" in line]) == 1
    assert len([line for line in lines if "works again" in line]) == 1


def test_a_receiver_that_slows_a_backlog_down_is_no_news_each_time(
    tmp_path: Path, folder: Path, receiver: Receiver
) -> None:
    config = configure(tmp_path / "c.yaml", folder, {"main": {"url": receiver.url}})
    receiver.behave = lambda number: shipping.status(429) if number % 3 == 0 else None
    log = tmp_path / "log"
    sent = fill(folder, 30)
    with service(config, log=log):
        until(lambda: not waiting(folder))
    assert sorted(receiver.stored) == sorted(sent)
    assert receiver.attempts >= 40
    lines = log.read_text().splitlines()
    assert len([line for line in lines if "429" in line]) == 1
    assert len([line for line in lines if "works again" in line]) == 1


def test_a_web_server_that_says_200_to_all_gets_nothing_deleted(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    receiver.behave = lambda _n: lambda handler, _data: handler.answer(200, {"welcome": "home"})
    fill(folder, 2)
    ran = once(config)
    assert ran.returncode == 4
    assert "not what a receiver answers; check the url" in ran.stderr
    assert len(waiting(folder)) == 2


def test_a_lost_answer_leads_to_a_duplicate_not_to_a_loss(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    receiver.behave = lambda number: shipping.reset if number % 3 == 0 else None
    sent = fill(folder, 10)
    with service(config):
        until(lambda: not waiting(folder))
    assert sorted(receiver.stored) == sorted(sent)
    assert receiver.duplicates > 0
    assert receiver.conflicts == 0


def test_a_proxy_that_times_out(folder: Path, receiver: Receiver, config: Path) -> None:
    """Stored behind the proxy, 504 before it: or silence until the client gives up."""

    def store_then_504(handler: shipping.Handler, data: bytes) -> None:
        receiver.store(data)
        handler.answer(504)

    ways = {0: store_then_504, 1: shipping.hang(4), 3: store_then_504}
    receiver.behave = ways.get
    sent = fill(folder, 4)
    with service(config):
        until(lambda: not waiting(folder))
    assert sorted(receiver.stored) == sorted(sent)
    assert receiver.duplicates == 3


def test_an_answer_that_never_ends_is_cut(
    tmp_path: Path, folder: Path, receiver: Receiver, config: Path
) -> None:
    receiver.behave = lambda number: shipping.drip if number == 0 else None
    fill(folder, 1)
    log = tmp_path / "log"
    with service(config, log=log):
        until(lambda: not waiting(folder))
    assert "no answer within 4 s in all" in log.read_text()


def test_sigterm_does_not_wait_for_a_receiver_that_hangs(
    tmp_path: Path, folder: Path, receiver: Receiver
) -> None:
    config = configure(
        tmp_path / "c.yaml",
        folder,
        {"main": {"url": receiver.url}},
        ship={"read_timeout_s": 600, "total_timeout_s": 600},
    )
    receiver.behave = lambda _number: shipping.hang(25, store=False)
    fill(folder, 1)
    with service(config) as process:
        until(lambda: receiver.attempts)
        process.terminate()
        assert process.wait(15) == 0
    assert len(waiting(folder)) == 1


def test_retry_after_is_honoured(folder: Path, receiver: Receiver, config: Path) -> None:
    receiver.behave = lambda n: shipping.status(503, Retry_After="2") if n == 0 else None
    fill(folder, 1)
    with service(config):
        until(lambda: not waiting(folder))
    first, second = receiver.moments
    assert second - first >= 2


def test_one_batch_that_never_gets_through_holds_up_no_other(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    poison = fill(folder, 6)[2]

    def break_on_poison(handler: shipping.Handler, data: bytes) -> None:
        if wire.decode_header(data).identity == poison:
            handler.answer(500)
        else:
            handler.answer(200, {"status": receiver.store(data)})

    receiver.behave = lambda _number: break_on_poison
    with service(config):
        until(lambda: len(receiver.stored) == 5)
        until(lambda: receiver.attempts > 10)
    assert waiting(folder) == [spool.Entry(poison, "delta").name]


def test_sighup_tries_again_at_once(tmp_path: Path, folder: Path, receiver: Receiver) -> None:
    config = configure(
        tmp_path / "c.yaml",
        folder,
        {"main": {"url": receiver.url}},
        ship={"backoff_s": 3000, "backoff_max_s": 3000},
    )
    receiver.behave = lambda number: (
        shipping.status(503, Retry_After="3000") if not number else None
    )
    fill(folder, 1)
    with service(config) as process:
        until(lambda: receiver.attempts == 1)
        until(lambda: process.send_signal(signal.SIGHUP) or not waiting(folder))
    assert receiver.attempts == 2


@pytest.mark.parametrize("content", [b"", b"\x81\xa1v\x01", b"\xff" * 100])
def test_corrupt_files_are_set_aside_and_the_rest_goes_on(
    folder: Path, receiver: Receiver, config: Path, content: bytes
) -> None:
    fill(folder, 3)
    victim = waiting(folder)[1]
    (folder / victim).write_bytes(content)
    (folder / "nonsense.msgpack").write_bytes(b"x")
    swapped = spool.Entry(wire.Identity(bytes(16), 1, b"collectr", 99), "full").name
    (folder / swapped).write_bytes((folder / waiting(folder)[0]).read_bytes())
    (folder / "README").write_text("not ours")
    ran = once(config)
    assert ran.returncode == 4
    assert (waiting(folder), len(receiver.stored)) == ([], 2)
    aside = {file.name for file in (folder / "rejected").glob("*.msgpack")}
    assert aside == {victim, "nonsense.msgpack", swapped}
    reasons = [json.loads(f.read_text())["reason"] for f in (folder / "rejected").glob("*.reason")]
    assert sorted(reason[:9] for reason in reasons) == ["it holds ", "its name ", "not a bat"]
    assert (folder / "README").exists()


def test_once_does_not_set_the_whole_spool_aside(
    folder: Path, receiver: Receiver, config: Path
) -> None:
    receiver.behave = lambda _: shipping.status(409)
    fill(folder, 20)
    ran = once(config)
    assert ran.returncode == 4
    assert "receiver main refused 8 batches in a row: the rest is kept" in ran.stderr
    assert len(waiting(folder)) == 12
    assert "12 batches still wait, 8 were set aside" in ran.stderr


def test_what_does_not_speak_http_is_told(folder: Path, tmp_path: Path) -> None:
    fill(folder, 1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        ran = once(configure(tmp_path / "smtp.yaml", folder, {"main": {"url": url}}))
        thread.join()
    assert "main failed: not an answer in HTTP: 220 mail.example.org ESMTP" in ran.stderr
    assert len(waiting(folder)) == 1


def test_a_link_in_the_spool_is_not_followed(
    tmp_path: Path, folder: Path, receiver: Receiver, config: Path
) -> None:
    fill(folder, 1)
    (name,) = waiting(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    ran = once(config)
    assert ran.returncode == 0
    assert f"{folder / name}: not a file, left alone" in ran.stderr
    assert receiver.attempts == 0
    assert (tmp_path / name).exists()


def test_two_shippers_do_not_work_on_one_spool(folder: Path, config: Path) -> None:
    with service(config):
        until((folder / "shipper" / "lock").exists)
        until(lambda: "another shipper" in (ran := once(config)).stderr and ran.returncode == 1)


def test_a_spool_that_goes_away_is_one_line(
    tmp_path: Path, folder: Path, receiver: Receiver, config: Path
) -> None:
    receiver.behave = lambda _: shipping.status(503)
    fill(folder, 1)
    log = tmp_path / "log"
    with service(config, log=log) as process:
        until(lambda: receiver.attempts > 0)
        folder.rename(folder.with_name("gone"))
        assert process.wait(20) == 1
    lines = log.read_text().splitlines()
    assert "is the spool's disk there?" in lines[-1]
    assert all("node=n1: " in line for line in lines)


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_spool_that_is_not_there_is_one_line(folder: Path, config: Path, kind: str) -> None:
    folder.rmdir()
    if kind == "file":
        folder.touch()
    ran = once(config)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert "spool.folder" in line
    assert str(folder) in line


# Several receivers ---------------------------------------------------------------------


@pytest.fixture
def second() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def test_nothing_is_deleted_before_every_required_receiver_has_it(
    tmp_path: Path, folder: Path, receiver: Receiver, second: Receiver
) -> None:
    second.stop()
    both = {"a": {"url": receiver.url}, "b": {"url": second.url}}
    config = configure(tmp_path / "c.yaml", folder, both)
    sent = fill(folder, 5)
    assert once(config).returncode == 4
    assert (len(receiver.stored), len(waiting(folder))) == (5, 5)
    second.start()
    assert once(config).returncode == 0
    assert sorted(second.stored) == sorted(sent)
    assert waiting(folder) == []
    # What the first one has acknowledged was remembered over the restart.
    assert (receiver.attempts, receiver.duplicates) == (5, 0)


def test_a_receiver_that_is_not_required_holds_nothing_up(
    tmp_path: Path, folder: Path, receiver: Receiver, second: Receiver
) -> None:
    second.stop()
    both = {"a": {"url": receiver.url}, "b": {"url": second.url, "required": False}}
    config = configure(tmp_path / "c.yaml", folder, both)
    with service(config):
        fill(folder, 5)
        until(lambda: not waiting(folder))
        second.start()
        # It comes back by itself: what arrives from then on reaches it too.
        for sequence in range(5, 500):
            fill(folder, 1, first=sequence)
            until(lambda: not waiting(folder))
            if second.stored:
                break
    assert second.stored
    assert len(receiver.stored) == sequence + 1


def test_a_refusal_of_one_receiver_does_not_keep_it_from_the_other(
    tmp_path: Path, folder: Path, receiver: Receiver, second: Receiver
) -> None:
    receiver.behave = lambda _number: shipping.status(400)
    both = {"a": {"url": receiver.url}, "b": {"url": second.url}}
    config = configure(tmp_path / "c.yaml", folder, both)
    fill(folder, 3)
    assert once(config).returncode == 4
    assert (len(second.stored), waiting(folder)) == (3, [])
    assert len(list((folder / "rejected").glob("*.a.msgpack"))) == 3


def test_the_memory_of_acknowledgements_stays_small(
    tmp_path: Path, folder: Path, receiver: Receiver, second: Receiver
) -> None:
    both = {"a": {"url": receiver.url}, "b": {"url": second.url}}
    config = configure(tmp_path / "c.yaml", folder, both)
    fill(folder, 400)
    (folder / "shipper").mkdir()
    (folder / "shipper" / "gone.done").write_text("x\n")
    assert once(config).returncode == 0
    assert once(config).returncode == 0
    sizes = {file.name: file.stat().st_size for file in (folder / "shipper").glob("*.done")}
    assert sizes == {"a.done": 0, "b.done": 0}


# Killed at any moment ------------------------------------------------------------------


def kill_until_empty(
    folder: Path, config: Path, kills: int, chance: random.Random, batches: int
) -> list[wire.Identity]:
    """Kill the shipper at random moments while batches come in; all of them in the end."""
    sent = []
    for round_ in range(kills):
        sent += fill(folder, batches, first=round_ * batches)
        with service(config) as process:
            time.sleep(0.25 + chance.random() * 0.5)
            process.kill()
            process.wait()
    with service(config):
        until(lambda: not waiting(folder), 240)
    return sent


@pytest.mark.parametrize("receivers", [1, 2])
def test_killed_at_random_moments(
    tmp_path: Path, folder: Path, receiver: Receiver, second: Receiver, receivers: int
) -> None:
    targets = {"a": {"url": receiver.url}, "b": {"url": second.url}}
    config = configure(tmp_path / "c.yaml", folder, dict(list(targets.items())[:receivers]))
    chance = random.Random(receivers)
    slow = shipping.hang(0.02)
    receiver.behave = shipping.mostly(chance, 0.1, slow, shipping.reset, shipping.status(500))
    sent = kill_until_empty(folder, config, 4, chance, 100)
    for one in (receiver, second)[:receivers]:
        assert sorted(one.stored) == sorted(sent)
        assert one.conflicts == 0
    assert waiting(folder) == []
    print(f"4 kills, {len(sent)} batches to {receivers} receivers, none lost or doubled")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_random_moments(
    tmp_path: Path, folder: Path, receiver: Receiver, second: Receiver, seed: int
) -> None:
    targets = {"a": {"url": receiver.url}, "b": {"url": second.url}}
    config = configure(tmp_path / "c.yaml", folder, targets)
    chance = random.Random(seed)
    receiver.behave = shipping.mostly(chance, 0.1, shipping.reset, shipping.status(503))
    second.behave = shipping.mostly(chance, 0.1, shipping.hang(0.05), shipping.status(500))
    sent = kill_until_empty(folder, config, 10, chance, 150)
    assert sorted(receiver.stored) == sorted(second.stored) == sorted(sent)
    assert waiting(folder) == []
    again = receiver.duplicates + second.duplicates
    print(f"10 kills, {len(sent)} batches to 2 receivers, none lost or doubled, {again} sent again")


# TLS and credentials -------------------------------------------------------------------


class Pair(NamedTuple):
    certificate: str
    key: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By name; of an authority the key is not used."""
    folder = tmp_path_factory.mktemp("pki")
    pairs = {name: Pair(str(pki.authority(folder, name)), "") for name in ("ca", "stranger-ca")}
    for name, ca, host, days in (
        ("server", "ca", "localhost", 2),
        ("expired", "ca", "localhost", -1),
        ("elsewhere", "ca", "example.org", 2),
        ("client", "ca", "n1", 2),
        ("stranger", "stranger-ca", "n1", 2),
    ):
        pairs[name] = Pair(
            *pki.certificate(folder, ca, name, f"/CN={host}", days=days, alternative=f"DNS:{host}")
        )
    return pairs


def server_side(pair: Pair, client_ca: str | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context


@pytest.mark.parametrize(
    ("server", "ca", "reason"),
    [
        ("server", "ca", None),
        ("server", "stranger-ca", "certificate verify failed"),
        ("server", None, "certificate verify failed"),
        ("expired", "ca", "certificate has expired by this node's clock;"),
        ("elsewhere", "ca", "doesn't match"),
    ],
)
def test_the_receiver_s_certificate_is_checked(  # noqa: PLR0917
    tmp_path: Path,
    folder: Path,
    made: dict[str, Pair],
    server: str,
    ca: str | None,
    reason: str | None,
) -> None:
    with Receiver(server_side(made[server])) as receiver:
        target = {"url": receiver.url} | ({"ca_file": made[ca].certificate} if ca else {})
        config = configure(tmp_path / "c.yaml", folder, {"main": target})
        fill(folder, 2)
        ran = once(config)
        if reason is None:
            assert (ran.returncode, ran.stderr, len(receiver.stored)) == (0, "", 2)
        else:
            assert ran.returncode == 4
            assert reason in ran.stderr or "mismatch" in ran.stderr
            assert (receiver.attempts, len(waiting(folder))) == (0, 2)


@pytest.mark.parametrize(("client", "good"), [("client", True), ("stranger", False), (None, False)])
def test_the_node_shows_its_certificate(
    tmp_path: Path, folder: Path, made: dict[str, Pair], client: str | None, good: bool
) -> None:
    with Receiver(server_side(made["server"], made["ca"].certificate)) as receiver:
        target = {"url": receiver.url, "ca_file": made["ca"].certificate}
        if client:
            target |= {
                "client_certificate": made[client].certificate,
                "client_key": made[client].key,
            }
        config = configure(tmp_path / "c.yaml", folder, {"main": target})
        fill(folder, 2)
        ran = once(config)
        assert ran.returncode == (0 if good else 4)
        assert (len(receiver.stored), len(waiting(folder))) == ((2, 0) if good else (0, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ca_file": "none"}, "none: cannot be read: No such file or directory"),
        ({"ca_file": "garbage"}, "garbage: holds no certificate in PEM"),
        ({"client_certificate": "garbage"}, "not a certificate and its key in PEM"),
        ({"client_key": "garbage"}, "not a certificate and its key in PEM"),
        ({"client_key": "other.key"}, "other.key: is not the key of "),
    ],
)
def test_a_file_for_tls_that_cannot_be_used_is_named(  # noqa: PLR0917
    tmp_path: Path,
    folder: Path,
    receiver: Receiver,
    made: dict[str, Pair],
    change: dict[str, str],
    reason: str,
) -> None:
    for name, text in (
        ("garbage", "nonsense"),
        ("other.key", Path(made["server"].key).read_text()),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    target = {
        "url": receiver.url.replace("http:", "https:"),
        "ca_file": made["ca"].certificate,
        "client_certificate": made["client"].certificate,
        "client_key": made["client"].key,
    } | {key: str(tmp_path / name) for key, name in change.items()}
    config = configure(tmp_path / "c.yaml", folder, {"main": target})
    fill(folder, 2)
    ran = once(config)
    assert (ran.returncode, len(waiting(folder))) == (4, 2)
    assert reason in ran.stderr.splitlines()[0]
    command = [*shipping.COMMAND[:-2], "check-config", "--config", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert checked.returncode == 2
    assert f"ship.receivers.main: {tmp_path}" in checked.stderr or "client.pem" in checked.stderr
    assert reason in checked.stderr


@pytest.mark.parametrize(
    ("key", "content", "header"),
    [
        ("token_file", "s3cret-token\n", "Bearer s3cret-token"),
        ("basic_file", "node:pass:word\n", "Basic bm9kZTpwYXNzOndvcmQ="),
    ],
)
def test_credentials_come_from_guarded_files(  # noqa: PLR0917
    tmp_path: Path, folder: Path, receiver: Receiver, key: str, content: str, header: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(content)
    secret.chmod(0o640)
    config = configure(
        tmp_path / "c.yaml", folder, {"main": {"url": receiver.url, key: str(secret)}}
    )
    fill(folder, 1)
    assert once(config).returncode == 0
    assert receiver.headers[0]["Authorization"] == header
    secret.chmod(0o644)
    fill(folder, 1, first=1)
    ran = once(config)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert f"ship.receivers.main: {secret}: a secret with mode 0644: chmod" in line
    assert receiver.attempts == 1


def test_a_new_token_is_taken_up_without_a_restart(
    tmp_path: Path, folder: Path, receiver: Receiver
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    secret.chmod(0o600)
    config = configure(
        tmp_path / "c.yaml", folder, {"main": {"url": receiver.url, "token_file": str(secret)}}
    )

    def door(handler: shipping.Handler, data: bytes) -> None:
        if handler.headers["Authorization"] == "Bearer new":
            handler.answer(200, {"status": receiver.store(data)})
        else:
            handler.answer(401)

    receiver.behave = lambda _number: door
    fill(folder, 1)
    with service(config):
        until(lambda: receiver.attempts)
        secret.chmod(0o644)
        secret.write_text("new")
        seen = receiver.attempts
        secret.chmod(0o600)
        until(lambda: not waiting(folder))
    assert seen <= receiver.attempts


def test_the_environment_s_proxies_and_passwords_are_not_used(
    tmp_path: Path, folder: Path, receiver: Receiver, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    fill(folder, 1)
    assert once(config).returncode == 0
    assert "Authorization" not in receiver.headers[0]


def test_runs_without_privileges(receiver: Receiver) -> None:
    """As the unit does: files of root, readable by the group, in a folder the group may write."""
    if os.geteuid() != 0:
        pytest.fail("this test has to be run by root")
    base = Path("/tmp") / f"sams-ship-{os.getpid()}-{random.random()}"
    folder = base / "spool"
    folder.mkdir(parents=True)
    try:
        base.chmod(0o755)
        os.chown(folder, 0, 65534)
        folder.chmod(0o2770)
        fill(folder, 3)
        assert {f.stat().st_gid for f in folder.iterdir()} == {65534}
        config = configure(base / "c.yaml", folder, {"main": {"url": receiver.url}})
        drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        with service(config, *drop, "--bounding-set", "-all"):
            until(lambda: not waiting(folder))
        assert len(receiver.stored) == 3
    finally:
        shutil.rmtree(base)
