"""Which meter measures a job: one way is chosen, by using it, and said aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from sams_ebpf import bpf, cgroups, host, layout, probe, programs, slots
from sams_ebpf.cgroups import Cgroup, Hierarchy
from sams_ebpf.config import Collector
from sams_ebpf.errors import NotPossibleError, UsageError
from sams_ebpf.host import Attempt
from sams_ebpf.programs import Options, ProgramSet
from sams_ebpf.tracing import BpfMeter

if TYPE_CHECKING:
    from sams_ebpf.procfs import ProcMeter

_log = logging.getLogger(__name__)

Mode = Literal["auto", "bpf", "proc"]
Loader = Literal["auto", "libbpf", "bcc"]


def choose(
    use: Callable[[host.Loader], BpfMeter], mode: Mode, loader: Loader
) -> tuple[host.Choice, BpfMeter | None]:
    """Try the ways that were asked for, best first; `use` is one that worked.

    Raises NotPossibleError with every reason if none does.
    """
    made: list[BpfMeter] = []

    def attempt(which: host.Loader) -> Attempt:
        try:
            made.append(use(which))
        except bpf.BpfError as error:
            return Attempt(which, False, str(error))
        return Attempt(which, True, "in use")

    choice = probe.decide(attempt, mode=mode, loader=loader)
    if choice.passed_over:
        _log.warning("mode %s: %s", choice.mode, choice.reason)
    return choice, made[0] if made else None


def private(cgroup: Cgroup, *, mode: Mode, loader: Loader, exact: bool) -> BpfMeter | ProcMeter:
    """Measure a cgroup with programs that go with this process, or by sampling."""

    def use(which: host.Loader) -> BpfMeter:
        options = Options(hierarchy=cgroup.hierarchy, exact=exact, quota=8192)
        own = programs.load(options, which)

        def let_go(mine: ProgramSet, _: int) -> None:
            mine.close()

        return BpfMeter(own, slots.take(own, cgroup), cgroup, let_go=let_go)

    _, meter = choose(use, mode, loader)
    if meter is not None:
        return meter
    from sams_ebpf.procfs import ProcMeter  # noqa: PLC0415 (not where the kernel side counts)

    return ProcMeter([cgroup])


def options_of(settings: Collector, hierarchy: Hierarchy, node: str) -> Options:
    """Settle what the node's shared set of programs is loaded with."""
    parents = tuple(parent.replace("{node}", node) for parent in settings.cgroup_parents)
    if len(parents) > layout.PARENTS:
        raise UsageError(f"collector.cgroup_parents: at most {layout.PARENTS}")
    return Options(
        hierarchy=hierarchy,
        exact=settings.exact,
        quota=settings.executables_per_job,
        tasks=settings.tasks,
        executables=settings.executables,
        limit_percent=settings.programs_limit_percent,
        parents=parents,
    )


def tree_of_jobs(name: str) -> Hierarchy:
    """Give the cgroup tree in which a node's jobs are told apart: `auto`, v2 or a controller.

    auto: v2 where no v1 controller is mounted, else the v1 tree best to account by, as
    Slurm does on such a node.
    """
    trees = cgroups.mounted()
    if name == "auto":
        found = [tree for tree in trees if tree.version == 1 and not _named_only(tree)] or trees
    else:
        found = [tree for tree in trees if name == tree.name or name in tree.controllers]
    if not found:
        raise NotPossibleError(f"cgroup tree {name}: not mounted on this node")
    return found[0]


def _named_only(tree: Hierarchy) -> bool:
    return all(controller.startswith("name=") for controller in tree.controllers)
