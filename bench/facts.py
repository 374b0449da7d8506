# ruff: noqa: S608 - statements of our own
"""Facts: reading archives, reprocessing on processes and Dask, reports against SQLite."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench import facts_site
from bench.facts_site import PARTITIONS
from bench.section import Section, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import dask_cluster

from sams_aggregator import (
    accounts,
    compact,
    ingest,
    job,
    manifest,
    pool,
    report,
    software,
    sources,
    tables,
)
from sams_aggregator import config as cfg
from sams_aggregator import reprocess as rebuild
from sams_aggregator import state as st
from sams_aggregator.manifest import Manifest, Store
from sams_aggregator.rules import Rules
from sams_aggregator.work import Options, Result, work
from sams_receiver.archive import Archive, Kind

SITE = accounts.Site("UTC", "c1")
DASK_TURNS = 5
# Sets of so many segments: the most that compaction leaves of a year of hours, some 8,760.
YEAR_SETS = [1] * 7 + [8] * 7 + [64] * 7 + [512] * 8 + [4096]


def run() -> Section:
    archive, sacct, counts = facts_site.archives()
    folder = Path(tempfile.mkdtemp(prefix="bench-facts-", dir=facts_site.ROOT))
    try:
        return _run(archive, sacct, counts, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Took(NamedTuple):
    """Wall and CPU time of one run, its children included; memory of its largest process."""

    wall_s: float
    cpu_s: float
    peak_mb: int


def _run(archive: Path, sacct: Path, counts: dict[str, int], folder: Path) -> Section:
    records = counts["records"]
    shapes = {"totals only": 0, "points of ten minutes, as by default": 600, "all points": 1}
    turns: dict[str, tuple[Steps, tuple[object, ...]]] = {
        f"{name}, one process": (one_by_one, (archive, folder / f"r{every}", every))
        for name, every in shapes.items()
    }
    loop_name = "naive loop: a dict for each record"
    took = in_turns({loop_name: (naive, (archive,)), **turns})
    loop = took[loop_name]
    rows: list[list[Any]] = [_row(name, one, records, loop) for name, one in took.items()]
    totals, one_process, _ = (took[name] for name in turns)
    for every in (0, 1):
        shutil.rmtree(folder / f"r{every}")
    remarks = []
    two = alone(reprocess, archive, folder / "two", 600, 2)
    rows.append(_row("points of ten minutes, two processes", two, records, loop))
    dask, same = on_dask(archive, folder, fingerprint(folder / "two"))
    rows.append(["the same on Dask, two worker processes, median", dask, None, records / dask,
                 loop.wall_s / dask, None, None])  # fmt: skip
    remarks.append(
        f"Two processes: {one_process.wall_s / two.wall_s:.2f} times one. Dask: {DASK_TURNS} runs,"
        f" the workers up before the clock starts; {dask / two.wall_s:.2f} times the pool's time."
        f" Once more with one of three workers killed on the way: same facts to the digit:"
        f" {same}."
    )
    remarks.append(
        f"Directory of batches beside the index of sealed segments; without one each batch's header"
        f" is decoded: totals then take {without(archive, folder) / totals.cpu_s:.1f} times the"
        " CPU."
    )
    lines = alone(reprocess, sacct, folder / "two", 600, 1)
    remarks.append(
        f"Rows of sacct of all jobs, from the aggregator's own archive: {lines.wall_s:.1f} s."
    )
    reports, more = report_figures(folder / "two", folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    remarks += [*more, f"Peak memory of compaction, accounts and reports: {peak} MB."]
    return Section(
        "Facts and reports",
        f"{counts['jobs']:,} jobs of 5 to 120 batches on 2,000 nodes, some 2,000 at a time,"
        f" {counts['batches']:,} batches in the order in which they are sent, {records:,} records,"
        f" 20,000 paths; {counts['segments']} sealed segments of {PARTITIONS} partitions,"
        f" {counts['raw'] >> 20:,} MB raw, {counts['bytes'] >> 20:,} MB sealed. One run"
        " each, in a process of its own, to facts recorded in the manifest, before compaction. What"
        " takes one process goes on by a segment in turn, so that all meet the same machine: its"
        " moods make tens of per cent. The naive loop"
        " reads the same archive, decodes each batch to dicts, and keeps the latest record of each"
        " epoch and path in a dict. CPU: all processes of the reading.",
        [
            Table(
                ["reading", "s", "CPU s", "records/s", "x naive", "x naive, CPU", "peak MB"], rows
            ),
            Table(["question", "s", "SQLite s", "ratio"], reports),
        ],
        remarks,
    )


def _row(name: str, took: Took, records: int, loop: Took) -> list[Any]:
    return [name, took.wall_s, took.cpu_s, records / took.wall_s, loop.wall_s / took.wall_s,
            loop.cpu_s / took.cpu_s, took.peak_mb]  # fmt: skip


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = function()
    return time.monotonic() - began, result


def alone(function: Callable[..., Any], *arguments: object) -> Took:
    """Time a function in a process of its own, from after its imports to its end."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_timed_alone, args=(theirs, function, arguments)
    )
    process.start()
    theirs.close()
    wall, cpu, peak = ours.recv()
    process.join()
    print(f"{function.__name__} {arguments[1:]}: {wall:.1f} s, {cpu:.1f} s CPU, {peak} MB",
          file=sys.stderr)  # fmt: skip
    return Took(wall, cpu, peak)


