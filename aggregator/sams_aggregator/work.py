# ruff: noqa: S608 - names of columns come from the schema
"""From the frames of one unit of input to one set of Parquet files. Pure but for that set.

The same frames under the same options always give the same rows, wherever and however
often this runs. Batches that a later full one of the same interval supersedes are not
even decoded beyond their header.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from sams_aggregator import sacct, sams_facts, tables
from sams_aggregator.months import Months, of_zone
from sams_aggregator.tables import SetWriter, integers
from sams_ebpf import wire
from sams_ebpf.errors import SamsError

MAX_PROBLEMS: Final = 10_000
SECOND: Final = 1_000_000_000
BATCH: Final = "batch"
SAMS_JSON: Final = "sams-json"
_CHUNK_ROWS: Final = 65_536
_CLAIM_NAMES: Final = tuple(tables.CLAIMS)


# Columns that are kept once for all rows that share them.
_SOURCE: Final = {"path": "p.name", "script": "s.name"}


class Options(NamedTuple):
    """What the rows depend on beside the frames; the same for all sets of a state.

    cluster: for input that does not name its own. sams_json_zone: zone of the start
    times in upstream's JSON.
    """

    zone: str = "UTC"
    points_every_s: int = 600
    cluster: str | None = None
    sams_json_zone: str = "UTC"


class Payload(NamedTuple):
    """One thing to be read: what it is (as `archive.Kind` counts), where it stood, its bytes."""

    kind: int
    place: str
    data: bytes
    received_ns: int = 0


class Result(NamedTuple):
    """What one unit gave. `name` is None where no payload gave a row.

    bad: places of payloads that were set aside, with the reason.
    """

    name: str | None
    tables: tuple[str, ...]
    size: int
    begin_ns: int | None
    end_ns: int | None
    frames: int
    records: int
    paths: tuple[bytes, ...]
    bad: tuple[tuple[str, str], ...]


class _Batch(NamedTuple):
    order: tuple[int, int, int]
    end_ns: int
    header: wire.Header
    data: bytes
    origin: str
    place: str


KIND_COUNTERS: Final = 1
KIND_SAMS_JSON: Final = 2
KIND_SACCT: Final = 16


class Builder:
    """Collects payloads of one unit and writes their set.

    check: look at every record of every batch, also of those that others supersede. A
    receiver has done so before it archived them.
    """

    def __init__(self, options: Options, *, check: bool = False) -> None:
        self._options = options
        self._check = check
        self._months: Months = of_zone(options.zone)
        self._epochs: dict[bytes, dict[tuple[int, int, int], _Batch]] = defaultdict(dict)
        self._jobs: list[sacct.Job] = []
        self.bad: list[tuple[str, str]] = []
        self.frames = 0
        self.records = 0

    def add(self, payload: Payload) -> bool:
        """Take one payload; False if it was set aside, with its reason in `bad`."""
        self.frames += 1
        try:
            if payload.kind == KIND_COUNTERS:
                self._add_batch(payload.data, BATCH, payload.place)
            elif payload.kind == KIND_SAMS_JSON:
                self._add_batch(self._from_json(payload.data), SAMS_JSON, payload.place)
            elif payload.kind == KIND_SACCT:
                jobs, problems = sacct.parse(payload.data)
                self._jobs += jobs
                for problem in problems[:MAX_PROBLEMS]:
                    self._set_aside(f"{payload.place}, row {problem.line}", problem.reason)
        except SamsError as error:
            self._set_aside(payload.place, str(error))
            return False
        return True

    def write(self, folder: Path) -> Result:
        """Write what was collected. Raises OSError or what DuckDB raises (a full disk, …)."""
        rows = _Rows(self._options, self._months, self._set_aside)
        for epoch in sorted(self._epochs):
            rows.add_epoch(epoch, self._epochs[epoch])
        self.records = rows.records
        if not (rows.epochs or rows.dropped or self._jobs):
            return Result(None, (), 0, None, None, self.frames, rows.records, (), tuple(self.bad))
        writer = SetWriter(folder)
        try:
            connection = tables.connect(threads=1)
            rows.write(connection, writer)
            if self._jobs:
                _copy_rows(connection, "jobs", self._jobs, writer)
            connection.close()
            size = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        times = [job.start_ns for job in self._jobs] + rows.times
        return Result(
            writer.name,
            tuple(writer.tables),
            size,
            min(times, default=None),
            max(times, default=None),
            self.frames,
            rows.records,
            tuple(sorted(rows.paths)),
            tuple(self.bad),
        )

    def _set_aside(self, place: str, reason: str) -> None:
        if len(self.bad) < MAX_PROBLEMS:
            self.bad.append((place, reason))

    def _add_batch(self, data: bytes, origin: str, place: str) -> None:
        header = wire.check(data) if self._check else wire.decode_header(data)
        end_ns = header.end_ns if header.end_ns is not None else header.begin_ns or 0
        tie = int.from_bytes(blake2b(data, digest_size=8).digest(), "little") & wire.INT64_MAX
        order = (header.generation, header.sequence, tie)
        self._epochs[_epoch_key(header)][order] = _Batch(order, end_ns, header, data, origin, place)

    def _from_json(self, data: bytes) -> bytes:
        options = self._options
        return wire.encode(sams_facts.batch_of_frame(data, options.cluster, options.sams_json_zone))


def _epoch_key(header: wire.Header) -> bytes:
    """The epoch and who sent it: a node that knows another's epoch adds nothing to it."""
    return header.epoch + _sender(header.claims.cluster, header.claims.node)


