"""Every wire version there ever was is read for ever: the same facts from the same archive.

The archives in `golden_archives/` are made once, by `tests/support/make_golden_archive.py`
of the time, and never again. What is compared are the columns of that time: new ones may
come, old ones keep their meaning.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import golden_archives
import pytest

from sams_aggregator import outbox, own_archive, software
from sams_aggregator.rules import Rules
from sams_ebpf import wire
from sams_receiver.archive import Archive, Kind

VERSIONS = pytest.mark.parametrize("version", range(1, wire.VERSION + 1))


def test_there_is_one_for_each_version() -> None:
    found = {path.name for path in golden_archives.FOLDER.iterdir()}
    assert found == {f"v{version}" for version in range(1, wire.VERSION + 1)}


@VERSIONS
def test_its_facts_and_accounts_are_what_they_were(version: int, tmp_path: Path) -> None:
    folder = golden_archives.FOLDER / f"v{version}"
    expected = json.loads((folder / "expected.json").read_text())
    found = json.loads(json.dumps(golden_archives.said(folder, tmp_path)))
    for table, rows in expected.items():
        columns = set(rows[0])
        assert ordered(found[table], columns) == ordered(rows, columns), table


def ordered(rows: list[dict[str, Any]], columns: set[str]) -> list[str]:
    return sorted(json.dumps({name: row[name] for name in sorted(columns)}) for row in rows)


def test_the_first_one_says_what_its_batches_and_rows_say() -> None:
    """What is expected of it, summed up once more and without the aggregator."""
    folder = golden_archives.FOLDER / "v1"
    latest: dict[Any, tuple[int, int, int]] = {}
    for segment in Archive.open(folder / "received").segments():
        for frame in segment.frames():
            batch = wire.decode(frame.data) if frame.kind == Kind.COUNTERS else None
            for record in batch.records if batch is not None else ():
                assert batch is not None
                key = (batch.epoch, batch.claims.cluster, batch.claims.node, record.key)
                now = (batch.generation, batch.sequence, record.cpu_ns)
                latest[key] = max(latest.get(key, now), now)
    used = {True: 0, False: 0}
    for (*_, (_path, flags)), (_generation, _sequence, cpu_ns) in latest.items():
        used[bool(flags & wire.OUTSIDE)] += cpu_ns
    rows = json.loads((folder / "expected.json").read_text())["account"]
    by_class = {name: sum(row["cpu_ns"] for row in rows if row["class"] == name)
                for name in ("path", "outside")}  # fmt: skip
    # 1.75 s are in upstream's JSON.
    assert by_class == {"path": used[False] + 1_750_000_000, "outside": used[True]}
    assert sum(row["core_us"] for row in rows) == (3600 * 8 + 900 * 4 + 600 * 4) * 10**6


@VERSIONS
def test_its_rules_and_what_was_sent_are_known(version: int, tmp_path: Path) -> None:
    shutil.copytree(golden_archives.FOLDER / f"v{version}", tmp_path / "data")
    (one,) = software.history(tmp_path / "data")
    rules = Rules.from_config(one.document, "archived")
    named = rules.map(b"/opt/apps/gromacs/2024.1/bin/gmx_mpi")
    assert named is not None
    assert named[:3] == ("gromacs", "2024", "%(user)s")
    (frame,) = own_archive.frames(tmp_path / "data", Kind.SENT)
    assert outbox.read_entry(frame.data).records[0].record_id == "c1:101:20251130235000"
