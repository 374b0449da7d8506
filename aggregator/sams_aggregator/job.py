# ruff: noqa: S608 - all that is put into the statements is this program's own
"""One job with its ledger: `report --job`, and its `timeline`."""

from __future__ import annotations

import argparse
import datetime as dt
import json
from collections.abc import Collection, Iterable
from typing import Any, Final

from sams_aggregator import accounts, lookup, manifest, sams_xml, show, software, tables
from sams_aggregator.accounts import Site
from sams_aggregator.manifest import Manifest, Store
from sams_aggregator.rules import Rules
from sams_aggregator.show import Column, Report, hours
from sams_ebpf import paths, wire
from sams_ebpf.errors import SamsError, UsageError


def command(
    store: Store, site: Site, rules: Rules, arguments: argparse.Namespace, form: str
) -> int:
    """`report --job`."""
    found = runs(manifest.read(store), site, arguments.job, arguments.cluster, rules)
    if not found:
        raise SamsError(f"job {arguments.job}: neither in the facts nor in sacct's rows")
    if form == "json":
        last = {**found[-1], **({"earlier_runs": found[:-1]} if len(found) > 1 else {})}
        show.put(show.dump(last), arguments.output)
        return 0
    if form == "table":
        text = "\n".join(show.table(_report(run)) for run in found)
        show.put(text, arguments.output)
        return 0
    rows = [{"run": n, **one} for n, run in enumerate(found, 1) for one in run["executables"]]
    columns = [Column("run", "run"), *[Column(name, name) for name in _COLUMNS]]
    show.write(Report(columns, rows), form, arguments.output)
    return 0


_NAMES: Final = ("kind", "software", "version", "local_version")
_COLUMNS: Final = ("path", "flags", *_NAMES, *wire.COUNTERS, "core_us")


def runs(
    view: Manifest,
    site: Site,
    job_id: int,
    cluster: str | None = None,
    rules: Rules | None = None,
) -> list[dict[str, Any]]:
    """Every run of a job id, in order of start; by `rules` with the software it is."""
    found = _Job(view, site, job_id, cluster)
    executables = found.executables()
    return [_run(found, run, executables[run["run"]], rules) for run in found.runs]


