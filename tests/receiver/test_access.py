"""Who gets in: only the right one stores anything, whichever way it comes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import batches
import pki
import pytest
import receiving
import requests
import shipping
from receiving import Receiver, private

from sams_ebpf import wire
from sams_receiver import auth
from sams_receiver.archive import Archive

MSGPACK = {"Content-Type": "application/msgpack"}
EXAMPLES = Path(__file__).parents[2] / "receiver"
PASSWORD = "correct horse battery"  # noqa: S105


class Pki(NamedTuple):
    folder: Path
    ca: Path
    server: tuple[str, str]
    n1: tuple[str, str]
    n2: tuple[str, str]
    expired: tuple[str, str]
    stranger: tuple[str, str]
    tricky: tuple[str, str]
    crl: Path
    revoked: tuple[str, str]


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    ca = pki.authority(folder, "ca")
    pki.authority(folder, "other")
    server = pki.certificate(
        folder, "ca", "server", "/CN=localhost", alternative="DNS:localhost,IP:127.0.0.1"
    )
    revoked = pki.certificate(folder, "ca", "gone", "/CN=n1")
    return Pki(
        folder,
        ca,
        server,
        pki.certificate(folder, "ca", "n1", "/CN=n1"),
        pki.certificate(folder, "ca", "n2", "/O=a site/CN=n2"),
        pki.certificate(folder, "ca", "expired", "/CN=n1", days=-1),
        pki.certificate(folder, "other", "stranger", "/CN=n1"),
        # One part of the subject that reads like another.
        pki.certificate(folder, "ca", "tricky", "/CN=n3/O=x,CN=n1"),
        pki.revoke(folder, "ca", revoked[0]),
        revoked,
    )


def send(url: str, node: str = "n1", sequence: int = 0, **how: Any) -> int:
    """Status of one batch of that node; 0 if there was not even an answer."""
    headers = MSGPACK | how.pop("headers", {})
    body = batches.encoded(node=node, sequence=sequence)
    try:
        return requests.post(
            f"{url}/v1/batches", body, headers=headers, timeout=20, **how
        ).status_code
    except requests.exceptions.SSLError:
        return 0
    except requests.exceptions.ConnectionError as error:
        # With TLS 1.3 a refused client certificate shows as a reset after the handshake.
        assert "url" not in how, error
        return 0


def nodes_stored(receiver: Receiver) -> list[tuple[str | None, bool]]:
    return [
        (wire.decode_header(frame.data).claims.node, frame.vouched)
        for segment in Archive.open(receiver.archive).segments()
        for frame in segment.frames()
    ]


# -- tokens and passwords --------------------------------------------------------------


def test_tokens(tmp_path: Path) -> None:
    tokens = private(
        tmp_path / "t",
        f"# name, hash, expiry\nn1 {auth.hash_token('a' * 40)}\n"
        f"n2 {auth.hash_token('b' * 40)} 2999-01-01T00:00Z\n"
        f"n1 {auth.hash_token('c' * 40)} 2020-01-01\n",
    )
    with Receiver(tmp_path, tokens_file=str(tokens)).start() as receiver:

        def bearer(token: str) -> dict[str, Any]:
            return {"headers": {"Authorization": f"Bearer {token}"}}

        assert send(receiver.url) == 401
        assert send(receiver.url, **bearer("x" * 40)) == 401
        assert send(receiver.url, **bearer("")) == 401
        assert send(receiver.url, **bearer("c" * 40)) == 401
        assert send(receiver.url, **bearer(auth.hash_token("a" * 40))) == 401
        assert send(receiver.url, node="n1", **bearer("b" * 40)) == 403
        assert send(receiver.url, node="n1", auth=("n1", "a" * 40)) == 401
        assert nodes_stored(receiver) == []
        assert send(receiver.url, **bearer("a" * 40)) == 200
        assert send(receiver.url, node="n2", **bearer("b" * 40)) == 200
        # Rotation: a new file is in force within seconds, without a restart.
        private(tokens, f"n1 {auth.hash_token('d' * 40)}\n")
        for _ in range(100):
            if send(receiver.url, sequence=1, **bearer("d" * 40)) == 200:
                break
            time.sleep(0.1)
        assert send(receiver.url, sequence=2, **bearer("a" * 40)) == 401
        # A file that others could have written is not believed.
        tokens.chmod(0o666)
        private_text = f"n1 {auth.hash_token('e' * 40)}\n"
        tokens.write_text(private_text)
        time.sleep(2.2)
        assert send(receiver.url, sequence=2, **bearer("e" * 40)) == 401
        assert send(receiver.url, sequence=2, **bearer("d" * 40)) == 200
        assert nodes_stored(receiver).count(("n1", True)) == 3


def test_passwords(tmp_path: Path) -> None:
    passwords = private(
        tmp_path / "p",
        f"n1 {auth.hash_password(PASSWORD)}\n"
        f"n2 {auth.hash_password('another long one')}\n"
        f"n3 {auth.hash_password(PASSWORD)} 2020-01-01\n",
    )
    section = {"passwords_file": str(passwords), "tokens_file": None}
    with Receiver(tmp_path, **section).start() as receiver:
        assert send(receiver.url) == 401
        assert send(receiver.url, auth=("n1", "wrong")) == 401
        assert send(receiver.url, auth=("n9", PASSWORD)) == 401
        assert send(receiver.url, node="n3", auth=("n3", PASSWORD)) == 401
        assert send(receiver.url, node="n1", auth=("n2", "another long one")) == 403
        for broken in ("Basic", "Basic !!!", "Basic bm9jb2xvbg==", "Digest x", "Bearer x"):
            assert send(receiver.url, headers={"Authorization": broken}) == 401
        assert nodes_stored(receiver) == []
        assert send(receiver.url, auth=("n1", PASSWORD)) == 200
        assert send(receiver.url, sequence=1, auth=("n1", PASSWORD)) == 200
        assert send(receiver.url, sequence=2, auth=("n1", PASSWORD + "x")) == 401
        assert nodes_stored(receiver) == [("n1", True)] * 2


def test_guessing_is_slowed_down_and_the_right_ones_are_not(tmp_path: Path) -> None:
    limits = {"failures_per_minute": 5}
    tokens = receiving.tokens(tmp_path / "t", {"n1": "a" * 40})
    with Receiver(tmp_path, tokens_file=str(tokens), limits=limits).start() as receiver:
        wrong = {"headers": {"Authorization": "Bearer nonsense"}}
        statuses = [send(receiver.url, **wrong) for _ in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        assert receiver.log.read_text().count("denied") == 5
        # A user of the node who guesses does not shut out the node itself.
        assert send(receiver.url, headers={"Authorization": "Bearer " + "a" * 40}) == 200


def test_guessed_passwords_are_not_even_looked_at_after_a_while(tmp_path: Path) -> None:
    passwords = private(tmp_path / "p", f"n1 {auth.hash_password(PASSWORD)}\n")
    section = {"passwords_file": str(passwords), "tokens_file": None}
    with Receiver(tmp_path, limits={"failures_per_minute": 3}, **section).start() as receiver:
        assert send(receiver.url, auth=("n1", PASSWORD)) == 200
        statuses = [send(receiver.url, auth=("n1", f"guess {n}")) for n in range(6)]
        assert statuses == [401] * 3 + [429] * 3
        assert send(receiver.url, sequence=1, auth=("n1", PASSWORD)) == 200


def test_a_node_that_writes_as_another_is_counted_and_does_not_fill_the_log(
    tmp_path: Path,
) -> None:
    tokens = receiving.tokens(tmp_path / "t", {"n1": "a" * 40})
    limits = {"failures_per_minute": 3}
    with Receiver(tmp_path, tokens_file=str(tokens), limits=limits).start() as receiver:
        mine = {"headers": {"Authorization": "Bearer " + "a" * 40}}
        assert [send(receiver.url, node="n2", **mine) for _ in range(9)] == [403] * 9
        assert receiver.log.read_text().count("n1 denied: may write as node n1, not as n2") == 3
        assert receiving.metric(receiver.url, "denied_total") == 9
        # It is told from others by its name: neither it nor anybody else is shut out.
        assert send(receiver.url, node="n1", **mine) == 200


def test_a_client_that_asks_too_often_is_told_to_wait(tmp_path: Path) -> None:
    limits = {"requests_per_second": 1, "burst": 3}
    with Receiver(tmp_path, limits=limits).start() as receiver:
        answers = [
            requests.post(
                f"{receiver.url}/v1/batches",
                batches.encoded(sequence=n),
                headers=receiving.HEADERS,
                timeout=10,
            )
            for n in range(6)
        ]
        assert [a.status_code for a in answers][:3] == [200] * 3
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["Retry-After"]) >= 1


def test_quotas_of_a_node(tmp_path: Path) -> None:
    tokens = receiving.tokens(tmp_path / "t", {"n1": "a" * 40, "n2": "b" * 40})
    size = len(batches.encoded())
    quotas = {"writers_per_day": 3, "bytes_per_day": 6 * size + 60, "aside_bytes_per_day": 100}
    with Receiver(tmp_path, tokens_file=str(tokens), quotas=quotas).start() as receiver:

        def post(token: str, body: bytes) -> int:
            headers = MSGPACK | {"Authorization": f"Bearer {token * 40}"}
            return requests.post(
                f"{receiver.url}/v1/batches", body, headers=headers, timeout=10
            ).status_code

        writers = [post("a", batches.encoded(job=job)) for job in range(5)]
        assert writers == [200, 200, 200, 429, 429]
        assert post("a", batches.encoded(job=0, sequence=1)) == 200
        assert post("a", batches.encoded(job=0, sequence=2)) == 429
        for n in range(4):
            assert post("b", b"\xc1" + bytes([n]) * 50) == 400
        kept = list((receiver.archive / "aside").iterdir())
        assert len(kept) == 1
        assert b'"client": "n2"' in kept[0].read_bytes()
        assert receiving.metric(receiver.url, "aside_dropped_total") == 3
        assert post("b", batches.encoded(node="n2")) == 200


def test_a_restart_gives_nobody_a_new_day(tmp_path: Path) -> None:
    tokens = receiving.tokens(tmp_path / "t", {"n1": "a" * 40})
    receiver = Receiver(tmp_path, tokens_file=str(tokens), quotas={"writers_per_day": 3})

    def post(job: int) -> int:
        headers = MSGPACK | {"Authorization": f"Bearer {'a' * 40}"}
        body = batches.encoded(job=job)
        return requests.post(
            f"{receiver.url}/v1/batches", body, headers=headers, timeout=10
        ).status_code

    with receiver:
        receiver.start()
        assert [post(1), post(2)] == [200, 200]
        assert receiver.stop() == 0
        receiver.start()
        assert [post(3), post(4), post(1)] == [200, 429, 200]
        assert receiver.stop() == 0
        # What cannot be read is said, and stops nobody.
        (receiver.archive / "quotas.json").write_bytes(b"nonsense")
        receiver.start()
        assert post(4) == 200
        (line,) = [line for line in receiver.lines() if "quotas.json" in line]
        assert "warning" in line
        assert "today's quotas begin anew" in line


def test_a_file_at_the_socket_s_place_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "http.sock"
    place.write_text("somebody's")
    receiver = Receiver(tmp_path, listen=[{"address": f"unix:{place}", "proxy": {}}])
    with receiver, pytest.raises(AssertionError, match="cannot listen on unix:"):
        receiver.start()
    assert place.read_text() == "somebody's"


def test_nodes_that_share_one_name_have_quotas_of_their_own(tmp_path: Path) -> None:
    quotas = {"writers_per_day": 1}
    with Receiver(tmp_path, quotas=quotas).start() as receiver:
        for node in ("n1", "n2"):
            statuses = [
                requests.post(
                    f"{receiver.url}/v1/batches",
                    batches.encoded(node=node, job=job),
                    headers=receiving.HEADERS,
                    timeout=10,
                ).status_code
                for job in (1, 2)
            ]
            assert statuses == [200, 429]


def test_names_are_mapped_to_nodes_and_clusters(tmp_path: Path) -> None:
    names = [{"match": r"(?P<node>[a-z0-9]+)\.(?P<cluster>[a-z0-9]+)\.example\.org"}]
    tokens = receiving.tokens(
        tmp_path / "t",
        {"n1.c1.example.org": "a" * 40, "n1.c2.example.org": "b" * 40, "n1": "c" * 40},
    )
    with Receiver(tmp_path, tokens_file=str(tokens), names=names).start() as receiver:

        def status(token: str) -> int:
            return send(receiver.url, headers={"Authorization": f"Bearer {token * 40}"})

        assert [status("b"), status("c")] == [403, 403]
        assert nodes_stored(receiver) == []
        assert status("a") == 200


def test_without_binding_it_is_taken_but_not_vouched_for(tmp_path: Path) -> None:
    with Receiver(tmp_path).start() as receiver:
        assert send(receiver.url, node="n7", headers=receiving.HEADERS) == 200
        assert nodes_stored(receiver) == [("n7", False)]
        assert receiving.metric(receiver.url, "unvouched_batches_total") == 1


def test_who_speaks_is_settled_before_the_body(tmp_path: Path) -> None:
    with Receiver(tmp_path).start() as receiver:
        body = batches.encoded()
        for token, first in (("wrong", b"401"), (receiving.TOKEN, b"100")):
            head = (
                f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                f"Authorization: Bearer {token}\r\nContent-Type: application/msgpack\r\n"
                "Expect: 100-continue\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", receiver.ports[0]), timeout=10) as sock:
                sock.sendall(head.encode())
                assert sock.recv(1000).split()[1] == first
                if first == b"100":
                    sock.sendall(body)
                    assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_every_kind_of_client_gets_its_answer_in_its_own_way(tmp_path: Path) -> None:
    """Most answers are sent ready-made; who leaves, or speaks 1.0, is told so."""
    with Receiver(tmp_path).start() as receiver:

        def request(version: str, *lines: str, sequence: int = 0) -> bytes:
            body = batches.encoded(sequence=sequence)
            head = f"POST /v1/batches HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in receiving.HEADERS.items())
            return (
                head.encode() + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body
            )

        def answers(requests: bytes) -> list[bytes]:
            with socket.create_connection(("127.0.0.1", receiver.ports[0]), timeout=10) as sock:
                sock.sendall(requests)
                answer = b""
                while piece := sock.recv(4096):
                    answer += piece
            return answer.split(b"HTTP/")[1:]

        (old,) = answers(request("1.0", sequence=1))
        assert old.startswith(b"1.0 200 OK\r\n")
        assert old.endswith(b'\r\n\r\n{"status":"stored"}\n')
        stays = request("1.1") * 3
        first, *again, last = answers(stays + request("1.1", "Connection: close"))
        text = b"1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b\n"
        assert first == text % (20, b'{"status":"stored"}')
        assert again == [text % (23, b'{"status":"duplicate"}')] * 2
        assert b"\r\nConnection: close\r\n" in last


# -- TLS, without anything in front ----------------------------------------------------


@pytest.fixture
def tls(tmp_path: Path, certs: Pki) -> Iterator[Receiver]:
    listen = [
        {
            "address": "127.0.0.1:0",
            "tls": {
                "certificate": certs.server[0],
                "key": certs.server[1],
                "client_ca": str(certs.ca),
                "crl": str(certs.crl),
            },
        }
    ]
    with Receiver(tmp_path, listen=listen, tokens_file=None, node_binding=True).start() as made:
        yield made


def fingerprint(receiver: Receiver, certs: Pki) -> bytes:
    """The certificate that the receiver shows."""
    context = ssl.create_default_context(cafile=str(certs.ca))
    with (
        socket.create_connection(("localhost", receiver.ports[0]), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def reload(receiver: Receiver) -> None:
    """SIGHUP, and wait until it is done."""
    before = sum("read again" in line for line in receiver.lines())
    os.kill(receiver.pid, signal.SIGHUP)
    for _ in range(200):
        if sum("read again" in line for line in receiver.lines()) > before:
            return
        time.sleep(0.05)
    raise AssertionError(receiver.lines())


def test_a_request_under_way_is_answered_before_its_connection_ends(
    tls: Receiver, certs: Pki
) -> None:
    context = ssl.create_default_context(cafile=str(certs.ca))
    context.load_cert_chain(*certs.n2)
    body = batches.encoded(node="n2", sequence=77)
    head = f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: {MSGPACK['Content-Type']}\r\n\r\n"
    with (
        socket.create_connection(("localhost", tls.ports[0]), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        secured.sendall(head.encode() + body[:10])
        time.sleep(0.3)  # so that it is being read
        reload(tls)
        secured.sendall(body[10:])
        answer = b""
        while piece := secured.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"status":"stored"}\n')


def test_certificates_and_revocations_are_read_again_without_a_restart(
    tmp_path: Path, certs: Pki
) -> None:
    """Rotating them costs no connection that is still good; who is revoked is out at once."""
    folder = tmp_path / "pki"
    shutil.copytree(certs.folder, folder)
    text = (folder / "ca.cnf").read_text()
    (folder / "ca.cnf").write_text(text.replace(str(certs.folder), str(folder)))
    pair = [
        shutil.copy(path, tmp_path / name) for path, name in zip(certs.server, "ck", strict=True)
    ]
    crl = tmp_path / "crl"
    shutil.copy(certs.crl, crl)
    ca = tmp_path / "clients.pem"
    shutil.copy(certs.ca, ca)
    tls = {"certificate": str(pair[0]), "key": str(pair[1]), "client_ca": str(ca), "crl": str(crl)}
    listen = [{"address": "localhost:0", "tls": tls}]
    with Receiver(tmp_path, listen=listen, tokens_file=None, node_binding=True).start() as made:
        url = f"https://localhost:{made.ports[0]}"
        trusted: dict[str, Any] = {"verify": str(certs.ca)}
        assert send(url, node="n2", cert=certs.n2, **trusted) == 200
        with requests.Session() as kept:
            kept.trust_env = False
            kept.verify, kept.cert = str(certs.ca), certs.n1

            def post(sequence: int) -> int:
                body = batches.encoded(node="n1", sequence=sequence)
                return kept.post(f"{url}/v1/batches", body, headers=MSGPACK, timeout=20).status_code

            assert post(0) == 200
            shutil.copy(pki.revoke(folder, "ca", certs.n1[0]), crl)
            assert post(1) == 200, "not read yet"
            reload(made)
            with pytest.raises(requests.exceptions.ConnectionError):
                post(2)
        assert send(url, cert=certs.n1, **trusted) == 0
        assert send(url, node="n2", sequence=1, cert=certs.n2, **trusted) == 200
        # The server's own certificate, and a second authority beside the first.
        old = fingerprint(made, certs)
        new = pki.certificate(folder, "ca", "server2", "/CN=x", alternative="DNS:localhost")
        for path, place in zip(new, pair, strict=True):
            shutil.copy(path, place)
        pki.authority(tmp_path, "next")
        joined = pki.certificate(tmp_path, "next", "n4", "/CN=n4")
        text = (folder / "ca.cnf").read_text()
        ca.write_text(certs.ca.read_text() + (tmp_path / "next.pem").read_text())
        lists = [
            crl.read_text(),
            pki.revoke(
                tmp_path, "next", pki.certificate(tmp_path, "next", "x", "/CN=x")[0]
            ).read_text(),
        ]
        crl.write_text("".join(lists))
        reload(made)
        assert fingerprint(made, certs) != old
        assert send(url, node="n4", cert=joined, **trusted) == 200
        assert send(url, node="n2", sequence=2, cert=certs.n2, **trusted) == 200
        # What cannot be used is refused as a whole; what was there before stays.
        now = fingerprint(made, certs)
        Path(pair[1]).write_text("no key")
        reload(made)
        assert fingerprint(made, certs) == now
        assert send(url, node="n4", sequence=1, cert=joined, **trusted) == 200
        (line,) = [line for line in made.lines() if "stays in force" in line]
        assert "error" in line
        assert str(pair[1]) in line
        assert made.stop() == 0


def test_mutual_tls_without_a_proxy(tls: Receiver, certs: Pki) -> None:
    url = f"https://localhost:{tls.ports[0]}"
    trusted: dict[str, Any] = {"verify": str(certs.ca)}
    assert send(url, **trusted) == 401
    for wrong in (certs.expired, certs.stranger, certs.revoked):
        assert send(url, cert=wrong, **trusted) == 0
    assert send(url, node="n1", cert=certs.n2, **trusted) == 403
    assert send(url, node="n1", cert=certs.tricky, **trusted) == 403
    # Headers that only a proxy may send are nothing here.
    forged = {"X-Sams-Client": "n1", "X-Sams-Proxy-Secret": ""}
    assert send(url, headers=forged, **trusted) == 401
    assert send(url, cert=certs.n2, headers=forged, **trusted) == 403
    assert requests.get(f"{url}/metrics", timeout=10, verify=str(certs.ca)).status_code == 200
    assert nodes_stored(tls) == []
    # Both sides are told why.
    said = [line for line in tls.lines() if "a client's certificate at " in line]
    for reason in ("certificate has expired", "local issuer certificate", "certificate revoked"):
        assert len([line for line in said if reason in line]) == 1, said
    shown = requests.get(f"{url}/metrics", timeout=10, verify=str(certs.ca)).text
    assert 'sams_receiver_denied_total{status="tls"} 3.0' in shown
    assert 'sams_receiver_denied_total{status="403"} 3.0' in shown
    for wrong, reason in ((certs.expired, "EXPIRED"), (certs.stranger, "UNKNOWN_CA")):
        with pytest.raises(requests.exceptions.SSLError, match=reason):
            requests.get(f"{url}/healthz", cert=wrong, timeout=10, **trusted)
    assert send(url, node="n1", cert=certs.n1, **trusted) == 200
    assert send(url, node="n2", cert=certs.n2, **trusted) == 200
    assert sorted(nodes_stored(tls)) == [("n1", True), ("n2", True)]


def test_plain_http_and_old_tls_on_the_tls_port(tls: Receiver, certs: Pki) -> None:
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"http://localhost:{tls.ports[0]}/healthz", timeout=10)
    old = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{tls.ports[0]}", "-tls1_1"],
        input=b"", capture_output=True, check=False, timeout=20,
    )  # fmt: skip
    assert old.returncode != 0
    url = f"https://localhost:{tls.ports[0]}"
    assert send(url, cert=certs.n1, verify=str(certs.ca)) == 200
    assert "Traceback" not in tls.log.read_text()


# -- a proxy ---------------------------------------------------------------------------


def test_a_proxy_over_tcp_needs_its_secret(tmp_path: Path) -> None:
    secret = private(tmp_path / "secret", "s" * 64 + "\n")
    listen = [{"address": "127.0.0.1:0", "proxy": {"secret_file": str(secret)}}]
    with Receiver(tmp_path, listen=listen, node_binding=True).start() as receiver:
        name = {"X-Sams-Client": "n1"}
        assert send(receiver.url, headers=name) == 403
        assert send(receiver.url, headers=name | {"X-Sams-Proxy-Secret": "s" * 63}) == 403
        assert send(receiver.url, headers={"X-Sams-Proxy-Secret": "s" * 64}) == 401
        assert nodes_stored(receiver) == []
        assert send(receiver.url, headers=name | {"X-Sams-Proxy-Secret": "s" * 64}) == 200
        # Rotated: the old one is out with the reload.
        private(secret, "r" * 64 + "\n")
        reload(receiver)
        assert send(receiver.url, headers=name | {"X-Sams-Proxy-Secret": "s" * 64}) == 403
        old = len(nodes_stored(receiver))
        new = name | {"X-Sams-Proxy-Secret": "r" * 64}
        assert send(receiver.url, sequence=1, headers=new) == 200
        assert len(nodes_stored(receiver)) == old + 1


def test_the_socket_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    listen = [{"address": f"unix:{path}", "proxy": {}, "mode": "0660"}]
    with Receiver(tmp_path, listen=listen).start() as receiver:
        assert path.stat().st_mode & 0o777 == 0o660
        assert receiver.stop() == 0
        assert not path.exists()


class Nginx:
    """Real nginx with the example that ships, on other ports and paths."""

    def __init__(self, folder: Path, certs: Pki, **changes: str) -> None:
        self.folder = folder
        self.ports = [_free_port(), _free_port()]
        text = (EXAMPLES / "nginx" / "sams-receiver.conf").read_text()
        htpasswd = folder / "htpasswd"
        hashed = subprocess.run(
            ["openssl", "passwd", "-6", PASSWORD], check=True, capture_output=True, text=True
        ).stdout.strip()
        htpasswd.write_text(f"n1:{hashed}\nn2:{hashed}\n")
        htpasswd.chmod(0o644)
        replaced = {
            "listen 8443 ssl": f"listen 127.0.0.1:{self.ports[0]} ssl",
            "listen 8444 ssl": f"listen 127.0.0.1:{self.ports[1]} ssl",
            "listen [::]:8443 ssl;": "",
            "listen [::]:8444 ssl;": "",
            "/run/sams-receiver/http.sock": str(folder / "http.sock"),
            "/etc/sams-receiver/server.pem": certs.server[0],
            "/etc/sams-receiver/server.key": certs.server[1],
            "/etc/sams-receiver/clients-ca.pem": str(certs.ca),
            "/etc/sams-receiver/htpasswd": str(htpasswd),
            "/var/log/nginx/sams-receiver.log": str(folder / "access.log"),
            **changes,
        }
        for old, new in replaced.items():
            assert old in text, f"the example says nothing of {old!r} any more"
            text = text.replace(old, new)
        config = folder / "nginx.conf"
        paths = "".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config.write_text(
            f"user root;daemon off;pid {folder}/nginx.pid;error_log {folder}/error.log info;"
            f"events {{}}\nhttp {{ {paths}\n{text}\n}}\n"
        )
        self.process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(folder)])
        for port in self.ports:
            _wait_for(port)

    def url(self, which: int) -> str:
        return f"https://localhost:{self.ports[which]}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("nginx does not listen")


StartNginx = Callable[..., Nginx]


@pytest.fixture
def start_nginx(tmp_path: Path, certs: Pki) -> Iterator[StartNginx]:
    started: list[Nginx] = []

    def start(**changes: str) -> Nginx:
        started.append(Nginx(tmp_path, certs, **changes))
        return started[-1]

    yield start
    for made in started:
        made.stop()


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Receiver]:
    listen = [{"address": f"unix:{tmp_path / 'http.sock'}", "proxy": {}}]
    with Receiver(tmp_path, listen=listen, tokens_file=None, node_binding=True).start() as made:
        yield made


@pytest.mark.system
def test_behind_real_nginx(behind: Receiver, start_nginx: StartNginx, certs: Pki) -> None:
    nginx = start_nginx()
    trusted: dict[str, Any] = {"verify": str(certs.ca)}
    by_cert, by_password = nginx.url(0), nginx.url(1)
    # Client certificates: missing, expired, of a stranger, another node's, forged by header.
    assert send(by_cert, **trusted) == 400
    for wrong in (certs.expired, certs.stranger):
        assert send(by_cert, cert=wrong, **trusted) == 400
    assert send(by_cert, cert=certs.n2, **trusted) == 403
    assert send(by_cert, cert=certs.tricky, **trusted) in (401, 403)
    for forged in ({"X-Sams-Client": "n1"}, {"x-sams-client": "n1"}, {"X_Sams_Client": "n1"}):
        assert send(by_cert, cert=certs.n2, headers=forged, **trusted) == 403
        assert send(by_password, headers=forged, **trusted) == 401
        assert send(by_password, auth=("n2", PASSWORD), headers=forged, **trusted) == 403
    # A user name beside a certificate does not count.
    assert send(by_cert, cert=certs.n2, auth=("n1", PASSWORD), **trusted) == 403
    assert send(by_password, auth=("n1", "wrong"), **trusted) == 401
    assert send(by_password, auth=("n9", PASSWORD), **trusted) == 401
    for path in ("/metrics", "/v1/other", "/../v1/batches/x"):
        answer = requests.get(by_cert + path, cert=certs.n1, timeout=10, **trusted)
        assert answer.status_code == 404
    assert nodes_stored(behind) == []
    assert send(by_cert, cert=certs.n1, **trusted) == 200
    assert send(by_cert, node="n2", cert=certs.n2, **trusted) == 200
    assert send(by_password, node="n1", sequence=1, auth=("n1", PASSWORD), **trusted) == 200
    assert sorted(nodes_stored(behind)) == [("n1", True), ("n1", True), ("n2", True)]
    body = bytes(33 << 20)
    answer = requests.post(
        f"{by_cert}/v1/batches", body, headers=MSGPACK, cert=certs.n1, timeout=30, **trusted
    )
    assert answer.status_code == 413


@pytest.mark.system
def test_a_certificate_that_nginx_refuses_costs_no_batch(
    tmp_path: Path, behind: Receiver, start_nginx: StartNginx, certs: Pki
) -> None:
    """It answers 400, which a receiver says of a batch that is none."""
    nginx = start_nginx()
    folder = tmp_path / "spool"
    folder.mkdir()
    for pair in (certs.expired, certs.stranger, None, certs.n1):
        target: dict[str, Any] = {"url": nginx.url(0), "ca_file": str(certs.ca)}
        if pair is not None:
            target |= {"client_certificate": pair[0], "client_key": pair[1]}
        config = shipping.configure(tmp_path / "node.yaml", folder, {"main": target})
        if pair is not certs.n1:
            sent = shipping.fill(folder, 3)
            ran = shipping.once(config)
            assert ran.returncode == 4
            assert "SSL certificate" in ran.stderr
            assert len(shipping.waiting(folder)) == 3
            assert list((folder / "rejected").iterdir()) == []
    assert shipping.once(config).returncode == 0
    assert sorted(receiving.stored(behind.archive)) == sorted(sent)


@pytest.mark.system
def test_a_proxy_that_times_out(behind: Receiver, start_nginx: StartNginx, certs: Pki) -> None:
    nginx = start_nginx(**{"proxy_read_timeout    60s;": "proxy_read_timeout 1s;"})
    how: dict[str, Any] = {"cert": certs.n1, "verify": str(certs.ca)}
    assert send(nginx.url(0), sequence=0, **how) == 200
    os.kill(behind.pid, signal.SIGSTOP)
    try:
        assert [send(nginx.url(0), sequence=n, **how) for n in (1, 2)] == [504, 504]
    finally:
        os.kill(behind.pid, signal.SIGCONT)
    for _ in range(2):
        assert [send(nginx.url(0), sequence=n, **how) for n in (0, 1, 2)] == [200] * 3
    assert len(receiving.stored(behind.archive)) == 3


@pytest.mark.system
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "sams-receiver.service"
    text = (EXAMPLES / "systemd" / "sams-receiver.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/sams-receiver", "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    # systemd passes over a key that it does not know, with a warning only.
    complaints = [line for line in checked.stderr.splitlines() if "sams-receiver.service" in line]
    assert complaints == []
