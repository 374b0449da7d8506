"""What every command does when its output cannot be written: one line, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "v1-full.msgpack"


def run(to: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", "-c", f'"$@" {to}', "sh", sys.executable, "-m", "sams_ebpf", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("words", [("dump", str(GOLDEN)), ("check-config",)])
@pytest.mark.parametrize(
    ("to", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_output_that_is_lost_is_said(words: tuple[str, ...], to: str, reason: str) -> None:
    done = run(to, *words)
    assert done.returncode == 1
    assert done.stderr == f"sams-ebpf: error: standard output: {reason}\n"


@pytest.mark.parametrize("words", [("dump", str(GOLDEN)), ("check-config",)])
def test_a_reader_that_has_gone_is_no_error(words: tuple[str, ...]) -> None:
    done = run("| true", *words)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_stderr_the_exit_status_says_what_it_did() -> None:
    assert run("2>&-", "dump", "/nowhere").returncode == 4
