"""The table of kernels, what is made from it, and that Vagrant accepts its file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sams_ebpf.errors import UsageError

FOLDER = Path(__file__).resolve().parents[2] / "vagrant"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


table = load("table")
report = load("report")


def row(name: str) -> Any:
    return next(one for one in table.read() if one.id == name)


def result(**changes: Any) -> dict[str, Any]:
    ledger = {"cgroup_cpu_ns": 1000, "unattributed_cpu_ns": 1, "attributed_cpu_ns": 999}
    steps: dict[str, Any] = {
        "probe": {
            "would_use": {"mode": "bpf", "loader": "libbpf"},
            "ways": [
                {"mode": "bpf", "loader": "libbpf", "possible": True, "reason": None},
                {"mode": "bpf", "loader": "bcc", "possible": False, "reason": "no headers"},
            ],
            "tried": [{"name": "load with libbpf", "ok": True, "detail": "in 27 ms"}],
        },
        "work-libbpf": {"solver": {"ledger": ledger}},
        "tests-libbpf": {"tests": 3, "failures": 0, "errors": 0, "skipped": 1, "failed": []},
        "unit": {"final": {"reason": "signal"}},
    }
    steps.update(changes)
    return {"kernel": "6.1.0", "steps": steps, "machine_s": 60}


def test_every_row_is_whole_and_named_once() -> None:
    rows = table.read()
    assert len({one.id for one in rows}) == len(rows)
    for one in rows:
        assert bool(one.expect.loaders) == (one.expect.mode == "bpf")
    assert {one.cgroup for one in rows if one.vm.suite} == {"v1", "v2"}


def test_a_row_that_says_two_ways_to_get_it_is_refused(tmp_path: Path) -> None:
    text = table.PATH.read_text().replace("{suite: bullseye}", "{suite: bullseye, uml: true}", 1)
    (tmp_path / "kernels.yaml").write_text(text)
    with pytest.raises(UsageError, match="debian-11-v1: vm needs one of"):
        table.read(tmp_path / "kernels.yaml")


def test_v1_and_lockdown_reach_the_command_line() -> None:
    assert "unified_cgroup_hierarchy=0" in row("debian-12-v1").command_line
    assert row("debian-12-v2").command_line == ""
    assert row("debian-12-lockdown").command_line == "lockdown=confidentiality"


def test_a_good_row_has_no_problems_and_shows_its_figures() -> None:
    one = row("debian-12-v2")
    assert report.problems(one, result()) == []
    page = report.page([one], {one.id: result()})
    assert "bpf / libbpf" in page
    assert "0.100 %" in page
    assert "libbpf: 2 passed of 3, 1 skipped" in page
    assert "bcc: no headers" in page


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"probe": {"would_use": {"mode": "proc", "loader": None}}}, "auto uses proc, not bpf"),
        ({"unit": {"final": None}}, "unit: no final batch"),
        ({"work-bcc": {"error": "boom"}}, "work-bcc: boom"),
        (
            {"tests-bcc": {"tests": 2, "failures": 1, "errors": 0, "skipped": 0, "failed": ["x"]}},
            "tests-bcc: failed: x",
        ),
        (
            {"tests-bcc": {"tests": 2, "failures": 0, "errors": 0, "skipped": 2, "failed": []}},
            "tests-bcc: nothing was run",
        ),
    ],
)
def test_what_went_wrong_is_said(changes: dict[str, Any], problem: str) -> None:
    one = row("debian-12-v2")
    assert problem in report.problems(one, result(**changes))
    assert problem in report.page([one], {one.id: result(**changes)})


def test_rows_that_could_not_run_stand_in_the_page_with_their_reason() -> None:
    page = report.page(table.read(), {})
    for one in table.read():
        assert (one.vm.absent or "no result yet") in page


@pytest.mark.system
def test_vagrant_accepts_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=FOLDER,
        env=os.environ | {"VAGRANT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for one in table.read():
        assert (f"{one.id}:" in done.stdout) == (one.box is not None)
