"""From the frames of one unit of input to one set of Parquet files. Pure but for that set.

The same frames under the same options always give the same rows, wherever and however
often this runs. Which batches count is worked out on columns (of the segment's directory,
or of the batches' headers), and batches that a later full one of the same interval
supersedes are not decoded, with a directory not even looked at.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from sams_aggregator import latest, records, sacct, sams_facts, tables
from sams_aggregator.batches import Batches, DirectoryError, Picked
from sams_aggregator.garbage import uncollected
from sams_aggregator.months import of_zone
from sams_aggregator.records import Records
from sams_aggregator.tables import Column, SetWriter, integers
from sams_ebpf import wire
from sams_ebpf.errors import SamsError
from sams_receiver.archive import directory as dr

log = logging.getLogger(__name__)

MAX_PROBLEMS: Final = 10_000
SECOND: Final = 1_000_000_000
BATCH: Final = "batch"
SAMS_JSON: Final = "sams-json"
# Columns of the facts, and where they stand with the batches.
_ORDER: Final = {"generation": "generation", "sequence": "sequence", "tie": "digest"}
_OF_HEADER: Final = {
    name: tables.SCHEMA["epochs"][name]
    for name in (
        "begin_ns", "mode", "loader", "software", "unclaimed", "final_reason", "final_live",
        "cgroup_cpu_ns", "attributed_cpu_ns", "outside_cpu_ns", "age_ns", "unattributed_by",
        "lost", "processes", "executables",
    )
}  # fmt: skip
_DROPPED: Final = {
    name: tables.SCHEMA["dropped"][name]
    for name in ("first_sequence", "last_sequence", "batches", "bytes", "reason")
}
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
    """One thing to be read: what it is (as `archive.Kind` counts), where it stood, its bytes.

    vouched: whether who sent it proved to be the node that it names.
    """

    kind: int
    place: str
    data: bytes
    received_ns: int = 0
    vouched: bool = False


class Result(NamedTuple):
    """What one unit gave. `name` is None where no payload gave a row.

    bad: places of payloads that were set aside, with the reason. low_job, high_job: lowest
    and highest job id in it, None where some rows name none.
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
    low_job: int | None = None
    high_job: int | None = None


KIND_COUNTERS: Final = 1
KIND_SAMS_JSON: Final = 2
KIND_SACCT: Final = 16


class _Jobs:
    """Rows of sacct, as columns: as objects they take ten times the memory."""

    def __init__(self) -> None:
        self.parts: list[dict[str, pa.Array]] = []
        self.times: list[int] = []  # the least and the greatest of each part
        self.ids: set[int] = set()  # the same of job ids

    def add(self, jobs: list[sacct.Job]) -> None:
        if not jobs:
            return
        self.parts.append(tables.columns(tables.SCHEMA["jobs"], jobs))
        times, ids = [job.start_ns for job in jobs], [job.job_id for job in jobs]
        self.times += [min(times), max(times)]
        self.ids |= {min(ids), max(ids)}

    def columns(self) -> dict[str, pa.ChunkedArray]:
        return tables.joined(tables.SCHEMA["jobs"], self.parts)


