"""SAMS records of runs that have ended and settled, through an outbox.

A file of records is first put into the state, byte for byte; then written to the folder
from which the site's SAMS client takes it; only then are its records marked as sent. A
kill at any point leads to the same bytes under the same name once more, never to a lost
or a second, different record. What was sent is remembered by a digest of its content, so
a record goes out again exactly when it would say something else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import sqlalchemy as sa

from sams_aggregator import sams_xml
from sams_aggregator import state as st
from sams_aggregator.rules import Software
from sams_aggregator.sams_xml import Record
from sams_ebpf import durable
from sams_ebpf.errors import SamsError, UsageError

NS: Final = 10**9
KEPT_DAYS: Final = 90  # for which the bytes of files that were written are kept

Journal = Callable[[bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a job with the CPU time (ns) of its executables, over all its nodes.

    cpu_ns: attributed only; one path may stand there more than once. end_ns: None while
    it runs. settled: nothing more is to come, or is waited for no longer. partial:
    something of it is missing.
    """

    cluster: str
    job_id: int
    start_text: str | None
    user: str | None
    account: str | None
    end_ns: int | None
    settled: bool
    partial: bool
    cpu_ns: Sequence[tuple[bytes, int]]


class Source(Protocol):
    """Where runs come from: the facts, or a test."""

    def runs(self) -> Iterable[Run]:
        """Every run that is known; those with the same id of their record side by side."""
        ...


class Remembered(msgspec.Struct, frozen=True):
    """What is kept of a record that goes out."""

    record_id: str
    digest: str
    content: str
    partial: bool


class Proposal(NamedTuple):
    """A record that is to go out, and why."""

    record: Record
    partial: bool
    new: bool


@dataclass(slots=True)
class Survey:
    """How many runs of each kind there are.

    unsendable: ids of records that were sent and of which something else, or nothing any
    more, is to be said by no record: the format has no way to take them back.
    """

    new: int = 0
    changed: int = 0
    partial: int = 0
    unchanged: int = 0
    running: int = 0
    unsettled: int = 0
    empty: int = 0
    older: int = 0
    unsendable: list[str] = field(default_factory=list)


class ExtractError(SamsError):
    """Records could not be written; what was begun is finished by the next call."""


# ------------------------------------------------------------------ what to send


def survey(
    source: Source,
    names: Mapping[bytes, Software | None],
    sent: Mapping[str, str],
    send: Callable[[Proposal], None],
    *,
    since_ns: int | None = None,
    remove_less_then: Decimal = sams_xml.REMOVE_LESS_THEN,
) -> Survey:
    """Compare what the facts say of each run with what was sent (digests by record id).

    names: software of each path; a path that is not there is undetermined. send: told of
    each record that is to go out.
    """
    found = Survey()
    withdrawn = set(sent)
    for identity, group in groupby(source.runs(), key=_identity):
        runs = list(group)
        if any(run.end_ns is None for run in runs):
            found.running += 1
            withdrawn.discard(identity)
            continue
        if not all(run.settled for run in runs):
            found.unsettled += 1
            withdrawn.discard(identity)
            continue
        record = sams_xml.make_record(
            identity,
            runs[0].user,
            runs[0].account,
            [(names.get(path), used) for run in runs for path, used in run.cpu_ns],
            remove_less_then=remove_less_then,
        )
        if record is None:
            found.empty += 1
            continue
        withdrawn.discard(identity)
        if sent.get(identity) == record.digest:
            found.unchanged += 1
        elif since_ns is not None and max(run.end_ns or 0 for run in runs) < since_ns:
            found.older += 1
        else:
            proposal = Proposal(record, any(run.partial for run in runs), identity not in sent)
            found.new += proposal.new
            found.changed += not proposal.new
            found.partial += proposal.partial
            send(proposal)
    found.unsendable = sorted(withdrawn)
    return found


def _identity(run: Run) -> str:
    """Without start times all requeues of a job share one record."""
    return sams_xml.record_id(run.cluster, run.job_id, run.start_text)


# ------------------------------------------------------------------ outbox


def sent_digests(state: st.State) -> dict[str, str]:
    """Digest of what was sent last, by record id."""
    with state.read() as connection:
        rows = connection.execute(sa.select(st.sent.c.record_id, st.sent.c.digest)).all()
        return {row[0]: row[1] for row in rows}


