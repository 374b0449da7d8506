"""Which meter a job gets: its slot in the pinned programs, or samples of `/proc`.

A job's slot is known by the last part of its cgroup's path (`job_N` or a SLUID): that is
how the kernel side named it when the cgroup was made, also when the cgroup has gone
since, and whatever cgroup namespace this process sees paths from.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sams_ebpf import bpf, cgroups, config, envfile, host, layout, meters, pins, probe, slots
from sams_ebpf.cgroups import Cgroup, Hierarchy
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.host import Attempt, Choice
from sams_ebpf.programs import ProgramSet
from sams_ebpf.tracing import BpfMeter

if TYPE_CHECKING:
    from sams_ebpf.procfs import ProcMeter

# How long a job's earlier collector, told to end, may take for its last batch.
HANDOVER_S: Final = 10.0

_log = logging.getLogger(__name__)


class Opener:
    """Finds out once what this host can do, then opens meters for one job.

    names: last parts of the path that the job's cgroup can have. cgroup: the one that was
    named instead. run: which of the job's runs is meant. Raises NotPossibleError where the
    mode asked for cannot be had.
    """

    def __init__(
        self,
        site: config.Config,
        names: Sequence[str],
        cgroup: Cgroup | None = None,
        run: envfile.Run = envfile.UNKNOWN,
    ) -> None:
        self._run = run
        self._names = [name.encode() for name in names]
        self._site = site
        self.hierarchies = cgroups.mounted()
        settings = site.collector
        self._tree = (
            meters.tree_of_jobs(settings.cgroup_tree) if cgroup is None else cgroup.hierarchy
        )
        self._options = meters.options_of(settings, self._tree, site.site.node_name())
        self._cgroup = cgroup
        self._loader: host.Loader = "libbpf"
        self.choice: Choice = probe.decide(self._load, mode=settings.mode, loader=settings.loader)

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel side counts, awake or not."""
        return self.choice.mode == "bpf"

    def _load(self, loader: host.Loader) -> Attempt:
        # A compiler does not fit into the limits of a collector's unit. It runs once per
        # boot, in that of `sams-ebpf load`.
        make = loader != "bcc" or "INVOCATION_ID" not in os.environ
        try:
            with pins.lock():
                pins.load(self._options, loader, stay=False, make=make).close()
        except (bpf.BpfError, NotPossibleError) as error:
            return Attempt(loader, False, str(error))
        self._loader = loader
        return Attempt(loader, True, "loaded, or found pinned")

    def let_go(self) -> None:
        """Nothing was measured: a set that was loaded for this job alone goes again."""
        with pins.lock():
            pins.collect_garbage()

    def sampled(self, found: Sequence[Cgroup], instance: str, run: str) -> ProcMeter:
        """Open a meter that samples; baselines are kept in the state folder.

        run: what tells this run from others of the same instance, "" if nothing does.
        """
        from sams_ebpf.procfs import ProcMeter  # noqa: PLC0415 (5 ms that few nodes need)

        settings = self._site.collector
        file = settings.state / f"proc-{instance}.json"
        quota = settings.executables_per_job
        return ProcMeter(found, file, run=run, quota=quota, hierarchies=self.hierarchies)

    def slots_of_run(self) -> list[BpfMeter]:
        """Claim the slots the kernel side has made for the run, newest first; [] if none (yet).

        Older ones are of cgroups that were gone before anyone could claim them. A slot that
        another living collector still holds is waited for: that one has been told to end.
        """
        deadline = time.monotonic() + HANDOVER_S
        while True:
            with pins.lock():
                mine = [one for one in self._slots() if self._run.has(one[1].birth_ns)]
                if self._run.began_ns is None:
                    del mine[1:]  # nothing says that they are not an earlier run's
                if not mine:
                    return []
                if holder(*mine[0]) is None or time.monotonic() >= deadline:
                    return [self._meter(*one) for one in mine]
            for used, _ in mine:
                used.close()
            time.sleep(0.05)

    def left_behind(self) -> BpfMeter | None:
        """Wait for an earlier run's collector to end; gives its slot if it has none (any more).

        Until then what this run does may be counted there: both have cgroups of one path.
        """
        deadline = time.monotonic() + HANDOVER_S
        while True:
            with pins.lock():
                before = [
                    one
                    for one in self._slots()
                    if self._run.began_ns is not None and one[1].birth_ns < self._run.began_ns
                ]
                if not before:
                    return None
                if holder(*before[0]) is None:
                    return self._meter(*before[0])
            for used, _ in before:
                used.close()
            if time.monotonic() >= deadline:
                _log.warning("an earlier run's collector does not end: what it holds is its")
                return None
            time.sleep(0.05)

    def take(self, cgroup: Cgroup) -> BpfMeter:
        """Take a slot by hand for a cgroup that the kernel side did not recognise."""
        with pins.lock():
            # Once more: a set without jobs that is not to stay may be gone by now.
            used = pins.load(self._options, self._loader, stay=False)
            taken = slots.take(used, cgroup)
            # Recognised after all, since it was looked for: the tasks are in that slot.
            made = [
                (owner, slot)
                for owner, slot in self._slots()
                if slot.id != taken.id
                and slot.path == taken.path
                and self._run.has(slot.birth_ns)
                and slots.claim_of(owner, slot.id) is None
            ]
            if not made:
                return self._meter(used, taken, cgroup)
            owner, slot = made[0]
            slots.lead(owner, slot, cgroup)
            slots.release(used, taken.id)
            return self._meter(owner, slot)

    def _meter(self, used: ProgramSet, slot: layout.Slot, cgroup: Cgroup | None = None) -> BpfMeter:
        where = cgroup or place(os.fsdecode(slot.path), self._tree)
        return BpfMeter(used, slot, where, let_go=pins.let_go)

    def _slots(self) -> list[tuple[ProgramSet, layout.Slot]]:
        """Find the job's slots in every pinned set, newest first.

        After an upgrade it may be in an older one.
        """
        ours = []
        for folder, used in pins.readable_sets():
            found = [slot for slot in slots.used(used) if self._is_ours(folder, slot)]
            ours += [(used, slot) for slot in found]
            if not found:
                used.close()
        return sorted(ours, key=lambda one: one[1].birth_ns, reverse=True)

    def _is_ours(self, folder: Path, slot: layout.Slot) -> bool:
        if self._cgroup is not None:
            same_tree = pins.is_of(folder, self._tree)
            return same_tree and slot.path == slots.kernel_path(self._cgroup)
        return slot.path.rpartition(b"/")[2] in self._names


def place(path: str, tree: Hierarchy) -> Cgroup:
    """Find where a path of the kernel's is mounted; it need not be there any more.

    Inside a cgroup namespace the first parts of the path are not to be seen.
    """
    path = path.removeprefix(tree.root.rstrip("/"))
    short = path
    while short.count("/") > 1:
        if Path(tree.folder(os.path.dirname(short))).is_dir():  # noqa: PTH120
            return Cgroup(folder=tree.folder(short), path=short, hierarchy=tree)
        short = short[short.index("/", 1) :]
    return Cgroup(folder=tree.folder(path), path=path, hierarchy=tree)


def holder(used: ProgramSet, slot: layout.Slot) -> int | None:
    """Give the PID of the living collector that has claimed a slot; None if there is none."""
    claim = slots.claim_of(used, slot.id)
    if claim is None or claim.pid in (0, os.getpid()):
        return None
    try:
        words = Path(f"/proc/{claim.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return claim.pid if {b"collect", b"gc"} & set(words) else None