class Builder:
    """Collects payloads of one unit and writes their set.

    check: look at every record of every batch, also of those that others supersede. A
    receiver has done so before it archived them.
    """

    def __init__(self, options: Options, *, check: bool = False) -> None:
        self._options = options
        self._check = check
        self._batches = Batches()
        self._jobs = _Jobs()
        self.bad: list[tuple[str, str]] = []
        self.frames = 0

    def add(self, payload: Payload) -> bool:
        """Take one payload; False if it was set aside, with its reason in `bad`."""
        self.frames += 1
        try:
            if payload.kind == KIND_COUNTERS:
                self._add_batch(payload.data, BATCH, payload)
            elif payload.kind == KIND_SAMS_JSON:
                self._add_batch(self._from_json(payload.data), SAMS_JSON, payload)
            elif payload.kind == KIND_SACCT:
                jobs, problems = sacct.parse(payload.data)
                self._jobs.add(jobs)
                for problem in problems[:MAX_PROBLEMS]:
                    self._set_aside(f"{payload.place}, row {problem.line}", problem.reason)
        except SamsError as error:
            self._set_aside(payload.place, str(error))
            return False
        return True

    def add_segment(self, picked: Picked) -> None:
        """Take a segment by its directory, before all else.

        This and `write` then raise DirectoryError.
        """
        others = self._batches.add_segment(picked, BATCH)
        self.frames += self._batches.of_segment
        for kind, place, data, vouched in others:
            self.add(Payload(kind, place, data, vouched=vouched))

    def write(self, folder: Path) -> Result:
        """Write what was collected. Raises OSError (a full disk, …)."""
        rows = _Rows(self._batches, self._options, self._set_aside)
        times = self._jobs.times + rows.times
        jobs = self._jobs.ids | rows.claimed
        if rows.nameless:
            jobs = set()
        name, found, size = None, [], 0
        if rows.tables or self._jobs.parts:
            with SetWriter(folder) as writer:
                rows.write(writer)
                if self._jobs.parts:
                    tables.write(self._jobs.columns(), writer.path("jobs"))
                size = writer.finish()
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
            min(jobs, default=None),
            max(jobs, default=None),
        )

    def _set_aside(self, place: str, reason: str) -> None:
        if len(self.bad) < MAX_PROBLEMS:
            self.bad.append((place, reason))

    def _add_batch(self, data: bytes, origin: str, of: Payload) -> None:
        if self._check:
            wire.check(data)
        self._batches.add(data, wire.outline(data), origin, of.place, vouched=of.vouched)

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
    with uncollected():
        builder = Builder(options)
        for payload in payloads:
            builder.add(payload)
        return builder.write(folder)


def work_picked(picked: Picked, options: Options, folder: Path) -> Result | None:
    """The same for a segment with a directory; None if only its frames can tell."""
    with uncollected():
        builder = Builder(options)
        try:
            builder.add_segment(picked)
            return builder.write(folder)
        except DirectoryError as error:
            log.warning("%s: directory: %s; read without it", picked.name, error)
            return None
        finally:
            # Before there is a collector again that would look through all it holds.
            del builder


