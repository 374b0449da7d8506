"""`sams-ebpf run` as a stranger uses it: odd commands, odd places for the report."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from workloads import until

from sams_ebpf import cgroups

pytestmark = pytest.mark.kernel

SELF = (sys.executable, "-m", "sams_ebpf")


def run(*words: str | bytes | Path, by: str = 'exec "$@"') -> subprocess.CompletedProcess[bytes]:
    """Run `sams-ebpf run …` by way of a shell that may do something to its streams."""
    return subprocess.run(
        ["/bin/sh", "-c", by, "sh", *SELF, "run", *words],
        capture_output=True,
        check=False,
        timeout=60,
    )


def left_over() -> list[str]:
    return [
        str(folder)
        for hierarchy in cgroups.mounted()
        for folder in Path(hierarchy.mount).glob("**/sams-ebpf-run-*")
    ]


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (b"/nowhere/at-all", 127, b"/nowhere/at-all: command not found"),
        (b"/nowhere/\xff", 127, b"/nowhere/\xff: command not found"),
        (b"/etc/passwd", 126, b"/etc/passwd: Permission denied"),
    ],
)
def test_a_command_that_cannot_be_run(command: bytes, status: int, said: bytes) -> None:
    done = run("--", command)
    assert done.returncode == status
    assert b"sams-ebpf run: " + said in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"ledger:") == 1, "one report, by one process"


def test_arguments_that_are_not_text() -> None:
    done = run("--", "/bin/echo", b"a\xff")
    assert (done.returncode, done.stdout) == (0, b"a\xff\n")


def test_the_command_gets_the_signals_that_it_would_have_without(tmp_path: Path) -> None:
    """Python ignores SIGPIPE and SIGXFSZ for itself only."""
    look = ("grep", "SigIgn", "/proc/self/status")
    without = subprocess.run(look, capture_output=True, check=True)
    done = run("-o", tmp_path / "report", "--", *look)
    assert done.stdout == without.stdout
    assert not int(done.stdout.split()[1], 16) & (1 << 12 | 1 << 24)


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    device = tmp_path / "null"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    done = run("-o", device, "--", "/bin/true")
    assert (done.returncode, done.stderr) == (0, b"")
    assert stat.S_ISCHR(device.lstat().st_mode)


def test_a_full_device_costs_the_file_and_not_the_report(tmp_path: Path) -> None:
    device = tmp_path / "full"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    done = run("-o", device, "--", "/bin/sh", "-c", "exit 5")
    assert done.returncode == 5, "the command's"
    first, *table = done.stderr.splitlines()
    assert b"full: No space left on device" in first
    assert any(b"ledger:" in line for line in table), done.stderr


def test_the_report_behind_what_the_command_wrote(tmp_path: Path) -> None:
    """`-o /dev/stdout`, or a link to it: a pipe, and a file that the output goes to as well."""
    link = tmp_path / "link"
    link.symlink_to("/proc/self/fd/1")
    piped = run("--json", "-o", link, "--", "/bin/echo", "said")
    out = tmp_path / "out"
    assert run("--json", "-o", link, "--", "/bin/echo", "said", by=f'"$@" >{out}').stderr == b""
    assert link.is_symlink()
    for text in (piped.stdout, out.read_bytes()):
        said, report = text.splitlines()
        assert said == b"said"
        assert json.loads(report)["mode"]


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("of before")
    (tmp_path / "link").symlink_to("real")
    assert run("--json", "-o", tmp_path / "link", "--", "/bin/true").returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real").read_text())["mode"]


def test_a_folder_is_no_place_for_a_report(tmp_path: Path) -> None:
    for place in (Path("/"), tmp_path):
        done = run("-o", place, "--", "touch", tmp_path / "ran")
        assert done.returncode == 2
        assert b"is a folder" in done.stderr
        assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_stay_closed_for_the_command(closed: str, tmp_path: Path) -> None:
    """And what `run` opens itself never takes their numbers."""
    report = tmp_path / "report"
    look = "n=0; for fd in 0 1 2; do [ -e /proc/$$/fd/$fd ] && n=$((n*2+1)) || n=$((n*2)); done"
    done = run(
        *("--json", "-o", report, "--", "/bin/sh", "-c", f"{look}; exit $n"),
        by=f'"$@" {closed}',
    )
    there = "".join("0" if f"{stream}" in closed else "1" for stream in "012")
    assert done.returncode == int(there, 2), done.stderr
    assert json.loads(report.read_text())["mode"]


@pytest.mark.parametrize("to", ["2>&-", "2>/dev/full", "2>&1 >/dev/null | true"])
def test_without_stderr_the_exit_status_is_still_the_commands(to: str) -> None:
    by = f'{{ "$@"; echo $? >&3; }} 3>&2 {to}' if "|" in to else f'"$@" {to}; echo $? >&2'
    assert run("--", "/bin/sh", "-c", "sleep 0.2; exit 7", by=by).stderr == b"7\n"


def test_a_collector_that_found_no_job_leaves_no_programs(tmp_path: Path) -> None:
    """Without `load`: what was loaded for it goes with it. In a BPF file system of its own."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"collector: {{mode: bpf, grace_period_s: 1, state: {tmp_path}}}\n"
        f"spool: {{folder: {tmp_path}}}\n"
    )
    words = (*SELF, "collect", "--config", str(config), "--jobid", "999999")
    script = 'mount -t bpf none /sys/fs/bpf && "$@" && find /sys/fs/bpf/sams-ebpf -mindepth 1'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "nothing was measured" in done.stderr
    assert done.stdout == ""


def test_gc_removes_the_cgroup_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """Not before its command has ended, and not that of a run that lives."""
    before = set(left_over())
    config = tmp_path / "config.yaml"
    config.write_text(f"collector: {{state: {tmp_path}}}\nspool: {{folder: {tmp_path}}}\n")
    go, wait = tmp_path / "go", 'while [ ! -e "$0" ]; do sleep 0.05; done'
    killed, lives = (
        subprocess.Popen([*SELF, "run", "--", "sh", "-c", wait, go], stderr=subprocess.DEVNULL)
        for _ in range(2)
    )

    def busy() -> int:
        made = set(left_over()) - before
        return sum(bool(Path(folder, "cgroup.procs").read_text()) for folder in made)

    until(lambda: busy() == 2, "both commands")
    killed.kill()
    killed.wait(60)
    gc = [*SELF, "gc", "--config", str(config)]
    subprocess.run(gc, check=True, timeout=60)
    assert busy() == 2, "commands run in both"
    go.touch()
    assert lives.wait(60) == 0

    def is_gone() -> bool:
        subprocess.run(gc, check=True, timeout=60)
        return set(left_over()) <= before

    until(is_gone, "the killed run's cgroup to go")


def test_nothing_is_left() -> None:
    before = left_over()
    for command in (b"/bin/true", b"/nowhere/\xff"):
        run("--", command)
    run("-o", "/", "--", "/bin/true")
    assert left_over() == before
