"""From snapshots to batches in the spool: what changed, what is whole, what was lost.

`Composer` decides what stands in a batch and knows nothing of files; `Writer` puts it on
disk. A batch that could not be written costs nothing but its moment: the next one then
holds all records.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from sams_ebpf import __version__, leftovers, spool, wire
from sams_ebpf.meter import Meter, Snapshot

_log = logging.getLogger(__name__)

_Key = tuple[bytes, int]


class Composer:
    """Makes the batches of one writer of one epoch.

    full_every: every how many batches one holds all records; the first does as well,
    since nobody can know what an earlier writer of the epoch left unspooled.
    """

    def __init__(self, meter: Meter, claims: wire.Claims, full_every: int) -> None:
        self.claims = claims
        self._meter = meter
        self._full_every = full_every
        self._writer = os.urandom(8)
        self._sequence = 0
        self._since_full = full_every
        self._told: dict[_Key, wire.Record] = {}

    def compose(self, snapshot: Snapshot, end_ns: int, final: wire.Closing | None) -> wire.Batch:
        """Give the next batch; `kept` or `lost` has to follow."""
        full = final is not None or self._since_full >= self._full_every
        records = snapshot.records
        changed = records if full else [r for r in records if self._told.get(r.key) != r]
        return wire.Batch(
            v=wire.VERSION,
            kind="counters",
            epoch=self._meter.epoch,
            generation=self._meter.generation,
            writer=self._writer,
            sequence=self._sequence,
            claims=self.claims,
            software=f"sams-ebpf {__version__}",
            mode=self._meter.mode,
            loader=self._meter.loader,
            begin_ns=self._meter.begin_ns,
            end_ns=end_ns,
            full=full,
            final=final,
            ledger=ledger_of(snapshot),
            processes=snapshot.processes,
            executables=len(records),
            sums=sums_of(records),
            fields=wire.FIELDS,
            records=changed,
        )

    def kept(self, batch: wire.Batch) -> None:
        """Note that a batch is in the spool."""
        self._sequence += 1
        self._since_full = 1 if batch.full else self._since_full + 1
        self._told.update((record.key, record) for record in batch.records)

    def lost(self) -> None:
        """Note that it is not: its number may have been seen, and the next one is whole."""
        self._sequence += 1
        self._since_full = self._full_every


def put(composer: Composer, folder: Path, batch: wire.Batch) -> Path | None:
    """Spool a batch and let its composer know; None, logged, if it could not be written."""
    try:
        path = spool.put(folder, batch)
    except OSError as error:
        composer.lost()
        _log.warning("%s: batch not written: %s", folder, error.strerror)
        return None
    composer.kept(batch)
    return path


def ledger_of(snapshot: Snapshot) -> wire.Ledger:
    """Compare what was attributed with what the kernel charged."""
    inside = sum(r.cpu_ns for r in snapshot.records if not r.flags & wire.OUTSIDE)
    outside = sum(r.cpu_ns for r in snapshot.records if r.flags & wire.OUTSIDE)
    total = snapshot.cgroup_cpu_ns
    return wire.Ledger(
        cgroup_cpu_ns=total,
        attributed_cpu_ns=inside,
        unattributed_cpu_ns=None if total is None else total - inside,
        outside_cpu_ns=outside,
        age_ns=snapshot.age_ns,
        unattributed_by=snapshot.unattributed_by,
        lost=snapshot.lost,
    )


def sums_of(records: Sequence[wire.Record]) -> list[int | None]:
    """Add each counter up over all records; maxima as maxima; None where nobody has one."""
    sums: list[int | None] = []
    columns = list(zip(*map(msgspec.structs.astuple, records), strict=True))
    for at, name in enumerate(wire.COUNTERS, wire.KEY_COLUMNS):
        values = [v for v in columns[at] if v is not None] if columns else []
        if not values:
            sums.append(None)
        else:
            sums.append(max(values) if name in wire.MAXIMA else sum(values))
    return sums


class Writer:
    """Harvests a meter into the spool.

    state: where the newest batch is noted as long as the epoch is open, see `leftovers`.
    """

    def __init__(
        self,
        meter: Meter,
        claims: wire.Claims,
        *,
        folder: Path,
        state: Path,
        full_every: int,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.composer = Composer(meter, same_sender(claims, state, meter.epoch), full_every)
        self._meter = meter
        self._folder = folder
        self._state = state
        self._clock = clock
        self._failing = False
        self.problem = ""
        self.last: wire.Batch | None = None

    def write(self, final: wire.Closing | None = None) -> bool:
        """Harvest and spool one batch; False if it could not be kept.

        `problem` says why. Logged once, but for the final batch: that is the caller's to tell.
        """
        snapshot = self._meter.harvest()
        batch = self.composer.compose(snapshot, self._clock(), final)
        try:
            path = spool.put(self._folder, batch)
        except OSError as error:
            self.composer.lost()
            self.problem = f"{self._folder}: batch not written: {error.strerror}"
            if not self._failing and final is None:
                _log.warning("%s; the next batch holds it all", self.problem)
            self._failing = True
            return False
        if self._failing:
            _log.info("%s: batches are written again", self._folder)
        self._failing = False
        self.composer.kept(batch)
        self.last = batch
        self._note(path, final)
        return True

    def _note(self, path: Path, final: wire.Closing | None) -> None:
        try:
            if final is None:
                leftovers.note(self._state, path, self._meter.epoch)
            else:
                leftovers.forget(self._state, self._meter.epoch)
        except OSError as error:
            # Only a crash of the node would have needed it.
            _log.warning("%s: open epoch not noted: %s", self._state, error.strerror)


def with_claims(claims: wire.Claims, **more: object) -> wire.Claims:
    """Add what is known on the node; what is None leaves a claim as it was."""
    return msgspec.structs.replace(
        claims, **{name: value for name, value in more.items() if value is not None}
    )


def same_sender(claims: wire.Claims, state: Path, epoch: bytes) -> wire.Claims:
    """Claims with the cluster and node that the epoch has had so far.

    They tell it from other nodes' epochs: under another name its CPU would count twice.
    """
    before = leftovers.claims(state, epoch)
    if before is None:
        return claims
    return msgspec.structs.replace(claims, cluster=before.cluster, node=before.node)


BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """Name of this boot of the node; None where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None
