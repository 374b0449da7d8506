"""The meter of `bpf` mode: reads one job's slot of a set of programs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

from sams_ebpf import account, bpf, cgroups, layout, slots, wire
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.meter import Snapshot
from sams_ebpf.programs import ProgramSet

# Lost by cause: CPU, at most, of a later run of the same job that was counted here.
LATER_RUN: Final = "later_run_ns"

_TRIES: Final = 20  # once in a job's life
_HARVEST_TRIES: Final = 3
_TICK_NS: Final = 4_000_000
_OVERFLOW: Final = layout.Name(wire.OVERFLOW, b"", b"")
_OVERFLOW_OUTSIDE: Final = layout.Name(wire.OVERFLOW | wire.OUTSIDE, b"", b"")


class BpfMeter:
    """See `sams_ebpf.meter.Meter`.

    slot_id: of the job in `programs`; this meter becomes the next writer of its epoch.
    cgroup: the job's, for the kernel's own counter. let_go: called by `close` once the
    slot is released.
    """

    mode: Literal["bpf", "proc"] = "bpf"

    def __init__(
        self,
        programs: ProgramSet,
        slot: layout.Slot,
        cgroup: Cgroup,
        *,
        let_go: Callable[[ProgramSet, int], None],
    ) -> None:
        self.loader: Literal["libbpf", "bcc"] | None = programs.loader
        self.epoch = slot.epoch
        self.path = slot.path
        self._programs = programs
        self._id = slot.id
        self._where = cgroup
        self._counter = cgroups.counter(cgroup, cgroups.mounted()) if cgroup.exists() else cgroup
        self._let_go = let_go
        self._run_ended_ns: int | None = None
        self._names: dict[int, layout.Name] = {}
        self._splits: dict[int, tuple[int, int]] = {}
        self._claim = slots.claim(programs, slot)
        self.generation = self._claim.generation
        self.begin_ns = self._claim.begin_ns
        if self._claim.flags & layout.CLAIM_BY_HAND and self.generation == 1:
            self._settle_what_was_before()

    def _settle_what_was_before(self) -> None:
        """Note the CPU of before the take-up: what the counter has and the tasks have not."""
        attributed = self._inside(self._settled(_TRIES, enough_ns=0))
        self._claim = self._claim._replace(before_ns=max(0, self._claim.last_ns - attributed))
        slots.set_claim(self._programs, self._claim)

    def _settled(self, tries: int, *, enough_ns: int) -> list[tuple[int, layout.Total]]:
        """Settle all tasks and read their totals and the kernel's counter as of one moment.

        What runs meanwhile moves both on, at ticks and whenever a clock is read: of a few
        tries the one that was disturbed least counts, or the first by no more than
        `enough_ns`.
        """
        least = None
        rows: list[tuple[int, layout.Total]] = []
        claim = self._claim
        for _ in range(tries):
            self.read_counter()
            earlier = self._claim.last_ns
            self._settle()
            found = self._rows()
            self.read_counter()
            disturbed = self._claim.last_ns - earlier
            if least is None or disturbed < least:
                least, rows, claim = disturbed, found, self._claim
            if disturbed <= enough_ns:
                break
        self._claim = claim
        return rows

    def read_counter(self) -> None:
        """Read the kernel's counter of the job's cgroup, if it is there; the last one is kept.

        A cgroup that was removed and made again is another one: its counter begins anew
        and what the old one said last is added.
        """
        if self._counter is None or not self._is_ours():
            return
        try:
            now_id = cgroups.identify(self._counter)
            now_ns = cgroups.cpu_ns(self._counter)
        except FileNotFoundError:
            return
        if now_ns is None:
            return
        claim = self._claim
        if claim.cgroup_id not in (0, now_id):
            claim = claim._replace(past_ns=claim.past_ns + claim.last_ns)
        self._claim = claim._replace(
            cgroup_id=now_id,
            last_ns=now_ns,
            last_read_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        )

    def _is_ours(self) -> bool:
        """Tell whether the cgroup at the job's path is this run's, if there is one."""
        try:
            key = layout.U64.pack(cgroups.identify(self._where))
        except FileNotFoundError:
            return False
        noted = self._programs.maps["cgroups"].lookup(key)
        # Not noted at all: there was no room, which is counted.
        return noted is None or noted == layout.U32.pack(self._id)

    def look(self, found: Sequence[Cgroup]) -> None:
        """Read the counter of the job's cgroup, which may be another than before."""
        if found and (self._counter is None or found[0].folder != self._counter.folder):
            self._where = found[0]
            counter = cgroups.counter(found[0], cgroups.mounted())
            self._counter = counter or self._counter
        self.read_counter()
        slots.set_claim(self._programs, self._claim)

    def end_run(self, ended_ns: int | None) -> None:
        """Take no more cgroups to this run: one made at its path from now on is another run's.

        ended_ns: CLOCK_BOOTTIME of the run's end, if known; a cgroup that was made after it
        and before this call has been counted here, which the ledger then says.
        """
        self._run_ended_ns = ended_ns
        self._claim = self._claim._replace(flags=self._claim.flags | layout.CLAIM_ENDED)
        slots.set_claim(self._programs, self._claim)

    def works(self) -> bool:
        """Tell whether maps can be read and written, and tasks settled, as things are now."""
        try:
            self._settle()
            slots.set_claim(self._programs, self._claim)
        except (bpf.BpfError, OSError):
            return False
        return True

    def live(self) -> int:
        """Count the job's live processes, as the kernel side has counted them."""
        slot = slots.read(self._programs, self._id)
        return max(slot.live, 0) if slot is not None else 0

    def pending(self) -> int:
        """Count tasks whose row is not closed: live ones, and dead ones not yet freed."""
        slot = slots.read(self._programs, self._id)
        return max(slot.tasks, 0) if slot is not None else 0

    def harvest(self) -> Snapshot:
        """Settle every live task, then read all totals and the kernel's counter."""
        rows = self._settled(_HARVEST_TRIES, enough_ns=_TICK_NS)
        slot = slots.read(self._programs, self._id)
        if slot is None:
            raise bpf.BpfError(f"slot {self._id:#x}: released by somebody else")
        slots.set_claim(self._programs, self._claim)
        records = [self._record(index, total) for index, total in rows]
        records += [
            account.record(name, counters, self._splits.get(-1 - which, (0, 0)))
            for which, (name, counters) in enumerate(
                ((_OVERFLOW, slot.overflow), (_OVERFLOW_OUTSIDE, slot.overflow_outside))
            )
            if any(counters)
        ]
        return Snapshot(
            records=records,
            cgroup_cpu_ns=self._cgroup_cpu_ns(),
            age_ns=self._age_ns(),
            unattributed_by={"before_attach": self._claim.before_ns}
            if self._claim.before_ns
            else {},
            lost=self._lost(slot, rows),
            processes=wire.Processes(
                forks=slot.forks,
                adopted=slot.adopted,
                moved_in=slot.moved_in,
                exits=slot.exits,
                live=max(slot.live, 0),
                moved_out=slot.moved_out,
            ),
        )

    def _settle(self) -> None:
        tasks = self._programs.maps["tasks"]
        for key in self._programs.settle():
            row = tasks.lookup(key)
            if row is not None and row.startswith(bytes(4)):  # not taken by a new task since
                tasks.delete(key)

    def _rows(self) -> list[tuple[int, layout.Total]]:
        slot = slots.read(self._programs, self._id)
        if slot is None:
            return []
        found = []
        for key, data in slots.names(self._programs, slot):
            total = layout.total(data)
            index = layout.TOTAL_KEY.unpack(key)[1]
            # A row that two CPUs made at once for one path has no name and no charge.
            if self._name(index, total.hash) is not None and any(total.counters):
                found.append((index, total))
        return found

    def _name(self, index: int, hash_: int) -> layout.Name | None:
        known = self._names.get(index)
        if known is None or (known.path and not known.script):
            data = self._programs.maps["names"].lookup(layout.NAME_KEY.pack(self._id, 0, hash_))
            if data is None or layout.U32.unpack_from(data)[0] != index:
                return None
            known = self._names[index] = layout.name(data)
        return known

    def _record(self, index: int, total: layout.Total) -> wire.Record:
        key = layout.TOTAL_KEY.pack(self._id, index)
        before = self._splits.get(index)
        if before is None:
            data = self._programs.maps["splits"].lookup(key)
            before = (0, 0) if data is None else layout.SPLIT.unpack(data)
        made = account.record(self._names[index], total.counters, before)
        now = (made.user_ns or 0, made.system_ns or 0)
        self._splits[index] = now
        if now != before:
            with contextlib.suppress(bpf.BpfError):  # full: the split may shrink at a restart
                self._programs.maps["splits"].update(key, layout.SPLIT.pack(*now))
        return made

    def _inside(self, rows: list[tuple[int, layout.Total]]) -> int:
        return sum(
            total.counters.cpu_ns
            for index, total in rows
            if not self._names[index].flags & wire.OUTSIDE
        )

    def _cgroup_cpu_ns(self) -> int | None:
        if self._counter is None or not self._claim.cgroup_id:
            return None
        return self._claim.past_ns + self._claim.last_ns

    def _age_ns(self) -> int:
        if self._counter is None or not self._claim.cgroup_id or self._is_ours():
            return 0
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._claim.last_read_ns

    def _lost(self, slot: layout.Slot, rows: list[tuple[int, layout.Total]]) -> dict[str, int]:
        lost = {name: count for name, count in slot.lost.items() if count}
        if self._programs.node().tripped:
            lost["programs_tripped"] = 1
        ended_ns = self._run_ended_ns
        if ended_ns is not None and slots.remade_ns(self._programs, slot) > ended_ns:
            # Its cgroup's counter, or all there is where that went unread.
            lost[LATER_RUN] = self._claim.last_ns if self._is_ours() else self._inside(rows)
        return lost

    def close(self) -> None:
        """Remove the job from the kernel, and the set as well if it was there only for it."""
        self._let_go(self._programs, self._id)
