# ruff: noqa: S608 - the statements are the tests' own
"""A synthetic site with every odd case: the rows of every report add up to sacct's own total.

What each case should come to is worked out here once more, in plain Python.
"""

from __future__ import annotations

import datetime as dt
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import facts
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Row

from sams_aggregator import accounts, coretime, manifest, report, tables
from sams_aggregator.months import Months
from sams_aggregator.work import Options
from sams_ebpf import wire

ZONE = "Europe/Stockholm"
OPTIONS = Options(zone=ZONE, points_every_s=600, cluster="c1")
SITE = accounts.Site(ZONE, "c1")


def local(text: str) -> int:
    """A moment of the site's own clock, in Unix seconds."""
    return int(dt.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(ZONE)).timestamp())


READ = local("2026-04-02 12:00")


class Case:
    """Rows of sacct and epochs, with what should come of them."""

    def __init__(self) -> None:
        self.chance = random.Random(5)
        self.rows: list[Row] = []
        self.epochs: list[synthetic.Epoch] = []
        self.numbers = itertools.count(100)

    def row(self, start: str, seconds: int, **more: Any) -> Row:
        begin = local(start)
        values: dict[str, Any] = {
            "job_id": more.pop("job_id", None) or next(self.numbers),
            "start": begin, "end": begin + seconds, "elapsed": seconds, "cpus": 7,
            "node_list": "n1", "nodes": 1, "user": f"u{len(self.rows) % 3}",
            "account": f"p{len(self.rows) % 2}",
        }  # fmt: skip
        row = Row(**(values | more))
        self.rows.append(row)
        return row

    def epoch(
        self, row: Row, node: str = "n1", begin: int | None = None, end: int | None = None,
        said: dict[str, Any] | None = None, **more: Any,
    ) -> synthetic.Epoch:  # fmt: skip
        begin = begin if begin is not None else row.start + 1
        end = end if end is not None else (row.end or READ) - 1
        every = max(60, (end - begin) // 20)
        made = synthetic.epoch(self.chance, synthetic.claims(row, node, **(said or {})), begin,
                               synthetic.harvests(begin, end, every), **more)  # fmt: skip
        self.epochs.append(made)
        return made


@pytest.fixture(scope="module")
def case() -> Case:
    """The site. The clocks change on 2026-03-29 at 02:00."""
    site = Case()
    plain = site.row("2026-03-10 10:00", 3601, cpus=3)
    site.epoch(plain, outside=True)
    idle = site.row("2026-03-10 11:00", 100)
    site.epoch(idle, idle=True, unattributed=False)
    site.row("2026-03-10 12:00", 77)  # no data at all
    partly = site.row("2026-03-10 13:00", 3599, cpus=10, node_list="n[1-3],x7", nodes=4)
    site.epoch(partly, "n2")
    site.epoch(partly, "n3", unattributed=False)
    # Requeued: the same id twice, told apart by start; once more told apart by time alone.
    first = site.row("2026-03-11 10:00", 500, state="REQUEUED")
    second = site.row("2026-03-11 11:00", 700, job_id=first.job_id, restarts=1)
    site.epoch(first)
    site.epoch(second, said={"start_ns": None})
    # A requeue within seconds on the same node, and claims that do not tell which.
    one = site.row("2026-03-11 12:00", 300, state="REQUEUED")
    two = site.row("2026-03-11 12:05:00", 300, job_id=one.job_id, restarts=1)
    site.epoch(one, begin=one.start + 200, end=two.start + 100,
               said={"start_ns": None, "restart_count": None})  # fmt: skip
    # Resized twice; the rows make one run. Suspended: elapsed is less than the time between.
    grown = site.row(
        "2026-03-12 10:00", 1000, cpus=8, node_list="n[1-2]", nodes=2, state="RESIZING"
    )
    site.row(
        "2026-03-12 10:16:40",
        50,
        job_id=grown.job_id,
        cpus=4,
        state="RESIZING",
        submit=grown.start - 10,
    )
    site.row("2026-03-12 10:17:30", 901, job_id=grown.job_id, cpus=16, node_list="n[1-4]", nodes=4,
             submit=grown.start - 10)  # fmt: skip
    for node in ("n1", "n2", "n4"):
        site.epoch(grown, node, end=grown.start + 1900)
    halted = site.row("2026-03-12 12:00", 4000, elapsed=2500)
    site.epoch(halted)
    # Wrapped ids: another job of the same id, weeks before.
    site.epoch(site.row("2026-02-01 12:00", 600, job_id=plain.job_id))
    # Running; over a month's end; over the change of clocks and a month's end.
    site.epoch(
        site.row("2026-04-01 22:00", READ - local("2026-04-01 22:00"), end=None), final=False
    )
    site.epoch(site.row("2026-02-28 22:30", 10_001))
    long = site.row("2026-03-28 23:00", 8 * 86400 + 1, cpus=5)
    site.epoch(long)
    # All its CPU was used in the first of its months.
    lazy = site.row("2026-02-27 12:00", 4 * 86400)
    site.epoch(lazy, end=lazy.start + 7200)
    # Told by SLUID alone; a name of the node that sacct does not use; no claim of the cluster.
    named = site.row("2026-03-13 10:00", 1234, sluid="s7K5T8M2N4PQ3R")
    site.epoch(named, said={"job_id": None, "start_ns": None, "cluster": None})
    site.epoch(site.row("2026-03-13 11:00", 555), "n1.example.org")
    site.epoch(site.row("2026-03-13 12:00", 556), said={"cluster": None})
    # Restarted counters: two epochs of one run on one node. proc mode without a counter.
    twice = site.row("2026-03-14 10:00", 5000)
    site.epoch(twice, end=twice.start + 2000)
    site.epoch(twice, begin=twice.start + 2500, cgroup=False, mode="proc")
    # sacct does not know these.
    ghost = Row(9999, local("2026-03-15 10:00"), local("2026-03-15 11:00"), 3600, 9, "n1", 1)
    site.epoch(ghost)
    other = Row(plain.job_id, plain.start, plain.end, 1, 1, "n1", 1, cluster="c2")
    site.epoch(other)
    # Cancelled before it began to run anything.
    site.row("2026-03-16 10:00", 0)
    return site


@pytest.fixture(scope="module")
def store(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[manifest.Store]:
    batches = [data for one in case.epochs for data in one.encoded()]
    with facts.opened(tmp_path_factory.mktemp("site")) as store:
        facts.add(store, "batches", facts.payloads(batches), OPTIONS)
        facts.add(store, "sacct", facts.sacct_payloads(synthetic.output(case.rows), READ), OPTIONS)
        yield store


@pytest.fixture(scope="module")
def made(store: manifest.Store) -> accounts.Accounts:
    return accounts.current(store, SITE)


def test_every_report_adds_up_to_sacct(case: Case, made: accounts.Accounts) -> None:
    total = sum(row.cpu_time for row in case.rows)
    used = sum(one.last.ledger.cgroup_cpu_ns if one.last.ledger.cgroup_cpu_ns is not None  # type: ignore[union-attr]
               else one.last.ledger.attributed_cpu_ns for one in case.epochs)  # type: ignore[union-attr]  # fmt: skip
    used += sum(one.last.ledger.outside_cpu_ns for one in case.epochs)  # type: ignore[union-attr]
    connection = report.open_accounts(made, dict(facts.RULES))
    dimensions = ["software", "version", "user", "project", "partition", "cluster", "month", "job",
                  "path", "status"]  # fmt: skip
    groups = [*itertools.combinations(dimensions, 1), *itertools.combinations(dimensions, 2)]
    for keys in groups:
        rows = report.rows(connection, keys, report.Filter())
        assert sum(row.core_us for row in rows) == total * 10**6, keys
        assert sum(row.cpu_ns for row in rows) == used, keys
    by_month = report.rows(connection, ("month",), report.Filter())
    for month in {row.keys[0] for row in by_month}:
        chosen = report.Filter(since=month, until=month)
        assert sum(r.core_us for r in report.rows(connection, ("user",), chosen)) == sum(
            row.core_us for row in by_month if row.keys[0] == month
        )


def test_every_kind_of_row_is_there(made: accounts.Accounts) -> None:
    connection = report.open_accounts(made, dict(facts.RULES))
    rows = report.rows(connection, (), report.Filter())
    assert {row.kind for row in rows} == set(report.KINDS)


def test_runs_are_told_apart(case: Case, made: accounts.Accounts) -> None:
    connection = tables.connect()
    statuses = dict(
        connection.execute(
            f"SELECT status, count(*) FROM {made.source('run')} GROUP BY status"
        ).fetchall()
    )
    # Three rows of the resized job are one run.
    assert statuses == {"sacct": len(case.rows) - 2, "unresolved": 1, "unknown": 2}
    of_job = connection.execute(
        f"SELECT epochs, nodes_seen, nodes, cpu_time_s FROM {made.source('run')}"
        " WHERE job_id = ? AND cluster = 'c1' ORDER BY start_ns",
        [next(row.job_id for row in case.rows if row.state == "RESIZING")],
    ).fetchall()
    assert of_job == [(3, 3, 4, 8 * 1000 + 4 * 50 + 16 * 901)]


def test_what_is_ambiguous_is_guessed_into_no_run(made: accounts.Accounts) -> None:
    connection = tables.connect()
    found = connection.execute(
        f"SELECT r.start_ns, sum(a.core_us), sum(a.cpu_ns) FROM {made.source('account')} a"
        f" JOIN {made.source('run')} r USING (run) WHERE r.status = 'unresolved' GROUP BY ALL"
    ).fetchall()
    assert len(found) == 1
    assert found[0][1] == 0
    assert found[0][2] > 0


def test_accounts_equal_those_worked_out_in_plain_python(
    case: Case, made: accounts.Accounts
) -> None:
    found: dict[Any, int] = defaultdict(int)
    connection = tables.connect()
    for job, start, month, kind, path, flags, core in connection.execute(f"""
        SELECT r.job_id, r.start_ns, a.month, a.class, p.path, a.flags, a.core_us
        FROM {made.source("account")} a JOIN {made.source("run")} r USING (run)
        LEFT JOIN {made.source("path")} p USING (path_id) WHERE a.core_us > 0
    """).fetchall():
        found[job, start, month, kind, path, flags] += core
    assert dict(found) == oracle(case)


def oracle(case: Case) -> dict[Any, int]:
    """Core-time of each account row, from the case itself."""
    months = Months(ZONE)
    starts = dict(zip(months.numbers, months.starts_ns, strict=True))
    starts = {month: at for month, at in starts.items() if 202600 < month < 202700}
    runs: list[list[Row]] = []
    for row in sorted(case.rows, key=lambda row: (row.job_id, row.start)):
        if runs and runs[-1][-1].job_id == row.job_id and runs[-1][-1].state == "RESIZING":
            runs[-1].append(row)
        else:
            runs.append([row])
    said: dict[Any, int] = {}
    for pieces in runs:
        epochs = [one for one in case.epochs if belongs(one, pieces, case)]
        used: dict[int, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
        for one in epochs:
            increments(one, months, used)
        overall: dict[Any, int] = defaultdict(int)
        for of_month in used.values():
            for key, amount in of_month.items():
                overall[key] += amount
        with_data: dict[int, int] = defaultdict(int)
        nodes_seen = {one.claims.node for one in epochs}
        listed = {node for row in pieces for node in nodes_of(row)}
        key = (pieces[0].job_id, pieces[0].start * 10**9)
        for row in pieces:
            names = nodes_of(row)
            present = min(len(names), len(nodes_seen & set(names)) + len(nodes_seen - listed))
            end = row.end if row.end is not None else READ
            whole = row.cpu_time * 10**6
            for month, part in coretime.by_month(
                whole, row.start * 10**9, end * 10**9, starts
            ).items():
                missing = part * (len(names) - present) // len(names)
                with_data[month] += part - missing
                if missing:
                    place = (*key, month, "no data", None, None)
                    said[place] = said.get(place, 0) + missing
        for month, part in with_data.items():
            weights = {k: max(0, w) for k, w in used[month].items()}
            if not sum(weights.values()):
                weights = {k: max(0, w) for k, w in overall.items()}
            order = {k: (k[0], k[1] is not None, k[1] or b"", -1 if k[2] is None else k[2])
                     for k in weights}  # fmt: skip
            shares = coretime.share(part, {order[k]: w for k, w in weights.items()})
            for k in weights:
                if shares.get(order[k]):
                    said[*key, month, *k] = shares[order[k]]
            if not shares and part:
                said[*key, month, "no CPU", None, None] = part
    return said


def nodes_of(row: Row) -> list[str]:
    return {"n1": ["n1"], "n[1-2]": ["n1", "n2"], "n[1-3],x7": ["n1", "n2", "n3", "x7"],
            "n[1-4]": ["n1", "n2", "n3", "n4"]}[row.node_list]  # fmt: skip


def belongs(one: synthetic.Epoch, pieces: list[Row], case: Case) -> bool:
    said = one.claims
    if said.cluster not in (None, "c1"):
        return False
    if said.sluid is not None:
        return said.sluid == pieces[-1].sluid
    if said.job_id != pieces[0].job_id:
        return False
    if said.start_ns is not None:
        return said.start_ns == pieces[0].start * 10**9
    begin = one.batches[0].begin_ns or 0
    over = [row for row in case.rows if row.job_id == said.job_id
            and begin <= (row.end or READ) * 10**9
            and (one.last.end_ns or 0) >= row.start * 10**9]  # fmt: skip
    return len(over) == 1 and over[0] in pieces


def increments(one: synthetic.Epoch, months: Months, used: dict[int, dict[Any, int]]) -> None:
    """CPU of an epoch by month and row, from every batch of it in order."""
    before: dict[Any, int] = defaultdict(int)
    for batch in one.batches:
        month = months.of(batch.end_ns or 0)
        ledger = batch.ledger
        assert ledger is not None
        now = {(("outside" if r.flags & wire.OUTSIDE else "path"), r.path, r.flags): r.cpu_ns
               for r in batch.records}  # fmt: skip
        if ledger.unattributed_cpu_ns is not None:
            now["unattributed", None, None] = ledger.unattributed_cpu_ns
        for key, amount in now.items():
            used[month][key] += amount - before[key]
            before[key] = amount


@given(
    whole=st.integers(0, 10**20),
    weights=st.dictionaries(st.integers(0, 50), st.integers(-5, 10**19), max_size=8),
)
def test_shares_add_up_and_are_within_one_of_exact(whole: int, weights: dict[int, int]) -> None:
    parts = coretime.share(whole, weights)
    total = sum(max(0, weight) for weight in weights.values())
    if total == 0:
        assert parts == {}
        return
    assert sum(parts.values()) == whole
    for key, part in parts.items():
        assert abs(part - Fraction(whole * max(0, weights[key]), total)) < 1


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**20),
            st.dictionaries(st.integers(0, 50) | st.none(), st.integers(1, 10**25), min_size=1),
        ),
        max_size=5,
    )
)
def test_the_database_shares_out_as_plain_python_does_at_any_size(
    groups: list[tuple[int, dict[int | None, int]]],
) -> None:
    connection = tables.connect()
    connection.execute("CREATE TABLE weight (run BIGINT, whole HUGEINT, flags BIGINT, w HUGEINT)")
    for run, (whole, weights) in enumerate(groups):
        rows = [[run, str(whole), flags, str(w)] for flags, w in weights.items()]
        connection.executemany("INSERT INTO weight VALUES (?, ?, ?, ?)", rows)
    accounts.share_out(connection, ("run",), ("flags",))
    found: dict[int, dict[int | None, int]] = defaultdict(dict)
    for run, flags, part in connection.execute("SELECT run, flags, core_us FROM shared").fetchall():
        found[run][flags] = int(part)
    for run, (whole, weights) in enumerate(groups):
        keyed = {-1 if flags is None else flags: w for flags, w in weights.items()}
        assert {-1 if k is None else k: p for k, p in found[run].items()} == coretime.share(
            whole, keyed
        )


def test_months_of_the_site_have_the_hours_that_the_clocks_give_them() -> None:
    months = Months(ZONE)
    starts = dict(zip(months.numbers, months.starts_ns, strict=True))
    assert (starts[202604] - starts[202603]) // (3600 * 10**9) == 31 * 24 - 1
    assert (starts[202511] - starts[202510]) // (3600 * 10**9) == 31 * 24 + 1
    assert months.of(starts[202604]) == 202604
    assert months.of(starts[202604] - 1) == 202603
