"""Pure arithmetic of accounts: the user and system split, records from kernel counters."""

from __future__ import annotations

import os
from typing import Final

from sams_ebpf import layout, wire

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def split(cpu_ns: int, utime_ns: int, stime_ns: int, before: tuple[int, int]) -> tuple[int, int]:
    """Divide exact CPU time by the kernel's sampled ratio; neither part ever shrinks.

    As cputime_adjust() in kernel/sched/cputime.c does it: stime / (utime + stime) of the
    exact time is system; without any sample all of it is user. before: (user_ns,
    system_ns) as last reported, at most cpu_ns together unless cpu_ns shrank.
    """
    sampled = utime_ns + stime_ns
    system = cpu_ns * stime_ns // sampled if sampled > 0 else 0
    user_before, system_before = before
    system = max(system, system_before)
    user = cpu_ns - system
    if user < user_before:
        user = user_before
        system = max(cpu_ns - user, 0)
    return user, system


def record(name: layout.Name, counters: layout.Counters, before: tuple[int, int]) -> wire.Record:
    """Make the row of one executable.

    A total can be below zero for a moment: a task that moves on right after an exec takes
    its running slice along. It is shown as zero; the ledger has the difference.
    """
    cpu = max(counters.cpu_ns, 0)
    user, system = split(cpu, max(counters.utime_ns, 0), max(counters.stime_ns, 0), before)
    return wire.Record(
        name.path,
        name.flags,
        name.script or None,
        cpu,
        user,
        system,
        counters.execs,
        counters.forks,
        counters.exits,
        counters.max_rss_pages * _PAGE or None,
        max(counters.read_bytes, 0),
        max(counters.write_bytes, 0),
        max(counters.minor_faults, 0),
        max(counters.major_faults, 0),
        max(counters.voluntary_switches, 0),
        max(counters.involuntary_switches, 0),
    )
