"""`sams-aggregator reprocess`: all facts once more, from any set of archives.

The new facts grow in a folder of their own, with a state of their own, so that a
rebuild that was interrupted goes on and the facts in use stay as they are until the new
ones take their place in one transaction.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from sams_aggregator import compact, ingest, manifest, own_archive, pool, sources
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.ingest import Outcome, Tally, Task
from sams_aggregator.manifest import Store
from sams_aggregator.progress import bar
from sams_aggregator.sources import Source
from sams_aggregator.work import Builder, Options
from sams_ebpf import durable
from sams_ebpf.errors import SamsError, UsageError

log = logging.getLogger(__name__)

REBUILD: Final = "rebuild"


def command(arguments: argparse.Namespace) -> int:
    """`reprocess`."""
    config = cfg.load(arguments)
    data = config.aggregator.data
    state = st.open_state(config.aggregator)
    try:
        if not arguments.replace and manifest.extents(state):
            raise UsageError(
                f"{data}: holds facts already: rebuild them with --replace, or give another --data"
            )
        archives, folders = ingest.chosen(arguments, config)
        ingest.archive_sacct(config, arguments.sacct)
        own = data / own_archive.FOLDER
        if own.exists():
            archives.append(own)
        workers = arguments.workers or config.aggregator.worker_count
        tally = Tally()
        new = open_rebuild(config)
        try:
            options = ingest.options_of(config)
            manifest.fix_options(new.state, options)
            found = tasks(new, archives, options)
            with bar("reprocess", len(found)) as advance:
                for done in executor(arguments, found, workers):
                    ingest.take(new, done, tally)
                    advance(1)
            for source in folders:
                archived_files(new, source, options, tally)
            compact.compact(new)
            if tally.failed:
                raise SamsError(
                    f"{tally.failed} units could not be read; the facts in use stay as they are,"
                    " and the next `reprocess` goes on from here"
                )
            swap(new, Store(state, data))
        finally:
            new.state.close()
        shutil.rmtree(data / REBUILD, ignore_errors=True)
        return tally.close("reprocess")
    finally:
        state.close()


def open_rebuild(config: cfg.Config) -> Store:
    """The store in which the new facts grow."""
    part = msgspec.structs.replace(
        config.aggregator, data=config.aggregator.data / REBUILD, state=""
    )
    return Store(st.open_state(part), part.data)


def tasks(new: Store, archives: Iterable[Path], options: Options) -> list[Task]:
    """Segments that the rebuild has not read yet, the largest first."""
    known = manifest.extents(new.state)
    folder = manifest.facts_folder(new.data).resolve()
    found = [
        Task(ref, options, folder)
        for path in archives
        for ref in sources.segments(path)
        if ref.extent > known.get(ref.unit, 0)
    ]
    return sorted(found, key=lambda task: -task.ref.extent)


def executor(
    arguments: argparse.Namespace, found: list[Task], workers: int
) -> Iterator[pool.Done[Task, Outcome]]:
    """Processes of this host, or a Dask cluster."""
    if arguments.dask is None and arguments.dask_file is None:
        return pool.run(ingest.read_segment, found, workers)
    return dask_run(found, address=arguments.dask, file=arguments.dask_file)


def dask_run(
    found: list[Task], *, address: str | None, file: Path | None
) -> Iterator[pool.Done[Task, Outcome]]:
    """Do all tasks on a Dask cluster; what a lost worker had is done again by another.

    Workers have to see archives and data folder under the same paths.
    """
    try:
        import distributed  # noqa: PLC0415 - an extra of its own
    except ImportError as error:
        raise UsageError("Dask is not installed: pip install 'sams-ebpf[dask]'") from error
    if file is not None and not file.exists():
        # Dask would wait for it for ever.
        raise UsageError(f"--dask-file {file}: no such file; `dask scheduler` writes it")
    dask: Any = distributed  # it is not typed
    try:
        client = dask.Client(
            address=address, scheduler_file=None if file is None else str(file), timeout=30
        )
    except (OSError, ValueError) as error:
        raise SamsError(f"Dask scheduler {address or file}: no answer: {error}") from error
    with client:
        futures = client.map(ingest.read_segment, found, pure=False, retries=pool.MAX_DEATHS)
        of = dict(zip([future.key for future in futures], found, strict=True))
        for future in dask.as_completed(futures):
            task = of[future.key]
            failure = future.exception() if future.status == "error" else None
            if failure is None:
                yield pool.Done(task, future.result(), None)
            else:
                yield pool.Done(task, None, f"{type(failure).__name__}: {failure}")
            future.release()


def archived_files(new: Store, source: Source, options: Options, tally: Tally) -> None:
    """Read the files that an ingest has filed under archive/."""
    known = manifest.extents(new.state)
    folder = manifest.facts_folder(new.data)
    for group in sources.groups(source, archived=True):
        if group.unit in known:
            continue
        builder = Builder(options, check=True)
        for payload in group.payloads(options.cluster):
            builder.add(payload)
        result = builder.write(folder)
        manifest.record(new, group.unit, str(source.path), len(group.files), result)
        tally.add(result)


def swap(new: Store, old: Store) -> None:
    """Put the new facts in the place of the old ones. May be interrupted and done again."""
    target = manifest.facts_folder(old.data)
    source = manifest.facts_folder(new.data)
    tables = (st.files, st.units, st.paths, st.settings)
    with new.state.read() as connection:
        rows = {
            table.name: [dict(row._mapping) for row in connection.execute(sa.select(table))]  # noqa: SLF001
            for table in tables
        }
    for one in rows["files"]:
        if (source / one["name"]).exists():
            (source / one["name"]).rename(target / one["name"])
    durable.sync_folder(target)
    with old.state.begin() as connection:
        for table in (st.units, st.files, st.settings):
            connection.execute(table.delete())
        for table in (st.files, st.units, st.settings):
            if rows[table.name]:
                connection.execute(table.insert(), rows[table.name])
        if not old.state.sqlite:
            connection.execute(
                sa.text(
                    "SELECT setval(pg_get_serial_sequence('files', 'id'),"
                    " coalesce((SELECT max(id) FROM files), 0) + 1)"
                )
            )
        old.state.insert_new(connection, st.paths, rows["paths"])
