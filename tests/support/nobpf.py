"""Hosts without BPF: run a command where bpf(2), its capabilities or its files are missing.

`prefix(kind)` gives the words to put before a command. As a program,
`nobpf.py COMMAND…` runs it where bpf(2) answers ENOSYS.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

# Classic BPF (linux/filter.h, linux/seccomp.h), offsets into struct seccomp_data.
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, ARCHITECTURE = 0, 4
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
ENOSYS = 38
# AUDIT_ARCH_*, __NR_bpf
MACHINES = {"x86_64": (0xC000003E, 321), "aarch64": (0xC00000B7, 280)}

HIDE = (
    "mount -t tmpfs none /sys/kernel/btf && mount -t tmpfs none /sys/fs/bpf && "
    'umask 077 && exec "$@"'
)
CAPABILITIES = "-bpf,-perfmon,-sys_admin"
KINDS = ("seccomp", "capabilities", "files")


def prefix(kind: str) -> list[str]:
    """Words that make a command run on a host without BPF, in one of three ways."""
    if kind == "seccomp":
        return [sys.executable, __file__]
    if kind == "capabilities":
        return [
            *("setpriv", "--bounding-set", CAPABILITIES, "--inh-caps", CAPABILITIES),
            *("--ambient-caps", "-all"),
        ]
    return ["unshare", "--mount", "sh", "-c", HIDE, "sh"]


def forbid_bpf() -> None:
    """Let bpf(2) answer ENOSYS, in this process and all that come from it."""
    architecture, bpf = MACHINES[platform.machine()]
    instructions = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 0, 2, architecture),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 1, 0, bpf),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | ENOSYS),
    ]
    code = b"".join(struct.pack("HBBI", *one) for one in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, with_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, with_filter, program):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid_bpf()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - no shell is the point
