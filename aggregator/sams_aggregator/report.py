# ruff: noqa: S608 - keys are checked against a list, all else is this program's own
"""`sams-aggregator report`: core-hours and CPU-hours, and what they rest on."""

from __future__ import annotations

import argparse
import functools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sams_aggregator import accounts, job, latest, manifest, months, show, software, sums, tables
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.accounts import Accounts
from sams_aggregator.garbage import uncollected
from sams_aggregator.manifest import Store
from sams_aggregator.rules import Software
from sams_aggregator.show import Column, Report
from sams_ebpf import wire
from sams_ebpf.errors import UsageError

log = logging.getLogger(__name__)

CPU_HOUR: Final = 3600 * 10**9
CORE_HOUR: Final = 3600 * 10**6

# Rows that are never mixed with software and always stand by themselves.
KINDS: Final = (
    "software", "ignored", "undetermined", "unattributed", "outside", "no CPU", "no data",
)  # fmt: skip
SPECIAL: Final = KINDS[1:]

_OF_SOFTWARE: Final = ("software", "version", "local_version")
_OF_RUN: Final = {
    "user": '"user"', "project": "project", "partition": '"partition"', "cluster": "cluster",
    "job": "job_id", "run": "run", "status": "status",
}  # fmt: skip
_OF_ACCOUNT: Final = {"month": "month", "path": "path_id", "flags": "flags"}
_KEYS: Final = (*_OF_SOFTWARE, *_OF_RUN, *_OF_ACCOUNT)
_PART_ROWS: Final = 1_000_000
_EXPRESSIONS: Final = {
    **{
        name: f"CASE WHEN a.class = 'path' THEN filled(s.{name}, r.\"user\", r.project) END"
        for name in ("software", "version", "local_version")
    },
    **{name: f"r.{column}" for name, column in _OF_RUN.items()},
    "month": "a.month",
    "path": "p.path",
    "flags": "a.flags",
}


class Filter(NamedTuple):
    """Which part of the accounts is shown; None: all."""

    cluster: str | None = None
    since: int | None = None
    until: int | None = None


class Row(NamedTuple):
    """One line: keys in the order asked for, and exact amounts."""

    keys: tuple[Any, ...]
    kind: str
    runs: int | None
    cpu_ns: int
    core_us: int
    running: int | None
    partial: int | None


def command(arguments: argparse.Namespace) -> int:
    """`report`."""
    config = cfg.load(arguments)
    form = arguments.format or ("json" if arguments.json else "table")
    chosen, keys = filter_of(arguments), keys_of(arguments)
    show.check(form, arguments.output)
    state = st.open_existing(config.aggregator)
    try:
        store = Store(state, config.aggregator.data)
        site = site_of(config)
        rules = software.load_rules(config, software.config_file(arguments))
        if arguments.job is not None:
            return job.command(store, site, rules, arguments, form)
        made = accounts.current(store, site)
        known_cluster(made, chosen)
        if arguments.coverage:
            report = coverage(store, made, chosen)
        else:
            software.put_in_force(store, rules)
            names = dict(software.mapping(state, rules.version))
            report = main_report(made, names, chosen, keys, arguments)
        empty = not any(one.tables for one in manifest.read(store).sets)
    finally:
        state.close()
    if empty:
        log.warning("%s: holds no facts yet: `ingest` reads them in", config.aggregator.data)
    show.write(report, form, arguments.output)
    return 0


def filter_of(arguments: argparse.Namespace) -> Filter:
    """What the options ask for. Raises UsageError for options that say nothing together."""
    for name in ("top", "undetermined", "coverage", "job"):
        if arguments.by is not None and getattr(arguments, name) not in (None, False):
            raise UsageError(f"--by: not together with --{name}, which has rows of its own")
    since, until = (
        None if text is None else months.parse(text) for text in (arguments.since, arguments.until)
    )
    if since is not None and until is not None and since > until:
        raise UsageError(f"--from {arguments.since} --to {arguments.until}: no month in between")
    return Filter(arguments.cluster, since, until)