@lru_cache(maxsize=4096)
def _sender(cluster: str | None, node: str | None) -> bytes:
    return blake2b(msgspec.json.encode([cluster, node]), digest_size=16).digest()


def work(payloads: Iterable[Payload], options: Options, folder: Path) -> Result:
    """All payloads of one unit into one set in `folder`."""
    with _no_collector():
        builder = Builder(options)
        for payload in payloads:
            builder.add(payload)
        return builder.write(folder)


class _Rows:
    """Rows of the tables, as columns in the making."""

    def __init__(self, options: Options, months: Months, set_aside: Any) -> None:  # noqa: ANN401
        self._months = months
        self._every = options.points_every_s * SECOND
        self._set_aside = set_aside
        self.points = _Counters("points", "slot")
        self.totals = _Counters("totals", "month")
        self.epochs: list[tuple[Any, ...]] = []
        self.claims: list[tuple[Any, ...]] = []
        self.dropped: list[tuple[Any, ...]] = []
        self.times: list[int] = []
        self.paths: set[bytes] = set()
        self.records = 0

    def add_epoch(self, epoch: bytes, batches: dict[tuple[int, int, int], _Batch]) -> None:
        """Rows of one epoch: latest first, so that the first seen is what counts."""
        job_id = None
        claims: dict[wire.Claims, tuple[int, int, int]] = {}
        head: set[int] = set()
        slots: dict[int, _Latest] = {}
        months: dict[int, _Latest] = {}
        ordered = sorted(batches.values(), key=lambda batch: batch.order, reverse=True)
        for batch in ordered:
            if batch.header.claims.job_id is not None:
                job_id = batch.header.claims.job_id
                break
        for batch in ordered:
            header = batch.header
            claims.setdefault(header.claims, batch.order)
            if header.dropped is not None:
                self.dropped.append(_dropped_row(epoch, job_id, batch, header.dropped))
            if header.kind != "counters":
                continue
            month = self._months.of(batch.end_ns)
            of_month = months.setdefault(month, _Latest())
            slot = batch.end_ns // self._every if self._every else 0
            of_slot = slots.setdefault(slot, _Latest()) if self._every else None
            rows = None
            if not of_month.closed or (of_slot is not None and not of_slot.closed):
                try:
                    rows = wire.decode_rows(batch.data)
                except wire.WireError as error:
                    self._set_aside(batch.place, str(error))
                    continue
                self.records += len(rows)
            if month not in head:
                head.add(month)
                self.epochs.append(_epoch_row(epoch, job_id, month, batch))
                self.times.append(batch.end_ns)
            if rows is None:
                continue
            full = header.full and header.executables == len(rows)
            new = of_month.take(rows, full=full)
            if new:
                self.totals.add(epoch, job_id, month, batch, new)
                self.paths.update([row[0] for row in new])
            if of_slot is not None:
                new = of_slot.take(rows, full=full)
                if new:
                    self.points.add(epoch, job_id, slot, batch, new)
        if ordered:
            self.times.append(ordered[-1].end_ns)
        self.claims += [
            (epoch, *order, *[getattr(said, name) for name in _CLAIM_NAMES])
            for said, order in claims.items()
        ]

    def write(self, connection: Any, writer: SetWriter) -> None:  # noqa: ANN401
        """Write every table that has rows."""
        for counters in (self.points, self.totals):
            counters.write(connection, writer)
        for table, rows in (
            ("epochs", self.epochs), ("claims", self.claims), ("dropped", self.dropped)
        ):  # fmt: skip
            if rows:
                _copy_rows(connection, table, rows, writer)


