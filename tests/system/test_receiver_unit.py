"""The receiver's unit under a real systemd: as its own user, with all its restrictions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import batches
import pytest
import testbed
from testbed import Machine

from sams_receiver.archive import Archive

UNIT = Path(__file__).parents[2] / "receiver" / "systemd" / "sams-receiver.service"
CONFIG = """\
receiver:
  archive: /var/lib/sams-receiver/archive
  min_free_bytes: 0
  listen:
    - {address: "unix:/run/sams-receiver/http.sock", proxy: {}}
"""
POST = """\
import socket, sys
body = open("/batch", "rb").read()
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("/run/sams-receiver/http.sock")
    sock.sendall(
        b"POST /v1/batches HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/msgpack\\r\\n"
        b"X-Sams-Client: n1\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
        + body
    )
    print(sock.recv(4096).decode().splitlines()[-1])
"""

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def server(layer: Path) -> Iterator[Machine]:
    with testbed.boot("v2", layer=layer) as machine:
        machine.run(["useradd", "--system", "sams-receiver"])
        machine.write("/etc/sams-ebpf/config.yaml", CONFIG)
        text = UNIT.read_text()
        assert "/usr/local/bin/sams-receiver" in text
        program = f"{sys.executable} -m sams_receiver"
        machine.write(
            "/etc/systemd/system/sams-receiver.service",
            text.replace("/usr/local/bin/sams-receiver", program),
        )
        machine.path("/batch").write_bytes(batches.encoded())
        machine.systemctl("daemon-reload")
        yield machine


def test_serves_as_its_own_user_and_stops_in_good_order(server: Machine) -> None:
    server.systemctl("start", "sams-receiver")
    assert server.systemctl("is-active", "sams-receiver") == "active"
    status = server.run(["stat", "-c", "%U %a", "/run/sams-receiver/http.sock"]).stdout
    assert status.split() == ["sams-receiver", "660"]
    for expected in ('{"status":"stored"}', '{"status":"duplicate"}'):
        assert server.run([sys.executable, "-c", POST]).stdout.strip() == expected
    server.systemctl("reload", "sams-receiver")
    testbed.wait_for(
        "the reload",
        lambda: any("read again" in line for line in server.journal("-u", "sams-receiver")),
    )
    assert server.run([sys.executable, "-c", POST]).stdout.strip() == '{"status":"duplicate"}'
    # Whoever is not in its group does not get as far as the socket.
    denied = server.run([sys.executable, "-c", POST], user="nobody", check=False)
    assert "PermissionError" in denied.stderr
    server.systemctl("stop", "sams-receiver")
    assert server.systemctl("show", "-P", "Result", "sams-receiver") == "success"
    folder = server.path("/var/lib/sams-receiver/archive")
    assert sum(1 for s in Archive.open(folder).segments() for _ in s.frames()) == 1
    assert folder.stat().st_mode & 0o007 == 0


def test_a_kill_is_followed_by_a_restart_that_knows_what_it_had(server: Machine) -> None:
    server.systemctl("start", "sams-receiver")
    server.systemctl("kill", "-s", "KILL", "sams-receiver")
    testbed.wait_for(
        "the restart",
        lambda: (
            server.systemctl("show", "-P", "NRestarts", "sams-receiver") == "1"
            and server.systemctl("is-active", "sams-receiver", check=False) == "active"
        ),
        seconds=60,
    )
    assert server.run([sys.executable, "-c", POST]).stdout.strip() == '{"status":"duplicate"}'
    server.systemctl("stop", "sams-receiver")


def test_a_wrong_configuration_is_one_line_in_the_journal(server: Machine) -> None:
    server.write("/etc/sams-ebpf/config.yaml", CONFIG.replace("listen:", "lisen:"))
    server.systemctl("start", "sams-receiver", check=False)
    server.systemctl("stop", "sams-receiver")
    lines = [line for line in server.journal("-u", "sams-receiver") if "lisen" in line]
    assert "did you mean 'listen'" in lines[0]
    server.write("/etc/sams-ebpf/config.yaml", CONFIG)
