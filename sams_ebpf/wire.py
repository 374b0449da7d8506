"""The wire format: what a batch is, and the only door to msgpack. See `docs/wire.md`.

A batch is one msgpack map. Its records are arrays whose columns the batch itself
names in `fields`, so an archive describes itself. Everything read here is taken to be
hostile: types, lengths, counts and integers are bounded by the types below.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from sams_ebpf.errors import SamsError

VERSION: Final = 1
MAX_BYTES: Final = 64 << 20
MAX_RECORDS: Final = 1_000_000
INT64_MAX: Final = 2**63 - 1

# Bits of a record's `flags`: how the path is to be understood.
DELETED: Final = 1  # the file had no name any more when it was executed
MEMFD: Final = 2  # an anonymous file of memory
CUT: Final = 4  # the path was longer than the kernel side keeps; this is its end
FOREIGN: Final = 8  # path inside a mount namespace that is not the host's
OVERFLOW: Final = 16  # the row that takes what no row of its own could be had for
OUTSIDE: Final = 32  # CPU of descendants that left the job's cgroup: never in `attributed`
UNKNOWN: Final = 64  # no executable could be told (a kernel thread of the job, say)

FLAG_NAMES: Final = {
    DELETED: "deleted",
    MEMFD: "memfd",
    CUT: "cut",
    FOREIGN: "foreign-namespace",
    OVERFLOW: "overflow",
    OUTSIDE: "outside",
    UNKNOWN: "unknown",
}

Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Signed = Annotated[int, Meta(ge=-INT64_MAX, le=INT64_MAX)]
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=1024)]
PathBytes = Annotated[bytes, Meta(max_length=4096)]
Epoch = Annotated[bytes, Meta(min_length=16, max_length=16)]
Writer = Annotated[bytes, Meta(min_length=8, max_length=8)]


class WireError(SamsError):
    """Bytes that are not a batch this version can read."""


class Identity(NamedTuple):
    """What makes a batch this one and no other.

    epoch: 16 random bytes, one uninterrupted life of a job's counters on a node.
    generation: which writer of the epoch; sequence: which batch of that writer.
    writer: 8 random bytes, one life of a collector process.
    """

    epoch: bytes
    generation: int
    writer: bytes
    sequence: int


class Claims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the collector says of the job run and the node; None where it does not know.

    Times are nanoseconds since the Unix epoch. `start_text` holds the digits of the
    start time as Slurm printed them (YYYYMMDDHHMMSS), in the site's own zone.
    """

    cluster: Name | None = None
    node: Name | None = None
    job_id: Count | None = None
    restart_count: Count | None = None
    sluid: Name | None = None
    submit_ns: Count | None = None
    start_ns: Count | None = None
    start_text: Name | None = None
    boot_id: Name | None = None
    cgroup: PathBytes | None = None
    cgroup_birth_ns: Count | None = None
    user: Name | None = None
    uid: Count | None = None
    account: Name | None = None
    partition: Name | None = None
    job_name: Text | None = None
    cpus: Count | None = None
    nodes: Count | None = None
    het_job_id: Count | None = None


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """The proof of a batch's figures, cumulative since the epoch began. All ns.

    cgroup_cpu_ns: what the kernel charged to the job's cgroups, None where it keeps no
        such counter. attributed_cpu_ns: sum over executables. unattributed_cpu_ns: the
        difference, None with cgroup_cpu_ns; `unattributed_by` says of how much of it the
        cause is known. outside_cpu_ns: descendants that left the job's cgroup.
    age_ns: how much older than the totals the cgroup reading is (the cgroup may vanish
        before the last harvest). lost: counted losses by cause.
    """

    cgroup_cpu_ns: Count | None
    attributed_cpu_ns: Count
    unattributed_cpu_ns: Signed | None
    outside_cpu_ns: Count = 0
    age_ns: Count = 0
    unattributed_by: Annotated[dict[Name, Signed], Meta(max_length=64)] = {}
    lost: Annotated[dict[Name, Count], Meta(max_length=64)] = {}


