"""The command line, as a person meets it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import batches
import pytest
import receiving
import requests
from receiving import HEADERS, Receiver

from sams_receiver.archive import Appender, Item, Kind


def command(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sams_receiver", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "archive"
    with Appender.open(made, partitions=1) as appender:
        for job in range(3):
            appender.append(
                [Item(Kind.COUNTERS, batches.encoded(job=job, sequence=n)) for n in range(4)]
            )
            if job == 1:
                appender.seal(everything=True)
        appender.append([Item(Kind.RULES, b"rules"), Item(99, b"from later")])
    return made


def test_list(folder: Path) -> None:
    done = command("archive", "list", folder)
    assert done.returncode == 0
    head, sealed, live = done.stdout.splitlines()
    assert head.split()[0] == "segment"
    assert sealed.split()[:2] == ["0000-000000000001", "sealed"]
    assert sealed.split()[4] == "8"
    assert live.split()[:2] == ["0000-000000000002", "live"]


def test_cat(folder: Path) -> None:
    lines = [json.loads(line) for line in command("archive", "cat", folder).stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["counters"] * 12 + ["rules", "kind-99"]
    assert lines[0]["batch"]["claims"]["node"] == "n1"
    assert "records" not in lines[0]["batch"]
    one = command("archive", "cat", folder, "--job", "2", "--records").stdout.splitlines()
    assert len(one) == 4
    assert json.loads(one[0])["batch"]["records"][0][0] == "/usr/bin/bash"
    assert command("archive", "cat", folder, "--node", "n9").stdout == ""
    assert len(command("archive", "cat", folder, "--segment", "0000-000000000001")
               .stdout.splitlines()) == 8  # fmt: skip
    wrong = command("archive", "cat", folder, "--segment", "7")
    assert wrong.returncode == 2
    assert "no such segment" in wrong.stderr


def test_verify_says_what_is_damaged(folder: Path) -> None:
    good = command("archive", "verify", folder)
    assert good.returncode == 0, good.stdout
    assert good.stdout.startswith("14 frames")
    (raw,) = (folder / "p0000").glob("*.raw")
    data = bytearray(raw.read_bytes())
    data[300] ^= 4
    raw.write_bytes(data)
    bad = command("archive", "verify", folder)
    assert bad.returncode == 4
    assert "segment 0000-000000000002: bytes 128 to " in bad.stdout
    assert "13 frames" in bad.stdout
    assert "Traceback" not in bad.stderr
    with Appender.open(folder) as appender:
        appender.append([Item(Kind.RULES, b"rules")])  # may be: that is no resend
        appender.append([Item(Kind.COUNTERS, batches.encoded(job=2, sequence=3))])
    doubled = command("archive", "verify", folder)
    assert doubled.returncode == 4
    assert "1 stored twice" in doubled.stdout


def test_list_and_cat_go_on_behind_a_segment_that_cannot_be_read(folder: Path) -> None:
    (sealed,) = (folder / "p0000").glob("*.seg")
    sealed.unlink()
    sealed.mkdir()
    for action, lines in (("list", 2), ("cat", 6)):
        done = command("archive", action, folder)
        assert (done.returncode, len(done.stdout.splitlines())) == (4, lines)
        first, last = done.stderr.splitlines()
        assert "segment 0000-000000000001: [Errno 21] Is a directory" in first
        assert "not everything is good" in last


def test_cat_says_what_it_passes_over(folder: Path) -> None:
    (raw,) = (folder / "p0000").glob("*.raw")
    data = bytearray(raw.read_bytes())
    data[300] ^= 4
    raw.write_bytes(data)
    done = command("archive", "cat", folder)
    assert (done.returncode, len(done.stdout.splitlines())) == (4, 13)
    assert "segment 0000-000000000002: bytes 128 to " in done.stderr
    with Appender.open(folder) as appender:
        appender.append([Item(Kind.UPSTREAM_JSON, b"none")])
    shown = command("archive", "cat", folder).stdout.splitlines()[-1]
    assert "not a frame of upstream's JSON" in json.loads(shown)["error"]


@pytest.mark.parametrize("at", [20, -10])
def test_verify_finds_a_damaged_directory(folder: Path, at: int) -> None:
    (sealed,) = (folder / "p0000").glob("*.seg")
    packed = sealed.read_bytes()
    # The directory's frame ends where the index's begins: with its trailer.
    end = packed.rindex(b"SAMSDIR1") + 8
    begin = end - 24 - int.from_bytes(packed[end - 16 : end - 12], "little")
    data = bytearray(packed)
    data[begin + at if at > 0 else end + at] ^= 1
    sealed.write_bytes(data)
    bad = command("archive", "verify", folder)
    assert bad.returncode == 4
    assert "segment 0000-000000000001: directory" in bad.stdout
    assert bad.stdout.splitlines()[-1].startswith("14 frames")


def test_no_archive_is_one_line(tmp_path: Path) -> None:
    done = command("archive", "verify", tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no archive here" in done.stderr


def test_check_config(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path)
    with receiver.start():
        good = command("check-config", "--config", receiver.config)
        assert (good.returncode, good.stdout) == (0, f"{receiver.config}: good\n")
    text = receiver.config.read_text()
    for place in (tmp_path / "disk" / "archive", receiver.config):
        receiver.config.write_text(text.replace(str(receiver.archive), str(place)))
        bad = command("check-config", "--config", receiver.config)
        assert bad.returncode == 2
        assert f"receiver.archive: {place}: has to be a folder" in bad.stderr
    receiver.config.write_text(text + "  tokns_file: x\n")
    bad = command("check-config", "--config", receiver.config)
    assert bad.returncode == 2
    assert "did you mean 'tokens_file'" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1


def test_credentials_that_are_made_let_in(tmp_path: Path) -> None:
    made = command("credential", "token", "n1", "--expires", "2999-01-01 00:00")
    assert made.returncode == 0
    token = made.stderr.strip().rpartition(" ")[2]
    assert token not in made.stdout
    password = command("credential", "password", "n2", stdin="a long password\r\n")
    short = command("credential", "password", "n2", stdin="short\n")
    assert short.returncode == 2
    assert command("credential", "token", "a b").returncode == 2
    assert command("credential", "password", "n2", stdin="x" * 1025).returncode == 2
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff" * 20)
    for source in ("/dev/null", "&-", str(binary)):
        run = f'exec "$0" -m sams_receiver credential password n2 <{source}'
        done = subprocess.run(["sh", "-c", run, sys.executable], capture_output=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    section = {
        "tokens_file": str(receiving.private(tmp_path / "t", made.stdout)),
        "passwords_file": str(receiving.private(tmp_path / "p", password.stdout)),
    }
    with Receiver(tmp_path, **section).start() as receiver:
        url = f"{receiver.url}/v1/batches"
        kind = {"Content-Type": HEADERS["Content-Type"]}
        answer = requests.post(
            url, batches.encoded(node="n1"), timeout=10,
            headers=kind | {"Authorization": f"Bearer {token}"},
        )  # fmt: skip
        assert answer.status_code == 200
        answer = requests.post(
            url, batches.encoded(node="n2"), timeout=10, headers=kind,
            auth=("n2", "a long password"),
        )  # fmt: skip
        assert answer.status_code == 200


@pytest.mark.parametrize("arguments", [(), ("serve",), ("archive",), ("archive", "cat")])
def test_help_tells_a_stranger(arguments: tuple[str, ...]) -> None:
    done = command(*arguments, "--help")
    assert done.returncode == 0
    assert "usage: sams-receiver" in done.stdout


def test_systemd_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(path)
        heard.settimeout(20)
        receiver = Receiver(tmp_path)
        with receiver.start(NOTIFY_SOCKET=path, WATCHDOG_USEC="60000000"):
            assert heard.recv(100) == b"READY=1"
            assert heard.recv(100) == b"WATCHDOG=1"
            assert receiver.stop() == 0
            rest = heard.recv(100)
            while rest == b"WATCHDOG=1":
                rest = heard.recv(100)
            assert rest == b"STOPPING=1"


def test_metrics_add_up(tmp_path: Path) -> None:
    with Receiver(tmp_path, segments={"frames": 10}).start() as receiver:
        for n in (*range(25), *range(5)):
            requests.post(f"{receiver.url}/v1/batches", batches.encoded(sequence=n),
                          headers=HEADERS, timeout=10)  # fmt: skip
        requests.post(f"{receiver.url}/v1/batches", b"x", headers=HEADERS, timeout=10)
        text = receiving.get(receiver.url, "/metrics")[1]
        for line in (
            'sams_receiver_batches_total{outcome="stored"} 25.0',
            'sams_receiver_batches_total{outcome="duplicate"} 5.0',
            'sams_receiver_batches_total{outcome="invalid"} 1.0',
            'sams_receiver_requests_total{status="200",what="batch"} 30.0',
            'sams_receiver_requests_total{status="400",what="batch"} 1.0',
            "sams_receiver_unvouched_batches_total 25.0",
            "sams_receiver_in_flight_bytes 0.0",
        ):
            assert line in text
        assert receiving.metric(receiver.url, "commits_total") >= 1
        assert receiving.metric(receiver.url, "free_bytes") > 1 << 20


def test_the_archive_knows_nothing_of_http() -> None:
    script = """
import sams_receiver.archive, sams_receiver.archive.seen, sys
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"aiohttp", "http", "requests", "uvloop", "prometheus_client", "asyncio"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
