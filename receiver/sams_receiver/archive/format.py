"""The bytes of a segment: pure functions, no files. `docs/archive.md` is the same in words.

All integers are little-endian. Times are nanoseconds since the Unix epoch.
"""

from __future__ import annotations

import bisect
import functools
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from hashlib import blake2b
from typing import Final, NamedTuple
from zlib import crc32

import msgspec
from backports import zstd

from sams_ebpf import wire
from sams_ebpf.errors import SamsError

Buffer = bytes | bytearray | memoryview

FORMAT: Final = 1
SEGMENT_MAGIC: Final = b"SAMSSEG1"
INDEX_MAGIC: Final = b"SAMSIDX1"
MAX_PAYLOAD: Final = wire.MAX_BYTES
# A zstd frame that asks its reader for more than 8 MiB of window is refused: a frame of
# 10 kB may otherwise hold 130 MB while it streams.
WINDOW_LOG_MAX: Final = 23
COMPRESSION_LEVEL: Final = 9
# A flipped bit costs at most one block. 512 KiB would save a sixteenth of a sealed segment.
BLOCK_BYTES: Final = 64 << 10

_HEADER = struct.Struct("<8s16sIQQ8s8s")
_HEADER_BYTES: Final = _HEADER.size + 4
DATA_START: Final = 2 * _HEADER_BYTES
MARKER_BYTES: Final = 8
_FRAME = struct.Struct("<8sIBBHQ")
_CHECK = struct.Struct("<I")
FRAME_HEAD: Final = _FRAME.size + 4
FRAME_OVERHEAD: Final = FRAME_HEAD + 4
_MARK = struct.Struct("<QQ")
MARK_BYTES: Final = _MARK.size + 4

_SKIPPABLE: Final = 0x184D2A5E
_SKIP = struct.Struct("<II")
_INDEX_HEAD = struct.Struct("<8sIIIIQQQQ")
_BLOCK = struct.Struct("<QQII")
_WRITER = struct.Struct("<16sII")
_ROW = struct.Struct("<Q8s")
_KIND = struct.Struct("<IQ")
_TRAILER = struct.Struct("<II8s")


class FormatError(SamsError):
    """Bytes that are not what this format says should be there."""


class Kind(IntEnum):
    """What a frame holds. A reader passes over kinds that it does not know."""

    COUNTERS = 1  # a batch as `sams_ebpf.wire` describes it, tombstones included
    UPSTREAM_JSON = 2  # msgpack map: cluster, job, node, digest, name, body
    SACCT = 16  # rows of accounting as they were read
    SENT = 17  # digests of what was sent on
    RULES = 18  # a version of the rules


class Flag:
    """Bits of a frame's `flags`."""

    VOUCHED: Final = 1  # who sent it proved to be the node that the payload names


class Frame(NamedTuple):
    """One payload, where it stands in its segment, and when it was received.

    `offset` and `end` count bytes of the raw segment, sealed or not; `end` is where
    to go on reading.
    """

    kind: int
    flags: int
    received_ns: int
    offset: int
    end: int
    data: bytes

    @property
    def vouched(self) -> bool:
        """Whether the sender proved to be the node that the payload names."""
        return bool(self.flags & Flag.VOUCHED)


class Damage(NamedTuple):
    """A range of a segment that holds no valid frame. `tail`: none follows it either."""

    offset: int
    length: int
    tail: bool


class SegmentHeader(NamedTuple):
    """The first bytes of a segment, written twice.

    marker: 8 random bytes that start each frame of this segment. They are known to
    nobody who sends batches, so that no payload can look like a frame to a reader
    who searches for the next one behind damage.
    """

    archive: bytes
    partition: int
    number: int
    created_ns: int
    marker: bytes


def new_marker() -> bytes:
    """Make the marker of a new segment; never starts with a zero."""
    return bytes([1 + secrets.randbelow(255)]) + secrets.token_bytes(7)


def checksum(data: Buffer, start: int = 0) -> int:
    """CRC-32 as of zlib, with 1 for 0: no run of zeros is ever valid."""
    return crc32(data, start) or 1


def pack_segment_header(header: SegmentHeader) -> bytes:
    """Both copies."""
    packed = _HEADER.pack(SEGMENT_MAGIC, *header, bytes(8))
    packed += _CHECK.pack(checksum(packed))
    return packed * 2


