"""`sams-ebpf check-config` as a site runs it before it rolls a file out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sams_ebpf", "check-config", "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    file.chmod(0o640)
    return file


@pytest.fixture
def config(tmp_path: Path, token: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(f"ship: {{receivers: {{main: {{url: 'https://h', token_file: {token}}}}}}}")
    return file


def test_a_good_file(config: Path) -> None:
    ran = run(config)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{config}: good\n", "")


def test_an_open_token(config: Path, token: Path) -> None:
    token.chmod(0o644)
    ran = run(config)
    assert ran.returncode == 2
    first, last = ran.stderr.splitlines()
    assert f"ship.receivers.main: {token}: a secret with mode 0644: chmod" in first
    assert "1 of the files" in last


def test_absent_files_are_named_each(config: Path, token: Path) -> None:
    token.unlink()
    text = config.read_text().replace("token_file", "ca_file: /no/ca, token_file")
    config.write_text(text)
    ran = run(config)
    assert ran.returncode == 2
    assert [name in ran.stderr for name in ("/no/ca: cannot be read", str(token))] == [True, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("collector: {intervall_s: 1}", "did you mean 'interval_s'?"),
        ("collector: {interval_s: no}", "collector.interval_s: Expected `float`"),
        ("- 1", "top level has to be a mapping"),
        ("site: 2026-02-31", "not valid YAML: day is out of range"),
        ("site: {}\nspool: {}\nsite: {}", ":3: not valid YAML: site: stands there twice"),
        ("site: !!int x", "not valid YAML: invalid literal"),
        ("site: !!float ''", "not valid YAML: string index"),
        ("site: !!timestamp x", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line(config: Path, text: str, reason: str) -> None:
    config.write_text(text)
    ran = run(config)
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert reason in line
    assert str(config) in line
