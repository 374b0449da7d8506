"""A host without BPF, from end to end: `run` ends in mode proc, says why, and works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nobpf
import pytest

pytestmark = pytest.mark.kernel

PROGRAM = [sys.executable, "-m", "sams_ebpf"]
# A second of steady load in one process, then 200 short ones.
WORK = "i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done; for i in $(seq 200); do /bin/true; done"


def run(
    kind: str, report: Path, *options: str, command: tuple[str, ...] = ("sh", "-c", WORK)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *nobpf.prefix(kind),
            *PROGRAM,
            *("run", "--json", "-o", str(report), *options, "--", *command),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("kind", nobpf.KINDS)
def test_auto_ends_in_proc_and_says_why(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run(kind, path, "--interval", "1")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    assert (report["mode"], report["loader"]) == ("proc", None)
    assert "not used" in done.stderr
    assert "Traceback" not in done.stderr
    ledger = report["ledger"]
    attributed = sum(one["cpu_ns"] for one in report["executables"])
    assert attributed == ledger["attributed_cpu_ns"] <= ledger["cgroup_cpu_ns"]
    assert ledger["unattributed_cpu_ns"] == ledger["cgroup_cpu_ns"] - attributed
    assert all(one["execs"] is None for one in report["executables"])


@pytest.mark.parametrize("kind", nobpf.KINDS)
def test_mode_bpf_fails_in_one_line(kind: str, tmp_path: Path) -> None:
    done = run(kind, tmp_path / "report.json", "--mode", "bpf", command=("touch", "ran"))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not Path("ran").exists()


def test_the_command_keeps_its_exit_status(tmp_path: Path) -> None:
    done = run("seccomp", tmp_path / "r", command=("sh", "-c", "echo out; echo err >&2; exit 7"))
    assert done.returncode == 7
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr


def test_a_steady_process_is_attributed_but_for_its_last_interval(tmp_path: Path) -> None:
    """One thread's CPU of one interval is all that may be missing, and its start and end."""
    path = tmp_path / "report.json"
    program = "import time\nend = time.monotonic() + 6\nwhile time.monotonic() < end: pass"
    command = (sys.executable, "-c", program)
    done = run("seccomp", path, "--interval", "1", "--mode", "proc", command=command)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    python = os.path.realpath(sys.executable)
    (cpu,) = [one["cpu_ns"] for one in report["executables"] if one["path"] == python]
    assert cpu >= report["ledger"]["cgroup_cpu_ns"] - 1_300_000_000
