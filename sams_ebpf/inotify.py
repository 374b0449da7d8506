"""Wakes a program when a file is renamed into a folder (inotify(7), by ctypes)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_IN_MOVED_TO = 0x80
_IN_ONLYDIR = 0x1000000
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_HEAD = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Arrivals:
    """Names of files that came into a folder by rename, as `durable.write` makes them."""

    def __init__(self, folder: Path) -> None:
        """Begin to watch. Raises OSError."""
        self._fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot be had", str(folder))
        mask = _IN_MOVED_TO | _IN_ONLYDIR
        if _libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            error = ctypes.get_errno()
            self.close()
            raise OSError(error, os.strerror(error), str(folder))

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return int(self._fd)

    def take(self) -> set[str] | None:
        """Names that came since the last call; None if some were missed. Never blocks."""
        names: set[str] | None = set()
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return names
            place = 0
            while place < len(data):
                _, mask, _, length = _HEAD.unpack_from(data, place)
                place += _HEAD.size
                name = os.fsdecode(data[place : place + length].rstrip(b"\0"))
                place += length
                if mask & (_IN_Q_OVERFLOW | _IN_IGNORED):
                    names = None
                elif names is not None and name:
                    names.add(name)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)
