# ruff: noqa: S608 - the statements are the tests' own
"""Rebuild equals increment: any split, order, repetition and interleaving says the same."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import facts
import pytest
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sams_aggregator import accounts, compact, manifest, tables
from sams_aggregator.work import Options
from sams_ebpf import wire
from sams_ebpf.errors import SamsError

OPTIONS = Options(zone="Europe/Stockholm", points_every_s=600, cluster="c1")
SITE = accounts.Site("Europe/Stockholm", "c1")
# Half an hour before the end of October 2025 in Stockholm, in the night of no change of clocks.
BEGIN = 1_761_949_800


def history(seed: int) -> tuple[list[bytes], bytes]:
    """Batches of a few epochs across a month's end, and sacct's rows of most of them."""
    chance = random.Random(seed)
    batches: list[bytes] = []
    rows = []
    for job in range(chance.randint(1, 4)):
        start = BEGIN + chance.randrange(1200)
        end = start + chance.randint(120, 3600)
        nodes = chance.randint(1, 2)
        row = synthetic.Row(job + 1, start, end, end - start, 8, "n1" if nodes == 1 else "n[1-2]",
                            nodes)  # fmt: skip
        if chance.random() < 0.8:
            rows.append(row)
        for node in range(nodes):
            made = synthetic.epoch(
                chance, synthetic.claims(row, f"n{node + 1}"), start,
                synthetic.harvests(start, end, 60), outside=chance.random() < 0.3,
                final=chance.random() < 0.7, cgroup=chance.random() < 0.8,
            )  # fmt: skip
            batches += made.encoded()
    return batches, synthetic.output(rows)


@given(seed=st.integers(0, 2**32), order=st.integers(0, 2**32), parts=st.integers(2, 6))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_split_order_repetition_and_compaction_says_the_same(
    seed: int, order: int, parts: int
) -> None:
    batches, output = history(seed)
    chance = random.Random(order)
    with tempfile.TemporaryDirectory() as folder:
        with facts.opened(Path(folder, "whole")) as store:
            facts.add(store, "all", facts.payloads(batches), OPTIONS)
            facts.add(store, "sacct", facts.sacct_payloads(output, BEGIN), OPTIONS)
            whole = facts.everything(store, SITE)
        with facts.opened(Path(folder, "parts")) as store:
            dealt = facts.split(chance, batches, parts)
            for number, part in enumerate(dealt):
                # A live segment is read again when it has grown.
                for upto in {len(part), chance.randint(0, len(part))}:
                    found = facts.payloads(part[:upto])
                    facts.add(store, f"part {number}", found, OPTIONS)
                if number == 1:
                    facts.add(store, "sacct", facts.sacct_payloads(output, BEGIN), OPTIONS)
                    if chance.random() < 0.5:
                        facts.everything(store, SITE)
                if chance.random() < 0.5:
                    compact.compact(store, everything=True)
            assert facts.everything(store, SITE) == whole


def test_what_is_compared_holds_records_and_jobs(tmp_path: Path) -> None:
    batches, output = history(9)
    with facts.opened(tmp_path) as store:
        facts.add(store, "all", facts.payloads(batches), OPTIONS)
        facts.add(store, "sacct", facts.sacct_payloads(output, BEGIN), OPTIONS)
        said = facts.everything(store, SITE)
    assert said["xml"].count(b"<sa:JobRecordID>") == len(said["jobs in detail"]) == 4


def test_epochs_add_up_and_values_within_an_epoch_do_not(tmp_path: Path) -> None:
    chance = random.Random(1)
    row = synthetic.Row(1, BEGIN, BEGIN + 600, 600, 8, "n1", 1)
    epochs = [
        synthetic.epoch(chance, synthetic.claims(row, "n1"), BEGIN + at,
                        [BEGIN + at + 60, BEGIN + at + 120],
                        paths=[b"/bin/x"], unattributed=False)
        for at in (0, 300)
    ]  # fmt: skip
    with facts.opened(tmp_path) as store:
        for number, one in enumerate(epochs):
            facts.add(store, str(number), facts.payloads(one.encoded()), OPTIONS)
        said = facts.everything(store, SITE)
    assert sum(line[5] for line in said["account"]) == sum(
        one.last.records[0].cpu_ns for one in epochs
    )


@pytest.mark.parametrize("said", [{"node": "bad"}, {"cluster": "c2"}, {"cluster": None}])
def test_nobody_adds_to_the_epoch_of_another_sender(
    tmp_path: Path, said: dict[str, str | None]
) -> None:
    chance = random.Random(1)
    row = synthetic.Row(1, BEGIN, BEGIN + 600, 600, 8, "n1", 1)
    one = synthetic.epoch(chance, synthetic.claims(row, "n1"), BEGIN,
                          [BEGIN + 60, BEGIN + 120], paths=[b"/bin/x"])  # fmt: skip
    values = {name: getattr(one.last, name) for name in one.last.__struct_fields__}
    values |= {"generation": 99, "claims": synthetic.claims(row, **{"node": "n1", **said}),
               "records": [wire.Record(b"/bin/x", 0, None, 1)]}  # fmt: skip
    with facts.opened(tmp_path) as store:
        found = facts.payloads([*one.encoded(), wire.encode(wire.Batch(**values))])
        facts.add(store, "1", found[:2], OPTIONS)
        # In one unit with it, in another, and after a merge.
        facts.add(store, "2", found, OPTIONS)
        compact.compact(store, everything=True)
        cpu = [row[5] for row in facts.everything(store, SITE)["account"] if row[2] == "path"]
    assert sum(cpu) == one.last.records[0].cpu_ns + 1


def test_the_highest_generation_and_sequence_wins_never_the_largest(tmp_path: Path) -> None:
    chance = random.Random(1)
    row = synthetic.Row(1, BEGIN, BEGIN + 600, 600, 8, "n1", 1)
    one = synthetic.epoch(chance, synthetic.claims(row, "n1"), BEGIN, [BEGIN + 60], paths=[b"/x"])
    first = one.batches[0]

    def later(generation: int, sequence: int, cpu_ns: int) -> bytes:
        values = {name: getattr(first, name) for name in first.__struct_fields__}
        values |= {"generation": generation, "sequence": sequence,
                   "records": [wire.Record(b"/x", 0, None, cpu_ns)]}  # fmt: skip
        return wire.encode(wire.Batch(**values))

    with facts.opened(tmp_path) as store:
        for number, batch in enumerate([later(2, 0, 50), later(1, 9, 900), later(1, 10, 70)]):
            facts.add(store, str(number), facts.payloads([batch]), OPTIONS)
        view = manifest.read(store)
        found = tables.connect().execute(f"SELECT cpu_ns FROM {view.latest('totals')}").fetchall()
    assert found == [(50,)]


def test_points_are_thinned_to_one_per_executable_and_interval(tmp_path: Path) -> None:
    chance = random.Random(2)
    row = synthetic.Row(1, BEGIN, BEGIN + 3600, 3600, 8, "n1", 1)
    one = synthetic.epoch(chance, synthetic.claims(row, "n1"), BEGIN,
                          synthetic.harvests(BEGIN, BEGIN + 3600), paths=[b"/x"])  # fmt: skip
    with facts.opened(tmp_path) as store:
        facts.add(store, "1", facts.payloads(one.encoded()), OPTIONS)
        view = manifest.read(store)
        found = (
            tables.connect()
            .execute(f"SELECT slot, end_ns FROM {view.latest('points')} ORDER BY slot")
            .fetchall()
        )
    slots = [slot for slot, _ in found]
    assert len(slots) == len(set(slots)) <= 7
    assert found[-1][1] == (BEGIN + 3600) * 10**9


def test_a_filter_on_bytes_finds_what_is_there(tmp_path: Path) -> None:
    """DuckDB's own filters in Parquet files deny blobs that are there: none may be written."""
    rows = [[bytes([n % 256, 255 - n % 256]) * 8, n % 7, 0, 0, 0, *[None] * 4] for n in range(450)]
    connection = tables.connect()
    file = tmp_path / "x.parquet"
    with tables.loaded({"epoch": "BLOB", "n": "BIGINT"}, [row[:2] for row in rows]) as source:
        tables.copy(connection, f"SELECT * FROM {source}", file)
    for epoch in {row[0] for row in rows}:
        found = connection.execute(
            f"SELECT count(*) FROM read_parquet('{file}') WHERE epoch = ?", [epoch]
        ).fetchone()
        assert found == (sum(row[0] == epoch for row in rows),)


def test_facts_of_two_time_zones_are_not_mixed(tmp_path: Path) -> None:
    with facts.opened(tmp_path) as store:
        manifest.fix_options(store.state, OPTIONS)
        manifest.fix_options(store.state, OPTIONS)
        with pytest.raises(SamsError, match=r"aggregator\.timezone: .*reprocess"):
            manifest.fix_options(store.state, OPTIONS._replace(zone="UTC"))


def test_gc_takes_only_what_nobody_names(tmp_path: Path) -> None:
    batches, _ = history(3)
    with facts.opened(tmp_path) as store:
        facts.add(store, "a", facts.payloads(batches[: len(batches) // 2]), OPTIONS)
        facts.add(store, "a", facts.payloads(batches), OPTIONS)
        before = facts.everything(store, SITE)
        assert compact.gc(store, 3600) == (0, 0)
        assert compact.gc(store, -1)[0] == 1
        assert compact.gc(store, -1)[0] == 0
        assert facts.everything(store, SITE) == before
