"""Slots of a set of programs: one per job, taken by the kernel side or by hand.

The kernel side takes a slot when it recognises a new job's cgroup; a collector claims it.
For any other cgroup the collector takes a slot itself. Whoever changes claims holds the
lock of `pins`, except in a private set, which nobody else can see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sams_ebpf import cgroups, layout
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.programs import ProgramSet

_INDEX: Final = 0xFFF
_USED: Final = layout.U32.pack(layout.SLOT_USED)
# Maps whose keys begin with the slot's id.
_ROWS: Final = ("totals", "splits", "names", "chains")


def used(programs: ProgramSet) -> Iterator[layout.Slot]:
    """Yield every slot in use."""
    for data in programs.maps["slots"].array(layout.SLOTS):
        if data[4:8] == _USED:
            yield layout.slot(data)


def read(programs: ProgramSet, slot_id: int) -> layout.Slot | None:
    """Read the slot; None if it is not in use under this id any more."""
    data = programs.maps["slots"].lookup(layout.U32.pack(slot_id & _INDEX))
    found = None if data is None else layout.slot(data)
    if found is None or found.id != slot_id or found.state != layout.SLOT_USED:
        return None
    return found


def claim_of(programs: ProgramSet, slot_id: int) -> layout.Claim | None:
    """Read the collector's side of a slot; None if nobody has claimed it."""
    data = programs.maps["claims"].lookup(layout.U32.pack(slot_id & _INDEX))
    claim = layout.Claim._make(layout.CLAIM.unpack(data or bytes(64)))
    return claim if claim.slot_id == slot_id else None


def set_claim(programs: ProgramSet, claim: layout.Claim) -> None:
    """Write the collector's side of a slot."""
    key = layout.U32.pack(claim.slot_id & _INDEX)
    programs.maps["claims"].update(key, layout.CLAIM.pack(*claim))


def claim(programs: ProgramSet, slot: layout.Slot) -> layout.Claim:
    """Become the next writer of a slot's epoch; one that has not ended yet."""
    now = layout.Claim(
        slot_id=slot.id,
        # A slot of the kernel's making began before anyone could read the wall clock.
        begin_ns=time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + slot.birth_ns,
    )
    known = claim_of(programs, slot.id) or now
    mine = known._replace(
        generation=known.generation + 1,
        pid=os.getpid(),
        flags=known.flags & ~layout.CLAIM_ENDED,
    )
    set_claim(programs, mine)
    return mine


def remade_ns(programs: ProgramSet, slot: layout.Slot) -> int:
    """CLOCK_BOOTTIME at which the job's cgroup was last made again; 0: it was not."""
    data = programs.maps["remade"].lookup(layout.U32.pack(slot.id & _INDEX))
    return layout.U64.unpack(data)[0] if data else 0


def take(programs: ProgramSet, cgroup: Cgroup) -> layout.Slot:
    """Take a slot for a cgroup, with what is in it already.

    Raises NotPossibleError if none is left. The cgroup's CPU so far, less what its live
    tasks will be charged, is kept in the claim as `before_ns`.
    """
    index = programs.maps["free_slots"].pop()
    if index is None:
        raise NotPossibleError(
            f"{cgroup.folder}: all {layout.SLOTS} job slots of this node are in use"
        )
    slots = programs.maps["slots"]
    generation = layout.U32.unpack_from(slots.lookup(index) or bytes(4))[0] >> 12
    slot_id = (generation + 1) << 12 | layout.U32.unpack(index)[0]
    path = kernel_path(cgroup)
    birth = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    slots.update(index, layout.new_slot(slot_id, os.urandom(16), path, birth))
    set_claim(
        programs, layout.Claim(slot_id=slot_id, begin_ns=time.time_ns(), flags=layout.CLAIM_BY_HAND)
    )
    programs.maps["jobs"].update(layout.U64.pack(layout.path_hash(path)), layout.U32.pack(slot_id))
    note(programs, slot_id, cgroup)
    programs.adopt(Path(folder) for folder in cgroups.subtree(cgroup.folder))
    slot = read(programs, slot_id)
    assert slot is not None  # noqa: S101 (written above, by nobody else)
    return slot


def lead(programs: ProgramSet, slot: layout.Slot, cgroup: Cgroup) -> None:
    """Let a cgroup, and what is made at its path, lead to this slot and no other."""
    programs.maps["jobs"].update(layout.U64.pack(slot.path_hash), layout.U32.pack(slot.id))
    note(programs, slot.id, cgroup)


def note(programs: ProgramSet, slot_id: int, cgroup: Cgroup) -> None:
    """Tell the kernel side that a cgroup and all below it belong to a slot.

    Cgroups made below from the first one on are noted by the kernel side itself.
    """
    noted = programs.maps["cgroups"]
    for folder in cgroups.subtree(cgroup.folder):
        one = Cgroup(folder=folder, path="", hierarchy=cgroup.hierarchy)
        try:
            key = layout.U64.pack(cgroups.identify(one))
        except FileNotFoundError:
            continue  # gone meanwhile, and with it the need
        noted.update(key, layout.U32.pack(slot_id))


def kernel_path(cgroup: Cgroup) -> bytes:
    """Give the path as the kernel side sees it: from the top of the tree."""
    top = cgroup.hierarchy.root.rstrip("/")
    return os.fsencode(f"{top}{cgroup.path}")


def totals(programs: ProgramSet, slot_id: int) -> list[tuple[int, bytes]]:
    """Give index and value of all totals of a slot, those without a name as well."""
    lookup = programs.maps["totals"].lookup
    found = []
    index = misses = 0
    # Two CPUs that make a row at once may leave `names` behind by a few, see new_total().
    while misses < 8:
        data = lookup(layout.TOTAL_KEY.pack(slot_id, index))
        if data is None:
            misses += 1
        else:
            misses = 0
            found.append((index, data))
        index += 1
    return found


def release(programs: ProgramSet, slot_id: int) -> None:
    """Remove everything of a slot from the kernel and give its place back."""
    slot = read(programs, slot_id)
    if slot is None:
        return
    maps = programs.maps
    wanted = layout.U32.pack(slot_id)
    # First what leads new rows to it, last the place itself.
    job = layout.U64.pack(slot.path_hash)
    if maps["jobs"].lookup(job) == wanted:
        maps["jobs"].delete(job)
    for key in maps["cgroups"].all_keys():
        if maps["cgroups"].lookup(key) == wanted:
            maps["cgroups"].delete(key)
    for name in ("tasks", "processes"):
        for key in maps[name].all_keys():
            data = maps[name].lookup(key)
            if data is not None and data.startswith(wanted):
                maps[name].delete(key)
    for name in _ROWS:
        for key in maps[name].all_keys():
            if key.startswith(wanted):
                maps[name].delete(key)
    index = layout.U32.pack(slot_id & _INDEX)
    maps["claims"].update(index, bytes(layout.CLAIM.size))
    # The id stays: the next user of the place counts on from it.
    maps["slots"].update(index, wanted + bytes(layout.SLOT.size - len(wanted)))
    maps["free_slots"].update(None, index)
