"""What was set aside: damaged, or refused by a receiver for good; bounded.

    rejected/<batch>[.<receiver>].msgpack   and beside it   .reason

Over the bound the oldest go. That is a loss: the caller gets told what goes before it
does, and how much has gone stays in a file, for `sams-ebpf status`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import stat
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from sams_ebpf import durable, spool, wire

FOLDER: Final = "rejected"
TALLY: Final = "rejected.json"
BLOCK: Final = 4096
# Once over the bound, make some room, so that not every batch brings a loss of its own.
_KEEP_TENTHS: Final = 9

_log = logging.getLogger(__name__)


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What has gone from here since the first time that there was no room; bytes of disk."""

    batches: int = 0
    bytes: int = 0
    since: str | None = None
    last: str | None = None


class Kept(NamedTuple):
    """A batch set aside, with its reason. entry: None where the name is no batch's."""

    files: list[Path]
    entry: spool.Entry | None
    bytes: int
    mtime_ns: int

    @property
    def batch(self) -> Path | None:
        """The file of the batch itself, if it is there."""
        return next((file for file in self.files if file.suffix == ".msgpack"), None)


def put_reason(target: Path, reader: str | None, reason: str) -> None:
    """Say beside a batch why it was set aside."""
    note = {"receiver": reader, "reason": reason, "time": _now()}
    with contextlib.suppress(OSError):  # the batch itself is what counts
        durable.write(target.with_suffix(".reason"), json.dumps(note).encode() + b"\n")


def kept(folder: Path) -> list[Kept]:
    """List the files that are there, oldest first. Raises OSError."""
    found: dict[str, Kept] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue  # about to be renamed, or of one who was killed
        with contextlib.suppress(FileNotFoundError):
            status = file.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                continue  # not ours, and not to be deleted like a file
            size = -(-status.st_size // BLOCK) * BLOCK
            known = found.get(file.stem)
            if known is None:
                entry = spool.parse(f"{file.name.partition('.')[0]}.msgpack")
                known = Kept([], entry, 0, status.st_mtime_ns)
            known.files.append(file)
            found[file.stem] = known._replace(bytes=known.bytes + size)
    return sorted(found.values(), key=lambda one: one.mtime_ns)


def over(folder: Path, max_bytes: int) -> list[Kept]:
    """Choose what has to go so that the rest is within its bound. Raises OSError."""
    found = kept(folder)
    total = sum(one.bytes for one in found)
    gone: list[Kept] = []
    if total > max_bytes:
        for one in found:
            if total <= max_bytes * _KEEP_TENTHS // 10:
                break
            gone.append(one)
            total -= one.bytes
    return gone


def runs(gone: list[Kept]) -> list[list[Kept]]:
    """Group batches of one writer whose sequences follow each other: what one tombstone tells."""
    batches = [one for one in gone if one.entry is not None and one.entry.kind != "tombstone"]
    ordered = sorted(batches, key=_identity)
    found: list[list[Kept]] = []
    for one in ordered:
        before = _identity(found[-1][-1]) if found else None
        identity = _identity(one)
        # The same one may be here twice, refused by two receivers.
        if before and before[:3] == identity[:3] and identity[3] - before[3] <= 1:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def remove(gone: list[Kept], tally_file: Path) -> None:
    """Delete, and add to the tally. Raises OSError."""
    now = _now()
    before = tally(tally_file)
    after = Tally(
        batches=before.batches + len(gone),
        bytes=before.bytes + sum(one.bytes for one in gone),
        since=before.since or now,
        last=now,
    )
    durable.write(tally_file, msgspec.json.encode(after) + b"\n")
    for one in gone:
        for file in one.files:
            file.unlink(missing_ok=True)
    _log.warning("%s: no room: the %d oldest batches deleted", gone[0].files[0].parent, len(gone))


def tally(file: Path) -> Tally:
    """Read how much has gone so far; nothing, logged, if the file cannot be read."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Tally)
    except FileNotFoundError:
        return Tally()
    except (OSError, msgspec.MsgspecError) as error:
        _log.warning("%s: cannot be read, counted from nothing: %s", file, error)
        return Tally()


def _identity(one: Kept) -> wire.Identity:
    assert one.entry is not None  # noqa: S101 (of those that have a name)
    return one.entry.identity


def _now() -> str:
    return time.strftime("%FT%TZ", time.gmtime())
