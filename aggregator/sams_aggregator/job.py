# ruff: noqa: S608 - all that is put into the statements is this program's own
"""One job with its ledger: `report --job`, and its `timeline`."""

from __future__ import annotations

import argparse
import datetime as dt
import json
from collections.abc import Iterable
from typing import Any, Final

from sams_aggregator import accounts, manifest, sams_xml, show, software, tables
from sams_aggregator.accounts import Site
from sams_aggregator.manifest import Manifest, Store
from sams_aggregator.rules import Rules
from sams_aggregator.show import Column, Report, hours
from sams_ebpf import paths, wire
from sams_ebpf.errors import SamsError, UsageError

_SUMS: Final = [name for name in wire.COUNTERS if name not in wire.MAXIMA]


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
    connection = tables.connect(threads=1)
    _open(connection, view, site, job_id)
    _one_cluster(connection, job_id, cluster)
    where = f"WHERE job_id = {int(job_id)}"
    if cluster is not None:
        where += f" AND cluster = {tables.quoted(cluster)}"
    found = _dicts(
        connection.execute(f"SELECT * FROM run {where} ORDER BY start_ns NULLS FIRST, run")
    )
    return [_run(connection, run, rules) for run in found]


def _one_cluster(connection: Any, job_id: int, cluster: str | None) -> None:  # noqa: ANN401
    """Raise UsageError where several clusters have the job and none is chosen."""
    query = "SELECT DISTINCT coalesce(cluster, '(none)') FROM run WHERE job_id = ? ORDER BY 1"
    clusters = [row[0] for row in connection.execute(query, [job_id]).fetchall()]
    if cluster is None and len(clusters) > 1:
        raise UsageError(
            f"job {job_id}: there is one in each of {', '.join(clusters)}: choose with --cluster"
        )


def _open(connection: Any, view: Manifest, site: Site, job_id: int) -> None:  # noqa: ANN401
    """Tables `run`, `member`, `account`, `path`, `total` of what is about one job id.

    Taken from the accounts of all runs where these are up to date, else worked out for
    this job alone.
    """
    made = accounts.ready(view, site)
    if made is None:
        accounts.build(connection, view, site, job_id=job_id)
        return
    do = connection.execute
    do(f"CREATE TEMP TABLE run AS FROM {made.source('run')} WHERE job_id = {int(job_id)}")
    numbers = ", ".join(str(row[0]) for row in do("SELECT run FROM run").fetchall()) or "NULL"
    for name in ("member", "account"):
        do(f"CREATE TEMP TABLE {name} AS FROM {made.source(name)} WHERE run IN ({numbers})")
    do(f"CREATE TEMP VIEW path AS FROM {made.source('path')}")
    epochs = [row[0] for row in do("SELECT DISTINCT epoch FROM member").fetchall()]
    listed = ", ".join(f"unhex('{epoch.hex()}')" for epoch in epochs) or "NULL"
    ids = do("SELECT DISTINCT job_id FROM member WHERE job_id IS NOT NULL").fetchall()
    jobs = ", ".join(str(int(one[0])) for one in ids) or "NULL"
    # The job id beside an epoch is there to find its row groups by.
    source = (
        f"(SELECT * FROM {view.source('totals')}"
        f" WHERE (job_id IN ({jobs}) OR job_id IS NULL) AND epoch IN ({listed}))"
    )
    do(f"CREATE TEMP TABLE total AS SELECT * FROM {tables.latest('totals', source)}")


def _run(connection: Any, run: dict[str, Any], rules: Rules | None) -> dict[str, Any]:  # noqa: ANN401
    number = run["run"]
    epochs = _dicts(
        connection.execute(
            "SELECT * FROM member WHERE run = ? ORDER BY node, begin_ns, epoch", [number]
        )
    )
    executables = _executables(connection, number)
    if rules is not None:
        _name(executables, rules, run)
    for one in executables:
        one["path"] = paths.show(one["path"])
    classes = {
        name: {"cpu_ns": int(cpu), "core_us": int(core)}
        for name, cpu, core in connection.execute(
            "SELECT class, sum(cpu_ns), sum(core_us) FROM account WHERE run = ? GROUP BY class"
            " ORDER BY class",
            [number],
        ).fetchall()
    }
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
        "accounts": classes,
        "epochs": [_epoch(one) for one in epochs],
    }


def partial(run: dict[str, Any]) -> bool:
    """Whether something of a run is known to be missing, or not there yet."""
    return bool(run["not_final"] or run["lossy"] or run["nodes_seen"] < run["nodes"])


def _executables(connection: Any, run: int) -> list[dict[str, Any]]:  # noqa: ANN401
    sums = ", ".join(
        f"{'max' if name in wire.MAXIMA else 'sum'}({name}) AS {name}" for name in wire.COUNTERS
    )
    found = _dicts(
        connection.execute(
            f"""
            WITH last AS (
                SELECT t.* FROM total t JOIN member m USING (epoch) WHERE m.run = ?
                QUALIFY row_number() OVER (PARTITION BY t.epoch, t.path, t.flags
                    ORDER BY t.generation DESC, t.sequence DESC, t.tie DESC) = 1
            ), core AS (
                SELECT p.path, a.flags, sum(a.core_us) AS core_us
                FROM account a JOIN path p USING (path_id) WHERE a.run = ? GROUP BY ALL
            )
            SELECT path, flags, max(script) AS script, {sums}, any_value(core_us) AS core_us
            FROM last LEFT JOIN core USING (path, flags) GROUP BY path, flags
            ORDER BY cpu_ns DESC, path, flags
            """,
            [run, run],
        )
    )
    for one in found:
        one["script"] = None if one["script"] is None else paths.show(one["script"])
        one["flags"] = [name for bit, name in wire.FLAG_NAMES.items() if one["flags"] & bit]
        for name in (*wire.COUNTERS, "core_us"):
            one[name] = None if one[name] is None else int(one[name])
    return found


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


def _dicts(cursor: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def timeline(view: Manifest, site: Site, job_id: int, cluster: str | None) -> Report:
    """CPU of each executable and node in each interval, as differences of the kept points."""
    connection = tables.connect(threads=1)
    _open(connection, view, site, job_id)
    _one_cluster(connection, job_id, cluster)
    where = f"r.job_id = {int(job_id)}"
    if cluster is not None:
        where += f" AND r.cluster = {tables.quoted(cluster)}"
    points = f"(SELECT * FROM {view.source('points')} WHERE epoch IN (SELECT epoch FROM member))"
    rows = _dicts(
        connection.execute(
            f"""
            SELECT m.run, m.node, p.end_ns, p.path, p.flags, p.cpu_ns AS total_cpu_ns,
                p.cpu_ns - coalesce(lag(p.cpu_ns) OVER (PARTITION BY p.epoch, p.path, p.flags
                    ORDER BY p.generation, p.sequence, p.tie), 0) AS cpu_ns
            FROM {tables.latest("points", points)} p JOIN member m USING (epoch)
            JOIN run r USING (run) WHERE {where}
            ORDER BY m.run, m.node, p.end_ns, p.path, p.flags
            """
        )
    )
    for row in rows:
        row["time"] = time_text(row.pop("end_ns"))
        row["flags"] = [name for bit, name in wire.FLAG_NAMES.items() if row["flags"] & bit]
    names = ("run", "node", "time", "path", "flags", "cpu_ns", "total_cpu_ns")
    return Report([Column(name, name, right=name.endswith("ns")) for name in names], rows)