def parse_segment_header(data: Buffer) -> SegmentHeader:
    """Read either copy. Raises FormatError if both are damaged."""
    for start in (0, _HEADER_BYTES):
        packed = bytes(data[start : start + _HEADER.size])
        check = bytes(data[start + _HEADER.size : start + _HEADER_BYTES])
        if len(check) == _CHECK.size and check == _CHECK.pack(checksum(packed)):
            magic, archive, partition, number, created_ns, marker, _ = _HEADER.unpack(packed)
            if magic == SEGMENT_MAGIC:
                return SegmentHeader(archive, partition, number, created_ns, marker)
    raise FormatError("no valid segment header")


def pack_frame(marker: bytes, kind: int, flags: int, received_ns: int, data: bytes) -> bytes:
    """One frame, ready to be appended."""
    if not 0 < len(data) <= MAX_PAYLOAD:
        raise FormatError(f"a payload of {len(data)} bytes: 1 to {MAX_PAYLOAD} are possible")
    head = _FRAME.pack(marker, len(data), kind, flags, 0, received_ns)
    check = checksum(head)
    return b"".join((head, _CHECK.pack(check), data, _CHECK.pack(checksum(data, check))))


def parse_frame(data: Buffer, at: int, marker: bytes, base: int = 0) -> Frame | None:
    """Read the valid frame at `at`, or None. `base` is added to the offsets it reports."""
    body = at + FRAME_HEAD
    if body > len(data):
        return None
    head = data[at : at + _FRAME.size]
    found, length, kind, flags, _, received_ns = _FRAME.unpack(head)
    end = body + length
    if found != marker or not 0 < length <= MAX_PAYLOAD or end + _CHECK.size > len(data):
        return None
    (check,) = _CHECK.unpack_from(data, at + _FRAME.size)
    if check != checksum(head):
        return None
    payload = bytes(data[body:end])
    if _CHECK.unpack_from(data, end)[0] != checksum(payload, check):
        return None
    return Frame(kind, flags, received_ns, base + at, base + end + _CHECK.size, payload)


def needs(data: Buffer, at: int, marker: bytes) -> int:
    """How many bytes from `at` the frame that starts there takes; 0 if none starts there."""
    if at + FRAME_HEAD > len(data):
        return 0
    head = data[at : at + _FRAME.size]
    found, length, *_ = _FRAME.unpack(head)
    if found != marker or length > MAX_PAYLOAD:
        return 0
    if _CHECK.unpack_from(data, at + _FRAME.size)[0] != checksum(head):
        return 0
    return int(FRAME_OVERHEAD + length)


Read = Callable[[int, int], bytes]
_WINDOW: Final = 1 << 20
_STEP: Final = 128 << 10


def scan(read: Read, start: int, end: int, marker: bytes) -> Iterator[Frame | Damage]:
    """Every valid frame in [start, end) of a segment, and every range between them.

    `read(offset, length)` gives the bytes there, fewer at the end only. Holds no more
    than one window and one frame in memory.
    """
    at = start
    window, base = b"", start
    damaged_from: int | None = None
    while at < end:
        if at - base + FRAME_HEAD > len(window):
            window, base = read(at, min(_WINDOW, end - at)), at
        wanted = needs(window, at - base, marker)
        if at - base + wanted > len(window) and at + wanted <= end:
            window, base = read(at, min(max(_WINDOW, wanted), end - at)), at
        frame = parse_frame(window, at - base, marker, base) if wanted else None
        if frame is not None:
            if damaged_from is not None:
                yield Damage(damaged_from, at - damaged_from, tail=False)
                damaged_from = None
            yield frame
            at = frame.end
            continue
        if damaged_from is None:
            damaged_from = at
        found = window.find(marker, at - base + 1)
        if found >= 0:
            at = base + found
        elif base + len(window) >= end or not window:
            break
        else:
            # The marker may lie across the edge of the window.
            at = max(at + 1, base + len(window) - len(marker) + 1)
    if damaged_from is not None:
        yield Damage(damaged_from, end - damaged_from, tail=True)


def pack_mark(number: int, length: int) -> bytes:
    """The mark of what is durable: segment number and length of its good part."""
    packed = _MARK.pack(number, length)
    return packed + _CHECK.pack(checksum(packed))


def parse_mark(data: Buffer) -> tuple[int, int] | None:
    """Segment number and length, or None for a mark that cannot be read."""
    packed = bytes(data[: _MARK.size])
    if len(data) < MARK_BYTES or bytes(data[_MARK.size : MARK_BYTES]) != _CHECK.pack(
        checksum(packed)
    ):
        return None
    number, length = _MARK.unpack(packed)
    return number, length


