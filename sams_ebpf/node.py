"""`sams-ebpf load`, `unload` and `gc`: the node's programs, from boot to kill switch."""

from __future__ import annotations

import argparse
import logging

from sams_ebpf import (
    bpf,
    cgroups,
    config,
    leftovers,
    meters,
    pins,
    probe,
    programs,
    slots,
    unclaimed,
    writer,
)
from sams_ebpf.host import Attempt, Loader

_log = logging.getLogger(__name__)


def load(arguments: argparse.Namespace) -> int:
    """Load the programs to stay; close what the last boot left open.

    Raises NotPossibleError with the reasons where no loader works.
    """
    site = config.load(arguments.config)
    boot_id = writer.boot_id()
    if boot_id is not None and site.spool.folder.is_dir():
        closed = leftovers.close_last_boot(site.collector.state, site.spool.folder, boot_id)
        if closed:
            _log.info("%d jobs of the last boot closed with what was known last", closed)
    if site.collector.mode == "proc":
        _log.info("collector.mode is proc: nothing to load")
        return 0
    hierarchy = meters.tree_of_jobs(site.collector.cgroup_tree)
    options = meters.options_of(site.collector, hierarchy, site.site.node_name())

    def use(which: Loader) -> Attempt:
        try:
            with pins.lock():
                pins.load(options, which, stay=True).close()
        except bpf.BpfError as error:
            return Attempt(which, False, str(error))
        return Attempt(which, True, "loaded")

    choice = probe.decide(use, mode="bpf", loader=site.collector.loader)
    if choice.passed_over:
        _log.info("%s", choice.reason)
    _log.info("programs loaded with %s, accounting cgroup tree %s", choice.loader, hierarchy.name)
    return 0


def unload(_: argparse.Namespace) -> int:
    """Take every program of the product out of the kernel, jobs or no jobs."""
    with pins.lock():
        folders = pins.folders()
        jobs = 0
        for folder in folders:
            try:
                one = pins.open_set(folder)
            except bpf.BpfError:
                continue  # cannot be read, and need not be: it goes
            jobs += sum(1 for _ in slots.used(one))
            one.close()
        for folder in folders:
            pins.remove(folder)
        pins.collect_garbage()
    _log.info("unloaded %d sets of programs; %d jobs were being measured", len(folders), jobs)
    return 0


def gc(arguments: argparse.Namespace) -> int:
    """Remove what nobody needs: sets without jobs that are not to stay, unfinished ones.

    Jobs that nobody claimed for long are spooled first.
    """
    unclaimed.clear(config.load(arguments.config))
    with pins.lock():
        gone = pins.collect_garbage()
    for folder in [*gone, *cgroups.remove_abandoned()]:
        _log.info("%s: removed", folder)
    return 0


def cost(one: programs.ProgramSet) -> dict[str, int]:
    """What a set of programs has cost since it was loaded: events, and ns by sampling."""
    costs = one.costs()
    return {
        "events": sum(cpu.events for cpu in costs),
        "sampled_ns": sum(cpu.sampled_ns for cpu in costs),
    }
