"""Files that are whole or absent, and on disk before anyone is told so."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def write(path: Path, data: bytes, *, mode: int = 0o640) -> None:
    """Put `data` at `path` by temporary file, fsync, rename, fsync of the folder.

    Raises OSError; then nothing is at `path` but what was there before. The temporary
    file is always a new one: root may write into a folder in which a less trusted
    user could have put a link of that name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_output(path: Path, data: bytes, *, mode: int = 0o640) -> None:
    """Write what a person asked for: whole or not at all; what is no file of its own, as a shell.

    A device, a pipe, or what the command's own output goes to (`-o /dev/stdout`) must
    not be replaced by a file. Raises OSError.
    """
    if not stands_for_itself(path):
        write(path.resolve(), data, mode=mode)
        return
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def stands_for_itself(path: Path) -> bool:
    """Whether path is a device, a pipe, or where this program's own output goes."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(there.st_mode) or any(
        os.path.samestat(there, os.fstat(stream)) for stream in (1, 2)
    )


def write_all(fd: int, data: bytes) -> None:
    """Write every byte to fd; a short write is continued, an error raised."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