@functools.lru_cache(maxsize=1 << 14)
def partition_of(cluster: str | None, node: str | None, partitions: int) -> int:
    """Which partition a node's batches go to, the same on every machine and for ever."""
    name = f"{cluster or ''}\0{node or ''}".encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little") % partitions


class Tag(NamedTuple):
    """What tells a payload from another: 16 bytes of who, a sequence, 8 bytes of content."""

    key: bytes
    sequence: int
    digest: bytes


def content_digest(data: Buffer) -> bytes:
    """8 bytes that tell whether two payloads of one identity are the same."""
    return blake2b(data, digest_size=8).digest()


def batch_tag(header: wire.Header, data: Buffer) -> Tag:
    """Tag of a batch: cluster and node are part of it, so no node can take another's place."""
    claims = header.claims
    key = _writer_key(claims.cluster, claims.node, header.generation, header.epoch, header.writer)
    return Tag(key, header.sequence, content_digest(data))


# A writer sends many batches.
@functools.lru_cache(maxsize=1 << 14)
def _writer_key(
    cluster: str | None, node: str | None, generation: int, epoch: bytes, writer: bytes
) -> bytes:
    who = f"{cluster or ''}\0{node or ''}\0{generation}\0".encode()
    return blake2b(who + epoch + writer, digest_size=16).digest()


