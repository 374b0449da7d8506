"""From the frames of one unit of input to one set of Parquet files. Pure but for that set.

The same frames under the same options always give the same rows, wherever and however
often this runs. Which batches count is worked out on columns (of the segment's directory,
or of the batches' headers), and batches that a later full one of the same interval
supersedes are not decoded, with a directory not even looked at.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from sams_aggregator import latest, records, sacct, sams_facts, tables
from sams_aggregator.batches import Batches, Damaged, Whole
from sams_aggregator.months import of_zone
from sams_aggregator.records import Records
from sams_aggregator.tables import Column, SetWriter, integers
from sams_ebpf import wire
from sams_ebpf.errors import SamsError
from sams_receiver.archive import directory as dr

MAX_PROBLEMS: Final = 10_000
SECOND: Final = 1_000_000_000
BATCH: Final = "batch"
SAMS_JSON: Final = "sams-json"
INTERVAL: Final = {"totals": "month", "points": "slot"}


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
        self._batches = Batches()
        self._jobs: list[sacct.Job] = []
        self.bad: list[tuple[str, str]] = []
        self.frames = 0

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

    def add_segment(self, whole: Whole) -> None:
        """Take a segment by its directory, at most one. Raises Damaged, as `write` then does."""
        others = self._batches.add_segment(whole, BATCH)
        self.frames += self._batches.of_segment
        for kind, place, data in others:
            self.add(Payload(kind, place, data))

    def write(self, folder: Path) -> Result:
        """Write what was collected. Raises OSError (a full disk, …)."""
        rows = _Rows(self._batches, self._options, self._set_aside)
        times = [job.start_ns for job in self._jobs] + rows.times
        name, found, size = None, [], 0
        if rows.epochs or rows.dropped or self._jobs:
            writer = SetWriter(folder)
            try:
                rows.write(writer)
                if self._jobs:
                    tables.write_rows("jobs", self._jobs, writer.path("jobs"))
                size = writer.finish()
            except BaseException:
                writer.abandon()
                raise
            name, found = writer.name, writer.tables
        return Result(
            name,
            tuple(found),
            size,
            min(times, default=None),
            max(times, default=None),
            self.frames,
            rows.decoded,
            rows.paths,
            tuple(self.bad),
        )

    def _set_aside(self, place: str, reason: str) -> None:
        if len(self.bad) < MAX_PROBLEMS:
            self.bad.append((place, reason))

    def _add_batch(self, data: bytes, origin: str, place: str) -> None:
        if self._check:
            wire.check(data)
        self._batches.add(data, wire.outline(data), origin, place)

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


def work_whole(whole: Whole, options: Options, folder: Path) -> Result | None:
    """The same for a segment with a directory; None if only its frames can tell."""
    with _no_collector():
        builder = Builder(options)
        try:
            builder.add_segment(whole)
            return builder.write(folder)
        except Damaged:
            return None


class _Rows:
    """What the batches of one unit say, as rows of the tables."""

    def __init__(
        self, batches: Batches, options: Options, set_aside: Callable[[str, str], None]
    ) -> None:
        self._batches = batches
        self._months = of_zone(options.zone)
        self._every = options.points_every_s * SECOND
        self._set_aside = set_aside
        self.epochs: list[tuple[Any, ...]] = []
        self.claims: list[tuple[Any, ...]] = []
        self.dropped: list[tuple[Any, ...]] = []
        self.times: list[int] = []
        self.decoded = 0
        self.paths: tuple[bytes, ...] = ()
        self._counters: dict[str, dict[str, Any]] = {}
        self._keys: list[bytes] = []
        self._job_ids: list[int | None] = []
        columns = batches.columns()
        if len(columns["source"]):
            self._find(columns)

    def _find(self, columns: dict[str, Column]) -> None:
        order, epoch = self._in_order(columns)
        self._say_claims(order, epoch, columns["claims"])
        # Tables are written in the order of jobs, so that a look-up reads little of them.
        by_job = sorted(range(len(self._keys)), key=self._by_job)
        place = np.argsort(np.array(by_job))
        self._keys = [self._keys[n] for n in by_job]
        self._job_ids = [self._job_ids[n] for n in by_job]
        self._jobs = integers(self._job_ids)
        again = np.argsort(place[epoch], kind="stable")
        order, epoch = order[again], place[epoch][again]
        self._order, self._epoch = order, epoch
        self._ordered = {name: column[order] for name, column in columns.items()}
        counters = (self._ordered["bits"] & dr.COUNTERS) > 0
        for at in np.flatnonzero(~counters).tolist():
            self._say_dropped(at)
        times = self._ordered["end_ns"]
        self.times = [int(times.min()), int(times.max())]
        self._count(counters)

    def _by_job(self, number: int) -> tuple[bool, int, bytes]:
        job_id = self._job_ids[number]
        return job_id is None, job_id or 0, self._keys[number]

    def _in_order(self, columns: dict[str, Column]) -> tuple[Column, Column]:
        """Numbers of the batches, by epoch and the latest first, and the epoch of each."""
        source, generation, sequence = (
            columns[name] for name in ("source", "generation", "sequence")
        )
        # Which epoch a source is, any of its batches says; the last one is wanted anyway.
        order = np.lexsort((sequence, generation, source))
        ends = np.append(np.flatnonzero(latest.starts(source[order]))[1:], len(order)) - 1
        keys: dict[bytes, int] = {}
        number = np.array([
            keys.setdefault(_epoch_key(self._batches.header(last)), len(keys))
            for last in order[ends].tolist()
        ])  # fmt: skip
        self._keys = list(keys)
        epoch = number[source]
        order = np.lexsort((-sequence, -generation, epoch))
        same = ~latest.starts(epoch[order], generation[order], sequence[order])
        if same.any():
            tie = np.zeros(len(order), dtype=np.int64)
            for at in order[same | np.append(same[1:], False)].tolist():
                tie[at] = self._batches.tie(at)
            order = np.lexsort((-tie, -sequence, -generation, epoch))
            order = order[
                latest.starts(epoch[order], generation[order], sequence[order], tie[order])
            ]
        return order, epoch[order]

    def _say_claims(self, order: Column, epoch: Column, claims: Column) -> None:
        """Each different claims of an epoch with the last batch that made them."""
        said = claims[order]
        by_claims = np.lexsort((np.arange(len(order)), said, epoch))
        firsts = np.sort(by_claims[latest.starts(epoch[by_claims], said[by_claims])])
        self._job_ids = [None] * len(self._keys)
        seen: set[tuple[int, wire.Claims]] = set()
        for at in firsts.tolist():
            of, number = int(epoch[at]), int(order[at])
            header = self._batches.header(number)
            made = header.claims
            if (of, made) in seen:
                continue
            seen.add((of, made))
            if self._job_ids[of] is None:
                self._job_ids[of] = made.job_id
            self.claims.append(
                (self._keys[of], header.generation, header.sequence, self._batches.tie(number),
                 *_plain_claims(made))
            )  # fmt: skip

    def _say_dropped(self, at: int) -> None:
        of, number = int(self._epoch[at]), int(self._order[at])
        header = self._batches.header(number)
        dropped = header.dropped
        if dropped is not None:
            self.dropped.append(
                (self._keys[of], self._job_ids[of], header.generation, header.sequence,
                 self._batches.tie(number), dropped.first_sequence, dropped.last_sequence,
                 dropped.batches, dropped.bytes, dropped.reason)
            )  # fmt: skip

    def _count(self, alive: Column) -> None:
        """Rows of `points`, `totals`, `epochs`; batches that cannot be read are left out."""
        times, whole = self._ordered["end_ns"], (self._ordered["bits"] & dr.WHOLE) > 0
        months = self._months.of_all(times)
        slots = times // self._every if self._every else None
        while True:
            some = np.flatnonzero(alive)
            totals = some[latest.needed(self._epoch[some], months[some], whole[some])]
            points = totals[:0]
            if slots is not None:
                points = some[latest.needed(self._epoch[some], slots[some], whole[some])]
            wanted = np.union1d(totals, points)
            found = self._records(wanted)
            if not found.bad:
                break
            for at, reason in found.bad.items():
                self._set_aside(self._batches.place(int(self._order[wanted[at]])), reason)
            alive[wanted[list(found.bad)]] = False
        self.decoded = len(found.path.codes)
        ends = latest.starts(self._epoch[totals], months[totals])
        for at in totals[ends].tolist():
            self._say_epoch(at, int(months[at]))
        kept = self._table("totals", months, totals, wanted, found)
        used = np.unique(found.path.codes[kept]).tolist()
        self.paths = tuple(sorted(found.path.values[code] for code in used))
        if slots is not None:
            self._table("points", slots, points, wanted, found)

    def _records(self, wanted: Column) -> Records:
        numbers = self._order[wanted].tolist()
        starts = self._ordered["records_at"][wanted]
        areas = [
            self._batches.data(number)[at:] if at else b""
            for number, at in zip(numbers, starts.tolist(), strict=True)
        ]
        return records.decode(
            areas,
            self._ordered["records"][wanted],
            starts > 0,
            lambda at: wire.decode_rows(self._batches.data(numbers[at])),
        )

    def _say_epoch(self, at: int, month: int) -> None:
        of, number = int(self._epoch[at]), int(self._order[at])
        header = self._batches.header(number)
        ledger, final = header.ledger, header.final
        assert ledger is not None  # noqa: S101 - the wire refuses counters without a ledger
        self.epochs.append(
            (self._keys[of], self._job_ids[of], month, header.generation, header.sequence,
             self._batches.tie(number), header.begin_ns, header.clock_ns, header.mode,
             header.loader, header.software, int(header.unclaimed),
             final and final.reason, final and final.live, ledger.cgroup_cpu_ns,
             ledger.attributed_cpu_ns, ledger.outside_cpu_ns, ledger.age_ns,
             _json(ledger.unattributed_by), _json(ledger.lost), _json(header.processes),
             header.executables, self._batches.origin(number))
        )  # fmt: skip

    def _table(
        self, table: str, interval: Column, chosen: Column, wanted: Column, found: Records
    ) -> Column:
        """Make the columns of a table of counters; returns which of the records are in it."""
        place = np.searchsorted(wanted, chosen)
        counts = np.diff(found.first)[place]
        rows = records.ranges(found.first[place], counts)
        batch = np.repeat(np.arange(len(chosen)), counts)
        of = np.cumsum(latest.starts(self._epoch[chosen], interval[chosen])) - 1
        flags = found.numbers["flags"][rows]
        if flags.max(initial=0) > 2 * max(wire.FLAG_NAMES):
            flags = np.unique(flags, return_inverse=True)[1]
        first = latest.first_of_each((of[batch], found.path.codes[rows], flags))
        if first is not None:
            rows, batch = rows[first], batch[first]
        ties = [self._batches.tie(number) for number in self._order[chosen].tolist()]
        at = chosen[batch]
        epoch = self._epoch[at]
        columns: dict[str, Any] = {
            "epoch": pa.DictionaryArray.from_arrays(
                epoch.astype(np.int32), pa.array(self._keys, pa.binary())
            ),
            "job_id": tables.whole_numbers(self._jobs[epoch]),
            INTERVAL[table]: pa.array(interval[at]),
            **{key: pa.array(self._ordered[key][at]) for key in ("generation", "sequence")},
            "tie": pa.array(np.array(ties, dtype=np.int64)[batch]),
            "end_ns": pa.array(self._ordered["end_ns"][at]),
            "path": found.path.array(rows),
            "script": found.script.array(rows),
            **{
                key: tables.whole_numbers(column[rows]) for key, column in found.numbers.items()
            },
        }  # fmt: skip
        if len(rows):
            self._counters[table] = {key: columns[key] for key in tables.SCHEMA[table]}
        return rows

    def write(self, writer: SetWriter) -> None:
        """Write every table that has rows."""
        for table, columns in self._counters.items():
            tables.write(columns, writer.path(table))
        for table, rows in (
            ("epochs", self.epochs), ("claims", self.claims), ("dropped", self.dropped)
        ):  # fmt: skip
            if rows:
                tables.write_rows(table, rows, writer.path(table))


_plain_claims: Final = operator.attrgetter(*tables.CLAIMS)


def _json(value: Any) -> str | None:  # noqa: ANN401
    return msgspec.json.encode(value, order="sorted").decode() if value else None


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