class _Job:
    """Every run of one job id, with its epochs and accounts.

    From the accounts of all runs where these are up to date, else worked out for this job
    alone.
    """

    def __init__(self, view: Manifest, site: Site, job_id: int, cluster: str | None) -> None:
        self._view = view
        self._made = accounts.ready(view, site)
        if self._made is None:
            self._connection = tables.connect(threads=1)
            accounts.build(self._connection, view.of_jobs([job_id]), site, job_id=job_id)
        every = self._rows("run", "job_id", [job_id])
        clusters = sorted({run["cluster"] or "(none)" for run in every})
        if cluster is None and len(clusters) > 1:
            raise UsageError(
                f"job {job_id}: there is one in each of {', '.join(clusters)}:"
                " choose with --cluster"
            )
        self.runs = [run for run in every if cluster in (None, run["cluster"])]
        self.runs.sort(
            key=lambda one: (one["start_ns"] is not None, one["start_ns"] or 0, one["run"])
        )
        numbers = [run["run"] for run in self.runs]
        self.members = self._rows("member", "run", numbers)
        self.members.sort(key=lambda one: [(one[name] is None, one[name]) for name in _MEMBERS])
        self.accounts = self._rows("account", "run", numbers)
        ids = {one["path_id"] for one in self.accounts} - {None}
        self._paths = {one["path_id"]: one["path"] for one in self._rows("path", "path_id", ids)}

    def _rows(self, table: str, column: str, wanted: Collection[int]) -> list[dict[str, Any]]:
        if self._made is not None:
            return lookup.rows(self._made.path(table), column, wanted)
        numbers = ", ".join(str(int(one)) for one in wanted) or "NULL"
        cursor = self._connection.execute(f'SELECT * FROM "{table}" WHERE {column} IN ({numbers})')
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def facts(self, table: str) -> list[dict[str, Any]]:
        """Rows of `totals` or `points` about the epochs of its runs: those that count."""
        epochs = {one["epoch"] for one in self.members}
        # The job id beside an epoch is there to find its sets and row groups by.
        ids = {one["job_id"] for one in self.members} - {None}
        view = self._view.of_jobs(sorted(ids))
        nulls = any(one.low_job is None for one in view.sets)
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for path in view.files(table) if epochs else ():
            for row in lookup.rows(path, "job_id", ids, nulls=nulls, epochs=epochs):
                key = tuple(row[name] for name in tables.KEYS[table])
                old = found.setdefault(key, row)
                if order(old) < order(row):
                    found[key] = row
        return list(found.values())

    def executables(self) -> dict[int, list[dict[str, Any]]]:
        """By run: the last counters of each executable, the most CPU first."""
        core: dict[tuple[int, bytes, int], int] = {}
        for one in self.accounts:
            if one["path_id"] is not None:
                key = (one["run"], self._paths[one["path_id"]], one["flags"])
                core[key] = core.get(key, 0) + one["core_us"]
        newest: dict[tuple[bytes, bytes, int], dict[str, Any]] = {}
        for row in sorted(self.facts("totals"), key=order):  # a row for each month
            newest[row["epoch"], row["path"], row["flags"]] = row
        run_of = {one["epoch"]: one["run"] for one in self.members}
        of_run: dict[tuple[int, bytes, int], list[dict[str, Any]]] = {}
        for row in newest.values():
            of_run.setdefault((run_of[row["epoch"]], row["path"], row["flags"]), []).append(row)
        summed = [(key, {name: _over_epochs(name, rows) for name in wire.COUNTERS}, rows)
                  for key, rows in of_run.items()]  # fmt: skip
        summed.sort(key=lambda one: (-(one[1]["cpu_ns"] or 0), *one[0][1:]))
        said: dict[int, list[dict[str, Any]]] = {run["run"]: [] for run in self.runs}
        for (run, path, flags), sums, rows in summed:
            scripts = [row["script"] for row in rows if row["script"] is not None]
            said[run].append(
                {
                    "path": path,
                    "flags": _flag_names(flags),
                    "script": paths.show(max(scripts)) if scripts else None,
                    **sums,
                    "core_us": core.get((run, path, flags)),
                }
            )
        return said


_MEMBERS: Final = ("run", "node", "begin_ns", "epoch")


def order(row: dict[str, Any]) -> tuple[int, int, int]:
    """What tells which of several rows of an epoch is the later one."""
    return row["generation"], row["sequence"], row["tie"]


def _over_epochs(name: str, rows: Iterable[dict[str, Any]]) -> int | None:
    values: list[int] = [row[name] for row in rows if row[name] is not None]
    if not values:
        return None
    return max(values) if name in wire.MAXIMA else sum(values)


def _flag_names(flags: int) -> list[str]:
    return [name for bit, name in wire.FLAG_NAMES.items() if flags & bit]


