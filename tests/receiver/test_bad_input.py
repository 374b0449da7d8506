"""Whatever is sent: an answer below 500, no traceback, bounded memory, and the rest goes on."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import batches
import hostile
import msgspec
import pytest
import receiving
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from receiving import HEADERS, TOKEN, Load, Receiver

from sams_ebpf import wire
from sams_receiver.archive import format as fmt

# A receiver at rest has about 60 MB; the largest batch that may be sent adds its records.
MEMORY = 400 << 20


def _fuzz(folder: Path, bodies: int, connections: int) -> None:
    limits = {
        "requests_per_second": 100_000,
        "burst": 100_000,
        "failures_per_minute": 10**6,
        "batch_bytes": 8 << 20,
        "body_seconds": 2,
    }
    quotas = {"aside_bytes_per_day": 3 << 20}
    with Receiver(folder, limits=limits, quotas=quotas).start() as receiver:
        load = Load(receiver.url, clients=3, seed=10**6)
        peak = [0]
        answered = [0]
        slow = Slow(receiver.ports[0])
        seen: dict[str, set[int]] = {}

        async def one(session: aiohttp.ClientSession, seed: int) -> None:
            made = hostile.request(seed)
            headers = {"Authorization": HEADERS["Authorization"], **made.headers}
            url = f"{receiver.url}{made.path}"
            with contextlib.suppress(aiohttp.ClientConnectionError):
                # A refused body may meet a connection that is closed already.
                async with session.post(
                    aiohttp.client.URL(url, encoded=True), data=made.body, headers=headers
                ) as answer:
                    seen.setdefault(made.what, set()).add(answer.status)
                    answered[0] += 1
                    assert answer.status < 500, (seed, made.what, await answer.text())

        async def worker(session: aiohttp.ClientSession, seeds: list[int]) -> None:
            while seeds:
                await one(session, seeds.pop())
                if len(seeds) % 50 == 0:
                    peak[0] = max(peak[0], receiver.rss())

        async def main() -> None:
            sending = asyncio.create_task(load.run())
            seeds = list(range(bodies))
            async with (
                aiohttp.ClientSession() as session,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(8):
                    group.create_task(worker(session, seeds))
                group.create_task(asyncio.to_thread(_raw, receiver, connections))
            while not slow.cut:  # noqa: ASYNC110 - all else may be done before they are cut off
                await asyncio.sleep(0.1)
            load.stop()
            await asyncio.to_thread(slow.stop)
            await sending

        asyncio.run(main())
        peak[0] = max(peak[0], receiver.rss())
        assert set(seen) == {what for what, _ in hostile._KINDS}
        assert answered[0] > 0.95 * bodies
        assert 413 in seen["bomb"]
        assert slow.cut > 0
        assert load.statuses.keys() == {200}
        assert len(load.acknowledged) > 20
        assert receiving.get(receiver.url, "/healthz")[0] == 200
        assert peak[0] < MEMORY
        assert receiver.stop() == 0
        log = receiver.log.read_text()
        assert "Traceback" not in log
        assert all(line.startswith("sams-receiver: ") for line in log.splitlines())
        receiving.check(receiver.archive, load.acknowledged)
        verified = subprocess.run(
            [sys.executable, "-m", "sams_receiver", "archive", "verify", str(receiver.archive)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert verified.returncode == 0, verified.stdout
        aside = sum(path.stat().st_size for path in (receiver.archive / "aside").iterdir())
        assert 0 < aside < 4 << 20
        print(
            f"{answered[0]} of {bodies} bodies answered, {connections} raw connections,"
            f" {slow.cut} slow bodies cut off, {len(load.acknowledged)} valid batches beside them,"
            f" peak {peak[0] >> 20} MB, statuses by kind {seen}"
        )


def _raw(receiver: Receiver, connections: int) -> None:
    for seed in range(connections):
        with (
            # Cut off at any moment, or gone already when we close our side (ENOTCONN).
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", receiver.ports[0]), timeout=5) as sock,
        ):
            sock.sendall(hostile.raw(seed, TOKEN))
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(100)
            assert not answer.startswith(b"HTTP/1.1 5"), (seed, answer)


def test_a_thousand_fuzzed_bodies(tmp_path: Path) -> None:
    _fuzz(tmp_path, 1_000, 100)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_fuzzed_bodies(tmp_path: Path) -> None:
    _fuzz(tmp_path, 12_000, 1_000)


SLOW = (
    b"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\n"
    b"Authorization: Bearer " + TOKEN.encode() + b"\r\nContent-Length: 5000\r\n"
)


class Slow:
    """Ten clients that never get on with their bodies, and come again when they are cut off."""

    def __init__(self, port: int) -> None:
        self.cut = 0
        self._port = port
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        held: list[socket.socket] = []
        while not self._stopped.wait(0.05):
            while len(held) < 10:
                held.append(socket.create_connection(("127.0.0.1", self._port)))
                held[-1].sendall(SLOW + b"\r\n")
            for sock in [one for one in held if _drip(one)]:
                self.cut += 1
                held.remove(sock)
                sock.close()
        for sock in held:
            sock.close()


def test_slow_bodies_and_slow_headers_are_cut_off(tmp_path: Path) -> None:
    limits = {"body_seconds": 1, "idle_seconds": 1, "connections": 60}
    with Receiver(tmp_path, limits=limits).start() as receiver:
        slow = [socket.create_connection(("127.0.0.1", receiver.ports[0])) for _ in range(40)]
        for at, sock in enumerate(slow):
            sock.sendall(SLOW if at % 2 else SLOW + b"\r\n")
        ended = [False] * len(slow)
        begin = time.monotonic()
        while not all(ended):
            for at, sock in enumerate(slow):
                if not ended[at]:
                    ended[at] = _drip(sock)
            # A valid client is served all the while.
            answer = requests.post(
                f"{receiver.url}/v1/batches",
                batches.encoded(sequence=int(1000 * (time.monotonic() - begin))),
                headers=HEADERS,
                timeout=10,
            )
            assert answer.status_code in (200, 429)
            time.sleep(0.1)
        for sock in slow:
            sock.close()
        assert "Traceback" not in receiver.log.read_text()


def _drip(sock: socket.socket) -> bool:
    """Send one byte more; True when the other side has had enough."""
    sock.settimeout(0.01)
    try:
        sock.sendall(b"x")
        answer = sock.recv(1000)
    except TimeoutError:
        return False
    except OSError:
        return True
    assert not answer or b"408" in answer.splitlines()[0]
    return True


def test_a_client_that_does_not_read_its_answers_is_cut_off(tmp_path: Path) -> None:
    with Receiver(tmp_path, limits={"idle_seconds": 1}).start() as receiver:
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100
        before = receiver.rss()
        with socket.create_connection(("127.0.0.1", receiver.ports[0]), timeout=1) as sock:
            with contextlib.suppress(TimeoutError):
                while True:
                    sock.sendall(request)
            # Nothing goes through any more. What is known by then of its requests is bounded.
            assert receiver.rss() < before + (32 << 20)
            sock.settimeout(None)
            with pytest.raises(ConnectionError):
                sock.sendall(request * 20_000)
        assert receiving.get(receiver.url, "/healthz")[0] == 200


def test_strangers_with_more_connections_than_allowed_shut_nobody_out(tmp_path: Path) -> None:
    with Receiver(tmp_path, limits={"connections": 20}).start() as receiver:
        known = http.client.HTTPConnection("127.0.0.1", receiver.ports[0], timeout=10)

        def post(sequence: int) -> bytes:
            known.request("POST", "/v1/batches", batches.encoded(sequence=sequence), HEADERS)
            return known.getresponse().read()

        assert post(0) == b'{"status":"stored"}\n'
        connection = known.sock
        strangers = [socket.create_connection(("127.0.0.1", receiver.ports[0])) for _ in range(60)]
        # Who is in stays in, over the same connection; who has a credential gets in.
        for sequence in range(1, 10):
            assert post(sequence) == b'{"status":"stored"}\n'
            answer = requests.post(
                f"{receiver.url}/v1/batches", batches.encoded(job=7, sequence=sequence),
                headers=HEADERS, timeout=10,
            )  # fmt: skip
            assert answer.json() == {"status": "stored"}
        assert known.sock is connection
        known.close()
        # The oldest of the strangers had to go, the newest are still there.
        closed = 0
        for sock in strangers:
            sock.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                with contextlib.suppress(ConnectionError):
                    assert sock.recv(1) == b""
                closed += 1
            sock.close()
        assert 40 <= closed < 60
        assert receiving.metric(receiver.url, "limited_total") >= 40


def test_connections_leave_files_for_the_archive(tmp_path: Path) -> None:
    # 150 files in all, 96 of them for what is not a connection: more clients than that.
    with Receiver(tmp_path, segments={"frames": 5}) as receiver:
        receiver.start(prefix=("prlimit", "--nofile=100:150"))
        (line,) = [line for line in receiver.lines() if "limits.connections" in line]
        assert "150 are allowed (LimitNOFILE=): 54 connections are taken" in line
        with requests.Session() as session:
            session.headers.update(HEADERS)
            url = f"{receiver.url}/v1/batches"
            assert session.post(url, batches.encoded(), timeout=10).status_code == 200
            held = []
            for _ in range(300):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", receiver.ports[0]), 5))
            for sequence in range(1, 40):
                answer = session.post(url, batches.encoded(sequence=sequence), timeout=10)
                assert answer.json() == {"status": "stored"}
            end = time.monotonic() + 60
            while len(list(receiver.archive.rglob("*.seg"))) < 8:
                assert time.monotonic() < end, receiver.lines()
                time.sleep(0.05)
        for sock in held:
            sock.close()
        assert "Too many open files" not in receiver.log.read_text()


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(tmp_path: Path) -> None:
    with Receiver(tmp_path, limits={"connections": 500}) as receiver:
        receiver.start(prefix=("prlimit", "--nofile=100:2000"))
        (line,) = [
            line
            for line in Path(f"/proc/{receiver.pid}/limits").read_text().splitlines()
            if line.startswith("Max open files")
        ]
        assert line.split()[3:5] == ["596", "2000"]
        assert not [line for line in receiver.lines() if "limits.connections" in line]


def test_100_000_records_are_taken(tmp_path: Path) -> None:
    with Receiver(tmp_path).start() as receiver:
        body = batches.encoded(records=100_000)
        packed = fmt.compress([body])
        for data, headers in ((body, HEADERS), (packed, HEADERS | {"Content-Encoding": "zstd"})):
            answer = requests.post(f"{receiver.url}/v1/batches", data, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
        assert len(receiving.stored(receiver.archive)) == 1
        print(f"{len(body)} bytes, {len(packed)} compressed, {receiver.rss() >> 20} MB resident")


def _many(fields: list[str], row: bytes, count: int) -> bytes:
    """A batch of very many equal records."""
    head = wire.to_plain(batches.encoded(records=1)) | {"fields": fields, "sums": []}
    del head["records"]
    pairs = [msgspec.msgpack.encode(part) for item in head.items() for part in item]
    records = b"\xa7records\xdd" + count.to_bytes(4, "big") + row * count
    return b"\xde" + (len(head) + 1).to_bytes(2, "big") + b"".join(pairs) + records


def test_a_little_that_becomes_very_much_is_refused_before_it_does(tmp_path: Path) -> None:
    """Three kilobytes on the wire, thirty million values: neither memory nor time for them."""
    wide = [*wire.FIELDS, *(f"x{n}" for n in range(64 - len(wire.FIELDS)))]
    core = b'{"sams.sampler.Core": {"jobid": 1, "node": "n1"}, "x": ['
    bodies = {
        "lists": ("/1/x.json", core + b"[]," * 10_000_000 + b"1]}"),
        "numbers": ("/1/x.json", core + b"999," * 8_000_000 + b"1]}"),
        "records": ("/v1/batches", _many(list(wire.FIELDS), b"\x94\xc4\0\0\xc0\0", 1_000_000)),
        "columns": ("/v1/batches", _many(wide, b"\xdc\0\x40\xc4\0\0\xc0" + bytes(61), 480_000)),
    }
    with Receiver(tmp_path).start() as receiver:
        for what, (path, body) in bodies.items():
            packed = fmt.compress([body])
            assert len(packed) < 10_000
            assert 5_000_000 < len(body) < 32 << 20
            headers = HEADERS | {"Content-Encoding": "zstd"}
            answer = requests.post(receiver.url + path, packed, headers=headers, timeout=60)
            assert answer.status_code == 413, (what, answer.text)
            assert re.search("values in it|records: 250000 are taken", answer.text)
        assert receiver.peak() < MEMORY
        print(f"peak {receiver.peak() >> 20} MB")


def test_the_bound_on_records_is_exact(tmp_path: Path) -> None:
    with Receiver(tmp_path, limits={"records": 20}).start() as receiver:
        statuses = [
            requests.post(
                f"{receiver.url}/v1/batches", batches.encoded(records=n, sequence=n),
                headers=HEADERS, timeout=10,
            ).status_code
            for n in (19, 20, 21, 22)
        ]  # fmt: skip
        assert statuses == [200, 200, 413, 413]


def test_statuses_mean_what_they_say(tmp_path: Path) -> None:
    limits = {"body_bytes": 20_000, "batch_bytes": 30_000}
    with Receiver(tmp_path, limits=limits).start() as receiver:
        url = f"{receiver.url}/v1/batches"
        good = batches.encoded()

        def post(body: bytes, **headers: str) -> tuple[int, str]:
            answer = requests.post(
                url, body, headers=HEADERS | {k.replace("_", "-"): v for k, v in headers.items()},
                timeout=10,
            )  # fmt: skip
            assert answer.headers["Content-Type"] == "application/json"
            return answer.status_code, answer.json()["error"]

        assert post(good, Content_Type="text/plain")[0] == 415
        assert post(good, Content_Encoding="gzip")[0] == 415
        assert post(bytes(20_001))[0] == 413
        assert post(fmt.compress([bytes(40_000)]), Content_Encoding="zstd")[0] == 413
        assert post(b"")[0] == 400
        assert post(b"\xc0") == (400, "not a batch: Expected `object`, got `None`")
        document = wire.to_plain(good)
        document["critical"] = ["joules"]
        status, reason = post(msgspec.msgpack.encode(document))
        assert status == 400
        assert "upgrade" in reason
        assert requests.get(url, timeout=10).status_code == 405
        assert requests.post(f"{receiver.url}/nothing", timeout=10).status_code == 404
        answer = requests.post(url, good, headers={"Content-Type": HEADERS["Content-Type"]},
                               timeout=10)  # fmt: skip
        assert answer.status_code == 401
        assert "Basic" in answer.headers["WWW-Authenticate"]
        assert receiving.stored(receiver.archive) == []


def test_upstreams_json(tmp_path: Path) -> None:
    with Receiver(tmp_path, cluster="c1").start() as receiver:
        body = (
            b'{"sams.sampler.Core": {"jobid": 1005, "node": "n1"},'
            b' "sams.sampler.Software": {"execs": {"/bin/x": {"user": 1.5, "system": 0.25}}}}'
        )
        auth = {"Authorization": HEADERS["Authorization"]}
        url = f"{receiver.url}/1005/1005.n1.json"
        for status in ("stored", "duplicate"):
            answer = requests.post(url, body, headers=auth, timeout=10)
            assert (answer.status_code, answer.json()) == (200, {"status": status})
        again = requests.post(url.replace(".n1.", ".again."), body, headers=auth, timeout=10)
        assert again.json() == {"status": "duplicate"}
        assert requests.post(url, body + b" ", headers=auth, timeout=10).json() == {
            "status": "stored"
        }
        assert requests.post(url.replace("/1005/", "/1006/"), body, headers=auth,
                             timeout=10).status_code == 400  # fmt: skip
        assert requests.post(url, body, timeout=10).status_code == 401
        receiver.stop()
        shown = subprocess.run(
            [sys.executable, "-m", "sams_receiver", "archive", "cat", "--job", "1005",
             str(receiver.archive)],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        assert len(shown) == 2
        assert '"kind": "upstream-json"' in shown[0]
        assert '"cluster": "c1"' in shown[0]


# -- the decoder by itself -------------------------------------------------------------


def _decode(data: bytes) -> None:
    """What the receiver does with a body, up to the store."""
    with contextlib.suppress(wire.WireError):
        header = wire.check(data)
        tag = fmt.batch_tag(header, data)
        assert fmt.tag_of(fmt.Kind.COUNTERS, data) == tag
        assert wire.outline(data).records == len(wire.decode_rows(data))


_leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9),
    st.binary(max_size=20),
)  # fmt: skip
_tree = st.recursive(
    _leaf,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@given(
    st.integers(0, 2**32),
    st.dictionaries(st.sampled_from(wire.Batch.__struct_fields__), _tree, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_value_at_any_key_is_read_or_refused(seed: int, changes: dict[str, object]) -> None:
    document = hostile._plain(random.Random(seed)) | changes
    _decode(msgspec.msgpack.encode(document))


@given(st.integers(0, 2**32))
@settings(max_examples=500, deadline=None)
def test_a_mutated_body_is_read_or_refused(seed: int) -> None:
    _decode(hostile.mutated(random.Random(seed)))


@given(st.binary(max_size=400), st.integers(1, 5000))
@settings(max_examples=500, deadline=None)
def test_decompression_is_bounded_whatever_it_is_fed(data: bytes, limit: int) -> None:
    magic = b"\x28\xb5\x2f\xfd"
    for body in (data, magic + data, fmt.compress([data])[:-3] + data):
        out, _ = fmt.salvage(body, limit)
        assert len(out) <= limit


def _guided(folder: Path, limit: str) -> str:
    corpus = folder / "corpus"
    corpus.mkdir()
    for seed in range(40):
        data = hostile._valid(random.Random(seed))
        (corpus / str(seed)).write_bytes(data if seed % 4 else fmt.compress([data]))
    # Its address space is bounded: an input that makes the decoder allocate much ends it.
    done = subprocess.run(
        ["prlimit", f"--as={3 << 30}", sys.executable,
         str(Path(__file__).with_name("fuzz_decoder.py")), str(corpus),
         limit, f"-artifact_prefix={folder}/", "-max_len=4096",
         "-rss_limit_mb=0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_coverage_guided_fuzzing_of_the_decoder(tmp_path: Path) -> None:
    assert "Done 20000" in _guided(tmp_path, "-atheris_runs=20000")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_coverage_guided_fuzzing_of_the_decoder_for_ten_minutes(tmp_path: Path) -> None:
    output = _guided(tmp_path, "-max_total_time=600")
    (runs,) = re.findall(r"Done (\d+) runs", output)
    assert int(runs) > 20_000
    print(f"{runs} runs")
