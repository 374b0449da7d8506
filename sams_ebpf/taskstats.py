"""What died between two samples, told by the kernel: exit records of taskstats.

At each death the kernel sends the dead task's counters to whoever listens (generic
netlink, Documentation/accounting/taskstats.rst). The records wait in the socket's buffer
until they are fetched, so nobody wakes in between; what the buffer cannot hold is
counted. The counter is the scheduler's own, in ns, as it stood at the last tick or switch
before the death. Used by mode `proc` only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

from sams_ebpf.errors import NotPossibleError

# struct taskstats names the executable's inode, and the process that a thread belongs to,
# from version 12 on.
LEAST_VERSION: Final = 12
BUFFER_BYTES: Final = 4 << 20

_POSSIBLE: Final = Path("/sys/devices/system/cpu/possible")
_SOCKETS: Final = Path("/proc/net/netlink")
_NETLINK_GENERIC: Final = 16
_SO_RCVBUFFORCE: Final = 33
_REQUEST_ACK: Final = 5
_NLMSG_ERROR: Final = 2
_CONTROL_FAMILY: Final = 16
_GET_FAMILY: Final = 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_GET: Final = 1
_REGISTER_CPUS: Final = 3
_OF_PID: Final = 1
_STATS, _AGGREGATE_PID, _AGGREGATE_TGID = 3, 4, 5
_HEADER_BYTES: Final = 20
# ac_flag (linux/acct.h): the last task of its process.
_LAST_OF_GROUP: Final = 0x20

# Offsets in struct taskstats (linux/taskstats.h), the same in versions 12 to 16.
_VERSION: Final = struct.Struct("=H")
_FLAG_AT: Final = 8
_CPU_AT: Final = 72
_COMM_AT: Final = 80
_IDS_AT: Final = 128
_TIMES_AT: Final = 152
_PEAK_AT: Final = 200
_BEGIN_AT: Final = 344
_TGID_AT: Final = 368
_EXE_AT: Final = 384
_BYTES: Final = 400


class Exit(NamedTuple):
    """The death of a whole process.

    cpu_ns: of all its threads. user_us, system_us: the kernel's split, 0 where it gives
    none (processes with threads). begin_s: wall clock of its start, whole seconds. file:
    device and inode of its executable, as stat(2) gives them. peak_bytes: peak memory.
    """

    pid: int
    parent: int
    comm: bytes
    cpu_ns: int
    user_us: int
    system_us: int
    begin_s: int
    file: tuple[int, int]
    peak_bytes: int


class Listener:
    """Collects exits of all processes of the host from now on.

    buffer_bytes: what the kernel may hold for us, about 640 bytes an exit. Raises
    NotPossibleError: needs CAP_NET_ADMIN, the host's own PID and user namespaces, and a
    kernel that names executables here.
    """

    def __init__(self, buffer_bytes: int = BUFFER_BYTES) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC
            )
        except OSError as error:
            raise NotPossibleError(f"taskstats: no netlink socket: {error.strerror}") from error
        try:
            self._start(buffer_bytes)
        except OSError as error:
            self.close()
            raise NotPossibleError(f"taskstats: {error.strerror}") from error
        except NotPossibleError:
            self.close()
            raise

    def drain(self) -> tuple[list[Exit], int]:
        """Take the deaths since the last call; beside them how many tasks' were lost."""
        exits = []
        lost = False
        while True:
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            found = parse(data)
            if found is not None:
                exits.append(found)
        return exits, self._newly_dropped() if lost else 0

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def _start(self, buffer_bytes: int) -> None:
        self._dropped = 0
        self._socket.bind((0, 0))
        self._port = self._socket.getsockname()[0]
        name = _attribute(_FAMILY_NAME, b"TASKSTATS\0")
        family = _attributes(self._ask(_CONTROL_FAMILY, _GET_FAMILY, name))
        number = struct.unpack("=H", family[_FAMILY_ID])[0]
        mine = _attribute(_OF_PID, struct.pack("=I", os.getpid()))
        reply = _attributes(self._ask(number, _GET, mine))
        version = _VERSION.unpack_from(_attributes(reply[_AGGREGATE_PID])[_STATS])[0]
        if version < LEAST_VERSION:
            raise NotPossibleError(
                f"taskstats: this kernel's are of version {version}, "
                f"which name no executables ({LEAST_VERSION} and later do)"
            )
        # Refused without CAP_NET_ADMIN; then registering is refused as well.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
        cpus = _POSSIBLE.read_text().strip().encode() + b"\0"
        self._ask(number, _GET, _attribute(_REGISTER_CPUS, cpus))
        self._try_out()

    def _try_out(self) -> None:
        """Let a process die and look whether that is told.

        In a network namespace other than the host's the kernel takes the registration and
        then sends the records where nobody listens.
        """
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        exits, _ = self.drain()
        if all(one.pid != pid for one in exits):
            raise NotPossibleError(
                "taskstats: exits are not told here; is this the host's network namespace?"
            )

    def _ask(self, family: int, command: int, attributes: bytes) -> bytes:
        """Send a request; give the attributes of its answer, b"" if it is but an ack."""
        body = struct.pack("=BBH", command, 1, 0) + attributes
        self._socket.send(struct.pack("=IHHII", 16 + len(body), family, _REQUEST_ACK, 1, 0) + body)
        answer = b""
        while True:
            data = self._socket.recv(65536)
            length, kind = struct.unpack_from("=IH", data)
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", data, 16)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return answer
            answer = data[_HEADER_BYTES:length]

    def _newly_dropped(self) -> int:
        """How many messages the kernel could not deliver: at least one, when it said so."""
        total = self._dropped + 1
        with contextlib.suppress(OSError):
            for line in _SOCKETS.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1:3] == [str(_NETLINK_GENERIC), str(self._port)]:
                    total = max(total, int(fields[8]))
        new, self._dropped = total - self._dropped, total
        return new


def parse(data: bytes) -> Exit | None:
    """Read one message; None for a thread whose process goes on, and for anything else."""
    try:
        attributes = _attributes(data[_HEADER_BYTES:])
        stats = _attributes(attributes[_AGGREGATE_PID])[_STATS]
        if len(stats) < _BYTES or not stats[_FLAG_AT] & _LAST_OF_GROUP:
            return None
        _, parent = struct.unpack_from("=II", stats, _IDS_AT)
        user_us, system_us = struct.unpack_from("=QQ", stats, _TIMES_AT)
        cpu_ns = struct.unpack_from("=Q", stats, _CPU_AT)[0]
        if _AGGREGATE_TGID in attributes:
            # A process that had threads: what follows is the sum over all of them.
            group = _attributes(attributes[_AGGREGATE_TGID])[_STATS]
            cpu_ns = struct.unpack_from("=Q", group, _CPU_AT)[0]
            user_us = system_us = 0
        return Exit(
            pid=struct.unpack_from("=I", stats, _TGID_AT)[0],
            parent=parent,
            comm=stats[_COMM_AT : _COMM_AT + 32].partition(b"\0")[0],
            cpu_ns=cpu_ns,
            user_us=user_us,
            system_us=system_us,
            begin_s=struct.unpack_from("=Q", stats, _BEGIN_AT)[0],
            file=struct.unpack_from("=QQ", stats, _EXE_AT),
            peak_bytes=struct.unpack_from("=Q", stats, _PEAK_AT)[0] * 1024,
        )
    except (KeyError, struct.error):
        return None


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += length + 3 & ~3
    return found
