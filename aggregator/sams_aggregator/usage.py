"""Runs with the CPU of their executables, out of the accounts: what records are made of."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

from sams_aggregator import accounts, tables
from sams_aggregator import config as cfg
from sams_aggregator.manifest import Store
from sams_aggregator.outbox import Run
from sams_ebpf.errors import UsageError

NS: Final = 10**9
_ROWS: Final = 50_000

# Epochs that could belong to several runs belong to none: nothing is said of them.
_QUERY: Final = """
    SELECT r.run, r.cluster, r.job_id, r.start_text, r.start_ns, r.status, r."user", r.project,
        r.end_ns, r.last_ns, r.running, r.nodes, r.nodes_seen, r.not_final, r.lossy, p.path,
        u.cpu_ns::VARCHAR
    FROM {run} r
    LEFT JOIN (
        SELECT run, path_id, sum(cpu_ns) AS cpu_ns FROM {account} WHERE class = 'path'
        GROUP BY run, path_id
    ) u ON u.run = r.run
    LEFT JOIN {path} p USING (path_id)
    WHERE r.status <> 'unresolved' AND r.job_id IS NOT NULL
    ORDER BY r.cluster, r.job_id, r.start_text, r.run, p.path
"""


class Weight(NamedTuple):
    """What an executable comes to over all runs: core-time (us), CPU (ns), number of runs."""

    core_us: int
    cpu_ns: int
    runs: int


NOTHING: Final = Weight(0, 0, 0)


def weights(store: Store, config: cfg.Config) -> dict[bytes, Weight]:
    """Each path of the accounts with its weight; accounts are made if they are not there."""
    made = accounts.current(store, site_of(config))
    connection = tables.connect()
    try:
        rows = connection.execute(
            _WEIGHTS.format(account=made.source("account"), path=made.source("path"))
        ).fetchall()
    finally:
        connection.close()
    return {bytes(row[0]): Weight(int(row[1]), int(row[2]), row[3]) for row in rows}


_WEIGHTS: Final = """
    SELECT path, sum(core_us), sum(cpu_ns), count(DISTINCT run)
    FROM {account} JOIN {path} USING (path_id) WHERE class = 'path' GROUP BY path
"""


class FactsSource:
    """All runs of the facts as they are now. Makes the accounts if they are not made yet."""

    def __init__(self, store: Store, config: cfg.Config, now_ns: int) -> None:
        self._store = store
        self._now_ns = now_ns
        self._settle_ns = config.aggregator.settle_s * NS
        self._zone = config.aggregator.timezone
        self._site = site_of(config)

    def runs(self) -> Iterator[Run]:
        """One after the other; nothing but the run at hand is kept in memory."""
        made = accounts.current(self._store, self._site)
        connection = tables.connect()
        try:
            names = {name: made.source(name) for name in ("run", "account", "path")}
            cursor = connection.execute(_QUERY.format(**names))
            columns = [column[0] for column in cursor.description]
            for _, rows in groupby(rows_of(cursor), key=lambda row: row[0]):
                yield self._run(columns, list(rows))
        finally:
            connection.close()

    def _run(self, columns: list[str], rows: list[tuple[Any, ...]]) -> Run:
        head = dict(zip(columns, rows[0], strict=True))
        if head["cluster"] is None:
            raise UsageError(f"site.cluster: not set, and job {head['job_id']} names no cluster")
        complete = head["not_final"] == 0 and head["nodes_seen"] >= max(1, head["nodes"])
        end_ns = head["end_ns"]
        if head["status"] != "sacct":
            # Nobody says when it ended: when its nodes said so, or fell silent.
            silent = self._now_ns - (head["last_ns"] or 0) >= self._settle_ns
            end_ns = head["last_ns"] if complete or silent else None
        settled = end_ns is not None and (complete or self._now_ns - end_ns >= self._settle_ns)
        return Run(
            cluster=head["cluster"],
            job_id=head["job_id"],
            start_text=head["start_text"] or digits(head["start_ns"], self._zone),
            user=head["user"],
            account=head["project"],
            end_ns=None if head["running"] else end_ns,
            settled=settled,
            partial=bool(head["lossy"]) or not complete,
            cpu_ns=[(bytes(row[-2]), int(row[-1])) for row in rows if row[-2] is not None],
        )


def site_of(config: cfg.Config) -> accounts.Site:
    """What the accounts depend on, from the configuration."""
    return accounts.Site(config.aggregator.timezone, config.site.cluster)


def digits(start_ns: int | None, zone: str) -> str | None:
    """Give a start as Slurm prints it in the site's zone, digits only."""
    if start_ns is None:
        return None
    return dt.datetime.fromtimestamp(start_ns // NS, ZoneInfo(zone)).strftime("%Y%m%d%H%M%S")


def rows_of(cursor: Any) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
    """Rows of a result, some at a time."""
    while rows := cursor.fetchmany(_ROWS):
        yield from rows
