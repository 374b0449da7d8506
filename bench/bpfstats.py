"""How long BPF programs run: the kernel's own statistics, for as long as they are wanted."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_GET_NEXT_ID = 11
_PROG_GET_FD_BY_ID = 13
_OBJ_GET_INFO_BY_FD = 15
_ENABLE_STATS = 32
_libc = ctypes.CDLL(None, use_errno=True)


class Runs(NamedTuple):
    """Time in ns and number of runs of one program since it was loaded."""

    name: str
    time_ns: int
    runs: int


class _Info(ctypes.Structure):
    """`struct bpf_prog_info` up to what is needed here."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", ctypes.c_uint32 * 2),
        ("instructions", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("gpl_compatible", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("nr_jited", ctypes.c_uint32 * 2),
        ("jited", ctypes.c_uint64 * 2),
        ("btf_id", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("nr_func_info", ctypes.c_uint32),
        ("nr_line_info", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("jited_line_info", ctypes.c_uint64),
        ("nr_jited_line_info", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("jited_line_info_rec_size", ctypes.c_uint32),
        ("nr_prog_tags", ctypes.c_uint32),
        ("prog_tags", ctypes.c_uint64),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
    )


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _libc.syscall(_SYS_BPF[platform.machine()], command, attributes, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _words(*values: int) -> ctypes.Array[ctypes.c_char]:
    data = b"".join(value.to_bytes(4, "little") for value in values)
    return ctypes.create_string_buffer(data.ljust(64, b"\0"), 64)


def programs() -> dict[int, Runs]:
    """Every BPF program that is loaded, by id."""
    found: dict[int, Runs] = {}
    last = 0
    while True:
        request = _words(last, 0)
        try:
            _bpf(_PROG_GET_NEXT_ID, request)
        except FileNotFoundError:
            return found
        last = int.from_bytes(request.raw[4:8], "little")
        try:
            fd = _bpf(_PROG_GET_FD_BY_ID, _words(last))
        except FileNotFoundError:
            continue
        try:
            info = _Info()
            address = ctypes.addressof(info)
            _bpf(
                _OBJ_GET_INFO_BY_FD,
                _words(fd, ctypes.sizeof(info), address & 0xFFFFFFFF, address >> 32),
            )
        finally:
            os.close(fd)
        found[last] = Runs(info.name.decode(), info.run_time_ns, info.run_cnt)


def spent(before: dict[int, Runs], after: dict[int, Runs]) -> dict[int, Runs]:
    """What ran between two readings."""
    zero = Runs("", 0, 0)
    return {
        number: Runs(
            now.name,
            now.time_ns - before.get(number, zero).time_ns,
            now.runs - before.get(number, zero).runs,
        )
        for number, now in after.items()
    }


@contextmanager
def counting() -> Iterator[None]:
    """Have the kernel take the time of every run; ends with this process at the latest."""
    fd = _bpf(_ENABLE_STATS, _words(0))
    try:
        yield
    finally:
        os.close(fd)
