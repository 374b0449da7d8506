"""`sams-ebpf status`: what this node measures, what waits to be sent, what the programs cost.

Read from disk and from pinned maps; asks no service and changes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from sams_ebpf import bpf, config, layout, leftovers, paths, pins, rejected, slots, spool, wire


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One open epoch, as its newest batch tells it. Times in ns, ages in s."""

    job: int | None
    restart: int | None
    user: str | None
    mode: str | None
    loader: str | None
    begin_ns: int | None
    last_batch_age_s: float | None
    generation: int
    executables: int | None
    ledger: wire.Ledger | None


class Spool(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in the spool folder; None where it cannot be read.

    aside: batches set aside, damaged or refused for good; gone: those of them for which
    there was no room.
    """

    folder: str
    batches: dict[str, int] | None
    bytes: int | None
    oldest_age_s: float | None
    max_bytes: int
    aside: int | None = None
    gone: rejected.Tally = rejected.Tally()


class ProgramSet(msgspec.Struct, frozen=True, kw_only=True):
    """One pinned set of BPF programs.

    stays: it was loaded to stay. closed: it takes no new jobs, a newer one does.
    tripped: it switched itself off for its cost. unclaimed: slots that no collector has
    taken up; abandoned: those whose collector is gone, with counts that wait. cost_ns: CPU
    time of the programs since they were loaded, by sampling, and cost_share: of one CPU.
    slots_full: job cgroups that found no slot.
    """

    name: str
    loader: str
    stays: bool
    closed: bool
    tripped: bool
    slots_used: int
    unclaimed: int
    abandoned: int
    slots_full: int
    events: int
    cost_ns: int
    cost_share: float


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the kernel; `unread`: why it could not be told.

    others: names of sets that another version of the product loaded and can read.
    """

    sets: list[ProgramSet] = []
    others: list[str] = []
    slots_used: int = 0
    unread: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `status --json` prints."""

    node: str
    jobs: list[Job]
    spool: Spool
    programs: Programs


def command(arguments: argparse.Namespace) -> int:
    """Print the node's state."""
    site = config.load(arguments.config)
    status = read(site, time.time_ns(), programs())
    print(msgspec.json.encode(status).decode() if arguments.json else show(status))
    return 0


def read(site: config.Config, now_ns: int, loaded: Programs) -> Status:
    """Look at the folders that the configuration names."""
    opened = leftovers.open_batches(site.collector.state)
    return Status(
        node=site.site.node_name(),
        jobs=sorted((_job(header, now_ns) for _, header in opened), key=lambda job: job.job or 0),
        spool=_spool(site.spool, now_ns),
        programs=loaded,
    )


def programs(root: Path = pins.ROOT) -> Programs:
    """Look at the pinned sets; without privileges, say that they cannot be seen."""
    try:
        folders = pins.folders(root)
        sets = [_set(folder) for folder in folders if pins.is_readable(folder)]
    except (bpf.BpfError, PermissionError) as error:
        return Programs(unread=str(error))
    return Programs(
        sets=sets,
        others=[folder.name for folder in folders if not pins.is_readable(folder)],
        slots_used=sum(one.slots_used for one in sets),
    )


def _set(folder: Path) -> ProgramSet:
    one = pins.open_set(folder)
    try:
        used = list(slots.used(one))
        claims = [slots.claim_of(one, slot.id) for slot in used]
        flags = one.node()
        costs = one.costs()
        age_ns = max(1, time.time_ns() - folder.stat().st_ctime_ns)
        cost_ns = sum(cpu.sampled_ns for cpu in costs)
        return ProgramSet(
            name=folder.name,
            loader=one.loader,
            stays=bool(flags.stay),
            closed=bool(flags.closed),
            tripped=bool(flags.tripped),
            slots_used=len(used),
            unclaimed=claims.count(None),
            abandoned=sum(c is not None and not Path("/proc", str(c.pid)).exists() for c in claims),
            slots_full=flags.slots_full,
            events=sum(cpu.events for cpu in costs),
            cost_ns=cost_ns,
            cost_share=cost_ns / age_ns,
        )
    finally:
        one.close()


def _job(header: wire.Header, now_ns: int) -> Job:
    age = None if header.end_ns is None else max(0, now_ns - header.end_ns) / 1e9
    return Job(
        job=header.claims.job_id,
        restart=header.claims.restart_count,
        user=header.claims.user,
        mode=header.mode,
        loader=header.loader,
        begin_ns=header.begin_ns,
        last_batch_age_s=age,
        generation=header.generation,
        executables=header.executables,
        ledger=header.ledger,
    )


def _spool(limits: config.Spool, now_ns: int) -> Spool:
    kinds: dict[str, int] = {}
    size = 0
    oldest: int | None = None
    try:
        for path in limits.folder.iterdir():
            entry = spool.parse(path.name)
            if entry is None:
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # sent meanwhile
            kinds[entry.kind] = kinds.get(entry.kind, 0) + 1
            size += stat.st_size
            oldest = stat.st_mtime_ns if oldest is None else min(oldest, stat.st_mtime_ns)
    except OSError:
        return _unread(limits)
    return Spool(
        folder=str(limits.folder),
        batches=kinds,
        bytes=size,
        oldest_age_s=None if oldest is None else max(0, now_ns - oldest) / 1e9,
        max_bytes=limits.max_bytes,
        aside=_aside(limits.folder / rejected.FOLDER),
        gone=rejected.tally(limits.folder / "shipper" / rejected.TALLY),
    )


def _aside(folder: Path) -> int | None:
    try:
        return sum(one.batch is not None for one in rejected.kept(folder))
    except FileNotFoundError:
        return 0
    except OSError:
        return None


def _unread(limits: config.Spool) -> Spool:
    return Spool(
        folder=str(limits.folder),
        batches=None,
        bytes=None,
        oldest_age_s=None,
        max_bytes=limits.max_bytes,
    )


def show(status: Status) -> str:
    """Lay the state out for a person."""
    head = (
        "JOB",
        "RUN",
        "USER",
        "MODE",
        "SINCE",
        "LAST",
        "PROGRAMS",
        "CPU",
        "UNATTRIBUTED",
        "LOST",
    )
    jobs = [_row(job) for job in status.jobs]
    lines = [f"node {paths.show(status.node.encode())}: {len(jobs)} jobs", ""]
    lines += _table([head, *jobs]) if jobs else ["no job is being measured"]
    return "\n".join([*lines, "", *_spool_lines(status.spool), *_program_lines(status.programs)])


def _row(job: Job) -> tuple[str, ...]:
    ledger = job.ledger
    lost = sum(ledger.lost.values()) if ledger else 0
    return (
        _or_dash(job.job),
        _or_dash(job.restart),
        paths.show((job.user or "-").encode()),
        "/".join(word for word in (job.mode, job.loader) if word) or "-",
        "-" if job.begin_ns is None else _clock(job.begin_ns),
        "-" if job.last_batch_age_s is None else f"{span(job.last_batch_age_s)} ago",
        _or_dash(job.executables),
        "-" if ledger is None else span(ledger.attributed_cpu_ns / 1e9),
        _share(ledger),
        str(lost),
    )


def _share(ledger: wire.Ledger | None) -> str:
    if ledger is None or ledger.unattributed_cpu_ns is None or not ledger.cgroup_cpu_ns:
        return "-"
    return f"{100 * ledger.unattributed_cpu_ns / ledger.cgroup_cpu_ns:.2f} %"


def _spool_lines(state: Spool) -> Iterable[str]:
    if state.batches is None or state.bytes is None:
        return [f"spool {state.folder}: cannot be read; are you root or in its group?"]
    count = sum(state.batches.values())
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(state.batches.items()))
    text = f"spool {state.folder}: {count} batches{f' ({kinds})' if kinds else ''}, "
    text += f"{state.bytes / 1e6:.1f} of {state.max_bytes / 1e6:.0f} MB"
    if state.oldest_age_s is not None:
        text += f", oldest {span(state.oldest_age_s)} ago"
    lines = [text]
    if state.aside or state.gone.batches:
        text = f"rejected: {_or_dash(state.aside)} batches set aside, see the .reason beside each"
        if state.gone.batches:
            text += f"; {state.gone.batches} more found no room since {state.gone.since}"
        lines.append(text)
    return lines


