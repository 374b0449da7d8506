"""`sams-ebpf status`: what this node measures, what waits to be sent, what the programs cost.

Read from disk and from pinned maps; asks no service and changes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence

import msgspec

from sams_ebpf import config, leftovers, paths, spool, wire


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
    """What waits in the spool folder; None where it cannot be read."""

    folder: str
    batches: dict[str, int] | None
    bytes: int | None
    oldest_age_s: float | None
    max_bytes: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `status --json` prints."""

    node: str
    jobs: list[Job]
    spool: Spool


def command(arguments: argparse.Namespace) -> int:
    """Print the node's state."""
    site = config.load(arguments.config)
    status = read(site, time.time_ns())
    print(msgspec.json.encode(status).decode() if arguments.json else show(status))
    return 0


def read(site: config.Config, now_ns: int) -> Status:
    """Look at the folders that the configuration names."""
    opened = leftovers.open_batches(site.collector.state)
    return Status(
        node=site.site.node_name(),
        jobs=sorted((_job(header, now_ns) for _, header in opened), key=lambda job: job.job or 0),
        spool=_spool(site.spool, now_ns),
    )


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
    )


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
    return "\n".join([*lines, "", *_spool_lines(status.spool)])


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
    return [text]


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
