"""The shipper as its hardened unit runs it: not root, under real systemd, over TLS."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import netns
import pki
import pytest
import testbed
from shipping import Receiver, fill, status, until, waiting
from testbed import Machine

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

UNIT = "sams-ebpf-ship.service"
FOLDER = "/etc/sams-ebpf"


@pytest.fixture(scope="module")
def machine(layer: Path) -> Iterator[Machine]:
    with testbed.boot("v2", layer=layer) as machine:
        machine.run(["systemd-tmpfiles", "--create", "sams-ebpf.conf"])
        yield machine


@pytest.fixture
def receiver(machine: Machine, tmp_path: Path) -> Iterator[Receiver]:
    """Listens on the machine's own loopback; the machine is configured to send there."""
    authority = pki.authority(tmp_path, "ca")
    pair = pki.certificate(tmp_path, "ca", "server", "/CN=x", alternative="DNS:localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    with Receiver(context) as receiver:
        # Started once more, on the other side.
        receiver.stop()
        netns.inside(Path(f"/proc/{machine.pid}/ns/net"), receiver.start)
        machine.write(f"{FOLDER}/ca.pem", authority.read_text())
        machine.write(f"{FOLDER}/token", "t" * 40, mode=0o640)
        machine.run(["chown", "root:sams-ebpf", f"{FOLDER}/token"])
        main = {"url": receiver.url, "ca_file": f"{FOLDER}/ca.pem", "token_file": f"{FOLDER}/token"}
        ship = {"spread_s": 0, "backoff_s": 600, "backoff_max_s": 600, "receivers": {"main": main}}
        machine.write(f"{FOLDER}/config.yaml", json.dumps({"ship": ship}))
        yield receiver
        machine.systemctl("stop", UNIT)
        machine.systemctl("reset-failed", UNIT, check=False)


def test_the_unit_ships_what_root_wrote(machine: Machine, receiver: Receiver) -> None:
    machine.systemctl("start", UNIT)
    spool = machine.path("/var/spool/sams-ebpf")
    sent = fill(spool, 5)
    until(lambda: not waiting(spool))
    assert sorted(receiver.stored) == sorted(sent)
    assert receiver.headers[0]["Authorization"] == f"Bearer {'t' * 40}"
    pid = machine.systemctl("show", "-P", "MainPID", UNIT)
    user = machine.run(["ps", "-o", "user=", "-p", pid]).stdout.strip()
    assert user == "sams-ebpf"
    until(lambda: "0 batches wait" in machine.systemctl("show", "-P", "StatusText", UNIT))
    # A failure waits for up to ten minutes; `reload` tries again at once.
    receiver.behave = lambda number: status(503) if number == 5 else None
    sent += fill(spool, 1, first=5)
    until(lambda: receiver.attempts == 6)
    until(lambda: machine.systemctl("reload", UNIT) or not waiting(spool))
    machine.systemctl("stop", UNIT)
    assert machine.systemctl("show", "-P", "Result", UNIT) == "success"
    assert sorted(receiver.stored) == sorted(sent)


def test_an_open_token_is_one_line_in_the_journal(machine: Machine, receiver: Receiver) -> None:
    machine.run(["chmod", "0644", f"{FOLDER}/token"])
    machine.systemctl("start", UNIT, check=False)
    until(lambda: machine.systemctl("is-active", UNIT, check=False) == "failed")
    assert machine.systemctl("show", "-P", "ExecMainStatus", UNIT) == "2"
    lines = [line for line in machine.journal("-u", UNIT) if "mode 0644" in line]
    (line,) = lines
    assert f"error: ship.receivers.main: {FOLDER}/token: a secret with mode 0644: chmod" in line
    assert machine.systemctl("show", "-P", "NRestarts", UNIT) == "0"
    assert receiver.attempts == 0