class _Latest:
    """Which executables of an interval have been seen, going back in time."""

    __slots__ = ("_kept", "_seen", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._kept: list[list[wire.Row]] = []
        self._seen: set[tuple[bytes, int]] | None = None

    def take(self, rows: list[wire.Row], *, full: bool) -> list[wire.Row]:
        """Rows that are the latest of their executable."""
        if self.closed:
            return []
        self.closed = full
        if not self._kept:
            self._kept.append(rows)
            if len({row[0] for row in rows}) == len(rows):
                return rows
            # One path with several flags; or a hostile batch: then the first row stands.
            self._seen = set()
        if self._seen is None:
            self._seen = {row[:2] for row in self._kept[0]}
        new = []
        for row in rows:
            key = row[:2]
            if key not in self._seen:
                self._seen.add(key)
                new.append(row)
        return new


class _Counters:
    """The rows of `points` or `totals`: what is the same for a batch is kept once for it."""

    def __init__(self, table: str, interval: str) -> None:
        self._table = table
        self._interval = interval
        self._heads: list[tuple[bytes, int | None, int, int, int, int, int]] = []
        self._counts: list[int] = []
        self._waiting: list[wire.Row] = []
        self._paths: dict[bytes | None, int] = {}
        self._parts: list[list[np.ndarray[Any, Any]]] = []

    def add(
        self, epoch: bytes, job_id: int | None, interval: int, batch: _Batch, rows: list[wire.Row]
    ) -> None:
        """Take the rows of one batch."""
        self._heads.append((epoch, job_id, interval, *batch.order, batch.end_ns))
        self._counts.append(len(rows))
        self._waiting += rows
        if len(self._waiting) >= _CHUNK_ROWS:
            self._pack()

    def _pack(self) -> None:
        if not self._waiting:
            return
        path, flags, script, *counters = zip(*self._waiting, strict=True)
        self._waiting = []
        self._parts.append(
            [
                self._numbers(path),
                integers(flags),
                self._numbers(script),
                *[integers(column) for column in counters],
            ]
        )

    def _numbers(self, names: Iterable[bytes | None]) -> np.ndarray[Any, Any]:
        known = self._paths
        return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)

    def write(self, connection: Any, writer: SetWriter) -> None:  # noqa: ANN401
        """Write the table, sorted."""
        self._pack()
        if not self._parts:
            return
        counts = np.array(self._counts)
        schema = tables.SCHEMA[self._table]
        head_names = ("epoch", "job_id", self._interval, "generation", "sequence", "tie", "end_ns")
        head_schema = {name: schema[name] for name in head_names}
        rows = dict(
            zip(
                ["path_id", "flags", "script_id", *wire.COUNTERS],
                [np.concatenate(parts) for parts in zip(*self._parts, strict=True)],
                strict=True,
            )
        )
        rows["head"] = np.repeat(np.arange(len(counts)), counts)
        connection.register("rows_in", rows)
        select = ", ".join(
            f"nullif(r.{name}, {tables.NULL}) AS {name}"
            if name in rows
            else f'{_SOURCE.get(name, f"h.{name}")} AS "{name}"'
            for name in schema
        )
        folder = writer.temporary
        heads = ((at, *head) for at, head in enumerate(self._heads))
        with (
            tables.loaded({"head": "BIGINT", **head_schema}, heads, folder) as h,
            tables.loaded({"id": "BIGINT", "name": "BLOB"}, self._names(), folder) as names,
        ):
            connection.execute(f"CREATE TEMP TABLE heads_in AS FROM {h}")
            connection.execute(f"CREATE TEMP TABLE names_in AS FROM {names}")
        tables.copy(
            connection,
            f"SELECT {select} FROM rows_in r JOIN heads_in h USING (head)"
            " JOIN names_in p ON p.id = r.path_id JOIN names_in s ON s.id = r.script_id",
            writer.path(self._table),
        )
        connection.unregister("rows_in")
        for name in ("heads_in", "names_in"):
            connection.execute(f"DROP TABLE {name}")

    def _names(self) -> Iterator[tuple[int, bytes | None]]:
        for name, number in self._paths.items():
            yield number, name


def _copy_rows(
    connection: Any,  # noqa: ANN401
    table: str,
    rows: Sequence[Sequence[Any]],
    writer: SetWriter,
) -> None:
    with tables.loaded(tables.SCHEMA[table], rows, writer.temporary) as source:
        tables.copy(
            connection,
            f"SELECT * FROM {source} ORDER BY {tables.SORTED_BY[table]}",
            writer.path(table),
        )


def _json(value: Any) -> str | None:  # noqa: ANN401
    return msgspec.json.encode(value, order="sorted").decode() if value else None


def _epoch_row(epoch: bytes, job_id: int | None, month: int, batch: _Batch) -> tuple[Any, ...]:
    header = batch.header
    ledger = header.ledger
    assert ledger is not None  # noqa: S101 - the wire refuses counters without a ledger
    return (
        epoch, job_id, month, *batch.order, header.begin_ns, batch.end_ns, header.mode,
        header.loader, header.software, int(header.unclaimed),
        header.final.reason if header.final is not None else None,
        header.final.live if header.final is not None else None,
        ledger.cgroup_cpu_ns, ledger.attributed_cpu_ns, ledger.outside_cpu_ns, ledger.age_ns,
        _json(ledger.unattributed_by), _json(ledger.lost),
        _json(header.processes), header.executables, batch.origin,
    )  # fmt: skip


def _dropped_row(
    epoch: bytes, job_id: int | None, batch: _Batch, dropped: wire.Dropped
) -> tuple[Any, ...]:
    return (
        epoch, job_id, *batch.order, dropped.first_sequence, dropped.last_sequence,
        dropped.batches, dropped.bytes, dropped.reason,
    )  # fmt: skip


@contextmanager
def _no_collector() -> Iterator[None]:
    # Millions of tuples that make no cycles: looking for cycles among them takes longer
    # than all else.
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
