"""`sams-aggregator ingest`: what is new in archives and folders becomes facts."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from sams_aggregator import compact, manifest, own_archive, pool, sacct, sources
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_aggregator.progress import bar
from sams_aggregator.sources import SegmentRef, Source
from sams_aggregator.work import Builder, Options, Payload, Result, work, work_picked
from sams_ebpf.errors import PartialError, SamsError, UsageError
from sams_receiver.archive import Archive, Item, Kind

log = logging.getLogger(__name__)

SECOND: Final = 1_000_000_000


class Task(NamedTuple):
    """A segment to be read; can be sent to another process or host."""

    ref: SegmentRef
    options: Options
    folder: Path


class Outcome(NamedTuple):
    """What came of it; damage: ranges of the segment that hold no valid frame."""

    result: Result
    extent: int
    damage: tuple[str, ...]


class Tally:
    """What an ingest did, for its last line and its exit status."""

    def __init__(self) -> None:
        self.units = 0
        self.frames = 0
        self.records = 0
        self.bad = 0
        self.failed = 0

    def add(self, result: Result, damage: Sequence[str] = ()) -> None:
        """Count one unit, and name what was set aside."""
        self.units += 1
        self.frames += result.frames
        self.records += result.records
        self.bad += len(result.bad) + len(damage)
        for place, reason in result.bad[:20]:
            log.warning("%s: set aside: %s", place, reason)
        if len(result.bad) > 20:
            log.warning("… and %d more of the same unit", len(result.bad) - 20)
        for text in damage:
            log.warning("%s", text)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Name and count a source that cannot be read, and go on with the others."""
        try:
            yield
        except (SamsError, OSError) as error:
            log.error("%s", error)
            self.failed += 1

    def close(self, what: str) -> int:
        """Say what was done. Raises PartialError where something was set aside."""
        log.info(
            "%s: %d units, %d frames, %d records read", what, self.units, self.frames, self.records
        )
        if self.bad or self.failed:
            raise PartialError(
                f"{what}: {self.bad} parts set aside, {self.failed} inputs not read; the rest is in"
            )
        return 0


def options_of(config: cfg.Config) -> Options:
    """What the rows depend on, from the configuration."""
    part = config.aggregator
    return Options(part.timezone, part.points_every_s, config.site.cluster, part.timezone)


def command(arguments: argparse.Namespace) -> int:
    """`ingest`."""
    config = cfg.load(arguments)
    options = options_of(config)
    state = st.open_state(config.aggregator)
    try:
        manifest.fix_options(state, options)
        store = Store(state, config.aggregator.data)
        archives, folders = chosen(arguments, config)
        tally = Tally()
        archive_sacct(config, arguments.sacct)
        if arguments.sacct_command:
            with tally.going_on():
                ask_sacct(config)
        own = store.data / own_archive.FOLDER
        if own.exists():
            archives.append(own)
        ingest_archives(store, archives, options, tally, config.aggregator.worker_count)
        for source in folders:
            with tally.going_on():
                ingest_folder(store, source, options, tally)
        if not arguments.no_compact:
            compact.compact(store)
        return tally.close("ingest")
    finally:
        state.close()


def chosen(arguments: argparse.Namespace, config: cfg.Config) -> tuple[list[Path], list[Source]]:
    """Archives and folders that the options name, else those of the configuration.

    `--sacct` names no source of batches: its rows are read beside whichever there are.
    Raises SamsError for a source named by an option that is none.
    """
    part = config.aggregator
    named = bool(arguments.archive or arguments.batches or arguments.sams_json)
    archives = list(arguments.archive)
    batches, sams = list(arguments.batches), list(arguments.sams_json)
    if not named:
        archives = [path for path in part.archives if path.exists()]
        for path in part.archives:
            if not path.exists():
                log.warning("aggregator.archives: %s: not there yet", path)
        batches, sams = part.batches, part.sams_json
    folders = [
        *[Source("batches", path) for path in batches],
        *[Source("sams-json", path) for path in sams],
    ]
    if named:
        for path in archives:
            Archive.open(path)
        for source in folders:
            sources.folders(source)
    return archives, folders


