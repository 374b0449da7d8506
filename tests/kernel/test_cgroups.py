"""Real cgroups, on v1 and on v2."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgrouptools import cgroup_of_version, hierarchy_of, start

from sams_ebpf import cgroups
from sams_ebpf.cgroups import Cgroup

pytestmark = pytest.mark.kernel


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    with cgroup_of_version(request.param) as made:
        yield made


def test_cpu_processes_and_identity(cgroup: Cgroup) -> None:
    assert cgroups.cpu_ns(cgroup) == 0
    assert not cgroups.populated(cgroup)
    assert cgroups.identify(cgroup) == Path(cgroup.folder).stat().st_ino
    assert abs(cgroups.birth_ns(cgroup) - time.time_ns()) < 10**10
    below = cgroups.at(f"{cgroup.folder}/a/b", [cgroup.hierarchy])
    assert below is not None
    Path(below.folder).mkdir(parents=True)
    process = start(below, "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; read x")
    try:
        assert cgroups.processes(cgroup) == {process.pid} == cgroups.processes(below)
        assert process.pid in cgroups.threads(cgroup)
        assert cgroups.populated(cgroup)
        mine = cgroups.own(cgroup.hierarchy, process.pid)
        assert mine is not None
        assert mine.folder == below.folder
        assert not cgroups.remove(cgroup, attempts=2)
    finally:
        process.kill()
        process.wait()
    times = cgroups.times(cgroup)
    assert times.cpu_ns is not None
    assert times.cpu_ns > 0
    assert times.cpu_ns == cgroups.cpu_ns(below)


def test_a_cgroup_that_is_gone_is_told(cgroup: Cgroup) -> None:
    assert cgroups.remove(cgroup)
    assert cgroups.remove(cgroup)
    with pytest.raises(FileNotFoundError):
        cgroups.cpu_ns(cgroup)
    assert cgroups.processes(cgroup) == set()
    assert not cgroups.populated(cgroup)


def test_waiting_for_a_cgroup_to_come_and_go(cgroup: Cgroup) -> None:
    deep = Path(cgroup.folder, "x", "y")
    assert not cgroups.wait_until_made(str(deep), timeout_s=0.01)
    seen = []

    def sleep() -> None:
        seen.append(cgroups.wait_until_made(str(deep)))
        seen.append(cgroups.wait_until_removed(str(deep)))

    # Without a time-out: an event that does not come leaves the sleeper asleep.
    sleeper = threading.Thread(target=sleep, daemon=True)
    sleeper.start()
    for folder in (deep.parent, deep):
        time.sleep(0.05)
        folder.mkdir()
    for _ in range(1000):
        if seen:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    deep.rmdir()
    sleeper.join(10)
    assert seen == [True, True]


def test_the_folder_above_goes_and_comes_back(cgroup: Cgroup) -> None:
    deep = Path(cgroup.folder, "uid", "job")
    deep.parent.mkdir()
    sleeper = threading.Thread(target=cgroups.wait_until_made, args=(str(deep),), daemon=True)
    sleeper.start()
    time.sleep(0.05)
    deep.parent.rmdir()
    deep.mkdir(parents=True)
    sleeper.join(10)
    assert not sleeper.is_alive()


def test_only_v2_tells_that_it_became_empty(cgroup: Cgroup) -> None:
    with cgroups.Watch() as watch:
        assert watch.add_populated(cgroup) == (cgroup.version == 2)
        if cgroup.version == 1:
            return
        process = start(cgroup, "true")
        process.wait()
        changed = set()
        while not (changed and not cgroups.populated(cgroup)):
            changed |= watch.wait(20)
        assert changed == {f"{cgroup.folder}/cgroup.events"}


def test_create_prefers_a_tree_that_counts() -> None:
    without = [h for h in cgroups.mounted() if h.controllers == ("freezer",)]
    name = f"sams-test-create-{os.getpid()}"
    made = cgroups.create(name, [*without, hierarchy_of(1)])
    assert "cpuacct" in made.hierarchy.controllers
    assert cgroups.remove(made)
    for hierarchy in without:
        assert not Path(hierarchy.folder(name)).exists()
        alone = cgroups.create(name, [hierarchy])
        assert cgroups.counter(alone, [hierarchy]) is None
        assert cgroups.remove(alone)
