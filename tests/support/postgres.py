"""A PostgreSQL 15 of a test's own: in a folder, on a socket, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BIN = Path("/usr/lib/postgresql/15/bin")


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database."""
    folder = Path(tempfile.mkdtemp(prefix="sams-pg-"))
    # PostgreSQL does not run as root.
    user = pwd.getpwnam("postgres")
    as_user: dict[str, Any] = (
        {"user": user.pw_uid, "group": user.pw_gid} if os.getuid() == 0 else {}
    )
    os.chown(folder, user.pw_uid, user.pw_gid)
    data = folder / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run(
        [BIN / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8"],
        check=True,
        **quiet,
        **as_user,
    )
    control = [BIN / "pg_ctl", "-D", data, "-w", "-t", "60"]
    options = f"-k {folder} -c listen_addresses='' -c max_connections=30"
    try:
        subprocess.run(
            [*control, "-l", folder / "log", "-o", options, "start"], check=True, **quiet, **as_user
        )
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, **quiet, **as_user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