def _run(
    found: _Job, run: dict[str, Any], executables: list[dict[str, Any]], rules: Rules | None
) -> dict[str, Any]:
    number = run["run"]
    epochs = [one for one in found.members if one["run"] == number]
    if rules is not None:
        _name(executables, rules, run)
    for one in executables:
        one["path"] = paths.show(one["path"])
    classes: dict[str, dict[str, int]] = {}
    for one in found.accounts:
        if one["run"] == number:
            amounts = classes.setdefault(one["class"], {"cpu_ns": 0, "core_us": 0})
            for name in amounts:
                amounts[name] += int(one[name])
    start, end = run["start_ns"] or run["first_ns"], run["end_ns"] or run["last_ns"]
    nodes = list(dict.fromkeys(one["node"] for one in epochs))
    return {
        "mode": _one(epochs, "mode"),
        "loader": _one(epochs, "loader"),
        "job": run["job_id"],
        "node": nodes[0] if len(nodes) == 1 else None,
        "start": time_text(start),
        "end": time_text(end),
        "wall_s": None if start is None or end is None else (end - start) // 10**9,
        "ledger": _ledger(epochs),
        "executables": executables,
        "status": run["status"],
        "cluster": run["cluster"],
        "sluid": run["sluid"],
        "state": run["state"],
        "running": run["running"],
        "partial": partial(run),
        "user": run["user"],
        "project": run["project"],
        "partition": run["partition"],
        "cpus": run["cpus"],
        "nodes": run["nodes"],
        "nodes_seen": run["nodes_seen"],
        "sacct_cpu_time_s": None if run["cpu_time_s"] is None else int(run["cpu_time_s"]),
        "accounts": dict(sorted(classes.items())),
        "epochs": [_epoch(one) for one in epochs],
    }


def partial(run: dict[str, Any]) -> bool:
    """Whether something of a run is known to be missing, or not there yet."""
    return bool(run["not_final"] or run["lossy"] or run["nodes_seen"] < run["nodes"])


def _name(executables: list[dict[str, Any]], rules: Rules, run: dict[str, Any]) -> None:
    found = software.map_paths(rules, [one["path"] for one in executables])
    for one, named in zip(executables, found, strict=True):
        one["kind"] = (
            "outside" if "outside" in one["flags"]
            else "undetermined" if named is None
            else "ignored" if named.ignore
            else "software"
        )  # fmt: skip
        told = named[:3] if named is not None else (None, None, None)
        for name, said in zip(_NAMES[1:], told, strict=True):
            one[name] = said and sams_xml.fill(said, run["user"], run["project"])