def keys_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What the rows are told apart by. Raises UsageError."""
    if arguments.top or arguments.undetermined:
        return ("path", "flags", "software", "version")
    by = "software" if arguments.by is None else arguments.by
    keys = tuple(name for name in by.split(",") if name)
    unknown = [name for name in keys if name not in _KEYS]
    if unknown or not keys:
        raise UsageError(f"--by {by}: no key '{', '.join(unknown)}'; there are {', '.join(_KEYS)}")
    if len(set(keys)) < len(keys):
        raise UsageError(f"--by {by}: names a key twice")
    return keys


def known_cluster(made: Accounts, chosen: Filter) -> None:
    """Raise UsageError where no run is of the cluster that is asked for."""
    if chosen.cluster is None:
        return
    query = f"SELECT DISTINCT cluster FROM {made.source('run')} WHERE cluster IS NOT NULL"
    clusters = sorted(row[0] for row in tables.connect().execute(query).fetchall())
    if chosen.cluster not in clusters:
        raise UsageError(
            f"--cluster {chosen.cluster}: no run of it; there are {', '.join(clusters) or 'none'}"
        )


def site_of(config: cfg.Config) -> accounts.Site:
    """What the accounts depend on, from the configuration."""
    return accounts.Site(config.aggregator.timezone, config.site.cluster)


def main_report(
    made: Accounts,
    names: dict[bytes, Software | None],
    chosen: Filter,
    keys: Sequence[str],
    arguments: argparse.Namespace,
) -> Report:
    """The report by keys, of the top executables or of what is undetermined."""
    connection = open_accounts(made, names, upstream=arguments.core_time == "upstream")
    found = rows(connection, keys, chosen)
    if arguments.top:
        found = [row for row in found if row.keys[0] is not None]
    if arguments.undetermined:
        found = [row for row in found if row.kind == "undetermined"]
    amount = "core_us" if arguments.unit == "core-hours" else "cpu_ns"
    found.sort(key=lambda row: (-getattr(row, amount), _sort_key(row)))
    totals = (sum(row.cpu_ns for row in found), sum(row.core_us for row in found))
    limit = arguments.limit if arguments.limit is not None else (20 if arguments.top else None)
    rest = found[limit:] if limit is not None else []
    found = found[:limit] if limit is not None else found
    if not (arguments.top or arguments.undetermined):
        found += _always(found + rest, keys)
    found += summed_up(rest, keys)
    known = sacct_total(connection, chosen)
    head = [
        "core-hours: allocated CPUs x elapsed time, shared out by CPU time"
        if arguments.core_time == "sacct"
        else "core-hours as upstream SAMS has them: CPUs x time from first to last sample",
        "CPU-hours: CPU time used",
        "",
    ]
    foot = [f"(rest): {len(rest)} more rows, summed up"] if rest else []
    of_what = "total of these rows" if arguments.top or arguments.undetermined else "total"
    foot += [(f"{of_what}: core-hours {show.hours(totals[1], CORE_HOUR)}, CPU-hours"
             f" {show.hours(totals[0], CPU_HOUR)}")]  # fmt: skip
    if known is not None and arguments.core_time == "sacct":
        foot += [f"sacct's total: core-hours {show.hours(known, CORE_HOUR)}"]
    runs = _run_counts(connection, chosen)
    counts = ", ".join(f"{count} {what}" for what, count in runs.items() if count)
    foot += [f"runs: {counts or 'none'}"]
    return Report(
        [*[Column(name, name) for name in keys], *_COLUMNS],
        [_shown(keys, row) for row in found],
        head,
        foot,
        {
            "unit": arguments.unit,
            "core_time": arguments.core_time,
            "by": list(keys),
            "total": {"cpu_ns": totals[0], "core_us": totals[1]},
            "sacct": {"core_us": known},
            "runs": runs,
            "rest": {
                "rows": len(rest),
                "cpu_ns": sum(row.cpu_ns for row in rest),
                "core_us": sum(row.core_us for row in rest),
            },
        },
    )


_COLUMNS: Final = (
    Column("kind", "kind"),
    Column("core_hours", "core-hours", right=True),
    Column("cpu_hours", "CPU-hours", right=True),
    Column("runs", "runs", right=True),
    Column("running", "running", right=True),
    Column("partial", "partial", right=True),
    Column("core_us", "core-µs", right=True),
    Column("cpu_ns", "CPU-ns", right=True),
)


def _shown(keys: Sequence[str], row: Row) -> dict[str, Any]:
    cells = dict(zip(keys, row.keys, strict=True))
    if cells.get("month") is not None:
        cells["month"] = months.show(cells["month"])
    if cells.get("flags") is not None:
        cells["flags"] = flag_names(cells["flags"])
    return {
        **cells,
        "kind": row.kind,
        "core_hours": show.hours(row.core_us, CORE_HOUR),
        "cpu_hours": show.hours(row.cpu_ns, CPU_HOUR),
        "runs": row.runs,
        "running": row.running,
        "partial": row.partial,
        "core_us": row.core_us,
        "cpu_ns": row.cpu_ns,
    }


def flag_names(flags: int) -> str:
    """Bits of a record's flags in words."""
    return ",".join(name for bit, name in wire.FLAG_NAMES.items() if flags & bit)