def _timed_alone(
    pipe: Connection, function: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    before = os.times()
    wall = timed(lambda: function(*arguments))[0]
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    pipe.send(Took(wall, cpu, peak_mb()))


def peak_mb() -> int:
    """Memory at its most, of this process or of one that it started."""
    # Not that of getrusage: it takes over what the parent had when it started this process.
    status = Path("/proc/self/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10


Steps = Callable[..., Iterator[None]]


def in_turns(several: dict[str, tuple[Steps, tuple[object, ...]]]) -> dict[str, Took]:
    """Step through all of them in turn, so that the machine's moods are the same for each.

    Each in a process of its own, which waits while it is not its turn.
    """
    context = multiprocessing.get_context("spawn")
    running = {}
    took = dict.fromkeys(several, Took(0, 0, 0))
    for name, (function, arguments) in several.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_stepping, args=(theirs, function, arguments))
        process.start()
        theirs.close()
        running[name] = (process, ours)
    while running:
        for name, (process, pipe) in list(running.items()):
            pipe.send(True)
            more, step = pipe.recv()
            so_far = took[name]
            took[name] = Took(so_far.wall_s + step.wall_s, so_far.cpu_s + step.cpu_s, step.peak_mb)
            if not more:
                del running[name]
                process.join()
                print(f"{name}: {took[name]}", file=sys.stderr)
    return took


def _stepping(pipe: Connection, function: Steps, arguments: tuple[object, ...]) -> None:
    steps = function(*arguments)
    more = True
    while more:
        pipe.recv()
        before = os.times()
        wall, more = timed(lambda: next(steps, False) is not False)
        after = os.times()
        pipe.send((more, Took(wall, sum(after[:4]) - sum(before[:4]), peak_mb())))


def naive(archive: Path) -> Iterator[None]:
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
        yield
    assert sum(entry[2]["cpu_ns"] for entry in latest.values())


def one_by_one(archive: Path, data: Path, every: int) -> Iterator[None]:
    """As an ingest with one process does it."""
    state = st.open_state(cfg.Aggregator(data=data))
    store = Store(state, data)
    for task in rebuild.tasks(store, [archive], Options("UTC", every, "c1")):
        for done in pool.run(ingest.read_segment, [task], 1):
            ingest.take(store, done, ingest.Tally())
        yield
    state.close()


def reprocess(archive: Path, data: Path, every: int, workers: int) -> None:
    state = st.open_state(cfg.Aggregator(data=data))
    store = Store(state, data)
    ingest.ingest_archives(store, [archive], Options("UTC", every, "c1"), ingest.Tally(), workers)
    state.close()


def without(archive: Path, folder: Path) -> float:
    """CPU seconds that totals would take of segments without directory, by a few of them."""
    refs = sources.segments(archive)
    some = refs[:: max(1, len(refs) // 4)]
    began = time.process_time()
    for ref in some:
        work(sources.Reading(ref), Options("UTC", 0, "c1"), folder)
    return (time.process_time() - began) * len(refs) / len(some)


def fingerprint(data: Path) -> str:
    """Digest of all facts that count, whatever files they are in."""
    state = st.open_state(cfg.Aggregator(data=data))
    view = manifest.read(Store(state, data))
    state.close()
    connection = tables.connect()
    sums = []
    for table in ("points", "totals", "epochs", "claims", "dropped"):
        columns = ", ".join(f'"{name}"' for name in tables.SCHEMA[table])
        sums.append(
            connection.execute(
                f"SELECT count(*), sum(hash(row({columns}))::HUGEINT) FROM {view.latest(table)}"
            ).fetchone()
        )
    return repr(sums)


def on_dask(archive: Path, folder: Path, expected: str) -> tuple[float, bool]:
    """Median of several runs; and whether one with a killed worker gives the same facts."""
    with dask_cluster.started(folder) as cluster:
        for _ in range(2):
            cluster.worker()
        cluster.wait_for_workers(2)
        times = []
        for turn in range(DASK_TURNS):
            data = folder / f"dask{turn}"
            times.append(timed(lambda data=data: dask_once(archive, data, cluster.file, None))[0])  # type: ignore[misc]
            shutil.rmtree(data)
            print(f"dask: {times[-1]:.1f} s", file=sys.stderr)
        victim = cluster.worker()
        cluster.wait_for_workers(3)
        dask_once(archive, folder / "killed", cluster.file, victim)
        same = fingerprint(folder / "killed") == expected
        shutil.rmtree(folder / "killed")
        return statistics.median(times), same


def dask_once(
    archive: Path, data: Path, file: Path, victim: subprocess.Popen[bytes] | None
) -> None:
    """Read everything; the victim is killed when the first segments are there."""
    state = st.open_state(cfg.Aggregator(data=data))
    store = Store(state, data)
    found = rebuild.tasks(store, [archive], Options("UTC", 600, "c1"))
    for done in rebuild.dask_run(found, address=None, file=file):
        ingest.take(store, done, ingest.Tally())
        if victim is not None:
            victim.kill()
    state.close()


def report_figures(data: Path, folder: Path) -> tuple[list[list[Any]], list[str]]:
    state = st.open_state(cfg.Aggregator(data=data))
    store = Store(state, data)
    remarks = []
    took, _ = timed(lambda: compact.compact(store, everything=True))
    remarks.append(f"Compaction of all sets into one: {took:.1f} s.")
    took, made = timed(lambda: accounts.current(store, SITE))
    remarks.append(f"Accounts of all runs, once after each ingest: {took:.1f} s.")
    keys = ("software", "version", "user", "project", "month")

    def ask(rules: Rules) -> list[report.Row]:
        """As `report` does: new paths, or all under new rules, are mapped first."""
        software.update(state, rules)
        names = dict(software.mapping(state, rules.version))
        return report.rows(report.open_accounts(made, names), keys, report.Filter())

    changed = []
    for turn in range(3):
        rules = Rules.from_config(facts_site.rules(turn), "bench")
        changed.append(timed(lambda rules=rules: ask(rules))[0])  # type: ignore[misc]
    times = [timed(lambda: ask(rules)) for _ in range(5)]
    warm = statistics.median(time for time, _ in times)
    found = times[0][1]
    names = dict(software.mapping(state, rules.version))
    ours = {(row.keys, row.kind): row.cpu_ns for row in found
            if row.kind in ("software", "ignored", "undetermined")}  # fmt: skip
    theirs_s, theirs, points = sqlite_report(store, made, names, folder / "points.sqlite")
    same = {key: cpu for key, cpu in ours.items() if cpu} == {k: c for k, c in theirs.items() if c}
    remarks.append(
        f"{points:,} points in SQLite; {len(theirs):,} rows of the report, the CPU time of each the"
        f" same: {same}."
    )
    looks = look_up(manifest.read(store))
    year = a_year(manifest.read(store), folder / "year")
    view = manifest.read(year)
    before = look_up(view)
    accounts.current(year, SITE)
    over = look_up(view)
    size = sum(one.bytes for one in view.sets) >> 20
    remarks.append(
        f"A year: the same jobs as if {sum(YEAR_SETS):,} segments of an hour held them, in"
        f" {len(view.sets)} sets, the most that compaction leaves of these; {size} MB. Look-ups:"
        f" median of 15 runs here and there; CPU {looks.cpu_s * 1000:.0f} ms in one set,"
        f" {over.cpu_s * 1000:.0f} ms in a year. Right after an ingest, before any report has made"
        f" the accounts: {before.wall_s * 1000:.0f} ms."
    )
    year.state.close()
    state.close()
    return [
        ["report by software, version, user, project, month", warm, theirs_s, theirs_s / warm],
        ["the same after a change of rules: all paths mapped anew", statistics.median(changed),
         theirs_s, theirs_s / statistics.median(changed)],
        ["one run with its ledger, all in one set", looks.wall_s, None, None],
        ["one run with its ledger, after a year of segments", over.wall_s, None, None],
    ], remarks  # fmt: skip


class Look(NamedTuple):
    """Medians over runs here and there, each asked for the first time."""

    wall_s: float
    cpu_s: float


def look_up(view: Manifest) -> Look:
    chance = random.Random(5)
    numbers = [chance.randrange(1, facts_site.JOBS + 1) for _ in range(15)]
    times = []
    for number in numbers:
        cpu = time.process_time()
        took, found = timed(lambda number=number: job.runs(view, SITE, number))  # type: ignore[misc]
        times.append((took, time.process_time() - cpu))
        assert found[0]["job"] == number
    return Look(*map(statistics.median, zip(*times, strict=True)))


def a_year(view: Manifest, folder: Path) -> Store:
    """Sets as compaction leaves them of a year of segments, the jobs in turn."""
    store = Store(st.open_state(cfg.Aggregator(data=folder)), folder)
    connection = tables.connect()
    done = 0
    for segments in reversed(YEAR_SETS):
        low, high = (
            1 + facts_site.JOBS * upto // sum(YEAR_SETS) for upto in (done, done + segments)
        )
        done += segments
        with tables.SetWriter(manifest.facts_folder(folder)) as writer:
            for table in ("points", "totals", "epochs", "claims", "jobs"):
                tables.copy(
                    connection,
                    f"SELECT * FROM {view.source(table)} WHERE job_id >= {low} AND job_id < {high}"
                    f" ORDER BY {tables.SORTED_BY[table]}",
                    writer.path(table),
                    level=3,
                )
            size = writer.finish()
        found = Result(writer.name, tuple(writer.tables), size, None, None, 0, 0, (), (),
                       low, high - 1)  # fmt: skip
        manifest.record(store, f"year {done}", "bench", 1, found)
    return store


def sqlite_report(
    store: Store, made: accounts.Accounts, names: dict[bytes, Any], file: Path
) -> tuple[float, dict[Any, int], int]:
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
    points = database.execute("SELECT count(*) FROM points").fetchone()[0]
    database.close()
    file.unlink()
    return took, {(row[:5], row[5]): row[6] for row in found}, points


def main() -> None:
    print(run().render())


if __name__ == "__main__":
    main()
