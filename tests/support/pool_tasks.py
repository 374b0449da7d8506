"""Tasks for the tests of the worker pool; workers import them from here."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

from sams_ebpf.errors import SamsError


class Task(NamedTuple):
    number: int
    folder: Path
    die: int = 0
    fail: bool = False


def square(task: Task) -> int:
    """The number's square; dies `die` times before it is done."""
    deaths = task.folder / f"deaths-{task.number}"
    seen = int(deaths.read_text()) if deaths.exists() else 0
    if seen < task.die:
        deaths.write_text(str(seen + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    if task.fail:
        raise SamsError(f"task {task.number} does not want to")
    return task.number**2
