"""The small programs that tests and benchmarks run: compiled once, and their own truth read."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "kernel" / "workloads"
CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")


@dataclass(frozen=True)
class Programs:
    """Where the compiled workloads are; scripts stay beside their sources."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        """Path of a workload by name: `storm.sh`, or a C program without its ending."""
        path = SOURCES / name if "." in name else self.folder / name
        if not path.exists():
            raise KeyError(name)
        return str(path)

    def copy(self, name: str, to: Path) -> str:
        """Give a workload another name, so that it has a row of its own."""
        shutil.copy2(self[name], to)
        return str(to)


def compile_all(folder: Path) -> Programs:
    """Compile every workload, statically, into folder."""

    def build(source: Path) -> None:
        own = re.match(r"/\* cflags: (.*)", source.read_text())
        flags = (*CFLAGS, *(own[1].split() if own else ()))
        target = str(folder / source.stem)
        subprocess.run(["gcc", *flags, "-o", target, str(source)], check=True, timeout=120)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, sorted(SOURCES.glob("*.c"))))
    return Programs(folder)


class Truth:
    """What workloads say of themselves: `key value` lines, added up by key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.touch()

    def read(self) -> Counter[str]:
        """Add up what was written until now."""
        found: Counter[str] = Counter()
        for line in self.file.read_text().splitlines():
            key, value = line.split()
            found[key] += int(value)
        return found

    def wait_for(self, key: str, value: int = 1, timeout_s: float = 60) -> None:
        """Wait until a workload has written `key` often enough."""
        until(lambda: self.read()[key] >= value, f"{key} in {self.file}", timeout_s)


def until(condition: object, what: str, timeout_s: float = 60, pause_s: float = 0.005) -> None:
    """Wait for a condition; raises TimeoutError that says for what."""
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(pause_s)
