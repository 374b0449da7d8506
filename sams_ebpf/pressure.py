"""What a spool under pressure gives up, decided from file names, sizes and ages alone.

First goes what a later full batch of the same epoch, waiting in the same spool,
supersedes: counters are cumulative, so no total is lost. Then the oldest, and that is a
loss, for which the caller writes a tombstone per writer before it deletes anything.

Within an epoch a batch counts as at least as old as any later one, whatever the clock
did to the files' times. So of each writer a loss is always the beginning of what
waits, and the range that its tombstone names holds nothing that is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from sams_ebpf.spool import Entry

# Once over the bound, make some room, so that not every batch brings a tombstone.
_KEEP_TENTHS = 9
# Tombstones may take this part of the spool; beyond it the oldest are forgotten.
_TOMBSTONE_PART = 10


class Item(NamedTuple):
    """A file of the spool. bytes: disk it takes. age_s: how long it has waited."""

    entry: Entry
    bytes: int
    age_s: float


class Loss(NamedTuple):
    """Batches of one writer that one tombstone stands for, in order."""

    items: list[Item]
    reason: Literal["size", "age"]


class Plan(NamedTuple):
    """What to delete. superseded: silently; lost: after their tombstone is on disk.

    forgotten: tombstones for which there is no room either.
    """

    superseded: list[Entry]
    lost: list[Loss]
    forgotten: list[Entry]


def plan(
    items: Iterable[Item],
    *,
    max_bytes: int,
    max_age_s: float,
    shortage: int,
    holds_all: Callable[[Entry], bool],
) -> Plan:
    """Choose what has to go so that the rest is within its bounds.

    shortage: bytes the file system lacks; only superseded batches go for that.
    holds_all: whether a batch that its name calls full or final is readable and full.
    """
    tombstones: list[Item] = []
    waiting: list[Item] = []
    for item in items:
        (tombstones if item.entry.kind == "tombstone" else waiting).append(item)
    forgotten, taken = _forget(tombstones, max_bytes // _TOMBSTONE_PART)
    room = max_bytes - taken
    total = sum(item.bytes for item in waiting)
    if total <= room and shortage <= 0 and all(item.age_s <= max_age_s for item in waiting):
        return Plan([], [], forgotten)

    aged = _oldest_first(waiting)
    fresh = _fresh(waiting, holds_all)
    superseded: list[Entry] = []
    lost: dict[str, list[Item]] = {"age": [], "size": []}
    kept: list[Item] = []
    for item in aged:
        if item.age_s <= max_age_s:
            kept.append(item)
        elif item.entry.identity in fresh:
            lost["age"].append(item)
        else:
            superseded.append(item.entry)
    total = sum(item.bytes for item in kept)
    excess = total - room * _KEEP_TENTHS // 10 if total > room else 0

    rest: list[Item] = []
    wanted = max(excess, shortage)
    for item in kept:
        if wanted > 0 and item.entry.identity not in fresh:
            superseded.append(item.entry)
            wanted -= item.bytes
            excess -= item.bytes
        else:
            rest.append(item)
    for item in rest:
        if excess <= 0:
            break
        lost["size"].append(item)
        excess -= item.bytes
    losses = [*_by_writer(lost["age"], "age"), *_by_writer(lost["size"], "size")]
    return Plan(superseded, losses, forgotten)


def order(entry: Entry) -> tuple[bytes, int, int]:
    """Order within an epoch: generation, then sequence."""
    return entry.identity.epoch, entry.identity.generation, entry.identity.sequence


def _forget(tombstones: list[Item], bound: int) -> tuple[list[Entry], int]:
    taken = sum(item.bytes for item in tombstones)
    forgotten = []
    for item in sorted(tombstones, key=lambda item: -item.age_s):
        if taken <= bound:
            break
        forgotten.append(item.entry)
        taken -= item.bytes
    return forgotten, taken


def _oldest_first(waiting: list[Item]) -> list[Item]:
    """Sort by age, with ages that never grow along an epoch."""
    aged = []
    epoch, age = b"", 0.0
    for item in sorted(waiting, key=lambda item: order(item.entry), reverse=True):
        age = item.age_s if item.entry.identity.epoch != epoch else max(age, item.age_s)
        epoch = item.entry.identity.epoch
        aged.append(item._replace(age_s=age))
    return sorted(aged, key=lambda item: (-item.age_s, order(item.entry)))


def _fresh(waiting: list[Item], holds_all: Callable[[Entry], bool]) -> set[object]:
    """Identities that no later full batch of their epoch supersedes."""
    fresh: set[object] = set()
    epochs: dict[bytes, list[Entry]] = defaultdict(list)
    for item in waiting:
        epochs[item.entry.identity.epoch].append(item.entry)
    for entries in epochs.values():
        for entry in sorted(entries, key=order, reverse=True):
            fresh.add(entry.identity)
            if entry.kind in ("full", "final") and holds_all(entry):
                break
    return fresh


def _by_writer(items: list[Item], reason: Literal["size", "age"]) -> list[Loss]:
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.entry.identity[:3]].append(item)
    return [Loss(group, reason) for group in groups.values()]