class _Rows:
    """What the batches of one unit say, as rows of the tables."""

    def __init__(
        self, batches: Batches, options: Options, set_aside: Callable[[str, str], None]
    ) -> None:
        self._batches = batches
        self._months = of_zone(options.zone)
        self._every = options.points_every_s * SECOND
        self._set_aside = set_aside
        self.tables: dict[str, dict[str, Any]] = {}
        self.times: list[int] = []
        self.decoded = 0
        self.paths: tuple[bytes, ...] = ()
        self._keys: list[bytes] = []
        self.claimed: set[int] = set()  # job ids
        self.nameless = False  # whether an epoch claims none
        columns = batches.columns()
        if len(columns["source"]):
            self._find(columns)

    def _find(self, columns: dict[str, Column]) -> None:
        self._arrange(columns, columns["source"])
        keys: dict[bytes, int] = {}
        newest = np.flatnonzero(latest.starts(self._epoch))
        claimed = self._claimed(columns["claims"])
        wanted = np.concatenate([newest, claimed, *self._needed()])
        self._batches.fetch(self._order[_places(len(self._order), wanted)])
        number = [
            keys.setdefault(_epoch_key(header), len(keys))
            for header in self._batches.headers(self._order[newest])
        ]
        self._keys = list(keys)
        if len(keys) < len(number):  # One epoch of the segment, and beside it.
            self._arrange(columns, np.array(number)[columns["source"]])
            claimed = self._claimed(columns["claims"])
        self._say_claims(claimed)
        self._say_dropped(np.flatnonzero((self._sorted["bits"] & dr.COUNTERS) == 0))
        times = self._sorted["end_ns"]
        self.times = [int(times.min()), int(times.max())]
        self._count()

    def _arrange(self, columns: dict[str, Column], epoch: Column) -> None:
        """Put the batches in order: by epoch, the latest first; the same one only once."""
        generation, sequence, tie = (columns[name] for name in ("generation", "sequence", "digest"))
        keys = [epoch, *(one.max() - one for one in (generation, sequence))]
        order = latest.ordered(keys)
        same = ~latest.starts(epoch[order], generation[order], sequence[order])
        if same.any():
            order = latest.ordered([*keys, tie.max() - tie])
            order = order[
                latest.starts(epoch[order], generation[order], sequence[order], tie[order])
            ]
        self._order, self._epoch = order, epoch[order]
        self._sorted = {name: column[order] for name, column in columns.items()}
        self._alive = (self._sorted["bits"] & dr.COUNTERS) > 0
        times = self._sorted["end_ns"]
        self._month = self._months.of_all(times)
        self._slot = times // self._every if self._every else None

    def _claimed(self, claims: Column) -> Column:
        """Places of the last batch of an epoch with each of its claims, the latest first."""
        said = claims[self._order]
        by_claims = latest.ordered([self._epoch, said])
        firsts = by_claims[latest.starts(self._epoch[by_claims], said[by_claims])]
        return np.sort(firsts)

    def _needed(self) -> tuple[Column, Column]:
        """Places of the batches from which `totals` and `points` are made."""
        some = np.flatnonzero(self._alive)
        whole = (self._sorted["bits"][some] & dr.WHOLE) > 0
        totals = some[latest.needed(self._epoch[some], self._month[some], whole)]
        if self._slot is None:
            return totals, totals[:0]
        return totals, some[latest.needed(self._epoch[some], self._slot[some], whole)]

    def _headers(self, places: Column) -> list[wire.Header]:
        return self._batches.headers(self._order[places])

    def _columns(self, table: str, places: Column, own: dict[str, pa.Array]) -> dict[str, Any]:
        """Columns of a table, a row for each of these batches; `own` are those of this table."""
        epoch = self._epoch[places]
        columns = {
            "epoch": pa.DictionaryArray.from_arrays(
                epoch.astype(np.int32), pa.array(self._keys, pa.binary())
            ),
            "job_id": tables.whole_numbers(self._jobs[epoch]),
            **{name: pa.array(self._sorted[of][places]) for name, of in _ORDER.items()},
            **own,
        }
        return {name: columns[name] for name in tables.SCHEMA[table]}

    def _say_claims(self, places: Column) -> None:
        """Table `claims`; with it come the job ids of the epochs."""
        made = [header.claims for header in self._headers(places)]
        epoch = self._epoch[places]
        if not latest.starts(epoch).all():
            kept = _different(epoch.tolist(), made)
            places, epoch, made = places[kept], epoch[kept], [made[at] for at in kept]
        job_ids = integers([claims.job_id for claims in made])
        told = np.flatnonzero(job_ids != tables.NULL)
        self.claimed = set(job_ids[told].tolist())
        first = told[latest.starts(epoch[told])]  # what was said last of each epoch
        self._jobs = np.full(len(self._keys), tables.NULL)
        self._jobs[epoch[first]] = job_ids[first]
        self.nameless = len(first) < len(self._keys)
        own = tables.columns(tables.CLAIMS, [*map(_plain_claims, made)])
        self.tables["claims"] = self._columns("claims", places, own)

    def _say_dropped(self, places: Column) -> None:
        heads = zip(places.tolist(), self._headers(places), strict=True)
        said = [(place, head.dropped) for place, head in heads if head.dropped is not None]
        if said:
            own = tables.columns(_DROPPED, [_plain_dropped(one) for _, one in said])
            kept = np.array([place for place, _ in said])
            self.tables["dropped"] = self._columns("dropped", kept, own)

    def _count(self) -> None:
        """Rows of `points`, `totals`, `epochs`; batches that cannot be read are left out."""
        while True:
            totals, points = self._needed()
            wanted = _places(len(self._order), np.append(totals, points))
            found = self._records(wanted)
            if not found.bad:
                break
            for at, reason in found.bad.items():
                self._set_aside(self._batches.place(int(self._order[wanted[at]])), reason)
            self._alive[wanted[list(found.bad)]] = False
        self.decoded = len(found.path.codes)
        self._say_epochs(totals[latest.starts(self._epoch[totals], self._month[totals])])
        kept = self._table("totals", self._month, totals, wanted, found)
        used = np.unique(found.path.codes[kept]).tolist()
        self.paths = tuple(sorted(found.path.values[code] for code in used))
        if self._slot is not None:
            self._table("points", self._slot, points, wanted, found)

    def _records(self, wanted: Column) -> Records:
        numbers = self._order[wanted]
        starts = self._sorted["records_at"][wanted]
        self._batches.fetch(numbers)
        data = [*map(self._batches.data, numbers.tolist())]
        return records.decode(
            [one[at:] if at else b"" for one, at in zip(data, starts.tolist(), strict=True)],
            self._sorted["records"][wanted],
            starts > 0,
            lambda at: wire.decode_rows(data[at]),
        )

    def _say_epochs(self, places: Column) -> None:
        if not len(places):
            return
        rows = []
        for header in self._headers(places):
            ledger, final = header.ledger, header.final
            if ledger is None:
                raise DirectoryError("batch of counters without a ledger")
            by, lost, processes = ledger.unattributed_by, ledger.lost, header.processes
            rows.append(
                (header.begin_ns, header.mode, header.loader, header.software,
                 int(header.unclaimed), final and final.reason, final and final.live,
                 ledger.cgroup_cpu_ns, ledger.attributed_cpu_ns, ledger.outside_cpu_ns,
                 ledger.age_ns, (by and _json(by)) or None, (lost and _json(lost)) or None,
                 processes and _json(processes), header.executables)
            )  # fmt: skip
        origins = [*map(self._batches.origin, self._order[places].tolist())]
        own = {
            "month": pa.array(self._month[places]),
            "end_ns": pa.array(self._sorted["end_ns"][places]),
            "origin": tables.column("VARCHAR", origins),
            "vouched": pa.array(
                ((self._sorted["bits"][places] & dr.UNVOUCHED) == 0).astype(np.int64)
            ),
            **tables.columns(_OF_HEADER, rows),
        }
        self.tables["epochs"] = self._columns("epochs", places, own)

    def _table(
        self, table: str, interval: Column, chosen: Column, wanted: Column, found: Records
    ) -> Column:
        """Make the columns of a table of counters; returns which of the records are in it."""
        # In the order of jobs, so that a look-up reads little of it.
        chosen = chosen[latest.order_of(self._jobs[self._epoch[chosen]])]
        place = np.searchsorted(wanted, chosen)
        counts = np.diff(found.first)[place]
        rows = records.ranges(found.first[place], counts)
        batch = np.repeat(np.arange(len(chosen)), counts)
        of = np.cumsum(latest.starts(self._epoch[chosen], interval[chosen])) - 1
        flags = found.numbers["flags"][rows]
        first = latest.first_of_each((of[batch], found.path.codes[rows], flags))
        if first is not None:
            rows, batch = rows[first], batch[first]
        if len(rows):
            at = chosen[batch]
            own = {
                INTERVAL[table]: pa.array(interval[at]),
                "end_ns": pa.array(self._sorted["end_ns"][at]),
                "path": found.path.array(rows),
                "script": found.script.array(rows),
                **{
                    name: tables.whole_numbers(column[rows])
                    for name, column in found.numbers.items()
                },
            }
            self.tables[table] = self._columns(table, at, own)
        return rows

    def write(self, writer: SetWriter) -> None:
        """Write every table that has rows."""
        for table, columns in self.tables.items():
            tables.write(columns, writer.path(table))


def _different(epoch: Sequence[int], made: Sequence[wire.Claims]) -> list[int]:
    """Places of claims that no earlier one of the same epoch equals."""
    said: dict[int, list[wire.Claims]] = {}
    kept = []
    for at, (of, claims) in enumerate(zip(epoch, made, strict=True)):
        if claims not in said.setdefault(of, []):
            said[of].append(claims)
            kept.append(at)
    return kept


def _places(count: int, chosen: Column) -> Column:
    """Places below `count`, each once, in order."""
    mask = np.zeros(count, dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(mask)


_plain_claims: Final = operator.attrgetter(*tables.CLAIMS)
_plain_dropped: Final = operator.attrgetter(*_DROPPED)


_encoder: Final = msgspec.json.Encoder(order="sorted")


def _json(value: Any) -> str:  # noqa: ANN401
    return _encoder.encode(value).decode()
