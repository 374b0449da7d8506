"""The maps' keys and values as Python sees them: the mirror of `bpf/record.h`.

Pure packing and unpacking. A test compares sizes and offsets with the object's BTF.
Little-endian, as the machines the product runs on.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

# Of all that stands in the maps. It is part of a pinned set's name, and sets of another one
# are left to the collectors that can read them. What a slot and the node's row begin with
# (Slot.id and .state; Node.tripped, .closed and .stay) is the same in every version.
VERSION: Final = 1
SLOT_BEGIN: Final = struct.Struct("<2I")
NODE_BEGIN: Final = struct.Struct("<3I")

PATH_MAX: Final = 1024
SCRIPT_MAX: Final = 256
CGROUP_PATH: Final = 256
PARENTS: Final = 8
SLOTS: Final = 512
OVERFLOW: Final = 0xFFFFFFFF
SLOT_USED: Final = 1
# enum sams_claim_flag
CLAIM_BY_HAND: Final = 1
CLAIM_ENDED: Final = 2
# enum found: what `harvest` returns where it is run by hand
DYING: Final = 1

CONTROLLERS: Final = {
    "v2": 0,
    "cpuacct": 1,
    "cpu": 2,
    "cpuset": 3,
    "memory": 4,
    "devices": 5,
    "freezer": 6,
    "pids": 7,
    "blkio": 8,
}

# Names of `lost` in a slot, in the order of enum sams_lost.
LOST: Final = (
    "tasks_full",
    "executables_full",
    "missed_deaths",
    "threads_unsettled",
    "uncertain_splits",
    "cgroups_full",
    "programs_tripped",
)

_COUNTERS = "9q4Q"


class Counters(NamedTuple):
    """struct sams_counters; sums in ns, bytes and numbers, the peak in pages."""

    cpu_ns: int
    utime_ns: int
    stime_ns: int
    read_bytes: int
    write_bytes: int
    minor_faults: int
    major_faults: int
    voluntary_switches: int
    involuntary_switches: int
    execs: int
    forks: int
    exits: int
    max_rss_pages: int


class Total(NamedTuple):
    """struct sams_total."""

    counters: Counters
    hash: int


TOTAL: Final = struct.Struct(f"<{_COUNTERS}Q")
_EXECS: Final = 8 * Counters._fields.index("execs")
NO_COUNTERS: Final = bytes(struct.calcsize(f"<{_COUNTERS}"))


class Name(NamedTuple):
    """struct sams_name, without its index."""

    flags: int
    path: bytes
    script: bytes


NAME: Final = struct.Struct(f"<4I{PATH_MAX}s{SCRIPT_MAX}s")


class Slot(NamedTuple):
    """struct sams_slot: what the kernel side keeps per job."""

    id: int
    state: int
    tasks: int
    live: int
    forks: int
    exits: int
    names: int
    cgroups: int
    adopted: int
    moved_in: int
    moved_out: int
    path_hash: int
    birth_ns: int
    epoch: bytes
    lost: dict[str, int]
    overflow: Counters
    overflow_outside: Counters
    path: bytes


SLOT: Final = struct.Struct(f"<2I2q3Qq3Q2Q16s{len(LOST)}Q{_COUNTERS}{_COUNTERS}{CGROUP_PATH}s")


class Claim(NamedTuple):
    """struct sams_claim: the collector's side of a slot."""

    slot_id: int = 0
    generation: int = 0
    pid: int = 0
    flags: int = 0
    begin_ns: int = 0
    before_ns: int = 0
    past_ns: int = 0
    cgroup_id: int = 0
    last_ns: int = 0
    last_read_ns: int = 0


CLAIM: Final = struct.Struct("<4I6Q")


class Node(NamedTuple):
    """struct sams_node."""

    tripped: int = 0
    closed: int = 0
    stay: int = 0
    refused: int = 0
    slots_full: int = 0


NODE: Final = struct.Struct("<4IQ")


class Cost(NamedTuple):
    """struct sams_cost of one CPU."""

    events: int
    sampled_ns: int
    window_start_ns: int
    window_ns: int
    clock_offset_ns: int
    clock_samples: int


COST: Final = struct.Struct("<4QqQ")


U32: Final = struct.Struct("<I")
U64: Final = struct.Struct("<Q")
TOTAL_KEY: Final = struct.Struct("<2I")  # slot_id, index
NAME_KEY: Final = struct.Struct("<2IQ")  # slot_id, 0, hash
SPLIT: Final = struct.Struct("<2Q")  # user_ns, system_ns
CHAIN_KEY: Final = struct.Struct("<2IQ")  # slot_id, flags, sum
# slot_id, pid, tgid, state, image, start_ns, rss_base_pages, charged…, exit_ns, died_pages
TASK: Final = struct.Struct("<4I14Q")
PROCESS: Final = struct.Struct("<2I")  # slot_id, state


def total(data: bytes) -> Total:
    """Unpack a struct sams_total."""
    values = TOTAL.unpack(data)
    return Total(Counters._make(values[:13]), values[13])


def execs(data: bytes) -> int:
    """Give this one counter of a struct sams_total."""
    found: int = U64.unpack_from(data, _EXECS)[0]
    return found


def name(data: bytes) -> Name:
    """Unpack a struct sams_name; the path stands at the end of its field."""
    _, flags, length, script_length, path, script = NAME.unpack(data)
    length = min(length, PATH_MAX)
    script_length = min(max(script_length, 1), SCRIPT_MAX)
    return Name(flags, path[PATH_MAX - length :], script[: script_length - 1])


def slot(data: bytes) -> Slot:
    """Unpack a struct sams_slot."""
    values = SLOT.unpack(data)
    kinds = len(LOST)
    return Slot._make(
        (
            *values[:14],
            dict(zip(LOST, values[14 : 14 + kinds], strict=True)),
            Counters._make(values[14 + kinds : 27 + kinds]),
            Counters._make(values[27 + kinds : 40 + kinds]),
            values[40 + kinds].partition(b"\0")[0],
        )
    )


def new_slot(slot_id: int, epoch: bytes, path: bytes, birth_ns: int) -> bytes:
    """Pack a slot as on_mkdir makes it: in use, all counters zero."""
    return SLOT.pack(
        slot_id,
        SLOT_USED,
        *[0] * 9,
        path_hash(path),
        birth_ns,
        epoch,
        *[0] * (len(LOST) + 26),
        path[: CGROUP_PATH - 1],
    )


def path_hash(path: bytes) -> int:
    """FNV-1a, 64 bits, of a cgroup's path: how the kernel side knows a job's cgroup again."""
    value = 0xCBF29CE484222325
    for byte in path:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