def archive_sacct(config: cfg.Config, files: Iterable[Path]) -> None:
    """Put rows of sacct in files, as they were read, into the aggregator's own archive."""
    for path in files:
        try:
            output, read_ns = path.read_bytes(), path.stat().st_mtime_ns
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            sacct.check_head(output)
        except sacct.SacctError as error:
            raise UsageError(f"{path}: {error}") from error
        doubt = sacct.doubt(output, read_ns)
        if doubt is not None:
            log.warning("%s: %s", path, doubt)
        _keep_rows(config, output, read_ns)


def ask_sacct(config: cfg.Config) -> None:
    """The same with what sacct itself says of the last days. Raises SamsError."""
    now = time.time()
    asked = config.aggregator.sacct
    output = sacct.ask(
        asked.command,
        since=now - asked.days * 86400,
        until=now,
        timeout_s=asked.timeout_s,
    )
    _keep_rows(config, output, int(now * SECOND))


def _keep_rows(config: cfg.Config, output: bytes, read_ns: int) -> None:
    payloads = sacct.payloads(output, config.site.cluster, read_ns)
    own_archive.append(config.aggregator.data, (Item(Kind.SACCT, one) for one in payloads))


def ingest_archives(
    store: Store,
    archives: Iterable[Path],
    options: Options,
    tally: Tally,
    workers: int,
) -> None:
    """Read what the archives have beyond what was read before."""
    known = manifest.extents(store.state)
    folder = manifest.facts_folder(store.data)
    tasks: list[Task] = []
    for path in archives:
        with tally.going_on():
            tasks += [
                Task(ref, options, folder)
                for ref in sources.segments(path)
                if ref.extent > known.get(ref.unit, 0)
            ]
    with bar("ingest", len(tasks)) as advance:
        for done in pool.run(read_segment, tasks, workers):
            take(store, done, tally)
            advance(1)


def take(store: Store, done: pool.Done[Task, Outcome], tally: Tally) -> None:
    """Record what came of one segment."""
    ref = done.task.ref
    if done.result is None:
        tally.failed += 1
        log.error("%s, unit %s: not read: %s", ref.archive, ref.unit, done.error)
        return
    outcome = done.result
    if manifest.record(store, ref.unit, str(ref.archive), outcome.extent, outcome.result):
        tally.add(outcome.result, outcome.damage)


def read_segment(task: Task) -> Outcome:
    """Work on one segment: pure but for the set it writes."""
    reading = sources.Reading(task.ref)
    picked = reading.picked()
    found = None if picked is None else work_picked(picked, task.options, task.folder)
    if found is not None:
        return Outcome(found, task.ref.extent, ())
    result = work(reading, task.options, task.folder)
    # What stands behind the last frame is damage or not yet whole: it was looked at too.
    extent = max(reading.extent, task.ref.extent if reading.problems else 0)
    return Outcome(result, extent, tuple(reading.problems))


def ingest_folder(store: Store, source: Source, options: Options, tally: Tally) -> None:
    """Read files and file them: archive/ when their facts are recorded, error/ when bad."""
    filing = sources.folders(source)
    folder = manifest.facts_folder(store.data)
    for group in sources.groups(source):
        builder = Builder(options, check=True)
        rejected = []
        kept: list[Payload] = []
        for found, payload in zip(group.files, group.payloads(options.cluster), strict=True):
            kept.append(payload)
            if not builder.add(payload):
                rejected.append(found)
        result = builder.write(folder)
        manifest.record(store, group.unit, str(source.path), len(kept), result)
        tally.add(result)
        try:
            for found in group.files:
                if found in rejected:
                    filing.reject(found)
                else:
                    filing.archive(found)
        except OSError as error:
            raise SamsError(f"{source.path}: cannot file what was read: {error}") from error
