"""One job is found in the few sets that may hold it; a report by numbers is one by names."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import facts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
import synthetic

from sams_aggregator import accounts, compact, job, lookup, manifest, report
from sams_aggregator import state as st
from sams_aggregator.manifest import Manifest, Store
from sams_aggregator.report import Filter
from sams_aggregator.work import Options
from sams_ebpf import wire

OPTIONS = Options("Europe/Stockholm", 600, "c1")
SITE = accounts.Site("Europe/Stockholm", "c1")
BEGIN = 1_761_949_800  # half an hour before a month's end there


def fill(store: Store, jobs: int) -> None:
    """A unit for each job, and one with rows of sacct of them all."""
    chance = random.Random(3)
    rows = []
    for number in range(1, jobs + 1):
        row = synthetic.Row(
            number, BEGIN + 60 * number, BEGIN + 3600, 3600 - 60 * number, 4, "n1", 1
        )
        rows.append(row)
        made = synthetic.epoch(chance, synthetic.claims(row, "n1"), row.start,
                               synthetic.harvests(row.start, BEGIN + 3600),
                               outside=number % 2 == 0)  # fmt: skip
        facts.add(store, f"job {number}", facts.payloads(made.encoded()), OPTIONS)
    facts.add(store, "sacct", facts.sacct_payloads(synthetic.output(rows), BEGIN + 9999), OPTIONS)


def unknown(view: Manifest) -> Manifest:
    """The same sets, of which nobody knows what jobs they hold."""
    return view._replace(sets=tuple(s._replace(low_job=None, high_job=None) for s in view.sets))


def test_a_look_up_opens_the_sets_of_its_job_and_says_the_same(tmp_path: Path) -> None:
    with facts.opened(tmp_path) as store:
        fill(store, 5)
        for made in (False, True):
            view = manifest.read(store)
            if made:
                accounts.current(store, SITE)
            for number in range(1, 6):
                assert len(view.of_jobs([number]).sets) == 2  # its own, and that with all of sacct
                found = job.runs(view, SITE, number)
                assert found == job.runs(unknown(view), SITE, number)
                assert [one["job"] for one in found] == [number]
                assert found[0]["executables"]
            assert job.runs(view, SITE, 77) == []
        compact.compact(store, everything=True)
        (merged,) = manifest.read(store).sets
        assert (merged.low_job, merged.high_job) == (1, 5)


def test_a_set_with_batches_that_name_no_job_is_always_opened(tmp_path: Path) -> None:
    row = synthetic.Row(3, BEGIN, BEGIN + 600, 600, 4, "n1", 1)
    claims = wire.Claims(cluster="c1", node="n1", sluid="s3X")
    nameless = synthetic.epoch(random.Random(1), claims, BEGIN, [BEGIN + 300])
    with facts.opened(tmp_path) as store:
        fill(store, 2)
        facts.add(store, "nameless", facts.payloads(nameless.encoded()), OPTIONS)
        view = manifest.read(store)
        assert len(view.of_jobs([row.job_id]).sets) == 1
        compact.compact(store, everything=True)
        (merged,) = manifest.read(store).sets
        assert (merged.low_job, merged.high_job) == (None, None)


def test_a_state_of_before_learns_of_job_ids(tmp_path: Path) -> None:
    with facts.opened(tmp_path) as store:
        fill(store, 2)
        expected = facts.everything(store, SITE)
        with store.state.begin() as connection:
            for name in ("low_job", "high_job"):
                connection.execute(sa.text(f"ALTER TABLE files DROP COLUMN {name}"))
            connection.execute(st.migrations.delete().where(st.migrations.c.version >= 2))
    with facts.opened(tmp_path) as store:
        assert {one.low_job for one in manifest.read(store).sets} == {None}
        assert facts.everything(store, SITE) == expected


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_are_looked_up_as_a_loop_finds_them(tmp_path: Path, statistics: bool) -> None:
    chance = random.Random(8)
    numbers = [None] * 300 + sorted(chance.choices(range(0, 600, 2), k=2700))
    epochs = [b"%032d" % chance.randrange(40) for _ in numbers]
    table = pa.table({"n": pa.array(numbers, pa.int64()), "epoch": pa.array(epochs, pa.binary())})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=250, write_statistics=statistics)
    every = table.to_pylist()
    for _ in range(60):
        wanted = set(chance.choices(range(602), k=chance.randrange(4)))
        some = set(chance.choices(epochs, k=9)) if chance.random() < 0.5 else None
        nulls = chance.random() < 0.5
        assert lookup.rows(path, "n", wanted, nulls=nulls, epochs=some) == [
            row
            for row in every
            if (row["n"] in wanted or (nulls and row["n"] is None))
            and (some is None or row["epoch"] in some)
        ]


KEYS = (
    (), ("month",), ("software", "version", "user", "project", "month"), ("path", "flags"),
    ("local_version", "status", "job"), ("cluster", "partition", "run", "path"),
)  # fmt: skip


@pytest.mark.parametrize("keys", KEYS)
def test_a_report_by_numbers_is_one_by_names(tmp_path: Path, keys: tuple[str, ...]) -> None:
    def rows(found: list[report.Row]) -> list[Any]:
        return sorted(found, key=repr)

    with facts.opened(tmp_path) as store:
        fill(store, 4)
        made = accounts.current(store, SITE)
    # What holds the run's own user or project is never numbered.
    plain = {path: one for path, one in facts.RULES.items() if "%" not in "".join(one[:3])}
    for names in (plain, {}):
        connection = report.open_accounts(made, names)
        for chosen in (Filter(), Filter("c1", 202511), Filter(None, None, 202510), Filter("c2")):
            quick = rows(report._rows_by_numbers(connection, keys, chosen))
            assert quick == rows(report._rows_by_names(connection, keys, chosen))
            assert bool(quick) == (chosen.cluster != "c2")
