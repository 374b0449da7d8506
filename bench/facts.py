# ruff: noqa: S608 - statements of our own
"""Facts: reading archives, reprocessing on processes and Dask, reports against SQLite."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench import facts_site
from bench.section import Section, Table
from sams_aggregator import accounts, compact, ingest, job, manifest, report, tables
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_aggregator.rules import Rules
from sams_aggregator.work import Options
from sams_receiver.archive import Archive, Kind

SITE = accounts.Site("UTC", "c1")


def run() -> Section:
    archive, counts = facts_site.archive()
    folder = Path(tempfile.mkdtemp(prefix="bench-facts-", dir=facts_site.ROOT))
    try:
        return _run(archive, counts, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(archive: Path, counts: dict[str, int], folder: Path) -> Section:
    records = counts["records"]
    naive_s = timed(lambda: naive(archive))[0]
    rows: list[list[Any]] = [
        ["naive loop: dicts of dicts, one process", naive_s, records / naive_s, 1.0]
    ]
    shapes = (("totals only", 0), ("points of ten minutes", 600), ("all points", 1))
    for name, every in shapes:
        took, _ = timed(lambda every=every: reprocess(archive, folder / f"r{every}", every, 1))  # type: ignore[misc]
        rows.append([f"{name}, one process", took, records / took, naive_s / took])
    two = timed(lambda: reprocess(archive, folder / "two", 600, 2))[0]
    rows.append(["points of ten minutes, two processes", two, records / two, naive_s / two])
    dask = on_dask(archive, folder)
    rows.append(["the same on a Dask cluster of two worker processes", dask, records / dask,
                 naive_s / dask])  # fmt: skip
    reports, remarks = report_figures(folder / "two", folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    remarks.append(f"Peak memory: {peak} MB with the reports, {workers} MB in a worker.")
    return Section(
        "Facts and reports",
        f"{counts['jobs']:,} jobs of 5 to 120 batches on 2,000 nodes, {counts['batches']:,}"
        f" batches, {records:,} records, 20,000 paths; {counts['raw'] >> 20:,} MB raw,"
        f" {counts['bytes'] >> 20:,} MB sealed. Wall time of one run each, to facts recorded in the"
        " manifest, before compaction. The naive loop reads the same sealed archive, decodes each"
        " batch to dicts, and keeps the latest record of each epoch and path in a dict.",
        [
            Table(["reading", "s", "records/s", "x naive"], rows),
            Table(["question", "s", "SQLite s", "ratio"], reports),
        ],
        remarks,
    )


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = function()
    return time.monotonic() - began, result


def naive(archive: Path) -> int:
    latest: dict[tuple[bytes, bytes], tuple[int, int, dict[str, Any]]] = {}
    for segment in Archive.open(archive).segments():
        for frame in segment.frames():
            if frame.kind != Kind.COUNTERS:
                continue
            batch = msgspec.msgpack.decode(frame.data)
            order = (batch["generation"], batch["sequence"])
            for values in batch.get("records", ()):
                record = dict(zip(batch["fields"], values, strict=False))
                key = (batch["epoch"], record["path"])
                old = latest.get(key)
                if old is None or old[:2] < order:
                    latest[key] = (*order, record)
    return sum(entry[2]["cpu_ns"] for entry in latest.values())


def reprocess(archive: Path, data: Path, every: int, workers: int) -> None:
    state = st.open_state(cfg.Aggregator(data=data))
    store = Store(state, data)
    ingest.ingest_archives(store, [archive], Options("UTC", every, "c1"), ingest.Tally(), workers)
    state.close()


def on_dask(archive: Path, folder: Path) -> float:
    """Median of three; the workers are up before the clock starts."""
    from sams_aggregator import reprocess as module  # noqa: PLC0415

    file = folder / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    base = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port",
            "0", "--no-dashboard", "--scheduler-file", str(file)]  # fmt: skip
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file),
              "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory",
              str(folder)]  # fmt: skip
    processes = [subprocess.Popen(base, **quiet)]
    try:
        while not file.exists():
            time.sleep(0.1)
        processes += [subprocess.Popen(worker, **quiet) for _ in range(2)]
        time.sleep(10)
        times = []
        for turn in range(3):
            data = folder / f"dask{turn}"
            state = st.open_state(cfg.Aggregator(data=data))
            store = Store(state, data)
            began = time.monotonic()
            found = module.tasks(store, [archive], Options("UTC", 600, "c1"))
            for done in module.dask_run(found, address=None, file=file):
                ingest.take(store, done, ingest.Tally())
            times.append(time.monotonic() - began)
            state.close()
        return statistics.median(times)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def report_figures(data: Path, folder: Path) -> tuple[list[list[Any]], list[str]]:
    state = st.open_state(cfg.Aggregator(data=data))
    store = Store(state, data)
    remarks = []
    took, made = timed(lambda: compact.compact(store, everything=True))
    remarks.append(f"Compaction of all sets into one: {took:.1f} s.")
    took, made = timed(lambda: accounts.current(store, SITE))
    remarks.append(f"Accounts of all runs, once after each ingest: {took:.1f} s.")
    keys = ("software", "version", "user", "project", "month")
    rules = Rules.from_config(facts_site.rules(), "bench")
    connection = tables.connect()
    every = accounts.paths_of(connection, made)

    def ask(with_rules: Rules) -> list[report.Row]:
        names = dict(zip(every, with_rules.map_many(every), strict=True))
        opened = report.open_accounts(made, names)
        return report.rows(opened, keys, report.Filter())

    fresh = statistics.median(timed(lambda: ask(rules))[0] for _ in range(3))
    names = dict(zip(every, rules.map_many(every), strict=True))
    opened = report.open_accounts(made, names)
    warm = statistics.median(
        timed(lambda: report.rows(opened, keys, report.Filter()))[0] for _ in range(3)
    )
    ours = {(row.keys, row.kind): row.cpu_ns for row in report.rows(opened, keys, report.Filter())
            if row.kind in ("software", "ignored", "undetermined")}  # fmt: skip
    theirs_s, theirs = sqlite_report(store, made, names, folder / "points.sqlite")
    same = {key: cpu for key, cpu in ours.items() if cpu} == {k: c for k, c in theirs.items() if c}
    remarks.append(f"CPU time of each row the same as SQLite's: {same}.")
    number = facts_site.JOBS // 2
    view = manifest.read(store)
    looks = statistics.median(timed(lambda: job.runs(view, SITE, number))[0] for _ in range(9))
    state.close()
    return [
        ["report by software, version, user, project, month", warm, theirs_s, theirs_s / warm],
        ["the same, rules changed: all paths mapped anew", fresh, theirs_s, theirs_s / fresh],
        ["one run with its ledger, median of 9", looks, None, None],
    ], remarks


def sqlite_report(
    store: Store, made: accounts.Accounts, names: dict[bytes, Any], file: Path
) -> tuple[float, dict[Any, int]]:
    """The same question in SQL over the same points, with a covering index and ANALYZE."""
    view = manifest.read(store)
    source = tables.connect()
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE points (epoch INT, path INT, ord INT, month INT, cpu INT)")
    database.execute("CREATE TABLE runs (epoch INT PRIMARY KEY, user TEXT, project TEXT)")
    database.execute(
        "CREATE TABLE soft (path INT PRIMARY KEY, kind TEXT, software TEXT, version TEXT)"
    )
    epochs = (
        f"(SELECT epoch, run, row_number() OVER (ORDER BY epoch) AS n FROM {made.source('member')})"
    )
    database.executemany("INSERT INTO runs VALUES (?, ?, ?)", source.execute(
        f'SELECT e.n, r."user", r.project FROM {epochs} e JOIN {made.source("run")} r USING (run)'
    ).fetchall())  # fmt: skip
    cursor = source.execute(
        "SELECT e.n, p.path_id, t.sequence, year(make_timestamp(t.end_ns // 1000)) * 100"
        f" + month(make_timestamp(t.end_ns // 1000)), t.cpu_ns FROM {view.source('points')} t"
        f" JOIN {epochs} e USING (epoch) JOIN {made.source('path')} p USING (path)"
    )
    while rows := cursor.fetchmany(100_000):
        database.executemany("INSERT INTO points VALUES (?, ?, ?, ?, ?)", rows)
    for number, path in enumerate(accounts.paths_of(source, made), 1):
        found = names[path]
        kind = "undetermined" if found is None else "ignored" if found.ignore else "software"
        plain = kind == "software"
        database.execute("INSERT INTO soft VALUES (?, ?, ?, ?)",
                         (number, kind, found.software if plain else None,
                          found.version if plain else None))  # fmt: skip
    database.execute("CREATE INDEX covering ON points (epoch, path, ord, month, cpu)")
    database.execute("ANALYZE")
    database.commit()
    question = """
        WITH last AS (
            SELECT epoch, path, month, max(ord) AS ord, cpu FROM points GROUP BY epoch, path, month
        ), step AS (
            SELECT epoch, path, month,
                cpu - coalesce(lag(cpu) OVER (PARTITION BY epoch, path ORDER BY ord), 0) AS cpu
            FROM last
        )
        SELECT s.software, s.version, r.user, r.project, t.month, s.kind, sum(t.cpu)
        FROM step t JOIN runs r USING (epoch) JOIN soft s USING (path)
        GROUP BY 1, 2, 3, 4, 5, 6
    """
    took, found = timed(lambda: database.execute(question).fetchall())
    database.close()
    return took, {(row[:5], row[5]): row[6] for row in found}


def main() -> None:
    print(run().render())


if __name__ == "__main__":
    main()
