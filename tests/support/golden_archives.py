# ruff: noqa: S608 - the statements are the tests' own
"""Golden archives: one for each wire version there ever was, and what is to be read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import facts

from sams_aggregator import accounts, ingest, manifest, tables
from sams_aggregator.work import Options

FOLDER = Path(__file__).parent.parent / "aggregator" / "golden_archives"
SITE = accounts.Site("Europe/Stockholm", "c1")
OPTIONS = Options(SITE.zone, 600, SITE.cluster, "UTC")
# Numbers that only stand for rows of other tables.
_LEFT_OUT = {"tie", "run", "path_id"}


def said(folder: Path, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """Facts and accounts of an archive as plain data; reading leaves the archive as it is."""
    tally = ingest.Tally()
    with facts.opened(scratch) as store:
        archives = [folder / "received", folder / "archive"]
        ingest.ingest_archives(store, archives, OPTIONS, tally, 1)
        view = manifest.read(store)
        made = accounts.current(store, SITE)
    found = {table: _rows(f"SELECT * FROM {view.latest(table)}") for table in tables.SCHEMA}
    run, account = made.source("run"), made.source("account")
    found["run"] = _rows(f"SELECT * FROM {run}")
    found["account"] = _rows(
        "SELECT r.cluster, r.job_id, r.start_ns, a.month, a.class, p.path, a.flags,"
        " a.cpu_ns::HUGEINT AS cpu_ns, a.core_us"
        f" FROM {account} a JOIN {run} r USING (run)"
        f" LEFT JOIN {made.source('path')} p USING (path_id)"
    )
    assert (tally.bad, tally.failed) == (0, 0)
    return found


def _rows(query: str) -> list[dict[str, Any]]:
    cursor = tables.connect().execute(query)
    names = [column[0] for column in cursor.description]
    rows = [
        {name: _plain(name, value) for name, value in zip(names, row, strict=True)
         if name not in _LEFT_OUT}
        for row in cursor.fetchall()
    ]  # fmt: skip
    return sorted(rows, key=repr)


def _plain(name: str, value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    # The epoch's own 16 bytes; how it is told from another sender's is no matter here.
    return value[:16].hex() if name == "epoch" else value.decode("latin-1")
