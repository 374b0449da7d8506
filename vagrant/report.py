"""docs/kernels.md, from the table of kernels and what the machines brought back. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from table import Row

HEAD = """\
# Kernels

Written by `make test-vm`, from `vagrant/kernels.yaml` and `vagrant/results.json`. Each row is
booted in qemu without KVM, on one or two CPUs that are ten to twenty times slower than real ones
and shared with other work. There the wheel is installed, workloads are measured, a job's unit is
started by the Prolog, ended by the Epilog and shipped to a receiver, and the kernel's ledger and
split tests run with each loader: every case, with fewer repetitions (`SAMS_TEST_SCALE=20`, see
`tests/support/scale.py`) and the same bounds but for three: tasks that move, and tasks that run
while they are taken up, may be off by more ticks; and in mid-life, while the collector waits for a
CPU, the difference is shown and not judged. Rows and parts that were not run say why. The same
table makes the boxes of `vagrant/Vagrantfile`.

A row runs in parts of five to fifteen minutes, and a part can be run by itself:
`make test-vm VM=debian-12-v2:bcc-split`. The first run makes the disk (5 GB below `.cache/vm`).

- `site`: install, `probe`, a job's unit, the three workloads
- `libbpf-default`, `bcc-split`: split and ledger tests with the default set-up; with BCC, both
  loaders on one job too
- `libbpf-exact`, `bcc-exact`: the same with `exact: true`
- `libbpf-small`: the ledger tests whose maps are too small for the job
- `proc`: the tests of sampling, where there is no BPF

"""
MS = 1_000_000
NO_RESULT = "no result yet"


def problems(row: Row, part: str, found: dict[str, Any]) -> list[str]:
    """Say where a part of a row did not come out as the table expects; none if it was not run."""
    if "not_run" in found:
        return []
    if "error" in found:
        return [found["error"]]
    steps: dict[str, Any] = found["steps"]
    bad = [f"{name}: {step['error']}" for name, step in steps.items() if "error" in step]
    bad += [f"{name}: not reached in {found['machine_s']} s" for name in found["missing"]]
    good = {name: step for name, step in steps.items() if "error" not in step}
    if "probe" in good:
        used = good["probe"]["would_use"] or {}
        if used.get("mode") != row.expect.mode:
            bad.append(f"auto uses {used.get('mode')}, not {row.expect.mode}")
        reasons = " ".join(way["reason"] or "" for way in good["probe"]["ways"])
        if row.reason and row.reason not in reasons:
            bad.append(f"probe does not say {row.reason}")
    for name, step in good.items():
        if _is(name):
            bad += [f"{name}: failed: {one}" for one in step["failed"]]
            bad += [f"{name}: stopped: {one}" for one in step["cut"]]
            if step["tests"] == step["skipped"]:
                bad.append(f"{name}: nothing was run: {'; '.join(step['skips'])}")
    if "unit" in good and not good["unit"]["final"]:
        bad.append("unit: no final batch")
    if "unit" in good and good["unit"]["left_in_kernel"]:
        bad.append("unit: something is left in the kernel")
    if "unit" in good and good["unit"]["load"] != "active":
        bad.append(f"unit: the one that loads is {good['unit']['load']}")
    if "unit" in good and (good["unit"]["final"] or {}).get("mode") not in (None, row.expect.mode):
        bad.append(f"unit: the job was measured in mode {good['unit']['final']['mode']}")
    return bad or [f"{part}: no step was taken"] * (not steps)


def verdict(row: Row, part: str, found: dict[str, Any]) -> str:
    """One line for the terminal."""
    return "; ".join(problems(row, part, found)) or f"as expected, in {found['machine_s']} s"


def page(rows: list[Row], results: dict[str, Any], boxes: dict[str, Any]) -> str:
    """Give the whole page. boxes: as of `table.boxes`."""
    return HEAD + "\n".join(
        [
            *_overview(rows, results),
            *_boxes(rows, boxes),
            *_precision(rows, results),
            *_loaders(rows, results),
            *_shares(rows, results),
            *_costs(rows, results),
            *_exceptions(rows, results),
        ]
    )


def _steps(results: dict[str, Any], row: Row) -> dict[str, Any]:
    """Every step of a row that brought something back."""
    return {
        name: step
        for part in results.get(row.id, {}).values()
        for name, step in part.get("steps", {}).items()
        if "error" not in step
    }


def _name(row: Row) -> str:
    lockdown = f", lockdown={row.lockdown}" if row.lockdown else ""
    return f"{row.system}, {row.kernel}{lockdown}, {row.cgroup}"


def _table(columns: str, lines: Iterator[tuple[str, ...]]) -> list[str]:
    shown = ["| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines]
    return [columns, "|---" * (columns.count("|") - 1) + "|", *shown, ""]


def _overview(rows: list[Row], results: dict[str, Any]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            expected = " or ".join(row.expect.loaders) or row.expect.mode
            if row.vm.absent or row.id not in results:
                why = row.vm.absent or NO_RESULT
                yield _name(row), "", f"(expected: {expected})", "", "", f"not run: {why}"
                continue
            steps = _steps(results, row)
            releases = {p["kernel"] for p in results[row.id].values() if "kernel" in p}
            used = steps.get("probe", {}).get("would_use") or {}
            auto = ", ".join(filter(None, (used.get("mode"), used.get("loader"))))
            yield (
                _name(row),
                " ".join(sorted(releases)),
                auto or f"not asked (expected: {expected})",
                "; ".join(_tests(name, step) for name, step in sorted(steps.items()) if _is(name)),
                _unit(steps.get("unit")),
                _outcome(row, results[row.id]),
            )

    return _table("| row | kernel | `auto` | tests | a job's unit | outcome |", lines())


def _boxes(rows: list[Row], brought: dict[str, Any]) -> list[str]:
    """Boxes that Vagrant brought up and provisioned, in which check.sh ran at full scale."""

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            if row.id in brought:
                steps = brought[row.id]["steps"]
                tests = [_tests(name, step) for name, step in sorted(steps.items()) if _is(name)]
                yield _name(row), brought[row.id]["how"], "; ".join(tests), _unit(steps["unit"])

    return [
        *("## Vagrant boxes that were brought up", ""),
        *_table("| row | how | tests | a job's unit |", lines()),
        *("All others have only been validated (`vagrant validate`).", ""),
    ]


def _outcome(row: Row, parts: dict[str, Any]) -> str:
    """What came of a row's parts, and at which commits."""
    ran = {part: found for part, found in parts.items() if "not_run" not in found}
    if not ran:
        return f"not run: {'; '.join(sorted({found['not_run'] for found in parts.values()}))}"
    bad = [part for part, found in ran.items() if problems(row, part, found)]
    good, of = len(ran) - len(bad), len(row.parts)
    words = [f"all {of} parts as expected" if good == of else f"{good} of {of} parts as expected"]
    if bad:
        words.append(f"not as expected, see below: {', '.join(bad)}")
    if missing := [part for part in row.parts if part not in ran]:
        words.append(f"not run: {', '.join(missing)}")
    if commits := sorted({found["commit"] for found in ran.values()}):
        words.append(f"at {', '.join(commits)}")
    return "; ".join(words)