def put(state: st.State, proposals: Sequence[Proposal], now_ns: int) -> str:
    """Put records into the outbox as one file, and give its name."""
    body = sams_xml.document([one.record for one in proposals], now_ns // NS)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_ns // NS))
    name = f"{stamp}-{sha256(body).hexdigest()[:16]}.xml"
    kept = [
        Remembered(
            one.record.record_id,
            one.record.digest,
            msgspec.json.encode(one.record.entries).decode(),
            one.partial,
        )
        for one in proposals
    ]
    row = {
        "name": name,
        "body": body,
        "records": msgspec.json.encode(kept).decode(),
        "created_ns": now_ns,
    }
    with state.begin() as connection:
        state.insert_new(connection, st.outbox, [row])
    return name


def flush(state: st.State, folder: Path, journal: Journal | None = None) -> int:
    """Write every file of the outbox that is not known to be written; gives their number.

    journal: told of each file once it is on disk and before it is marked, so that what
    was sent can be known without this state. Raises ExtractError.
    """
    waiting = (
        sa.select(st.outbox.c.name)
        .where(st.outbox.c.written_ns.is_(None))
        .order_by(st.outbox.c.created_ns, st.outbox.c.name)
    )
    with state.read() as connection:
        names = list(connection.scalars(waiting))
    for name in names:
        row = st.outbox.c
        with state.read() as connection:
            body, records, created = connection.execute(
                sa.select(row.body, row.records, row.created_ns).where(row.name == name)
            ).one()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            durable.write(folder / name, bytes(body))
        except OSError as error:
            raise ExtractError(
                f"{folder / name}: cannot be written: {error.strerror}; the records stay in the"
                " outbox for the next call"
            ) from error
        entry = Entry(name, created, msgspec.json.decode(records, type=list[Remembered]))
        if journal is not None:
            journal(msgspec.msgpack.encode(entry))
        _mark(state, entry)
    return len(names)


class Entry(msgspec.Struct, frozen=True):
    """One file that was written, as the journal keeps it."""

    file: str
    created_ns: int
    records: list[Remembered]


read_entry: Final[Callable[[bytes], Entry]] = msgspec.msgpack.Decoder(Entry).decode


def restore(state: st.State, entries: Iterable[bytes]) -> int:
    """Take over what a journal says was sent, into a state that may not know it.

    Of several files with the same record the youngest counts. Raises msgspec's errors for
    bytes that are no entry.
    """
    number = 0
    for entry in sorted(map(read_entry, entries), key=lambda e: (e.created_ns, e.file)):
        _mark(state, entry)
        number += 1
    return number


def _mark(state: st.State, entry: Entry) -> None:
    """Mark a file as written and its records as sent, in one transaction."""
    table = st.sent
    insert = state.insert(table)
    columns = ("digest", "content", "file", "sent_ns", "partial")
    with state.begin() as connection:
        rows = [
            {
                "record_id": one.record_id,
                "digest": one.digest,
                "content": one.content,
                "file": entry.file,
                "sent_ns": entry.created_ns,
                "partial": one.partial,
            }
            for one in entry.records
        ]
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["record_id"],
                set_={name: insert.excluded[name] for name in columns},
                where=table.c.sent_ns <= insert.excluded.sent_ns,
            ),
            rows,
        )
        connection.execute(
            st.outbox.update()
            .where(st.outbox.c.name == entry.file)
            .values(written_ns=entry.created_ns)
        )


def forget_old(state: st.State, now_ns: int) -> None:
    """Drop the bytes of files that were written long ago."""
    limit = now_ns - KEPT_DAYS * 86400 * NS
    with state.begin() as connection:
        connection.execute(
            st.outbox.delete().where(
                st.outbox.c.written_ns.is_not(None), st.outbox.c.created_ns < limit
            )
        )


@contextlib.contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Keep a second extract out as long as this one works. Raises UsageError."""
    data.mkdir(mode=0o750, parents=True, exist_ok=True)
    fd = os.open(data / "extract.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{data}: another extract is at work; wait for its end") from None
        yield
    finally:
        os.close(fd)
