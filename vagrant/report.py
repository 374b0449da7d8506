"""docs/kernels.md, from the table of kernels and what the machines brought back. Pure."""

from __future__ import annotations

from typing import Any

from table import Row

HEAD = """\
# Kernels

Written by `make test-vm`, which boots each row (qemu without KVM, so times are some ten times
those of real hardware), installs the wheel, runs three workloads and the kernel tests with each
loader, and a job in a systemd unit. Rows that were not run say why. The same table,
`vagrant/kernels.yaml`, makes the boxes of `vagrant/Vagrantfile`.

| kernel | cgroup | `auto` | ledger tests | unattributed: solver, mixed, storm | job unit | note |
|---|---|---|---|---|---|---|
"""


def problems(row: Row, result: dict[str, Any]) -> list[str]:
    """Say where a row did not come out as the table expects."""
    if "error" in result:
        return [result["error"]]
    steps = result["steps"]
    found = [f"{name}: {step['error']}" for name, step in steps.items() if "error" in step]
    used = steps.get("probe", {}).get("would_use") or {}
    if used.get("mode") != row.expect.mode:
        found.append(f"auto uses {used.get('mode')}, not {row.expect.mode}")
    for name, step in steps.items():
        if name.startswith("tests-") and "error" not in step:
            if step["failures"] or step["errors"]:
                found.append(f"{name}: failed: {', '.join(step['failed'])}")
            if step["tests"] == step["skipped"]:
                found.append(f"{name}: nothing was run")
    unit = steps.get("unit", {})
    if "error" not in unit and not unit.get("final"):
        found.append("unit: no final batch")
    return found


def verdict(row: Row, result: dict[str, Any]) -> str:
    """One line for the terminal."""
    bad = problems(row, result)
    return "; ".join(bad) if bad else f"as expected, in {result['machine_s']} s"


def page(rows: list[Row], results: dict[str, Any]) -> str:
    """Give the whole page."""
    lines = [_line(row, results.get(row.id)) for row in rows]
    return HEAD + "\n".join(lines) + "\n" + _details(rows, results)


def _line(row: Row, result: dict[str, Any] | None) -> str:
    name = f"{row.system}, {row.kernel}" + (f", lockdown={row.lockdown}" if row.lockdown else "")
    if row.vm.absent or result is None:
        note = f"not run: {row.vm.absent or 'no result yet'}"
        expected = " or ".join(row.expect.loaders) or row.expect.mode
        return f"| {name} | {row.cgroup} | (expected: {expected}) | | | | {note} |"
    if "error" in result:
        return f"| {name} | {row.cgroup} | | | | | {result['error']} |"
    steps = result["steps"]
    used = steps.get("probe", {}).get("would_use") or {}
    auto = " / ".join(filter(None, (used.get("mode"), used.get("loader")))) or "nothing"
    tests = ", ".join(
        f"{key.removeprefix('tests-')}: {_tests(step)}"
        for key, step in steps.items()
        if key.startswith("tests-")
    )
    shares = "; ".join(
        f"{key.removeprefix('work-')}: {_shares(step)}"
        for key, step in steps.items()
        if key.startswith("work-")
    )
    unit = steps.get("unit", {})
    ended = "final batch" if unit.get("final") else "no final batch"
    note = "; ".join(problems(row, result))
    cells = (f"{name} ({result['kernel']})", row.cgroup, auto, tests, shares, ended, note)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _tests(step: dict[str, Any]) -> str:
    if "error" in step:
        return "did not run"
    good = step["tests"] - step["failures"] - step["errors"] - step["skipped"]
    return f"{good} passed of {step['tests']}, {step['skipped']} skipped"


def _shares(step: dict[str, Any]) -> str:
    if "error" in step:
        return "did not run"
    return ", ".join(_share(one["ledger"]) for one in step.values())


def _share(ledger: dict[str, Any]) -> str:
    total = ledger["cgroup_cpu_ns"]
    if not total:
        return "no counter"
    return f"{100 * ledger['unattributed_cpu_ns'] / total:.3f} %"


def _details(rows: list[Row], results: dict[str, Any]) -> str:
    parts = ["", "## Why not BPF, and what loading costs", ""]
    for row in rows:
        probe = results.get(row.id, {}).get("steps", {}).get("probe", {})
        if "ways" not in probe:
            continue
        parts.append(f"- **{row.id}**")
        for way in probe["ways"]:
            name = way["loader"] or way["mode"]
            parts.append(f"  - {name}: {'possible' if way['possible'] else way['reason']}")
        loads = [one for one in probe["tried"] if one["name"].startswith("load with") and one["ok"]]
        parts += [f"  - {one['name']}: {one['detail']}" for one in loads]
    return "\n".join(parts) + "\n"