class UpstreamJson(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of a frame of kind UPSTREAM_JSON. digest: SHA-256 of body."""

    cluster: str | None
    job: str
    node: str
    digest: bytes
    name: str
    body: bytes

    @property
    def tag(self) -> Tag:
        """Keyed by cluster, job, node and digest: any number of files of a job may be kept."""
        who = f"{self.cluster or ''}\0{self.job}\0{self.node}\0".encode()
        return Tag(blake2b(who + self.digest, digest_size=16).digest(), 0, self.digest[:8])


_upstream = msgspec.msgpack.Decoder(UpstreamJson)
pack_upstream = msgspec.msgpack.Encoder().encode


def unpack_upstream(data: bytes) -> UpstreamJson:
    """Read the payload of a frame of kind UPSTREAM_JSON. Raises FormatError."""
    try:
        return _upstream.decode(data)
    except msgspec.MsgspecError as error:
        raise FormatError(f"not a frame of upstream's JSON: {error}") from error


def tag_of(kind: int, data: bytes) -> Tag:
    """Tag of any payload. Raises wire.WireError or FormatError for what cannot be read."""
    if kind == Kind.COUNTERS:
        return batch_tag(wire.decode_header(data), data)
    return _tag_of_other(kind, data)


def _tag_of_other(kind: int, data: bytes) -> Tag:
    if kind == Kind.UPSTREAM_JSON:
        return unpack_upstream(data).tag
    whole = blake2b(bytes([kind]) + data, digest_size=16).digest()
    return Tag(whole, 0, whole[:8])


def tag_of_frame(frame: Frame) -> Tag | None:
    """Tag of a stored frame; None for one that today's reader of batches cannot read."""
    return describe(frame)[0]


def describe(frame: Frame) -> tuple[Tag | None, wire.Outline | None]:
    """Tag of a stored frame, and the outline of a batch; None for what cannot be read."""
    try:
        if frame.kind == Kind.COUNTERS:
            found = wire.outline(frame.data)
            return batch_tag(found.header, frame.data), found
        return _tag_of_other(frame.kind, frame.data), None
    except (wire.WireError, FormatError):
        return None, None


class Block(NamedTuple):
    """One zstd frame: where its bytes stand in the raw segment and in the sealed file."""

    raw_offset: int
    offset: int
    raw_length: int
    length: int


class Index:
    """What a sealed segment says of itself, in a skippable zstd frame at its end."""

    raw_length: int
    frames: int
    first_ns: int
    last_ns: int

    def __init__(self, packed: bytes) -> None:
        try:
            (
                magic,
                blocks,
                writers,
                rows,
                kinds,
                self.raw_length,
                self.frames,
                self.first_ns,
                self.last_ns,
            ) = _INDEX_HEAD.unpack_from(packed)
        except struct.error as error:
            raise FormatError("index is cut") from error
        self._writers = _INDEX_HEAD.size + blocks * _BLOCK.size
        self._rows = self._writers + writers * _WRITER.size
        kinds_at = self._rows + rows * _ROW.size
        end = kinds_at + kinds * _KIND.size
        good = len(packed) == end + _CHECK.size and packed[end:] == _CHECK.pack(
            checksum(packed[:end])
        )
        if magic != INDEX_MAGIC or not good:
            raise FormatError("index does not match its checksum")
        self._packed = packed
        self._count = writers
        self.blocks = [
            Block(*_BLOCK.unpack_from(packed, _INDEX_HEAD.size + at * _BLOCK.size))
            for at in range(blocks)
        ]
        self.kinds: dict[int, int] = dict(_KIND.iter_unpack(packed[kinds_at:end]))

    def digest(self, key: bytes, sequence: int) -> bytes | None:
        """Digest of what was stored under key and sequence; None if nothing was."""
        at = bisect.bisect_left(range(self._count), key, key=lambda n: self._writer(n)[0])
        if at == self._count:
            return None
        found, first, count = self._writer(at)
        if found != key:
            return None
        row = bisect.bisect_left(range(count), sequence, key=lambda n: self._row(first + n)[0])
        if row == count:
            return None
        stored, digest = self._row(first + row)
        return digest if stored == sequence else None

    def writers(self) -> Iterator[tuple[bytes, int, int]]:
        """Key, lowest and highest sequence of each writer in this segment."""
        for at in range(self._count):
            key, first, count = self._writer(at)
            yield key, self._row(first)[0], self._row(first + count - 1)[0]

    def _writer(self, at: int) -> tuple[bytes, int, int]:
        key, first, count = _WRITER.unpack_from(self._packed, self._writers + at * _WRITER.size)
        return key, first, count

    def _row(self, at: int) -> tuple[int, bytes]:
        sequence, digest = _ROW.unpack_from(self._packed, self._rows + at * _ROW.size)
        return sequence, digest


class IndexBuilder:
    """Collects what the index of a segment says while the segment is sealed."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._tags: list[Tag] = []
        self._kinds: dict[int, int] = {}
        self._times = array("Q")

    def add(self, frame: Frame, tag: Tag | None) -> None:
        """Count a frame; one without a tag can be read but is no writer's."""
        self._kinds[frame.kind] = self._kinds.get(frame.kind, 0) + 1
        self._times.append(frame.received_ns)
        if tag is not None:
            self._tags.append(tag)

    def pack(self, raw_length: int) -> bytes:
        """The skippable zstd frame that ends a sealed segment."""
        self._tags.sort()
        writers: list[bytes] = []
        rows: list[bytes] = []
        first = 0
        for at, tag in enumerate(self._tags):
            rows.append(_ROW.pack(tag.sequence, tag.digest))
            if at + 1 == len(self._tags) or self._tags[at + 1].key != tag.key:
                writers.append(_WRITER.pack(tag.key, first, at + 1 - first))
                first = at + 1
        head = _INDEX_HEAD.pack(
            INDEX_MAGIC,
            len(self.blocks),
            len(writers),
            len(rows),
            len(self._kinds),
            raw_length,
            len(self._times),
            min(self._times, default=0),
            max(self._times, default=0),
        )
        packed = b"".join(
            [
                head,
                *(_BLOCK.pack(*block) for block in self.blocks),
                *writers,
                *rows,
                *(_KIND.pack(*item) for item in sorted(self._kinds.items())),
            ]
        )
        return skippable(packed + _CHECK.pack(checksum(packed)), INDEX_MAGIC)


def skippable(packed: bytes, magic: bytes) -> bytes:
    """A zstd frame that decompressors pass over, with a trailer by which its end tells it."""
    trailer = _TRAILER.pack(len(packed), checksum(_CHECK.pack(len(packed))), magic)
    return _SKIP.pack(_SKIPPABLE, len(packed) + len(trailer)) + packed + trailer


def skippable_before(read: Read, end: int, magic: bytes) -> tuple[int, bytes] | None:
    """Where the skippable frame that ends at `end` begins, and what is in it.

    None if what ends there is not one of this magic. Raises FormatError if the file is
    too short for it.
    """
    trailer = read(max(0, end - _TRAILER.size), _TRAILER.size)
    if len(trailer) != _TRAILER.size:
        raise FormatError("sealed segment is cut")
    length, check, found = _TRAILER.unpack(trailer)
    if found != magic or check != checksum(_CHECK.pack(length)):
        return None
    begin = end - _TRAILER.size - length - _SKIP.size
    if begin < 0:
        raise FormatError("sealed segment is cut")
    return begin, read(begin + _SKIP.size, length)


def compress(parts: Sequence[bytes]) -> bytes:
    """One zstd frame of the parts."""
    compressor = zstd.ZstdCompressor(
        options={
            zstd.CompressionParameter.compression_level: COMPRESSION_LEVEL,
            zstd.CompressionParameter.window_log: 21,
            zstd.CompressionParameter.checksum_flag: 1,
        }
    )
    # Then the reader has the whole of it in one piece, without a window beside.
    compressor.set_pledged_input_size(sum(map(len, parts)))
    out = [compressor.compress(part) for part in parts]
    out.append(compressor.flush())
    return b"".join(out)


def self_checking(data: Buffer) -> bool:
    """Whether a zstd frame has a checksum of what it holds, which decompressing compares."""
    return len(data) > 4 and bool(data[4] & 4)


def _unchecked(data: Buffer) -> bytes:
    """The same zstd frame as if it had no checksum; that stays behind it."""
    return b"".join((data[:4], bytes([data[4] & ~4]), data[5:]))


def decompress(data: Buffer, limit: int) -> bytes:
    """Decompress what one zstd frame holds. Raises FormatError for damage or more than limit."""
    decompressor = _decompressor()
    try:
        out = decompressor.decompress(data, max_length=limit + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"not valid zstd: {error}") from error
    if decompressor.eof and len(out) <= limit and not decompressor.unused_data:
        return out
    out, problem = salvage(data, limit)
    if problem is not None:
        raise FormatError(problem)
    return out


# A reader may have a quicker way: what is packed, and how long it may be at most.
Decompress = Callable[[bytes, int], bytes]


def salvage(data: Buffer, limit: int) -> tuple[bytes, str | None]:
    """Decompress as far as it goes, at most limit bytes; what stopped it, if anything.

    Without comparing the checksum of all: each frame of the segment has its own.
    """
    decompressor = _decompressor()
    if self_checking(data):
        data = _unchecked(data)[: -_CHECK.size]
    out: list[bytes] = []
    size = 0
    feed: Buffer = data
    try:
        while not decompressor.eof:
            part = decompressor.decompress(feed, max_length=min(limit - size + 1, 128 << 10))
            feed = b""
            size += len(part)
            if size > limit:
                return b"".join(out), f"more than {limit} bytes when decompressed"
            out.append(part)
            if not part and decompressor.needs_input:
                return b"".join(out), "zstd frame is cut"
    except zstd.ZstdError as error:
        return b"".join(out), f"not valid zstd: {error}"
    if decompressor.unused_data:
        return b"".join(out), "bytes behind the zstd frame"
    return b"".join(out), None


def _decompressor() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX}
    )


