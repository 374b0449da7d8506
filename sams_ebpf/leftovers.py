"""What a node's crash left open: epochs without a last word, closed at the next start.

While an epoch is open, `<state>/open/<epoch>.msgpack` is a hard link to the newest batch
that was spooled for it: the shipper may delete its own name at any time, and no data is
written twice. A final batch removes the link. Links of another boot are epochs whose
counters died with the kernel: each gets a final batch that repeats what was known last,
says `reboot`, and counts the time nobody saw.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from sams_ebpf import durable, spool, wire

FOLDER: Final = "open"
SUFFIX: Final = ".msgpack"
# Lost by cause, in ns: wall-clock time between the last batch and this boot.
WINDOW: Final = "reboot_window_ns"
REASON: Final = "reboot"
# The same where a collector was lost, and the next run of its job found what it had kept.
LOST_WINDOW: Final = "collector_lost_window_ns"
LOST: Final = "collector-lost"

_log = logging.getLogger(__name__)


def note(state: Path, batch_file: Path, epoch: bytes) -> None:
    """Remember that `batch_file` is the newest of an open epoch. Raises OSError."""
    folder = state / FOLDER
    folder.mkdir(mode=0o750, exist_ok=True)
    place = _place(state, epoch)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(batch_file)
    except OSError:
        # Another file system, or the shipper was faster than we: a copy serves as well.
        if not batch_file.exists():
            return
        durable.write(place, batch_file.read_bytes())
        return
    temporary.rename(place)
    durable.sync_folder(folder)


def forget(state: Path, epoch: bytes) -> None:
    """Note that an epoch has had its final batch. Raises OSError."""
    _place(state, epoch).unlink(missing_ok=True)


def claims(state: Path, epoch: bytes) -> wire.Claims | None:
    """What the newest batch of an open epoch said of its job; None where there is none."""
    try:
        return wire.decode_header(_place(state, epoch).read_bytes()).claims
    except (OSError, wire.WireError):
        return None


def open_batches(state: Path) -> list[tuple[Path, wire.Header]]:
    """Give the newest batch of every open epoch; what cannot be read is logged and left."""
    found = []
    for path in sorted((state / FOLDER).glob(f"*{SUFFIX}")):
        try:
            found.append((path, wire.decode_header(path.read_bytes())))
        except FileNotFoundError:
            continue  # its collector has just ended
        except (OSError, wire.WireError) as error:
            _log.warning("%s: %s; left as it is", path, error)
    return found


def close_last_boot(state: Path, spool_folder: Path, boot_id: str) -> int:
    """Spool a final batch for every epoch of another boot; gives how many. Raises OSError."""
    closed = 0
    for path, last in open_batches(state):
        if last.claims.boot_id == boot_id:
            continue
        spool.put(spool_folder, last_word(last, time.time_ns()))
        path.unlink(missing_ok=True)
        closed += 1
        _log.warning(
            "job %s: the node went down while it ran; closed with what was last spooled",
            last.claims.job_id,
        )
    return closed


def close_lost(state: Path, spool_folder: Path, epoch: bytes) -> bool:
    """Spool a final batch for an epoch whose collector will not come back. Raises OSError."""
    for path, last in open_batches(state):
        if last.epoch == epoch:
            spool.put(spool_folder, last_word(last, time.time_ns(), LOST, LOST_WINDOW))
            path.unlink(missing_ok=True)
            return True
    return False


def last_word(
    last: wire.Header, now_ns: int, reason: str = REASON, window_name: str = WINDOW
) -> wire.Batch:
    """Give the batch that closes an epoch after a reboot, or after its collector was lost.

    It repeats the ledger and the sums of the last batch and holds no records: they are in
    the batches before. A generation of its own lets it supersede them all.
    """
    known = {name: getattr(last, name) for name in wire.Header.__struct_fields__}
    ledger = last.ledger or wire.Ledger(
        cgroup_cpu_ns=None, attributed_cpu_ns=0, unattributed_cpu_ns=None
    )
    window = max(0, now_ns - last.end_ns) if last.end_ns is not None else 0
    lost = {**ledger.lost, window_name: min(window, wire.INT64_MAX)}
    known |= {
        "kind": "counters",
        "generation": last.generation + 1,
        "writer": os.urandom(8),
        "sequence": 0,
        "full": False,
        "final": wire.Closing(reason=reason, live=0),
        "ledger": msgspec.structs.replace(ledger, lost=lost),
        "dropped": None,
    }
    return wire.Batch(**known, records=[])


def _place(state: Path, epoch: bytes) -> Path:
    return state / FOLDER / f"{epoch.hex()}{SUFFIX}"