def summed_up(rest: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """One row for each kind; how many different runs they are of is not known."""
    return [
        Row(
            (None,) * len(keys),
            f"{kind} (rest)",
            None,
            sum(row.cpu_ns for row in rest if row.kind == kind),
            sum(row.core_us for row in rest if row.kind == kind),
            None,
            None,
        )
        for kind in KINDS
        if any(row.kind == kind for row in rest)
    ]


def _sort_key(row: Row) -> tuple[Any, ...]:
    return (
        row.kind,
        *[(value is not None, value if value is not None else 0) for value in row.keys],
    )


def _always(found: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    there = {row.kind for row in found}
    return [Row((None,) * len(keys), kind, 0, 0, 0, 0, 0) for kind in SPECIAL if kind not in there]


def open_accounts(
    made: Accounts, names: dict[bytes, Software | None], *, upstream: bool = False
) -> Any:  # noqa: ANN401
    """A database with `account`, `run`, `path` and `soft`, the software of each path."""
    connection = tables.connect()
    for name in ("run", "path"):
        connection.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM {made.source(name)}")
    every = accounts.paths_of(connection, made)
    with tables.loaded(_SOFT, _softs(every, names)) as source:
        connection.execute(f"CREATE TEMP TABLE soft AS FROM {source}")
    to_fill = any(found is not None and "%" in "".join(found[:3]) for found in names.values())
    connection.execute(f"CREATE TEMP MACRO filled(name, u, p) AS {_FILLED if to_fill else 'name'}")
    if upstream:
        connection.execute(_UPSTREAM.format(source=made.source("account")))
        accounts.share_out(connection, ("run",), ("month", "path_id", "flags"))
        connection.execute(_AS_UPSTREAM.format(source=made.source("account")))
    else:
        connection.execute(f"CREATE TEMP VIEW account AS SELECT * FROM {made.source('account')}")
    return connection


# As `sams_xml.fill`: `%(user)s` and `%(project)s` are the run's own.
_FILLED: Final = r"""
    CASE WHEN contains(name, '%') THEN array_to_string(list_transform(
        regexp_extract_all(name, '%%|%\((?:user|project)\)s|%|[^%]+'),
        lambda part: CASE part WHEN '%%' THEN '%' WHEN '%(user)s' THEN coalesce(u, 'None')
            WHEN '%(project)s' THEN coalesce(p, 'None') ELSE part END), '') ELSE name END
"""
_SOFT: Final = {
    "path_id": "BIGINT", "kind": "VARCHAR", "software": "VARCHAR", "version": "VARCHAR",
    "local_version": "VARCHAR",
}  # fmt: skip


def _softs(
    every: Sequence[bytes], names: dict[bytes, Software | None]
) -> Iterator[tuple[Any, ...]]:
    for number, path in enumerate(every, 1):
        found = names.get(path)
        if found is None:
            yield number, "undetermined", None, None, None
        elif found.ignore:
            yield number, "ignored", None, None, None
        else:
            yield number, "software", found.software, found.version, found.local_version


# Upstream shares CPUs x (last - first sample) out over what it saw; it knows no other rows.
# What a node claims may be nonsense: no run has more than a column can hold.
_UPSTREAM: Final = f"""
    CREATE TEMP TABLE weight AS
    SELECT a.run, a.month, a.path_id, a.flags, a.cpu_ns::HUGEINT AS w,
        least(coalesce(r.claimed_cpus, r.cpus, 0)::HUGEINT
            * greatest(r.last_ns - r.first_ns, 0) // 1000, {wire.INT64_MAX}) AS whole
    FROM {{source}} a JOIN run r USING (run)
    WHERE a.class = 'path' AND r.last_ns IS NOT NULL AND a.cpu_ns > 0
"""
_AS_UPSTREAM: Final = """
    CREATE TEMP TABLE account AS
    SELECT a.run, a.month, a.class, a.path_id, a.flags, a.cpu_ns,
        coalesce(s.core_us, 0)::BIGINT AS core_us
    FROM {source} a JOIN run r USING (run)
    LEFT JOIN shared s USING (run, month, path_id, flags)
    WHERE a.class = 'path' AND r.last_ns IS NOT NULL
    ORDER BY a.run
"""


def _where(chosen: Filter) -> str:
    parts = []
    if chosen.cluster is not None:
        parts.append(f"r.cluster = {tables.quoted(chosen.cluster)}")
    if chosen.since is not None:
        parts.append(f"a.month >= {int(chosen.since)}")
    if chosen.until is not None:
        parts.append(f"a.month <= {int(chosen.until)}")
    return f"WHERE {' AND '.join(parts)}" if parts else ""


def rows(connection: Any, keys: Sequence[str], chosen: Filter) -> list[Row]:  # noqa: ANN401
    """Sums by keys and kind, in no order."""
    asked = [f"coalesce({name}, '')" for name in keys if name in _OF_SOFTWARE]
    if asked:
        query = f"SELECT count(*) FROM soft WHERE contains(concat({', '.join(asked)}), '%')"
        if connection.execute(query).fetchone()[0]:
            return _rows_by_names(connection, keys, chosen)
    return _rows_by_numbers(connection, keys, chosen)


def _rows_by_numbers(connection: Any, keys: Sequence[str], chosen: Filter) -> list[Row]:  # noqa: ANN401
    """The quick way: grouped by small numbers, which get their names at the end.

    `who` stands for the keys of a run, `what` for the kind and the keys of software.
    """
    who, names, marks = _of_runs(connection, [n for n in keys if n in _OF_RUN], chosen)
    what, of_what = _of_paths(connection, [n for n in keys if n in _OF_SOFTWARE])
    names |= of_what
    own = {name: sums.Numbering() for name in keys if name in _OF_ACCOUNT}
    found = sums.by_keys(_account_parts(connection, chosen, who, what, own), marks)
    if found is None:
        return []
    place = dict.fromkeys(_OF_RUN, 0) | dict.fromkeys(("kind", *_OF_SOFTWARE), 1)
    for at, (name, numbering) in enumerate(own.items(), 2):
        place[name] = at
        names[name] = [None if value < 0 else value for value in numbering.values]
    if "path" in own:
        every = [None, *(row[0] for row in connection.execute(_PATHS).fetchall())]
        names["path"] = [every[number or 0] for number in names["path"]]

    def column(name: str) -> list[Any]:
        values = np.empty(len(names[name]), dtype=object)
        values[:] = names[name]
        told: list[Any] = values[found.keys[place[name]]].tolist()
        return told

    values: Iterable[tuple[Any, ...]] = zip(*map(column, keys), strict=True)
    if not keys:
        values = [()] * len(found.runs)
    running, partial = (one.tolist() for one in found.marked)
    every_column = (
        values, column("kind"), found.runs.tolist(), found.amount(0, 4), found.amount(4, 2),
        running, partial,
    )  # fmt: skip
    # There may be as many as there are runs: no call of Python for each.
    with uncollected():
        return list(map(functools.partial(tuple.__new__, Row), zip(*every_column, strict=True)))


_PATHS: Final = "SELECT path FROM path ORDER BY path_id"


def _of_runs(
    connection: Any,  # noqa: ANN401
    of_run: Sequence[str],
    chosen: Filter,
) -> tuple[tables.Column, dict[str, list[Any]], list[tables.Column]]:
    """By run: its `who`, -1 for what is not chosen; names by `who`; which run, and are partial."""
    columns = "".join(f", {_OF_RUN[name]} AS {name}" for name in of_run)
    found = connection.execute(f"""
        SELECT run AS number, coalesce(running, false)::TINYINT AS is_running,
            coalesce({PARTIAL}, false)::TINYINT AS is_partial {columns}
        FROM run r {_where(Filter(chosen.cluster))}
    """).to_arrow_table()
    run = found["number"].to_numpy()
    size = connection.execute("SELECT coalesce(max(run), 0) + 1 FROM run").fetchone()[0]
    numbers, names = _together(found, of_run)
    who = np.full(size, -1, dtype=np.int64)
    who[run] = numbers
    marks = []
    for name in ("is_running", "is_partial"):
        mark = np.zeros(size, dtype=bool)
        mark[run] = found[name].to_numpy()
        marks.append(mark)
    return who, names, marks


def _of_paths(
    connection: Any,  # noqa: ANN401
    of_software: Sequence[str],
) -> tuple[tables.Column, dict[str, list[Any]]]:
    """By path: its `what`; names by `what`, behind which those of KINDS come, without software."""
    columns = ("kind", *of_software)
    found = connection.execute(f"SELECT path_id, {', '.join(columns)} FROM soft").to_arrow_table()
    path = found["path_id"].to_numpy()
    numbers, names = _together(found, columns)
    what = np.zeros(int(path.max(initial=0)) + 1, dtype=np.int64)
    what[path] = numbers
    for name in columns:
        names[name] += KINDS if name == "kind" else [None] * len(KINDS)
    return what, names


def _together(
    found: pa.Table, columns: Sequence[str]
) -> tuple[tables.Column, dict[str, list[Any]]]:
    """One number from 0 on for each row, by what these columns say; and what it stands for."""
    if not columns:
        return np.zeros(len(found), dtype=np.int64), {}
    codes = []
    for name in columns:
        numbers = found[name].combine_chunks().dictionary_encode().indices
        codes.append(pc.fill_null(numbers, -1).to_numpy().astype(np.int64) + 1)
    _, first, number = np.unique(latest.numbered(codes), return_index=True, return_inverse=True)
    return number, {name: found[name].take(first).to_pylist() for name in columns}


def _account_parts(
    connection: Any,  # noqa: ANN401
    chosen: Filter,
    who: tables.Column,
    what: tables.Column,
    own: dict[str, sums.Numbering],
) -> Iterator[sums.Rows]:
    """The accounts with their numbers, some at a time."""
    classes = " ".join(f"WHEN '{kind}' THEN {at}" for at, kind in enumerate(KINDS))
    kinds = len(KINDS)
    behind = int(what.max(initial=-1)) + 1
    chosen_keys = "".join(f", coalesce(a.{_OF_ACCOUNT[name]}, -1) AS {name}" for name in own)
    # One table and conditions: DuckDB keeps the rows in their order, which is that of runs.
    reader = connection.execute(f"""
        SELECT a.run, CASE a.class WHEN 'path' THEN {kinds} {classes} END AS kind,
            coalesce(a.path_id, 0) AS of_path, a.cpu_ns::DECIMAL(38, 0) AS cpu_ns, a.core_us
            {chosen_keys}
        FROM account a {_where(chosen._replace(cluster=None))}
    """).to_arrow_reader(_PART_ROWS)
    for batch in reader:
        run, kind, path = (batch.column(name).to_numpy() for name in ("run", "kind", "of_path"))
        rows = sums.Rows(
            run,
            [
                who[run],
                np.where(kind == kinds, what[path], behind + kind),
                *(numbering(batch.column(name).to_numpy()) for name, numbering in own.items()),
            ],
            [sums.words(batch.column("cpu_ns")), sums.words(batch.column("core_us"))],
        )
        here = rows.keys[0] >= 0
        yield rows if here.all() else rows.only(here)


def _rows_by_names(connection: Any, keys: Sequence[str], chosen: Filter) -> list[Row]:  # noqa: ANN401
    """The same where names of software hold the run's own user or project."""
    chosen_keys = "".join(f"{_EXPRESSIONS[name]} AS k{at}, " for at, name in enumerate(keys))
    again = "".join(f"k{at}, " for at in range(len(keys)))
    paths = "LEFT JOIN path p ON p.path_id = a.path_id" if "path" in keys else ""
    # First by run, then by the keys: to count distinct runs in one go takes ten times as long.
    found = connection.execute(f"""
        WITH by_run AS (
            SELECT {chosen_keys}
                CASE WHEN a.class = 'path' THEN coalesce(s.kind, 'undetermined')
                    ELSE a.class END AS kind,
                a.run, any_value(r.running) AS running, any_value({PARTIAL}) AS partial,
                sum(a.cpu_ns)::HUGEINT AS cpu_ns, sum(a.core_us) AS core_us
            FROM account a JOIN run r USING (run)
            LEFT JOIN soft s ON s.path_id = a.path_id {paths}
            {_where(chosen)}
            GROUP BY ALL
        )
        SELECT {again}kind, count(*), sum(cpu_ns), sum(core_us),
            count(*) FILTER (running), count(*) FILTER (partial)
        FROM by_run GROUP BY ALL
    """).fetchall()
    width = len(keys)
    return [
        Row(
            tuple(row[:width]),
            row[width],
            row[width + 1],
            int(row[width + 2]),
            int(row[width + 3]),
            row[width + 4],
            row[width + 5],
        )
        for row in found
    ]


# A run of which something is known to be missing, or not yet there.
PARTIAL: Final = "(r.not_final > 0 OR r.lossy > 0 OR r.nodes_seen < r.nodes)"


def sacct_total(connection: Any, chosen: Filter) -> int | None:  # noqa: ANN401
    """Core-time (us) as sacct itself adds it up; None for some months: it knows runs only."""
    if chosen.since is not None or chosen.until is not None:
        return None
    total = connection.execute(
        f"SELECT coalesce(sum(r.cpu_time_s), 0) FROM run r {_runs_where(chosen)}"
    ).fetchone()[0]
    return int(total) * 10**6


def _runs_where(chosen: Filter) -> str:
    """Of some months: the runs that have core-time or CPU in them."""
    if chosen.since is None and chosen.until is None:
        return _where(chosen)
    of_months = _where(chosen._replace(cluster=None))
    parts = [f"r.run IN (SELECT a.run FROM account a {of_months})"]
    if chosen.cluster is not None:
        parts.append(f"r.cluster = {tables.quoted(chosen.cluster)}")
    return f"WHERE {' AND '.join(parts)}"


def _run_counts(connection: Any, chosen: Filter) -> dict[str, int]:  # noqa: ANN401
    where = _runs_where(chosen)
    row = connection.execute(f"""
        SELECT count(*) FILTER (status = 'sacct'), count(*) FILTER (status = 'unknown'),
            count(*) FILTER (status = 'unresolved'), count(*) FILTER (running),
            count(*) FILTER ({PARTIAL}) FROM run r {where}
    """).fetchone()
    names = ("in sacct", "unknown to sacct", "unresolved", "running", "partial")
    return dict(zip(names, row, strict=True))


def coverage(store: Store, made: Accounts, chosen: Filter) -> Report:
    """What of the site was seen, how, and what was lost."""
    connection = tables.connect()
    for name in ("run", "member", "account"):
        connection.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM {made.source(name)}")
    where = _runs_where(chosen)
    of_runs = connection.execute(f"""
        SELECT count(*) FILTER (status = 'sacct'),
            count(*) FILTER (status = 'sacct' AND nodes_seen = 0),
            count(*) FILTER (status = 'sacct' AND nodes_seen > 0 AND nodes_seen < nodes),
            count(*) FILTER (status = 'unknown'), count(*) FILTER (status = 'unresolved'),
            count(*) FILTER (running), count(*) FILTER (not_final > 0), count(*) FILTER (lossy > 0)
        FROM run r {where}
    """).fetchone()
    members = connection.execute(f"""
        SELECT count(*), count(*) FILTER (m.mode = 'proc'), count(*) FILTER (m.unclaimed = 1),
            count(*) FILTER (m.cgroup_cpu_ns IS NULL),
            coalesce(sum(m.cgroup_cpu_ns), 0),
            coalesce(sum(m.attributed_cpu_ns) FILTER (m.cgroup_cpu_ns IS NOT NULL), 0),
            coalesce(sum(m.attributed_cpu_ns), 0),
            coalesce(sum(m.attributed_cpu_ns) FILTER (m.mode = 'proc'), 0),
            count(*) FILTER (m.vouched = 0),
            coalesce(sum(m.attributed_cpu_ns) FILTER (m.vouched = 0), 0)
        FROM member m JOIN run r USING (run) {where}
    """).fetchone()
    core = connection.execute(f"""
        SELECT coalesce(sum(core_us), 0), coalesce(sum(core_us) FILTER (class = 'no data'), 0)
        FROM account a JOIN run r USING (run) {_where(chosen)}
    """).fetchone()
    losses: dict[str, int] = {}
    for (text,) in connection.execute(
        f"SELECT m.lost FROM member m JOIN run r USING (run) {where or 'WHERE true'}"
        " AND m.lost IS NOT NULL"
    ).fetchall():
        for cause, count in json.loads(text).items():
            losses[cause] = losses.get(cause, 0) + count
    of_epochs = f" WHERE epoch IN (SELECT m.epoch FROM member m JOIN run r USING (run) {where})"
    dropped = connection.execute(
        f"SELECT coalesce(sum(batches), 0) FROM {manifest.read(store).latest('dropped')}"
        + (of_epochs if where else "")
    ).fetchone()
    found: list[tuple[str, Any]] = [
        ("runs in sacct", of_runs[0]),
        ("runs in sacct without any data", of_runs[1]),
        ("runs in sacct with data of some nodes only", of_runs[2]),
        ("runs unknown to sacct", of_runs[3]),
        ("runs unresolved", of_runs[4]),
        ("runs still running", of_runs[5]),
        ("runs without a final batch of each node", of_runs[6]),
        ("runs with counted losses", of_runs[7]),
        ("core-hours in sacct", show.hours(int(core[0]), CORE_HOUR)),
        ("core-hours without data", show.hours(int(core[1]), CORE_HOUR)),
        ("share of core-hours with data, %", percent(int(core[0] - core[1]), int(core[0]))),
        ("epochs (job on a node)", members[0]),
        ("epochs in proc mode", members[1]),
        ("epochs unclaimed", members[2]),
        ("epochs without a cgroup's counter", members[3]),
        ("CPU-hours charged to cgroups", show.hours(int(members[4]), CPU_HOUR)),
        ("share of them attributed, %", percent(int(members[5]), int(members[4]))),
        ("CPU-hours attributed", show.hours(int(members[6]), CPU_HOUR)),
        ("share of them in proc mode, %", percent(int(members[7]), int(members[6]))),
        ("epochs whose sender did not prove to be the node", members[8]),
        ("share of CPU-hours that rests on trust, %", percent(int(members[9]), int(members[6]))),
        ("batches dropped by nodes", int(dropped[0])),
        *[(f"lost: {cause}", count) for cause, count in sorted(losses.items())],
    ]
    return Report(
        [Column("what", "coverage"), Column("value", "", right=True)],
        [{"what": what, "value": value} for what, value in found],
        ["runs with core-time or CPU in these months, their epochs as a whole", ""]
        if chosen.since is not None or chosen.until is not None
        else [],
    )


def percent(part: int, whole: int) -> str | None:
    """Share in per cent with three decimals, from integers; None of nothing."""
    return show.hours(part * 100, whole) if whole else None
