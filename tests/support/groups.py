"""Cgroups of the tests: made, looked at and removed, on v1 (cpuacct) and v2."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from workloads import until

Hierarchy = Literal["v1", "v2"]
# A host may have one of them only (SAMS_TEST_HIERARCHIES=v2).
HIERARCHIES: tuple[Hierarchy, ...] = tuple(
    one for one in get_args(Hierarchy) if one in os.environ.get("SAMS_TEST_HIERARCHIES", "v1 v2")
)
_numbers = itertools.count()


def root_of(hierarchy: Hierarchy) -> Path:
    """Find where a hierarchy with a CPU counter is mounted. Raises LookupError if nowhere."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if hierarchy == "v2" and kind == "cgroup2":
            return Path(folder)
        if hierarchy == "v1" and kind == "cgroup" and "cpuacct" in options.split(","):
            return Path(folder)
    raise LookupError(f"no cgroup {hierarchy} hierarchy with a CPU counter is mounted")


@dataclass(frozen=True)
class Group:
    """One cgroup."""

    path: Path
    hierarchy: Hierarchy

    @classmethod
    def make(cls, hierarchy: Hierarchy, name: str = "") -> Group:
        """Make a cgroup right below the root of its hierarchy, under a name not in use."""
        label = f"sams-test-{os.getpid()}-{next(_numbers)}{name and '-'}{name}"
        return cls(root_of(hierarchy) / label, hierarchy).create()

    def create(self) -> Group:
        """Make it (again)."""
        self.path.mkdir()
        return self

    def child(self, name: str) -> Group:
        """Make a cgroup inside it."""
        return Group(self.path / name, self.hierarchy).create()

    @property
    def procs(self) -> Path:
        """The file that moves whole processes."""
        return self.path / "cgroup.procs"

    @property
    def tasks(self) -> Path:
        """The file that moves single threads (v1)."""
        return self.path / "tasks"

    def cpu_ns(self) -> int:
        """What the kernel charged to it and all below: ns, in steps of 1 µs on v2."""
        if self.hierarchy == "v1":
            return int((self.path / "cpuacct.usage").read_text())
        fields = dict(line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) * 1000

    def pids(self) -> list[int]:
        """Processes in it and all below, zombies left out, as the kernel lists them."""
        found: list[int] = []
        for folder in (self.path, *(p for p in self.path.rglob("*") if p.is_dir())):
            found += [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
        return found

    def populated(self) -> bool:
        """Tell whether anything lives in it or below, threads behind a dead leader included."""
        if self.hierarchy == "v2":
            return "populated 1" in (self.path / "cgroup.events").read_text()
        folders = (self.path, *(p for p in self.path.rglob("*") if p.is_dir()))
        return any((folder / "tasks").read_text() for folder in folders)

    def wait_empty(self, timeout_s: float = 120) -> None:
        """Wait until nothing lives in it."""
        until(lambda: not self.populated(), f"{self.path} to become empty", timeout_s)

    def remove(self) -> None:
        """Kill what is left in it and remove it with all below."""
        if not self.path.exists():
            return
        while self.populated():
            for pid in self.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        folders = [p for p in self.path.rglob("*") if p.is_dir()]
        for folder in (*sorted(folders, reverse=True), self.path):
            until(lambda folder=folder: _removed(folder), f"removal of {folder}", 20)


def _removed(folder: Path) -> bool:
    # A zombie that is not yet reaped, or an RCU grace period, holds a cgroup for a moment.
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