def _is(name: str) -> bool:
    return name.startswith("tests-")


def _tests(name: str, step: dict[str, Any]) -> str:
    good = step["tests"] - step["failures"] - step["errors"] - step["skipped"]
    skipped = f", {step['skipped']} skipped" if step["skipped"] else ""
    cut = ", stopped" if step["cut"] else ""
    return f"{name.removeprefix('tests-')}: {good} of {step['tests']} passed{skipped}{cut}"


def _unit(step: dict[str, Any] | None) -> str:
    if step is None:
        return "not tried"
    if not step["final"]:
        return "no final batch"
    batches = f"{step['batches']} batch{'es' if step['batches'] != 1 else ''}"
    loaded = f"; load {step['load_s']} s" if "load_s" in step else ""
    mode = f"{step['final']['mode']}: " if "mode" in step["final"] else ""
    return f"{mode}ended ({step['final']['final']['reason']}), {batches} shipped{loaded}"


def _precision(rows: list[Row], results: dict[str, Any]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            steps = _steps(results, row)
            for loader in row.expect.loaders:
                notes = [
                    one for name in steps if f"-{loader}-" in name for one in steps[name]["notes"]
                ]
                ledger = [one for one in notes if "unexplained_ns" in one]
                still = [one for one in ledger if one["moves"] == "0"]
                splits = [_split(one) for one in notes if "split_median_ns" in one]
                if notes:
                    yield (
                        _name(row),
                        loader,
                        _worst([one for one in still if "exact" not in one["test"]]),
                        _worst([one for one in still if "exact" in one["test"]]),
                        _worst([one for one in ledger if one["moves"] == "1"]),
                        _mid_life(notes),
                        "; ".join(splits) or "-",
                    )

    return [
        "## Ledger and split",
        "",
        "Worst difference between what was attributed and what the kernel charged, over the cases",
        "of the ledger tests; and how far outside its bracket the boundary at exec lies.",
        "",
        *_table(
            "| row | loader | default set-up | exact set-up | moves | mid-life | median, p95 |",
            lines(),
        ),
    ]


def _worst(notes: list[dict[str, Any]]) -> str:
    if not notes:
        return "-"
    worst = max(notes, key=lambda one: abs(int(one["unexplained_ns"])))
    off, total = abs(int(worst["unexplained_ns"])), int(worst["cgroup_cpu_ns"])
    share = f" ({100 * off / total:.3f} %)" if total else ""
    return f"{off / MS:.3f} ms{share} of {len(notes)} cases"


def _mid_life(notes: list[dict[str, Any]]) -> str:
    found = [int(one["mid_life_ns"]) for one in notes if "mid_life_ns" in one]
    return f"{max(found) / MS:.1f} ms" if found else "-"


def _split(note: dict[str, Any]) -> str:
    setup = "exact" if "exact" in note["test"] else "default"
    median, p95 = (int(note[f"split_{key}_ns"]) / 1000 for key in ("median", "p95"))
    return f"{setup} {median:.0f}, {p95:.0f} µs"


def _loaders(rows: list[Row], results: dict[str, Any]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            step = _steps(results, row).get("tests-bcc-split", {"notes": []})
            for one in (note for note in step["notes"] if "bcc_cpu_ns" in note):
                cpu = [int(one[f"{loader}_cpu_ns"]) for loader in ("libbpf", "bcc")]
                execs = [one[f"{loader}_execs"] for loader in ("libbpf", "bcc")]
                splits = [one[f"{loader}_uncertain_splits"] for loader in ("libbpf", "bcc")]
                yield (
                    _name(row),
                    " and ".join(f"{ns / MS:.3f} ms" for ns in cpu),
                    f"{100 * abs(cpu[0] - cpu[1]) / max(*cpu, 1):.4f} %",
                    " and ".join(execs),
                    " and ".join(splits),
                )

    return [
        "## libbpf and BCC on the same job, at the same time",
        "",
        "Execs, forks and exits have to be the same for every executable, CPU within 0.1 %.",
        "",
        *_table("| row | CPU | difference | execs | uncertain boundaries |", lines()),
    ]


def _shares(rows: list[Row], results: dict[str, Any]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            steps = _steps(results, row)
            for name in ("work-libbpf", "work-bcc", "work-proc"):
                if name in steps:
                    work = steps[name]
                    yield (
                        _name(row),
                        name.removeprefix("work-"),
                        *(_attributed(work[key]["ledger"]) for key in ("solver", "mixed", "storm")),
                        f"{sum(one['cpu_s'] for one in work.values()):.1f} s",
                    )

    return [
        "## What share is attributed",
        "",
        "`sams-ebpf run` of 5 s of work in one process, of a shell with pipelines, and of 100",
        "short commands, with BPF and sampled (`proc`, every second). The last column is the CPU",
        "time of all three with the program itself.",
        "",
        *_table("| row | by | long solver | mixed shell | storm | CPU |", lines()),
    ]


def _attributed(ledger: dict[str, Any]) -> str:
    total = ledger["cgroup_cpu_ns"]
    if not total:
        return "no counter"
    return f"{100 * ledger['attributed_cpu_ns'] / total:.2f} % of {total / 1e9:.2f} s"


def _costs(rows: list[Row], results: dict[str, Any]) -> list[str]:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            steps = _steps(results, row)
            loads = {
                one["name"]: one["detail"]
                for one in steps.get("probe", {}).get("tried", [])
                if one["name"].startswith("load with") and one["ok"]
            }
            for loader in row.expect.loaders:
                load = next((text for name, text in loads.items() if loader in name.lower()), None)
                events = [
                    _per_event(steps.get(f"tests-{loader}-{x}")) for x in ("default", "exact")
                ]
                if load or any(events):
                    yield (_name(row), loader, load or "-", *(one or "-" for one in events))

    return [
        "## Cost",
        "",
        "Load: as `probe` does it. An event: the programs' own time by their own sampling, over",
        "all test cases. Slower than on real hardware by the same factor as all else here.",
        "",
        *_table("| row | loader | load | an event, default | an event, exact |", lines()),
    ]


def _per_event(step: dict[str, Any] | None) -> str:
    if step is None or not step.get("events"):
        return ""
    return f"{step['cost_ns'] / step['events'] / 1000:.1f} µs"


def _exceptions(rows: list[Row], results: dict[str, Any]) -> list[str]:
    lines = ["## Why not BPF, and what did not come out as expected", ""]
    for row in rows:
        steps = _steps(results, row)
        ways = steps.get("probe", {}).get("ways", [])
        found = [
            f"  - {way['loader'] or way['mode']}: {way['reason']}"
            for way in ways
            if not way["possible"]
        ]
        for part, brought in results.get(row.id, {}).items():
            found += [f"  - **{part}**: {one}" for one in problems(row, part, brought)]
        for name, step in steps.items():
            if _is(name):
                found += [f"  - {name}: skipped: {one}" for one in step["skips"]]
        if row.id in results:
            parts = {part: results[row.id].get(part, {"not_run": NO_RESULT}) for part in row.parts}
            why: dict[str, list[str]] = {}
            for part, brought in parts.items():
                if "not_run" in brought:
                    why.setdefault(brought["not_run"], []).append(part)
            found += [f"  - not run: {', '.join(names)}: {reason}" for reason, names in why.items()]
        if found:
            lines += [f"- {_name(row)}", *found]
    return [*lines, ""]