def walk(data: bytes, limit: int) -> Iterator[bytes]:
    """Parts of all zstd frames of a sealed file, without its index.

    Raises FormatError at damage, or where the file ends without anything behind them.
    """
    at = size = 0
    while int.from_bytes(data[at : at + 4], "little") != _SKIPPABLE:
        feed, fed = data[at : at + _STEP], at + _STEP
        behind = _CHECK.size if self_checking(feed) else 0
        if behind:
            feed = _unchecked(feed)
        decompressor = _decompressor()
        try:
            while not decompressor.eof:
                part = decompressor.decompress(feed, max_length=1 << 20)
                feed = b""
                size += len(part)
                if size > limit:
                    raise FormatError(f"more than {limit} bytes when decompressed")
                if not part and decompressor.needs_input:
                    feed, fed = data[fed : fed + _STEP], fed + _STEP
                    if not feed:
                        raise FormatError("sealed segment is cut")
                yield part
        except zstd.ZstdError as error:
            raise FormatError(f"not valid zstd: {error}") from error
        at = min(fed, len(data)) - len(decompressor.unused_data) + behind


def join_blocks(frames: Iterable[Frame | Damage], start: int) -> Iterator[tuple[int, int]]:
    """Ranges of about BLOCK_BYTES that end where a frame ends, from `start` on."""
    begin = start
    end = start
    for item in frames:
        end = item.end if isinstance(item, Frame) else item.offset + item.length
        if end - begin >= BLOCK_BYTES:
            yield begin, end
            begin = end
    if end > begin:
        yield begin, end
