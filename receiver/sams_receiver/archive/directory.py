"""The directory of a sealed segment: what each batch in it is, so that few need be read.

Most batches are superseded by a later one of the same job. A reader that wants only what
counts finds here which those are, and takes nothing else out of the segment. What the
directory says, it could find out from the batches: it is left out or ignored at will.
"""

from __future__ import annotations

import struct
import sys
from array import array
from typing import Final

from sams_ebpf import wire
from sams_receiver.archive import format as fmt

MAGIC: Final = b"SAMSDIR1"
_HEAD = struct.Struct("<8sII")
_CHECK = struct.Struct("<I")
_LEVEL: Final = 9

# Bits of a frame's `bits`.
BATCH: Final = 1  # a batch that the sealing program could read; without it nothing else holds
COUNTERS: Final = 2  # of kind `counters`, not a tombstone
WHOLE: Final = 4  # full, and with as many records as the epoch has executables
UNVOUCHED: Final = 8  # the sender did not prove to be the node it names; of frames of any kind

# One array of each, in this order, with a value for each frame in the order of the segment.
# gap: bytes that belong to no frame in front of it. source: number of its cluster, node
# and epoch; claims: number of its claims; both count from 0 in this segment. records_at:
# where in the payload the first record starts, 0 where that is not told; digest: content
# digest of the payload, as in the index.
COLUMNS: Final = {
    "gap": "I", "length": "I", "kind": "B", "bits": "B", "source": "I", "claims": "I",
    "generation": "Q", "sequence": "Q", "end_ns": "Q", "records": "I", "records_at": "I",
    "digest": "Q",
}  # fmt: skip
_ROW_BYTES: Final = struct.calcsize("<" + "".join(COLUMNS.values()))
# `records_at` is told for records with these columns, and no others.
_FIELDS: Final = fmt.checksum(",".join(wire.FIELDS).encode())


class DirectoryBuilder:
    """Collects what the directory of a segment says while the segment is sealed.

    Readers use it too, for what has no directory: `columns` grow with each `add`.
    """

    def __init__(self) -> None:
        self.columns = {name: array(code) for name, code in COLUMNS.items()}
        self._sources: dict[tuple[str | None, str | None, bytes], int] = {}
        self._claims: dict[wire.Claims, int] = {}
        self._end = fmt.DATA_START

    def add_frame(self, frame: fmt.Frame, outline: wire.Outline | None, digest: bytes) -> None:
        """Take a frame; without an outline it is one that cannot be read as a batch."""
        gap = frame.offset - self._end
        self._end = frame.end
        if outline is not None:
            self.add(
                len(frame.data), outline, digest, kind=frame.kind, gap=gap, vouched=frame.vouched
            )
            return
        row = dict.fromkeys(COLUMNS, 0) | {
            "gap": gap, "length": len(frame.data), "kind": frame.kind,
            "bits": 0 if frame.vouched else UNVOUCHED,
        }  # fmt: skip
        for name, column in self.columns.items():
            column.append(row[name])

    def add(
        self,
        length: int,
        outline: wire.Outline,
        digest: bytes,
        *,
        kind: int = fmt.Kind.COUNTERS,
        gap: int = 0,
        vouched: bool = False,
    ) -> None:
        """Take a batch of so many bytes with this content digest."""
        header, records, at = outline
        claims = header.claims
        bits = BATCH if vouched else BATCH | UNVOUCHED
        if header.kind == "counters":
            bits |= COUNTERS
        if header.full and header.executables == records:
            bits |= WHOLE
        source = (claims.cluster, claims.node, header.epoch)
        row = (
            gap,
            length,
            kind,
            bits,
            self._sources.setdefault(source, len(self._sources)),
            self._claims.setdefault(claims, len(self._claims)),
            header.generation,
            header.sequence,
            header.clock_ns,
            records,
            at,
            int.from_bytes(digest, "little"),
        )
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def pack(self) -> bytes:
        """The skippable zstd frame in front of that of the index."""
        plain = [_HEAD.pack(MAGIC, _FIELDS, len(self.columns["gap"]))]
        plain += [_little(column).tobytes() for column in self.columns.values()]
        packed = fmt.compress(plain)
        return fmt.skippable(packed + _CHECK.pack(fmt.checksum(packed)), MAGIC)


class Directory:
    """What a sealed segment says of its frames: `columns` are arrays as COLUMNS names them."""

    def __init__(
        self, packed: bytes, frames: int, decompress: fmt.Decompress = fmt.decompress
    ) -> None:
        """Unpack it. Raises FormatError if it is damaged or says another number of frames."""
        body = packed[: -_CHECK.size]
        if packed[-_CHECK.size :] != _CHECK.pack(fmt.checksum(body)):
            raise fmt.FormatError("directory does not match its checksum")
        plain = decompress(body, _HEAD.size + frames * _ROW_BYTES)
        if len(plain) != _HEAD.size + frames * _ROW_BYTES:
            raise fmt.FormatError("directory is cut")
        magic, fields, count = _HEAD.unpack_from(plain)
        if magic != MAGIC or count != frames:
            raise fmt.FormatError("directory does not match its index")
        self.columns: dict[str, array[int]] = {}
        at = _HEAD.size
        for name, code in COLUMNS.items():
            column = array(code)
            column.frombytes(plain[at : at + count * column.itemsize])
            at += count * column.itemsize
            self.columns[name] = _little(column)
        if fields != _FIELDS:
            self.columns["records_at"] = array("I", bytes(4 * count))

    def covers(self, raw_length: int) -> bool:
        """Whether the frames lie one after the other to the end of the segment: no damage."""
        if any(self.columns["gap"]):
            return False
        taken = sum(self.columns["length"]) + fmt.FRAME_OVERHEAD * len(self.columns["length"])
        return fmt.DATA_START + taken == raw_length


def _little(column: array[int]) -> array[int]:
    if sys.byteorder != "little":
        column.byteswap()
    return column
