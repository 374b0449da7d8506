"""The command line: one command's parser is enough for it, and little is loaded to start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sams_ebpf import cli

ROOT = Path(__file__).resolve().parents[2]
# What costs a start milliseconds and a collector memory for as long as its job runs.
HEAVY = {
    *("yaml", "requests", "urllib3", "socket", "json", "hashlib", "subprocess"),
    *("sams_ebpf.procfs", "sams_ebpf.taskstats", "sams_ebpf.ship", "sams_ebpf.bcc_loader"),
}


@pytest.mark.parametrize("command", list(cli._COMMANDS))
def test_a_command_says_the_same_of_itself_alone(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for parser in (cli.build(command), cli.build()):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([command, "--help"])
        said.append((ended.value.code, capsys.readouterr().out))
    assert said[0] == said[1]
    assert f"usage: sams-ebpf {command}" in said[0][1]


@pytest.mark.parametrize("words", [[], ["--help"], ["no-such-command"]])
def test_without_a_command_all_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.build(*words[:1]).parse_args(words or ["no-such-command"])
    said = "".join(capsys.readouterr())
    assert all(command in said for command in cli._COMMANDS)


def test_a_collector_starts_without_what_it_does_not_need() -> None:
    code = "import sys, sams_ebpf.cli, sams_ebpf.program, sams_ebpf.collect; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = set(done.stdout.split())
    assert "sams_ebpf.tracing" in loaded
    assert sorted(loaded & HEAVY) == []
