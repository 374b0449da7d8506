"""Give up what root may do, once it has been done.

A thread's capabilities are its own: call `drop` before any other thread is started.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

# include/uapi/linux/capability.h
NUMBERS: Final = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

_LAST: Final = Path("/proc/sys/kernel/cap_last_cap")
_STATUS: Final = Path("/proc/thread-self/status")
_VERSION_3: Final = 0x20080522
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


def effective() -> frozenset[str]:
    """Names of those capabilities of `NUMBERS` that are in effect now."""
    return _names(_sets()["CapEff"])


def bounding() -> int:
    """Give the bounding set as bits: what any program executed from here could have."""
    return _sets()["CapBnd"]


def drop(keep: Iterable[str] = ()) -> frozenset[str]:
    """Give up every capability but `keep`, for good, also for programs executed later.

    Gives the names of those that are left: no more than there were. Raises OSError.
    """
    wanted = _bits(keep)
    # Needs CAP_SETPCAP: without it nothing of the set can be had by exec either, for
    # no_new_privs is set below, and permitted only shrinks.
    if "CAP_SETPCAP" in effective():
        for number in range(int(_LAST.read_text()) + 1):
            if not wanted >> number & 1:
                _prctl(_PR_CAPBSET_DROP, number)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    left = wanted & _sets()["CapPrm"]
    _capset(left, left)
    return _names(left)


def drop_all_but_needed(
    works: Callable[[], bool], *, keep: Iterable[str] = (), candidates: Iterable[str]
) -> frozenset[str]:
    """Drop all but `keep`, and the first of `candidates` without which `works()` is False.

    Found by trying: `works` is called with only `keep` in effect, then with each candidate
    beside it. Reading maps that are open needs none on recent kernels, CAP_BPF or
    CAP_SYS_ADMIN on those before 5.19 with `kernel.unprivileged_bpf_disabled` set. If
    nothing helps, all candidates are kept and the caller meets the error itself.
    """
    wanted = set(keep)
    permitted = _sets()["CapPrm"]
    tries = [wanted, *(wanted | {candidate} for candidate in candidates)]
    chosen = wanted | set(candidates)
    for one in tries:
        _capset(_bits(one) & permitted, permitted)
        if works():
            chosen = one
            break
    _capset(permitted, permitted)
    return drop(chosen)


def _bits(names: Iterable[str]) -> int:
    return sum(1 << NUMBERS[name] for name in set(names))


def _names(bits: int) -> frozenset[str]:
    return frozenset(name for name, number in NUMBERS.items() if bits >> number & 1)


def _sets() -> dict[str, int]:
    lines = _STATUS.read_text().splitlines()
    fields = (line.split(":\t") for line in lines if line.startswith("Cap"))
    return {name: int(bits, 16) for name, bits in fields}


def _capset(effective_bits: int, permitted_bits: int) -> None:
    """capset(2) of the calling thread; nothing is inheritable."""
    header = struct.pack("Ii", _VERSION_3, 0)
    data = b"".join(
        struct.pack("III", effective_bits >> shift & mask, permitted_bits >> shift & mask, 0)
        for shift, mask in ((0, 0xFFFFFFFF), (32, 0xFFFFFFFF))
    )
    if _libc.capset(ctypes.create_string_buffer(header), ctypes.create_string_buffer(data)) != 0:
        raise _error("capset")


def _prctl(option: int, argument: int) -> None:
    arguments = [ctypes.c_ulong(value) for value in (argument, 0, 0, 0)]
    if _libc.prctl(option, *arguments) != 0:
        raise _error("prctl")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