def _program_lines(loaded: Programs) -> Iterable[str]:
    if loaded.unread is not None:
        return [f"programs: cannot be seen: {loaded.unread}"]
    lines = [_program_line(one) for one in loaded.sets]
    lines += [f"programs {name}: of another version, goes with its jobs" for name in loaded.others]
    nothing = "programs: none loaded; `sams-ebpf load` counts jobs from their first process on"
    return lines or [nothing]


def _program_line(one: ProgramSet) -> str:
    words = ["loaded to stay" if one.stays else "loaded for its jobs"]
    words += ["no new jobs"] if one.closed else []
    words += ["SWITCHED OFF: took too much time"] if one.tripped else []
    words.append(f"{one.slots_used} of {layout.SLOTS} slots in use ({one.unclaimed} unclaimed)")
    if one.abandoned:
        words.append(f"{one.abandoned} wait for their job's next collector, or for `gc`")
    words += [f"{one.slots_full} jobs found none"] if one.slots_full else []
    each = one.cost_ns / one.events if one.events else 0
    words.append(f"{one.events} events of {each:.0f} ns, {100 * one.cost_share:.3f} % of a CPU")
    return f"programs {one.name} ({one.loader}): {', '.join(words)}"


def span(seconds: float) -> str:
    """Give a time as people say it: `0.42 s`, `3 m 07 s`, `2 h 05 m`, `4 d 03 h`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    return f"{hours} h {minute:02d} m" if hours else f"{minutes} m {second:02d} s"


def _clock(ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns // 1_000_000_000))


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]
