# ruff: noqa: S608 - the statements are the tests' own
"""A store of facts in a folder, and everything that can be said from it, to be compared."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sams_aggregator import accounts, job, manifest, outbox, report, sacct, sams_xml, tables, usage
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_aggregator.rules import Software
from sams_aggregator.work import KIND_COUNTERS, KIND_SACCT, Options, Payload, work

RULES = {
    b"/usr/bin/bash": Software("system", "", "", ignore=True),
    b"/opt/apps/gromacs/2024.1/bin/gmx_mpi": Software("gromacs", "2024.1", ""),
    b"/opt/apps/python/3.12.4/bin/python3.12": Software("python", "3.12", "3.12.4"),
    b"/opt/apps/orca/6.0/orca_scf_mpi": Software("orca", "6.0", "%(user)s"),
}
LONG_AFTER = 2_000_000_000 * 10**9


@contextmanager
def opened(folder: Path):  # noqa: ANN201
    """A store in folder."""
    state = st.open_state(cfg.Aggregator(data=folder))
    try:
        yield Store(state, folder)
    finally:
        state.close()


def payloads(batches: Iterable[bytes]) -> list[Payload]:
    return [Payload(KIND_COUNTERS, f"batch {n}", data) for n, data in enumerate(batches)]


def sacct_payloads(output: bytes, read_s: int, cluster: str | None = None) -> list[Payload]:
    return [
        Payload(KIND_SACCT, "sacct", data)
        for data in sacct.payloads(output, cluster, read_s * 10**9)
    ]


def add(store: Store, unit: str, found: Sequence[Payload], options: Options) -> None:
    """Work on a unit and record it."""
    folder = manifest.facts_folder(store.data)
    result = work(found, options, folder)
    assert not result.bad
    manifest.record(store, unit, "test", len(found), result)


def everything(store: Store, site: accounts.Site) -> dict[str, Any]:
    """All facts that count, accounts, reports and records: equal where the facts are equal."""
    view = manifest.read(store)
    connection = tables.connect()
    said: dict[str, Any] = {}
    for table, schema in tables.SCHEMA.items():
        # The job id beside an epoch only says where to look for it.
        own = table in ("jobs", "claims")
        names = [name for name in schema if own or name != "job_id"]
        columns = ", ".join(f'"{name}"' for name in names)
        rows = connection.execute(f"SELECT {columns} FROM {view.latest(table)}").fetchall()
        said[table] = sorted(rows, key=repr)
    made = accounts.current(store, site)
    for table in accounts.TABLES:
        rows = connection.execute(f"SELECT * FROM {made.source(table)}").fetchall()
        said[table] = sorted(rows, key=repr)
    connection = report.open_accounts(made, dict(RULES))
    for keys in (("software", "version", "user", "project", "month"), ("path", "flags")):
        said[",".join(keys)] = sorted(report.rows(connection, keys, report.Filter()), key=repr)
    said["coverage"] = report.coverage(store, made, report.Filter()).rows
    ids = connection.execute(
        "SELECT DISTINCT job_id, cluster FROM run WHERE job_id IS NOT NULL ORDER BY ALL"
    ).fetchall()
    said["jobs in detail"] = [job.runs(view, site, *one) for one in ids]
    said["xml"] = xml(store, site)
    return said


def xml(store: Store, site: accounts.Site) -> bytes:
    """The SAMS records of all runs that have ended, long after all of them."""
    config = cfg.Config(site=cfg.Site(cluster=site.cluster),
                        aggregator=cfg.Aggregator(data=store.data, timezone=site.zone))  # fmt: skip
    found: list[outbox.Proposal] = []
    source = usage.FactsSource(store, config, now_ns=LONG_AFTER)
    outbox.survey(source, RULES, {}, found.append)
    return sams_xml.document([one.record for one in found], 0)


def split(chance: random.Random, items: Sequence[Any], parts: int) -> list[list[Any]]:
    """Items dealt out to parts, some to several, each part in an order of its own."""
    dealt: list[list[Any]] = [[] for _ in range(parts)]
    for item in items:
        for at in chance.sample(range(parts), chance.choice([1, 1, min(2, parts)])):
            dealt[at].append(item)
    for part in dealt:
        chance.shuffle(part)
    return dealt
