"""The meter of `bpf` mode: reads one job's slot of a set of programs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

from sams_ebpf import account, bpf, cgroups, layout, slots, wire
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.meter import Snapshot
from sams_ebpf.programs import ProgramSet

_log = logging.getLogger(__name__)

# Lost by cause: CPU, at most, of a later run of the same job that was counted here.
LATER_RUN: Final = "later_run_ns"

_TRIES: Final = 20  # once in a job's life
_HARVEST_TRIES: Final = 3
_TICK_NS: Final = 4_000_000
_PAUSE_S: Final = 0.01
# How long to wait for what a job's last processes do between their exit and their end.
_DYING_S: Final = 2.0
_GLANCE_S: Final = 0.002
_OVERFLOW: Final = layout.Name(wire.OVERFLOW, b"", b"")
_OVERFLOW_OUTSIDE: Final = layout.Name(wire.OVERFLOW | wire.OUTSIDE, b"", b"")


class _Reading(NamedTuple):
    """All that the kernel side has of a job at one moment.

    totals: index and bytes of those that were ever charged. claim: with the kernel's own
    counter as of then.
    """

    slot: layout.Slot
    totals: list[tuple[int, bytes]]
    claim: layout.Claim


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
        self._told_off = False
        self._run_ended_ns: int | None = None
        # By index. Most executables of a job do nothing between two harvests: a name stands
        # beside the number of execs there had been, a record beside the total it was made of.
        self._names: dict[int, tuple[int, layout.Name]] = {}
        self._records: dict[int, tuple[bytes, wire.Record]] = {}
        self._claim = slots.claim(programs, slot)
        self.generation = self._claim.generation
        self.begin_ns = self._claim.begin_ns
        if self._claim.flags & layout.CLAIM_BY_HAND and self.generation == 1:
            self._settle_what_was_before()

    def _settle_what_was_before(self) -> None:
        """Note the CPU of before the take-up: what the counter has and the tasks have not."""
        attributed = self._inside(self._settled(_TRIES, enough_ns=0).totals)
        self._claim = self._claim._replace(before_ns=max(0, self._claim.last_ns - attributed))
        slots.set_claim(self._programs, self._claim)

    def _settled(self, tries: int, *, enough_ns: int) -> _Reading:
        """Settle all tasks and read what they were charged as of one moment.

        What runs meanwhile moves both on, at ticks and whenever a clock is read: of a few
        tries the one that was disturbed least counts, or the first by no more than
        `enough_ns`. Where all CPUs are busy, one who has slept meanwhile keeps its CPU longer.
        Where all processes have exited, those that are not dead yet are waited for: giving
        back a large memory can take them long.
        """
        best: tuple[int, _Reading] | None = None
        patience = time.monotonic() + _DYING_S
        while True:
            self.read_counter()
            earlier = self._claim.last_ns
            dying = self._settle()
            totals = self._totals()
            slot = slots.read(self._programs, self._id)
            if slot is None:
                raise bpf.BpfError(f"slot {self._id:#x}: released by somebody else")
            self.read_counter()
            if dying and slot.live <= 0 and time.monotonic() < patience:
                time.sleep(_GLANCE_S)
                continue
            disturbed = self._claim.last_ns - earlier
            if best is None or disturbed < best[0]:
                best = disturbed, _Reading(slot, totals, self._claim)
            tries -= 1
            if disturbed <= enough_ns or not tries:
                self._claim = best[1].claim
                return best[1]
            time.sleep(_PAUSE_S)

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
        slot, totals, claim = self._settled(_HARVEST_TRIES, enough_ns=_TICK_NS)
        slots.set_claim(self._programs, claim)
        records = [self._record(index, data) for index, data in totals]
        records += [
            account.record(name, counters, (0, 0))
            for name, counters in (
                (_OVERFLOW, slot.overflow),
                (_OVERFLOW_OUTSIDE, slot.overflow_outside),
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
            lost=self._lost(slot, totals),
            processes=wire.Processes(
                forks=slot.forks,
                adopted=slot.adopted,
                moved_in=slot.moved_in,
                exits=slot.exits,
                live=max(slot.live, 0),
                moved_out=slot.moved_out,
            ),
        )

    def _settle(self) -> int:
        """Settle all tasks; gives how many of the job's own have exited and are not dead yet."""
        tasks = self._programs.maps["tasks"]
        mine = layout.U32.pack(self._id)
        count = 0
        for key, dying in self._programs.settle():
            row = tasks.lookup(key)
            if row is None:
                continue
            if dying:
                count += row.startswith(mine)
            elif row.startswith(bytes(4)):  # not taken by a new task since
                tasks.delete(key)
        return count

    def _totals(self) -> list[tuple[int, bytes]]:
        # A row that two CPUs made at once for one path has no name and no charge.
        return [
            (index, data)
            for index, data in slots.totals(self._programs, self._id)
            if not data.startswith(layout.NO_COUNTERS) and self._name(index, data) is not None
        ]

    def _name(self, index: int, data: bytes) -> layout.Name | None:
        """Give the name of a total that has these bytes now; None if it has none."""
        seen, known = self._names.get(index, (0, None))
        execs = layout.execs(data)
        # A script is noted in the name before its exec is counted in the total.
        if known is None or (known.path and not known.script and seen != execs):
            key = layout.NAME_KEY.pack(self._id, 0, layout.total(data).hash)
            name = self._programs.maps["names"].lookup(key)
            if name is None or layout.U32.unpack_from(name)[0] != index:
                return None
            known = layout.name(name)
            self._names[index] = execs, known
        return known

    def _record(self, index: int, data: bytes) -> wire.Record:
        made_of, known = self._records.get(index, (b"", None))
        if known is not None and made_of == data:
            return known
        key = layout.TOTAL_KEY.pack(self._id, index)
        if known is not None:
            before = known.user_ns or 0, known.system_ns or 0
        else:
            kept = self._programs.maps["splits"].lookup(key)
            before = (0, 0) if kept is None else layout.SPLIT.unpack(kept)
        made = account.record(self._names[index][1], layout.total(data).counters, before)
        self._records[index] = data, made
        now = made.user_ns or 0, made.system_ns or 0
        if now != before:
            with contextlib.suppress(bpf.BpfError):  # full: the split may shrink at a restart
                self._programs.maps["splits"].update(key, layout.SPLIT.pack(*now))
        return made

    def _inside(self, totals: list[tuple[int, bytes]]) -> int:
        return sum(
            layout.total(data).counters.cpu_ns
            for index, data in totals
            if not self._names[index][1].flags & wire.OUTSIDE
        )

    def _cgroup_cpu_ns(self) -> int | None:
        if self._counter is None or not self._claim.cgroup_id:
            return None
        return self._claim.past_ns + self._claim.last_ns

    def _age_ns(self) -> int:
        if self._counter is None or not self._claim.cgroup_id or self._is_ours():
            return 0
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._claim.last_read_ns

    def _lost(self, slot: layout.Slot, totals: list[tuple[int, bytes]]) -> dict[str, int]:
        lost = {name: count for name, count in slot.lost.items() if count}
        if self._programs.node().tripped:
            lost["programs_tripped"] = 1
            if not self._told_off:
                self._told_off = True
                _log.warning(
                    "the programs took more time than collector.programs_limit_percent allows "
                    "and have switched themselves off: what runs from now on is unattributed"
                )
        ended_ns = self._run_ended_ns
        if ended_ns is not None and slots.remade_ns(self._programs, slot) > ended_ns:
            # Its cgroup's counter, or all there is where that went unread.
            lost[LATER_RUN] = self._claim.last_ns if self._is_ours() else self._inside(totals)
        return lost

    def close(self) -> None:
        """Remove the job from the kernel, and the set as well if it was there only for it."""
        self._let_go(self._programs, self._id)
