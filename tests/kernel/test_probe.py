"""`sams-ebpf probe` and giving up privileges, on this kernel and on hosts without BPF."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nobpf
import pytest

from sams_ebpf import bpf, cli, host, node, pins, probe, programs
from sams_ebpf.cgroups import mounted
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.host import Attempt

pytestmark = pytest.mark.kernel

PROGRAM = [sys.executable, "-m", "sams_ebpf"]


def run(*command: str, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def tried(report: dict[str, Any], name: str) -> tuple[bool | None, str]:
    (found,) = [one for one in report["tried"] if one["name"] == name]
    return found["ok"], found["detail"]


@pytest.mark.parametrize("name", programs.OBJECTS)
@pytest.mark.parametrize("exact", [False, True])
def test_every_object_is_taken(name: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is for older kernels has to load here too; and the newer must not fall back to it."""
    monkeypatch.setattr(programs, "OBJECTS", {name: programs.OBJECTS[name]})
    for hierarchy in mounted():
        if hierarchy.version == 2 or "cpuacct" in hierarchy.controllers:
            options = programs.Options(hierarchy=hierarchy, exact=exact, tasks=64, executables=64)
            made = programs.load(options)
            assert set(made.links) == options.attached()
            made.close()


def test_this_host() -> None:
    report = json.loads(run(*PROGRAM, "probe", "--json"))
    assert tried(report, "bpf() answers")[0] is True
    assert tried(report, "kernel BTF")[0] is True
    assert report["ways"][-1] == {
        "mode": "proc",
        "loader": None,
        "possible": True,
        "reason": None,
    }
    assert any(tree["cpu_counter"] for tree in report["cgroups"])


def test_the_table_says_the_same() -> None:
    report = json.loads(run(*PROGRAM, "probe", "--json"))
    table = run(*PROGRAM, "probe")
    for one in report["tried"]:
        assert one["name"] in table
    assert f"Mode auto would use: {report['would_use']['mode']}" in table


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("seccomp", "bpf() answers", "Function not implemented"),
        ("capabilities", "bpf() answers", "Operation not permitted"),
        ("files", "kernel BTF", "No such file"),
    ],
)
def test_hosts_without_bpf(kind: str, name: str, words: str) -> None:
    report = json.loads(run(*nobpf.prefix(kind), *PROGRAM, "probe", "--json"))
    ok, detail = tried(report, name)
    assert ok is False
    assert words in detail
    assert report["would_use"] == {"mode": "proc", "loader": None}
    libbpf, bcc, proc = report["ways"]
    assert not libbpf["possible"]
    assert not bcc["possible"]
    assert proc["possible"]
    assert words in libbpf["reason"]


def test_deciding_by_loading() -> None:
    calls = []

    def load(loader: str) -> Attempt:
        calls.append(loader)
        return Attempt("", loader == "bcc", f"{loader} says no")

    choice = probe.decide(load)
    assert (choice.mode, choice.loader, calls) == ("bpf", "bcc", ["libbpf", "bcc"])
    with pytest.raises(NotPossibleError, match="mode bpf is not possible on this host: libbpf: "):
        probe.decide(load, mode="bpf", loader="libbpf")
    calls.clear()
    assert probe.decide(load, mode="proc").mode == "proc"
    assert calls == []


DROP = """
import ctypes, json, os, sys, time
from sams_ebpf import privileges
keep = sys.argv[1].split() if sys.argv[1] else []
left = privileges.drop(keep)
child = json.loads(os.popen(
    f"{sys.executable} -c 'from sams_ebpf import privileges; import json;"
    "print(json.dumps([sorted(privileges.effective()), privileges.bounding()]))'").read())
print(json.dumps([sorted(left), sorted(privileges.effective()), *child]))
"""


