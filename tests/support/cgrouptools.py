"""Real cgroups for tests, and processes that are in them from their first instruction."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from sams_ebpf import cgroups
from sams_ebpf.cgroups import Cgroup, Hierarchy

_numbers = itertools.count()


def hierarchy_of(version: int) -> Hierarchy:
    """Give the hierarchy of a version that counts CPU time."""
    found = [
        h
        for h in cgroups.mounted()
        if h.version == version and (version == 2 or "cpuacct" in h.controllers)
    ]
    if not found:
        pytest.skip(f"no cgroup v{version} hierarchy with a CPU counter is mounted")
    return found[0]


@contextlib.contextmanager
def cgroup_of_version(version: int) -> Iterator[Cgroup]:
    """Make a cgroup; kill what is left in it at the end, and remove it."""
    name = f"sams-test-{os.getpid()}-{next(_numbers)}"
    made = cgroups.create(name, [hierarchy_of(version)])
    try:
        yield made
    finally:
        for _ in range(20):
            left = cgroups.processes(made)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.01)
        assert cgroups.remove(made, attempts=200)


def start(cgroup: Cgroup, *command: str, **options: object) -> subprocess.Popen[bytes]:
    """Start a command that is in the cgroup before it is executed, and wait until it is."""
    entering = f'echo 0 > {cgroup.folder}/cgroup.procs && exec "$@"'
    process: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
        ["sh", "-c", entering, "sh", *command], **options
    )
    while process.pid not in cgroups.processes(cgroup) and process.poll() is None:
        time.sleep(0.001)
    return process
