"""The command `export-sams-json`: facts as the files that SAMS' own aggregator reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

from sams_aggregator import accounts, manifest, report, sams_json, tables, usage
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.extract import moment
from sams_aggregator.manifest import Store
from sams_aggregator.sams_json import Exec, NodeReport
from sams_ebpf import durable, wire
from sams_ebpf.errors import SamsError, UsageError

NS: Final = 10**9

# One report per run and node. The counters of an epoch are those of its last batch; epochs
# of a run on a node add up. What left the job's cgroup is none of the job's for SAMS.
_EXECS: Final = """
    WITH last AS (
        SELECT epoch, path, flags,
            arg_max(cpu_ns, row(generation, sequence, tie)) AS cpu_ns,
            arg_max(user_ns, row(generation, sequence, tie)) AS user_ns
        FROM {totals} WHERE flags & {outside} = 0 GROUP BY epoch, path, flags
    ), nodes AS (
        SELECT run, coalesce(node, 'unknown') AS node, min(begin_ns) AS begin_ns,
            max(end_ns) AS end_ns
        FROM {member} GROUP BY ALL
    )
    SELECT m.run, n.node, n.begin_ns, n.end_ns,
        CASE WHEN octet_length(l.path) > 0 THEN l.path
            WHEN l.flags & {overflow} > 0 THEN '(overflow)'::BLOB ELSE '(unknown)'::BLOB END,
        sum(l.cpu_ns)::VARCHAR AS cpu_ns, sum(coalesce(l.user_ns, l.cpu_ns))::VARCHAR AS user_ns
    FROM {member} m JOIN nodes n ON n.run = m.run AND n.node = coalesce(m.node, 'unknown')
    JOIN last l USING (epoch)
    GROUP BY ALL
    ORDER BY 1, 2, 5
"""
_RUNS: Final = """
    SELECT run, cluster, job_id, start_text, start_ns, "user", uid, project, "partition",
        job_name, cpus, nodes
    FROM {run}
    WHERE NOT running AND status <> 'unresolved' AND job_id IS NOT NULL AND epochs > 0
        AND ({since} IS NULL OR coalesce(end_ns, last_ns) >= {since})
    ORDER BY cluster, job_id, start_ns NULLS FIRST, run
"""


def command(arguments: argparse.Namespace) -> int:
    """`export-sams-json`."""
    config = cfg.load(arguments)
    since_ns = moment(arguments.since, config.aggregator.timezone)
    state = st.open_existing(config.aggregator)
    written = 0
    try:
        store = Store(state, config.aggregator.data)
        made = accounts.current(store, usage.site_of(config))
        report.known_cluster(made, report.Filter(arguments.cluster))
        runs, left_out = _runs(store, config, since_ns)
        chosen = _of_cluster(runs, arguments.cluster)
        for one in _reports(store, config, chosen):
            name = sams_json.file_name(one.job_id, one.node, hash_size=arguments.jobid_hash_size)
            target = arguments.output / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                durable.write(target, sams_json.render(one))
            except OSError as error:
                raise SamsError(f"{target}: cannot be written: {error.strerror}") from error
            written += 1
    finally:
        state.close()
    print(f"{written} files written", file=sys.stderr)
    if left_out:
        print(
            f"{left_out} earlier runs of jobs that were run again are left out:"
            " SAMS knows a job id once",
            file=sys.stderr,
        )
    return 0


def _runs(
    store: Store, config: cfg.Config, since_ns: int | None
) -> tuple[dict[int, dict[str, Any]], int]:
    """The last run of each job, by number, and how many earlier ones there are."""
    made = accounts.current(store, usage.site_of(config))
    since = "NULL::BIGINT" if since_ns is None else str(since_ns)
    connection = tables.connect()
    try:
        cursor = connection.execute(_RUNS.format(run=made.source("run"), since=since))
        columns = [column[0] for column in cursor.description]
        rows = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    finally:
        connection.close()
    last = {(row["cluster"], row["job_id"]): row for row in rows}
    return {row["run"]: row for row in last.values()}, len(rows) - len(last)


def _of_cluster(runs: dict[int, dict[str, Any]], cluster: str | None) -> dict[int, dict[str, Any]]:
    if cluster is not None:
        return {number: row for number, row in runs.items() if row["cluster"] == cluster}
    clusters = sorted({str(row["cluster"]) for row in runs.values()})
    if len(clusters) > 1:
        raise UsageError(
            f"there are several clusters ({', '.join(clusters)}), and SAMS has a folder for each:"
            " choose one with --cluster"
        )
    return runs


def _reports(
    store: Store, config: cfg.Config, runs: dict[int, dict[str, Any]]
) -> Iterator[NodeReport]:
    view = manifest.read(store)
    made = accounts.current(store, usage.site_of(config))
    connection = tables.connect()
    try:
        cursor = connection.execute(
            _EXECS.format(
                totals=view.latest("totals"),
                member=made.source("member"),
                overflow=wire.OVERFLOW,
                outside=wire.OUTSIDE,
            )
        )
        for (number, node), rows in groupby(usage.rows_of(cursor), key=lambda row: row[:2]):
            if number in runs:
                yield _report(runs[number], node, list(rows), config)
    finally:
        connection.close()


def _report(
    run: dict[str, Any], node: str, rows: list[tuple[Any, ...]], config: cfg.Config
) -> NodeReport:
    execs = []
    for row in rows:
        cpu_ns = int(row[5])
        user_ns = min(int(row[6]), cpu_ns)
        execs.append(Exec(bytes(row[4]), user_ns, cpu_ns - user_ns))
    begin_ns, end_ns = rows[0][2], rows[0][3]
    return NodeReport(
        job_id=run["job_id"],
        node=node,
        begin_s=(begin_ns if begin_ns is not None else end_ns or 0) // NS,
        end_s=-(-(end_ns or 0) // NS),
        execs=tuple(execs),
        start_text=run["start_text"] or usage.digits(run["start_ns"], config.aggregator.timezone),
        start_ns=run["start_ns"],
        user=run["user"],
        uid=run["uid"],
        account=run["project"],
        partition=run["partition"],
        job_name=run["job_name"],
        cpus=run["cpus"],
        nodes=run["nodes"] or None,
    )
