"""The command `extract`: SAMS records of runs that have ended and settled."""

from __future__ import annotations

import argparse
import datetime as dt
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

from sams_aggregator import config as cfg
from sams_aggregator import outbox, own_archive, software, usage
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_aggregator.outbox import Proposal, Survey
from sams_ebpf.errors import UsageError
from sams_receiver.archive import Item, Kind

NS: Final = 10**9


def command(arguments: argparse.Namespace) -> int:
    """`extract`."""
    config = cfg.load(arguments)
    part = config.aggregator
    since_ns = moment(arguments.since, part.timezone)
    folder: Path | None = arguments.output or part.extract.output
    looking = arguments.dry_run or arguments.unsendable
    if folder is None and not looking:
        raise UsageError("aggregator.extract.output: not set; name a folder there or by --output")
    rules = software.load_rules(config, software.config_file(arguments))
    state = st.open_existing(part)
    try:
        with outbox.only_one(part.data):
            writer = None if looking or folder is None else _Writer(state, config, folder)
            store = Store(state, part.data)
            software.put_in_force(store, rules)
            _remember(store)
            found = outbox.survey(
                usage.FactsSource(store, config, time.time_ns()),
                dict(software.mapping(state, rules.version)),
                outbox.sent_digests(state),
                writer.send if writer is not None else _nothing if arguments.unsendable else _show,
                since_ns=since_ns,
                remove_less_then=Decimal(str(part.extract.remove_less_then)),
            )
            if writer is not None:
                writer.finish()
    finally:
        state.close()
    if arguments.unsendable:
        for identity in found.unsendable:
            print(identity)
    else:
        _summary(found, None if writer is None else writer.files)
    return 0


def _remember(store: Store) -> None:
    """Tell a state that knows of nothing that was sent, a new one say, what the archive knows."""
    if not outbox.sent_digests(store.state):
        kept = own_archive.frames(store.data, Kind.SENT)
        outbox.restore(store.state, (frame.data for frame in kept))


class _Writer:
    """Takes records, and writes them as soon as there are enough for a file."""

    def __init__(self, state: st.State, config: cfg.Config, folder: Path) -> None:
        self._state = state
        self._folder = folder
        self._data = config.aggregator.data
        self._most = config.aggregator.extract.jobs_per_file
        self._now_ns = time.time_ns()
        self._waiting: list[Proposal] = []
        # What an earlier call has begun comes first, so that its records count as sent.
        self.files = outbox.flush(state, folder, self._journal)

    def send(self, proposal: Proposal) -> None:
        """Take one record."""
        self._waiting.append(proposal)
        if len(self._waiting) >= self._most:
            self._put()

    def finish(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._put()
        outbox.forget_old(self._state, self._now_ns)

    def _put(self) -> None:
        outbox.put(self._state, self._waiting, self._now_ns)
        self._waiting = []
        self.files += outbox.flush(self._state, self._folder, self._journal)

    def _journal(self, entry: bytes) -> None:
        """Keep what was sent in the aggregator's own archive: nothing else could tell."""
        own_archive.append(self._data, [Item(Kind.SENT, entry)])


def _show(one: Proposal) -> None:
    marks = ("new" if one.new else "changed", *(["partial"] if one.partial else []))
    print(f"{one.record.record_id} {' '.join(marks)}")


def _nothing(_one: Proposal) -> None:
    pass


def _summary(found: Survey, files: int | None) -> None:
    verb = f"{files} files written" if files is not None else "nothing was written (--dry-run)"
    print(
        f"{verb}: {found.new} new records, {found.changed} changed"
        f" ({found.partial} of them partial), {found.unchanged} unchanged",
        file=sys.stderr,
    )
    print(
        f"left out: {found.running} running, {found.unsettled} not settled,"
        f" {found.older} before --since, {found.empty} without CPU in known software",
        file=sys.stderr,
    )
    if found.unsendable:
        print(
            f"{len(found.unsendable)} records were sent and are no longer true, but cannot be"
            " withdrawn: see --unsendable",
            file=sys.stderr,
        )


def moment(text: str | None, zone: str) -> int | None:
    """Nanoseconds since the epoch of a date in the site's zone. Raises UsageError."""
    if text is None:
        return None
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--since {text}: has to be YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS") from error
    if found.tzinfo is None:
        found = found.replace(tzinfo=ZoneInfo(zone))
    return int(found.timestamp()) * NS
