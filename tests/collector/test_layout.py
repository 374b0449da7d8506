"""The Python mirror of `bpf/record.h` against the BTF of the object that is shipped."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from sams_ebpf import layout, programs, wire

HEADER = Path(__file__).resolve().parents[2] / "bpf" / "record.h"


class Btf:
    """Structs in the .BTF section of an object: size, and the offset of each member."""

    def __init__(self, elf: bytes) -> None:
        data = self._section(elf, b".BTF")
        _, _, _, header, types_at, types_size, strings_at, _ = struct.unpack_from("<HBBIIIII", data)
        self.strings = data[header + strings_at :]
        self.structs: dict[str, tuple[int, dict[str, int]]] = {}
        at, end = header + types_at, header + types_at + types_size
        while at < end:
            name, info, size = struct.unpack_from("<III", data, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            at += 12
            if kind in (4, 5):  # struct, union
                members = {}
                for index in range(count):
                    member, _, offset = struct.unpack_from("<III", data, at + 12 * index)
                    members[self._text(member)] = offset // 8
                self.structs[self._text(name)] = size, members
            # What follows each kind, see Documentation/bpf/btf.rst.
            at += {1: 4, 3: 12, 4: 12 * count, 5: 12 * count, 6: 8 * count, 13: 8 * count,
                   14: 4, 15: 12 * count, 17: 4, 19: 12 * count}.get(kind, 0)  # fmt: skip

    def _text(self, at: int) -> str:
        return self.strings[at : self.strings.index(b"\0", at)].decode()

    @staticmethod
    def _section(elf: bytes, wanted: bytes) -> bytes:
        (table,) = struct.unpack_from("<Q", elf, 40)
        size, count, names = struct.unpack_from("<HHH", elf, 58)
        sections = [struct.unpack_from("<IIQQQQ", elf, table + size * n) for n in range(count)]
        strings = sections[names][4]
        for name, _, _, _, offset, length in sections:
            at = strings + name
            if elf[at : elf.index(b"\0", at)] == wanted:
                return elf[offset : offset + length]
        raise AssertionError(f"no section {wanted!r}")


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf(programs.object_bytes())


@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("sams_total", layout.TOTAL),
        ("sams_name", layout.NAME),
        ("sams_slot", layout.SLOT),
        ("sams_claim", layout.CLAIM),
        ("sams_node", layout.NODE),
        ("sams_cost", layout.COST),
        ("sams_task", layout.TASK),
        ("sams_process", layout.PROCESS),
        ("sams_split", layout.SPLIT),
        ("sams_total_key", layout.TOTAL_KEY),
        ("sams_name_key", layout.NAME_KEY),
    ],
)
def test_sizes_agree(btf: Btf, name: str, mirror: struct.Struct) -> None:
    assert btf.structs[name][0] == mirror.size


@pytest.mark.parametrize(
    ("name", "fields", "mirror"),
    [
        ("sams_claim", layout.Claim._fields, layout.CLAIM),
        ("sams_node", layout.Node._fields, layout.NODE),
        ("sams_cost", layout.Cost._fields, layout.COST),
    ],
)
def test_every_member_is_where_the_mirror_has_it(
    btf: Btf, name: str, fields: tuple[str, ...], mirror: struct.Struct
) -> None:
    for index, field in enumerate(fields):
        values = [0] * len(fields)
        values[index] = 1
        assert mirror.pack(*values).index(1) == btf.structs[name][1][field], field


def test_a_slot_is_unpacked_as_the_kernel_side_lays_it_out(btf: Btf) -> None:
    size, members = btf.structs["sams_slot"]
    data = bytearray(size)
    for number, name in enumerate(("id", "cgroups", "tasks", "live", "forks", "moved_out"), 1):
        data[members[name]] = number
    data[members["lost"] + 8 * layout.LOST.index("missed_deaths")] = 7
    data[members["overflow"]] = 8
    data[members["overflow_outside"]] = 9
    data[members["path"] : members["path"] + 6] = b"/job_1"
    slot = layout.slot(bytes(data))
    assert (slot.id, slot.cgroups, slot.tasks, slot.live, slot.forks, slot.moved_out) == (
        *range(1, 7),
    )
    assert {name for name, count in slot.lost.items() if count} == {"missed_deaths"}
    assert (slot.overflow.cpu_ns, slot.overflow_outside.cpu_ns, slot.path) == (8, 9, b"/job_1")


def test_a_total_s_columns_have_the_order_of_the_header() -> None:
    text = HEADER.read_text()
    columns = re.search(r"enum sams_column \{(.*?)\};", text, re.DOTALL)
    assert columns is not None
    names = [
        line.split("SAMS_")[1].split(",")[0] for line in columns[1].split("\n") if "SAMS_" in line
    ]
    assert [name.lower() for name in names] == [
        "cpu", "utime", "stime", "read_bytes", "write_bytes", "minor_faults", "major_faults",
        "voluntary", "involuntary",
    ]  # fmt: skip


def test_constants_of_the_header_are_those_of_python() -> None:
    text = HEADER.read_text()
    defined = dict(re.findall(r"#define SAMS_(\w+)\s+(\d+|0x[0-9a-f]+)u?\b", text))
    for name in ("PATH_MAX", "SCRIPT_MAX", "CGROUP_PATH", "PARENTS", "SLOTS"):
        assert int(defined[name], 0) == getattr(layout, name)
    claims = dict(re.findall(r"SAMS_CLAIM_(\w+) = (\d+),", text))
    assert claims == {"BY_HAND": str(layout.CLAIM_BY_HAND), "ENDED": str(layout.CLAIM_ENDED)}
    flags = dict(re.findall(r"SAMS_(\w+) = (\d+),", text))
    for name, value in (
        ("DELETED", wire.DELETED), ("MEMFD", wire.MEMFD), ("CUT", wire.CUT),
        ("FOREIGN", wire.FOREIGN), ("OVERFLOWED", wire.OVERFLOW), ("OUTSIDE", wire.OUTSIDE),
        ("UNKNOWN", wire.UNKNOWN),
    ):  # fmt: skip
        assert int(flags[name]) == value


def test_a_new_slot_reads_back() -> None:
    data = layout.new_slot(0x1005, bytes(range(16)), b"/a/b", 77)
    slot = layout.slot(data)
    assert (slot.id, slot.state, slot.epoch, slot.path, slot.birth_ns) == (
        0x1005, layout.SLOT_USED, bytes(range(16)), b"/a/b", 77,
    )  # fmt: skip
    assert slot.path_hash == layout.path_hash(b"/a/b")
    assert not any(slot.overflow)


def test_path_hash_is_fnv_1a() -> None:
    assert layout.path_hash(b"") == 0xCBF29CE484222325
    assert layout.path_hash(b"a") == 0xAF63DC4C8601EC8C


def test_execs_alone_are_those_of_the_whole() -> None:
    data = layout.TOTAL.pack(*range(1, 15))
    assert layout.execs(data) == layout.total(data).counters.execs == 10
