"""A Dask scheduler and its workers, each a process of its own on this host."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UP_S = 60


class Cluster:
    """file: the scheduler's file, by which clients and workers find it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file = folder / "scheduler.json"
        self._processes = [
            _start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                   "--scheduler-file", str(self.file))
        ]  # fmt: skip

    def worker(self) -> subprocess.Popen[bytes]:
        """Start one more, which may be killed."""
        process = _start("dask_worker", "--scheduler-file", str(self.file), "--nthreads", "1",
                         "--no-nanny", "--no-dashboard", "--local-directory",
                         str(self._folder))  # fmt: skip
        self._processes.append(process)
        return process

    def wait(self) -> None:
        """Until the scheduler has told where it is."""
        deadline = time.monotonic() + _UP_S
        while not self.file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("no Dask scheduler")
            time.sleep(0.1)

    def wait_for_workers(self, count: int) -> None:
        """Until so many are known to the scheduler."""
        import distributed  # noqa: PLC0415 - an extra of its own

        dask: Any = distributed  # it is not typed
        with dask.Client(scheduler_file=str(self.file), timeout=_UP_S) as client:
            client.wait_for_workers(count, timeout=_UP_S)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A scheduler without workers, and what it was given, ended with the context."""
    cluster = Cluster(folder)
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.close()


def _start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