class Processes(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """forks + adopted + moved_in = exits + live + moved_out, always; None: cannot be known."""

    forks: Count | None = None
    adopted: Count | None = None
    moved_in: Count | None = None
    exits: Count | None = None
    live: Count | None = None
    moved_out: Count | None = None


class Closing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The claim that nothing comes after this batch; a later batch supersedes it.

    reason: signal, cgroup-removed, grace-period, command-ended, reboot, unclaimed, …
    """

    reason: Name
    live: Count


# gc=False: what holds numbers and bytes alone is no part of a cycle, and there are many.
class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Counters of one executable, cumulative since the epoch began; None: not measured.

    The order of the fields is the order of the columns on the wire (FIELDS).
    `script` is the last script that was run by this executable as interpreter.
    """

    path: PathBytes
    flags: Count
    script: PathBytes | None
    cpu_ns: Count
    user_ns: Count | None = None
    system_ns: Count | None = None
    execs: Count | None = None
    forks: Count | None = None
    exits: Count | None = None
    max_rss_bytes: Count | None = None
    read_bytes: Count | None = None
    write_bytes: Count | None = None
    minor_faults: Count | None = None
    major_faults: Count | None = None
    voluntary_switches: Count | None = None
    involuntary_switches: Count | None = None

    @property
    def key(self) -> tuple[bytes, int]:
        """What tells one executable of an epoch from another: path and flags."""
        return self.path, self.flags


FIELDS: Final = list(Record.__struct_fields__)
KEY_COLUMNS: Final = 3
COUNTERS: Final = FIELDS[KEY_COLUMNS:]
# Counters that are maxima over processes; all others add up.
MAXIMA: Final = frozenset({"max_rss_bytes"})


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A batch without its records.

    critical: names of keys that a reader has to understand to use this batch; any
        other key it does not know it may ignore.
    begin_ns, end_ns: wall clock at the epoch's begin and at this harvest (ns since the
        Unix epoch). Never used for order: that is (generation, sequence).
    sums: sum over *all* records of the epoch for every column of COUNTERS in `fields`
        (None where no record has a value, maxima as maxima), `executables` their number:
        a reader that has less knows that it has a gap.
    full: this batch holds all records, not only those that changed.
    """

    v: Count
    kind: Literal["counters", "tombstone"]
    epoch: Epoch
    generation: Count
    writer: Writer
    sequence: Count
    claims: Claims
    critical: Annotated[list[Name], Meta(max_length=64)] = []
    software: Name | None = None
    mode: Literal["bpf", "proc"] | None = None
    loader: Literal["libbpf", "bcc"] | None = None
    begin_ns: Count | None = None
    end_ns: Count | None = None
    unclaimed: bool = False
    full: bool = False
    final: Closing | None = None
    ledger: Ledger | None = None
    processes: Processes | None = None
    executables: Count | None = None
    sums: Annotated[list[Signed | None], Meta(max_length=64)] = []
    dropped: Dropped | None = None
    fields: Annotated[list[Name], Meta(max_length=64)] = []

    @property
    def identity(self) -> Identity:
        """Epoch, generation, writer, sequence."""
        return Identity(self.epoch, self.generation, self.writer, self.sequence)

    @property
    def clock_ns(self) -> int:
        """When it was, as far as it says: end, else begin, else 0. Never used for order."""
        return self.end_ns if self.end_ns is not None else self.begin_ns or 0


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """What a tombstone stands for: batches of its epoch given up under pressure."""

    generation: Count
    writer: Writer
    first_sequence: Count
    last_sequence: Count
    batches: Count
    bytes: Count
    reason: Name


class Batch(Header, frozen=True, kw_only=True, omit_defaults=True):
    """One whole document, as written by `encode` and checked by `decode`."""

    records: Annotated[list[Record], Meta(max_length=MAX_RECORDS)] = []


class _Document(Header, frozen=True, kw_only=True, omit_defaults=True):
    records: msgspec.Raw = msgspec.Raw(b"\x90")


class _Head(Header, frozen=True, kw_only=True, omit_defaults=True):
    # A third of the time goes into names of columns that are the same everywhere.
    sums: msgspec.Raw = msgspec.Raw(b"\x90")  # type: ignore[assignment]
    fields: msgspec.Raw = msgspec.Raw(b"\x90")  # type: ignore[assignment]


class _Version(msgspec.Struct, frozen=True):
    v: Count


_KNOWN = frozenset(Batch.__struct_fields__)
_Row = Annotated[list[bytes | int | None], Meta(max_length=64)]
_Maybe = Count | None
# A record as a plain tuple in the order of FIELDS: what fills columns needs no object.
Row = tuple[
    PathBytes, Count, PathBytes | None, Count, _Maybe, _Maybe, _Maybe, _Maybe,
    _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe,
]  # fmt: skip


class _Whole(Header, frozen=True, kw_only=True, omit_defaults=True):
    # Compared as they stand: as names they are a sixth of the time.
    fields: msgspec.Raw = msgspec.Raw(b"\x90")  # type: ignore[assignment]
    records: Annotated[list[Row], Meta(max_length=MAX_RECORDS)] = []


_encoder = msgspec.msgpack.Encoder()
_fields = _encoder.encode(FIELDS)
_version = msgspec.msgpack.Decoder(_Version)
_header = msgspec.msgpack.Decoder(Header)
_head = msgspec.msgpack.Decoder(_Head)
_document = msgspec.msgpack.Decoder(_Document)
_whole = msgspec.msgpack.Decoder(_Whole)
_records = msgspec.msgpack.Decoder(Annotated[list[Record], Meta(max_length=MAX_RECORDS)])
_rows = msgspec.msgpack.Decoder(Annotated[list[_Row], Meta(max_length=MAX_RECORDS)])
_tuples = msgspec.msgpack.Decoder(Annotated[list[Row], Meta(max_length=MAX_RECORDS)])
_plain = msgspec.msgpack.Decoder(dict[str, object])


def encode(batch: Batch) -> bytes:
    """Serialise; the same batch always gives the same bytes."""
    return _encoder.encode(batch)


def decode(data: bytes | memoryview) -> Batch:
    """Read and check one batch. Raises WireError with a reason fit for a log line."""
    document = _take(_document, data)
    raw = document.records
    if document.fields == FIELDS:
        records = _parse(_records, raw)
    else:
        records = _reorder(_parse(_rows, raw), document.fields)
    values = {name: getattr(document, name) for name in _KNOWN if name != "records"}
    return Batch(**values, records=records)


def decode_rows(data: bytes | memoryview) -> list[Row]:
    """Records alone, as tuples in the order of FIELDS, checked as `decode` checks them."""
    document = _take(_document, data)
    if document.fields == FIELDS:
        try:
            rows: list[Row] = _tuples.decode(document.records)
        except (msgspec.MsgspecError, RecursionError):
            pass  # Rows may leave out what they do not measure: the slow way tells.
        else:
            return rows
    return [msgspec.structs.astuple(record) for record in decode(data).records]


def check(data: bytes | memoryview) -> Header:
    """Read and check one batch in full, records included, for its header.

    The header's `fields` may stay unread. Raises WireError with a reason fit for a log line.
    """
    try:
        batch = _whole.decode(data) if len(data) <= MAX_BYTES else None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        batch = None
    if batch is None or bytes(batch.fields) != _fields:
        # Not today's columns, or not a batch: the long way knows, and says what is wrong.
        return decode(data)
    return _checked(batch, len(FIELDS))


def decode_header(data: bytes | memoryview) -> Header:
    """Read and check everything but the records, which are only skipped over."""
    return _take(_header, data)


class Outline(NamedTuple):
    """A batch's header, and where its records stand.

    records: how many the array of records says it has. at: where the first of them starts
    in the batch, if they have the columns of FIELDS and nothing comes after them; else 0,
    and only `decode_rows` can tell.
    """

    header: Header
    records: int
    at: int


def outline(data: bytes | memoryview) -> Outline:
    """Read and check everything but the records, and say where these are."""
    document = _take(_document, data)
    raw = bytes(document.records)
    count, head = _array_head(raw)
    if not head or document.fields != FIELDS or count > MAX_RECORDS:
        return Outline(document, count, 0)
    if count == 0:  # They may have been left out.
        return Outline(document, 0, len(data))
    ends_it = data[-len(raw) :] == raw
    return Outline(document, count, len(data) - len(raw) + head if ends_it else 0)


def _array_head(raw: bytes) -> tuple[int, int]:
    """Elements of a msgpack array and length of its head; (0, 0) for what is no array."""
    if raw[0] & 0xF0 == 0x90:
        return raw[0] & 0x0F, 1
    length = {0xDC: 2, 0xDD: 4}.get(raw[0], 0)
    return int.from_bytes(raw[1 : 1 + length], "big"), length and 1 + length


def decode_head(data: bytes | memoryview) -> Header:
    """The same for a batch that has been checked before; its `sums` and `fields` stay unread."""
    return _understood(_parse(_head, data))


def to_plain(data: bytes) -> dict[str, object]:
    """Give the document as plain data with every key it holds, for people to look at."""
    decode_header(data)
    return _parse(_plain, data)


_H = TypeVar("_H", bound=Header)
_P = TypeVar("_P")


def _take(decoder: msgspec.msgpack.Decoder[_H], data: bytes | memoryview) -> _H:
    if len(data) > MAX_BYTES:
        raise WireError(f"batch of {len(data)} bytes: more than {MAX_BYTES}")
    try:
        header = _parse(decoder, data)
    except WireError:
        # In another version nothing else need be as expected: that is then the reason.
        _check_version(_parse(_version, data).v)
        raise
    return _checked(header, len(header.fields))


def _understood(header: _H) -> _H:
    if header.v == VERSION and not header.critical:
        return header
    _check_version(header.v)
    if not _KNOWN.issuperset(header.critical):
        unknown = sorted(set(header.critical) - _KNOWN)
        raise WireError(f"batch needs a reader that knows {', '.join(unknown)}: upgrade this one")
    return header


def _checked(header: _H, columns: int) -> _H:
    _understood(header)
    if len(header.sums) not in (0, max(0, columns - KEY_COLUMNS)):
        raise WireError("sums do not match fields")
    if header.kind == "tombstone" and header.dropped is None:
        raise WireError("tombstone that does not say what it stands for")
    if header.kind == "counters" and header.ledger is None:
        raise WireError("batch of counters without a ledger")
    return header


def _check_version(version: int) -> None:
    if version != VERSION:
        raise WireError(f"wire version {version}: this program reads version {VERSION}")


def _parse(decoder: msgspec.msgpack.Decoder[_P], data: bytes | memoryview | msgspec.Raw) -> _P:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a batch: {error}") from error
    except (RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a batch: {type(error).__name__}") from error


def _reorder(rows: list[list[bytes | int | None]], fields: list[str]) -> list[Record]:
    """Records of a batch whose columns are not today's: by name, absent ones as None."""
    if not rows and not fields:
        return []
    if fields[:KEY_COLUMNS] != FIELDS[:KEY_COLUMNS]:
        raise WireError(f"fields do not start with {', '.join(FIELDS[:KEY_COLUMNS])}")
    # In front of each row stands what is taken for a column that it has not.
    pick = itemgetter(*(fields.index(name) + 1 if name in fields else 0 for name in FIELDS))
    try:
        plain = [pick([None, *row]) for row in rows]
    except IndexError:
        raise WireError("a record is shorter than fields") from None
    try:
        return msgspec.convert(plain, list[Record])
    except msgspec.ValidationError as error:
        raise WireError(f"not a batch: {error}") from error
