"""Durable files, secrets in files, word to systemd."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from sams_ebpf import durable, program, settings
from sams_ebpf.errors import UsageError


def test_a_durable_file_is_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    durable.write(tmp_path / "a", b"one")
    durable.write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(victim)
    durable.write(tmp_path / "a", b"one")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        durable.write(tmp_path / "a", b"one")
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o440])
def test_reads_a_guarded_secret(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    file.chmod(mode)
    settings.check_secret(file)
    assert settings.read_secret(file) == "s3cret"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o642, 0o641])
def test_refuses_an_open_secret(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    file.chmod(mode)
    with pytest.raises(UsageError, match=f"token: a secret with mode {mode:04o}: chmod"):
        settings.read_secret(file)


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"\xff", b"a\rb", b"x" * 70000])
def test_refuses_what_is_no_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(UsageError, match="one line of printable ASCII"):
        settings.read_secret(file)


def test_refuses_someone_else_s_secret_and_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        settings.read_secret(tmp_path / "absent")
    with pytest.raises(UsageError, match="not a regular file"):
        settings.read_secret(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a regular file"):
        settings.read_secret(tmp_path / "fifo")
    if os.geteuid() == 0:
        file = tmp_path / "token"
        file.write_text("x")
        file.chmod(0o600)
        os.chown(file, 65534, 65534)
        with pytest.raises(UsageError, match="belongs to user 65534"):
            settings.read_secret(file)


@pytest.mark.parametrize("abstract", [False, True])
def test_tells_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"sams-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        program.notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_a_deaf_manager_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    program.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    program.notify("READY=1")
