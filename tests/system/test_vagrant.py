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


LEDGER = {"cgroup_cpu_ns": 1000, "unattributed_cpu_ns": 1, "attributed_cpu_ns": 999}
TESTS = {"tests": 3, "failures": 0, "errors": 0, "skipped": 0, "failed": [], "skips": [], "cut": []}
NOTES = [
    {
        "test": "a[x-v2-default]",
        "cgroup_cpu_ns": "2000000",
        "unexplained_ns": "-2000",
        "moves": "0",
    },
    {"test": "a[y-v2-default]", "cgroup_cpu_ns": "9000000", "unexplained_ns": "1000", "moves": "0"},
    {"test": "s[exact]", "split_median_ns": "3000", "split_p95_ns": "40000"},
]
BOTH = {
    "test": "l",
    "libbpf_cpu_ns": "100000000",
    "libbpf_execs": "7",
    "libbpf_uncertain_splits": "0",
    "bcc_cpu_ns": "100010000",
    "bcc_execs": "7",
    "bcc_uncertain_splits": "2",
}


UNIT = {
    "load": "active",
    "load_s": 1.5,
    "batches": 2,
    "final": {"mode": "bpf", "final": {"reason": "signal"}},
    "left_in_kernel": 0,
}


def result(part: str, **changes: Any) -> dict[str, Any]:
    """What a machine brings back of one part in which all is well, but for the changes."""
    ways = [
        {"mode": "bpf", "loader": "libbpf", "possible": True, "reason": None},
        {"mode": "bpf", "loader": "bcc", "possible": False, "reason": "no headers"},
    ]
    works = {name: {"ledger": LEDGER, "cpu_s": 1.5} for name in ("solver", "mixed", "storm")}
    parts: dict[str, dict[str, Any]] = {
        "site": {
            "probe": {
                "would_use": {"mode": "bpf", "loader": "libbpf"},
                "ways": ways,
                "tried": [{"name": "load with libbpf", "ok": True, "detail": "in 27 ms"}],
            },
            "unit": UNIT,
            "work-libbpf": works,
        },
        "libbpf-default": {
            "tests-libbpf-default": {
                **TESTS,
                "notes": NOTES,
                "events": 1000,
                "cost_ns": 5_000_000,
            }
        },
        "bcc-split": {"tests-bcc-split": {**TESTS, "notes": [BOTH]}},
    }
    steps = {**parts[part], **changes}
    made = {"kernel": "6.1.0", "commit": "abc1234", "machine_s": 60}
    return {**made, "steps": steps, "missing": []}


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
    parts = {part: result(part) for part in ("site", "libbpf-default", "bcc-split")}
    for part, found in parts.items():
        assert report.problems(one, part, found) == []
    page = report.page([one], {one.id: parts}, {})
    for shown in (
        "| bpf, libbpf | bcc-split: 3 of 3 passed; libbpf-default: 3 of 3 passed |",
        "| bpf: ended (signal), 2 batches shipped; load 1.5 s | ",
        "| 3 of 6 parts as expected; not run: libbpf-exact, ",
        ", bcc-exact; at abc1234 |",
        "| libbpf | 0.002 ms (0.100 %) of 2 cases | - | - | - | exact 3, 40 µs |",
        "| 100.000 ms and 100.010 ms | 0.0100 % | 7 and 7 | 0 and 2 |",
        "| 99.90 % of 0.00 s |",
        "| 4.5 s |",
        "| libbpf | in 27 ms | 5.0 µs | - |",
        "bcc: no headers",
        "- not run: libbpf-exact, libbpf-small, bcc-exact: no result yet",
    ):
        assert shown in page


@pytest.mark.parametrize(
    ("part", "changes", "problem"),
    [
        ("site", {"probe": {"would_use": {"mode": "proc"}, "ways": []}}, "auto uses proc, not bpf"),
        ("site", {"unit": {**UNIT, "final": None}}, "unit: no final batch"),
        ("site", {"unit": {**UNIT, "left_in_kernel": 1}}, "unit: something is left"),
        ("site", {"unit": {**UNIT, "load": "failed"}}, "unit: the one that loads is failed"),
        (
            "site",
            {"unit": {**UNIT, "final": {"mode": "proc", "final": {"reason": "signal"}}}},
            "unit: the job was measured in mode proc",
        ),
        ("site", {"work-libbpf": {"error": "boom"}}, "work-libbpf: boom"),
        (
            "libbpf-default",
            {"tests-libbpf-default": {**TESTS, "notes": [], "failures": 1, "failed": ["x: off"]}},
            "tests-libbpf-default: failed: x: off",
        ),
        (
            "libbpf-default",
            {"tests-libbpf-default": {**TESTS, "notes": [], "skipped": 3, "skips": ["x: no gcc"]}},
            "tests-libbpf-default: nothing was run: x: no gcc",
        ),
        (
            "libbpf-default",
            {"tests-libbpf-default": {**TESTS, "notes": [], "cut": ["default after 400 s"]}},
            "tests-libbpf-default: stopped: default after 400 s",
        ),
    ],
)
def test_what_went_wrong_is_said(part: str, changes: dict[str, Any], problem: str) -> None:
    one = row("debian-12-v2")
    found = result(part, **changes)
    assert problem in "; ".join(report.problems(one, part, found))
    assert problem in report.page([one], {one.id: {part: found}}, {})


def test_a_step_that_was_not_reached_is_a_problem() -> None:
    found = result("site") | {"missing": ["work-proc"]}
    (problem,) = report.problems(row("debian-12-v2"), "site", found)
    assert problem == "work-proc: not reached in 60 s"


def test_a_part_that_was_not_run_stands_there_with_its_reason() -> None:
    one = row("debian-12-v2")
    found = {"site": {"not_run": "no time"}, "libbpf-default": result("libbpf-default")}
    assert report.problems(one, "site", found["site"]) == []
    page = report.page([one], {one.id: found}, {})
    assert "- not run: site: no time" in page
    assert "| not asked (expected: libbpf or bcc) |" in page
    assert "| not tried | 1 of 6 parts as expected; not run: site, " in page


def test_a_row_without_bpf_has_to_say_why() -> None:
    one = row("debian-12-lockdown")
    ways = [{"mode": "bpf", "loader": "libbpf", "possible": False, "reason": "kernel lockdown"}]
    probe = {"would_use": {"mode": "proc", "loader": None}, "ways": ways, "tried": []}
    unit = {**UNIT, "final": {"mode": "proc", "final": {"reason": "signal"}}}
    assert report.problems(one, "site", result("site", probe=probe, unit=unit)) == []
    ways[0]["reason"] = "no"
    (problem,) = report.problems(one, "site", result("site", probe=probe, unit=unit))
    assert problem == "probe does not say lockdown"


def test_rows_that_could_not_run_stand_in_the_page_with_their_reason() -> None:
    page = report.page(table.read(), {}, {})
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


def test_boxes_that_came_up_are_shown_with_what_they_found() -> None:
    page = report.page(table.read(), {}, table.boxes())
    assert "| Debian 12, 6.1, lockdown=confidentiality, v2 | vagrant-libvirt" in page
    assert "proc: 23 of 24 passed, 1 skipped" in page
    assert "proc: ended (signal), 2 batches shipped; load 6.7 s" in page
