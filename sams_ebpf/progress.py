"""Which of the waiting batches one receiver has, kept over a kill and a power cut.

A file of lines, one batch name each, appended and synced before it counts, and written
anew when most of its names have left the spool: it stays in proportion to the spool.
An acknowledgement that is lost all the same costs a repetition, never a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sams_ebpf import durable

_SPARE_LINES = 256


class Progress:
    """Names of the batches one receiver is done with, as long as they wait for others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] = set()
        self._lines = 0
        self._fd: int | None = None
        self._torn = False

    def load(self, waiting: Iterable[str]) -> None:
        """Read the file; names that no longer wait are left behind. Raises OSError."""
        try:
            text = self._path.read_text("ascii", "replace")
        except FileNotFoundError:
            text = ""
        # A torn last line is no name that waits, unless it is a whole one.
        self._names = set(text.split("\n")) & set(waiting)
        self._rewrite()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """Remember, durably. Raises OSError, and then it is remembered in memory only."""
        self._names.add(name)
        if self._torn:
            self._rewrite()
            return
        if self._fd is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o640)
        try:
            durable.write_all(self._fd, f"{name}\n".encode("ascii"))
            os.fdatasync(self._fd)
        except OSError:
            self._torn = True
            raise
        self._lines += 1

    def forget(self, name: str) -> None:
        """The batch is gone; its name goes with the next rewriting."""
        self._names.discard(name)
        if self._lines > 2 * len(self._names) + _SPARE_LINES:
            self._rewrite()

    def close(self) -> None:
        """Let go of the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _rewrite(self) -> None:
        self.close()
        self._torn = True
        durable.write(self._path, "".join(f"{name}\n" for name in sorted(self._names)).encode())
        self._lines = len(self._names)
        self._torn = False
