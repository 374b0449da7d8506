"""One job's account for people and programs: the JSON object and the table of `run`."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any, Final

from sams_ebpf import paths, wire


def of_batch(batch: wire.Batch) -> dict[str, Any]:
    """Make the report of a batch that holds all records; times in ns and RFC 3339 UTC."""
    ledger = batch.ledger
    if ledger is None:
        raise ValueError("a tombstone has no report")
    records = sorted(batch.records, key=lambda r: (-r.cpu_ns, r.path, r.flags))
    begin, end = batch.begin_ns or 0, batch.end_ns or 0
    return {
        "mode": batch.mode,
        "loader": batch.loader,
        "job": batch.claims.job_id,
        "node": batch.claims.node,
        "start": _time(begin),
        "end": _time(end),
        "wall_s": round((end - begin) / 1e9, 3),
        "ledger": {
            "cgroup_cpu_ns": ledger.cgroup_cpu_ns,
            "attributed_cpu_ns": ledger.attributed_cpu_ns,
            "unattributed_cpu_ns": ledger.unattributed_cpu_ns,
            "outside_cpu_ns": ledger.outside_cpu_ns,
            "age_ns": ledger.age_ns,
            "unattributed_by": dict(ledger.unattributed_by),
            "lost": dict(ledger.lost),
        },
        "processes": None if batch.processes is None else _plain(batch.processes),
        "final": None if batch.final is None else _plain(batch.final),
        "executables": [_executable(record) for record in records],
    }


def _executable(record: wire.Record) -> dict[str, Any]:
    named = {name: getattr(record, name) for name in wire.COUNTERS}
    return {
        "path": paths.show(record.path),
        "flags": flags(record.flags),
        "script": None if record.script is None else paths.show(record.script),
        **named,
    }


def flags(bits: int) -> list[str]:
    """Names of a record's flags."""
    return [name for bit, name in wire.FLAG_NAMES.items() if bits & bit]


def _plain(struct: wire.Processes | wire.Closing) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _time(ns: int) -> str:
    moment = dt.datetime.fromtimestamp(ns // 1_000_000_000, dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S") + f".{ns % 1_000_000_000 // 1000:06d}Z"


def to_json(report: dict[str, Any]) -> str:
    """One line."""
    return json.dumps(report, ensure_ascii=False) + "\n"


# v2 counts in whole microseconds: less than one is rounding, not a row.
MICROSECOND: Final = 1000
_COLUMNS = ("CPU", "share", "user", "system", "execs", "peak mem", "executable")


def table(report: dict[str, Any]) -> str:
    """Lay the report out for a terminal: where the time went, then the ledger in one line."""
    ledger = report["ledger"]
    whole = ledger["cgroup_cpu_ns"]
    if whole is None:
        whole = ledger["attributed_cpu_ns"]
    rows = [_COLUMNS, *(_row(one, whole) for one in report["executables"])]
    unattributed = ledger["unattributed_cpu_ns"]
    if unattributed is not None and abs(unattributed) >= MICROSECOND:
        rows.append((seconds(unattributed), _share(unattributed, whole), *[""] * 4, "unattributed"))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS) - 1)]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=False))
        + f"  {row[-1]}"
        for row in rows
    ]
    return "\n".join([*lines, "", _ledger(report), ""])


def _row(one: dict[str, Any], whole: int) -> tuple[str, ...]:
    path = one["path"] or f"({', '.join(one['flags']) or 'unknown'})"
    marks = [mark for mark in one["flags"] if one["path"]]
    if one["script"]:
        marks.append(f"script {one['script']}")
    return (
        seconds(one["cpu_ns"]),
        _share(one["cpu_ns"], whole),
        _optional(one["user_ns"], seconds),
        _optional(one["system_ns"], seconds),
        _optional(one["execs"], str),
        _optional(one["max_rss_bytes"], size),
        path + (f"  [{', '.join(marks)}]" if marks else ""),
    )


def _optional(value: int | None, shown: Any) -> str:  # noqa: ANN401 (str, seconds or size)
    return "-" if value is None else str(shown(value))


def _ledger(report: dict[str, Any]) -> str:
    ledger = report["ledger"]
    way = report["mode"] + (f" ({report['loader']})" if report["loader"] else "")
    parts = [f"attributed {seconds(ledger['attributed_cpu_ns'])} s"]
    if ledger["cgroup_cpu_ns"] is None:
        parts.append("this cgroup tree keeps no CPU counter to compare with")
    else:
        rest = ledger["unattributed_cpu_ns"]
        parts[0] += f" of {seconds(ledger['cgroup_cpu_ns'])} s that the kernel charged"
        parts.append(f"unattributed {rest / 1e6:.3f} ms")
    parts += [f"{cause} {ns / 1e6:.3f} ms" for cause, ns in ledger["unattributed_by"].items()]
    if ledger["outside_cpu_ns"]:
        parts.append(f"outside the cgroup {seconds(ledger['outside_cpu_ns'])} s")
    parts += [f"{cause} {count}" for cause, count in ledger["lost"].items()]
    live = (report["final"] or {}).get("live")
    if live:
        parts.append(f"{live} processes still alive")
    return f"mode {way}, {report['wall_s']:.1f} s; ledger: " + ", ".join(parts)


def seconds(ns: int) -> str:
    """Seconds with a millisecond's digits."""
    return f"{ns / 1e9:.3f}"


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    unit = units[0]
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