def _ledger(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over epochs; what one of them does not know is not known of all."""
    cgroup = _sum(one["cgroup_cpu_ns"] for one in epochs)
    attributed = _sum(one["attributed_cpu_ns"] for one in epochs)
    return {
        "cgroup_cpu_ns": cgroup,
        "attributed_cpu_ns": attributed,
        "unattributed_cpu_ns": None
        if cgroup is None or attributed is None
        else cgroup - attributed,
        "outside_cpu_ns": _sum(one["outside_cpu_ns"] for one in epochs),
        "unattributed_by": _added(one["unattributed_by"] for one in epochs),
        "lost": _added(one["lost"] for one in epochs),
    }


def _epoch(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch": one["epoch"][:16].hex(),
        "node": one["node"],
        "mode": one["mode"],
        "loader": one["loader"],
        "origin": one["origin"],
        "begin": time_text(one["begin_ns"]),
        "end": time_text(one["end_ns"]),
        "final": one["final_reason"],
        "processes": None if one["processes"] is None else json.loads(one["processes"]),
        "ledger": _ledger([one]),
    }


def _sum(values: Iterable[int | None]) -> int | None:
    total = None
    for value in values:
        if value is None:
            return None
        total = value + (total or 0)
    return total


def _added(texts: Iterable[str | None]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for text in texts:
        for cause, amount in json.loads(text).items() if text is not None else ():
            sums[cause] = sums.get(cause, 0) + amount
    return dict(sorted(sums.items()))


def _one(epochs: list[dict[str, Any]], name: str) -> str | None:
    values = {one[name] for one in epochs}
    return values.pop() if len(values) == 1 else ("mixed" if values else None)


_STATUS: Final = {"sacct": "in sacct", "unknown": "unknown to sacct"}


def _report(run: dict[str, Any]) -> Report:
    ledger = run["ledger"]
    rows = [
        {
            "path": (one["path"] or "(none)")
            + (f" [{show.text(one['flags'])}]" if one["flags"] else ""),
            "software": " ".join(filter(None, (one["software"], one["version"])))
            if one["kind"] == "software"
            else f"({one['kind']})",
            "core": "" if one["core_us"] is None else hours(one["core_us"], 3600 * 10**6),
            "cpu": seconds(one["cpu_ns"]),
            "user": seconds(one["user_ns"]),
            "system": seconds(one["system_ns"]),
            "execs": one["execs"],
            "rss": one["max_rss_bytes"],
        }
        for one in run["executables"]
    ]
    marks = [name for name in ("partial", "running") if run[name]]
    head = [
        (
            f"job {run['job']} ({run['cluster']}), {_STATUS.get(run['status'], run['status'])},"
            f" {run['state'] or 'no state'}, user {run['user']}, project {run['project']},"
            f" {run['cpus']} CPUs"
        ),
        ", ".join(
            [
                f"{run['start']} to {run['end']}",
                f"{run['nodes_seen']} of {run['nodes']} nodes seen",
                "no data" if run["mode"] is None else f"mode {run['mode']}",
                *marks,
            ]
        ),
        "",
    ]
    foot = [
        "",
        f"{'charged to the cgroup':32}{seconds(ledger['cgroup_cpu_ns'])}",
        f"{'attributed':32}{seconds(ledger['attributed_cpu_ns'])}",
        f"{'unattributed':32}{seconds(ledger['unattributed_cpu_ns'])}",
        *[
            f"{'  of it ' + cause:32}{seconds(amount)}"
            for cause, amount in ledger["unattributed_by"].items()
        ],
        f"{'outside the cgroup':32}{seconds(ledger['outside_cpu_ns'])}",
        *[f"{'lost: ' + cause:32}{count}" for cause, count in ledger["lost"].items()],
        *[
            f"{'core-hours ' + name:32}{hours(one['core_us'], 3600 * 10**6)}"
            for name, one in run["accounts"].items()
            if name != accounts.PATH and one["core_us"]
        ],
    ]
    columns = [
        Column("path", "executable"), Column("software", "software"),
        Column("core", "core-hours", right=True), Column("cpu", "CPU s", right=True),
        Column("user", "user s", right=True), Column("system", "system s", right=True),
        Column("execs", "execs", right=True), Column("rss", "max RSS", right=True),
    ]  # fmt: skip
    return Report(columns, rows, head, foot)


def seconds(ns: int | None) -> str:
    """Show ns as seconds with all nine digits."""
    if ns is None:
        return "not known"
    sign, size = ("-", -ns) if ns < 0 else ("", ns)
    return f"{sign}{size // 10**9}.{size % 10**9:09d}"


def time_text(ns: int | None) -> str | None:
    """RFC 3339 in UTC, to the second."""
    if ns is None:
        return None
    return dt.datetime.fromtimestamp(ns // 10**9, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def timeline(view: Manifest, site: Site, job_id: int, cluster: str | None) -> Report:
    """CPU of each executable and node in each interval, as differences of the kept points."""
    found = _Job(view, site, job_id, cluster)
    of = {one["epoch"]: (one["run"], one["node"]) for one in found.members}
    before: dict[tuple[bytes, bytes, int], int] = {}
    rows = []
    for point in sorted(found.facts("points"), key=order):
        epoch, path, flags, total = (point[name] for name in ("epoch", "path", "flags", "cpu_ns"))
        run, node = of[epoch]
        rows.append(
            {
                "run": run,
                "node": node,
                "time": time_text(point["end_ns"]),
                "path": path,
                "flags": _flag_names(flags),
                "cpu_ns": total - before.get((epoch, path, flags), 0),
                "total_cpu_ns": total,
                "order": (run, node is None, node or "", point["end_ns"], path, flags, epoch),
            }
        )
        before[epoch, path, flags] = total
    rows.sort(key=lambda row: row["order"])
    names = ("run", "node", "time", "path", "flags", "cpu_ns", "total_cpu_ns")
    return Report([Column(name, name, right=name.endswith("ns")) for name in names], rows)