@pytest.mark.parametrize("keep", ["", "CAP_SYS_PTRACE", "CAP_SYS_PTRACE CAP_BPF"])
def test_what_is_dropped_stays_dropped(keep: str) -> None:
    names = sorted(keep.split())
    left, now, of_child, bounding = json.loads(run(sys.executable, "-c", DROP, keep))
    assert left == now == of_child == names
    assert bounding == sum(1 << {"CAP_SYS_PTRACE": 19, "CAP_BPF": 39}[name] for name in names)


NEEDED = """
import json, sys
from sams_ebpf import privileges
needed = sys.argv[1]
left = privileges.drop_all_but_needed(
    lambda: not needed or needed in privileges.effective(),
    keep=["CAP_SYS_PTRACE"], candidates=["CAP_BPF", "CAP_SYS_ADMIN"])
print(json.dumps([sorted(left), sorted(privileges.effective())]))
"""


@pytest.mark.parametrize("needed", ["", "CAP_BPF", "CAP_SYS_ADMIN"])
def test_what_is_needed_is_found_by_trying(needed: str) -> None:
    left, now = json.loads(run(sys.executable, "-c", NEEDED, needed))
    assert left == now == sorted({"CAP_SYS_PTRACE", needed} - {""})


def test_sampling_still_works_with_what_proc_mode_keeps() -> None:
    """Executables of another user are readable with CAP_SYS_PTRACE, and not without."""
    program = (
        "import os, sys; from sams_ebpf import privileges, procfs;"
        "privileges.drop(sys.argv[2:]);"
        "print(procfs.read_executable(int(sys.argv[1]), None, None).key[0].decode())"
    )
    other = subprocess.Popen(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sleep", "100"]
    )
    try:
        while Path(f"/proc/{other.pid}/exe").readlink().name != "sleep":
            pass
        command = [sys.executable, "-c", program, str(other.pid)]
        assert run(*command, "CAP_SYS_PTRACE").strip() == os.path.realpath("/bin/sleep")
        assert run(*command).strip() == ""
    finally:
        other.kill()
        other.wait()


def test_the_command_is_there() -> None:
    assert "probe" in cli.build().format_help()


@pytest.mark.parametrize(
    ("levels", "ok"),
    [
        ("[none] integrity confidentiality\n", True),
        ("none [integrity] confidentiality\n", True),
        ("none integrity [confidentiality]\n", False),
        (None, None),
    ],
)
def test_lockdown_is_told_by_its_file(
    levels: str | None, ok: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lockdown"
    if levels is not None:
        file.write_text(levels)
    monkeypatch.setattr(probe, "LOCKDOWN_FILE", file)
    assert probe._lockdown().ok is ok


@pytest.fixture
def _locked(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Attempt(host.LOCKDOWN, False, "confidentiality")
    monkeypatch.setattr(probe, "_lockdown", lambda: locked)
    monkeypatch.setitem(probe._PREREQUISITES, host.LOCKDOWN, lambda: locked)


@pytest.mark.usefixtures("_locked")
def test_nothing_is_compiled_under_lockdown() -> None:
    asked = []

    def load(loader: str) -> Attempt:
        asked.append(loader)
        return Attempt(loader, False, "no")

    choice = probe.decide(load)
    assert (choice.mode, asked) == ("proc", ["libbpf"])
    assert "bpf (libbpf) and bpf (bcc) not used: kernel lockdown: confidentiality" in choice.reason


@pytest.mark.usefixtures("_locked")
def test_nor_does_the_unit_that_loads_at_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(_: programs.Options, loader: str, **__: object) -> None:
        asked.append(loader)
        raise bpf.BpfError("refused", errno.EPERM)

    monkeypatch.setattr(pins, "load", load)
    file = tmp_path / "config.yaml"
    file.write_text(f"{{spool: {{folder: {tmp_path}}}, collector: {{state: {tmp_path}}}}}")
    with pytest.raises(NotPossibleError, match="libbpf, bcc: kernel lockdown: confidentiality"):
        node.load(argparse.Namespace(config=file))
    assert asked == ["libbpf"]
