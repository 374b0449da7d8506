"""Upstream's JSON of one job on one node, for a site whose aggregator still reads that.

Made from a job's last batch, which holds all records. The format knows no unattributed
CPU and no `null`: what it cannot say is left out, never invented. Where account, user,
CPUs or start are not known, the whole `SlurmInfo` is left out, and upstream's own
fall-back asks `sacct` for it.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sams_ebpf import config, durable, paths, wire
from sams_ebpf.errors import SamsError

_NANOSECONDS = 1_000_000_000


class SamsJsonError(SamsError):
    """Upstream's file could not be made; the batch is not touched by that."""


def document(batch: wire.Batch) -> dict[str, dict[str, object]]:
    """Give the three sections. Raises SamsJsonError when the format has no way to say it."""
    claims = batch.claims
    if claims.job_id is None or claims.node is None:
        raise SamsJsonError("upstream's JSON needs a job id and a node")
    if not batch.full:
        raise SamsJsonError("upstream's JSON is made from a batch that holds all records")
    if batch.begin_ns is None or batch.end_ns is None:
        raise SamsJsonError("upstream's JSON needs the times of begin and end")
    executables = _executables(batch)
    if not executables:
        raise SamsJsonError(f"job {claims.job_id} has run nothing: upstream takes no such file")
    sections: dict[str, dict[str, object]] = {
        "sams.sampler.Core": {"jobid": claims.job_id, "node": claims.node},
        "sams.sampler.Software": {
            "execs": executables,
            "start_time": batch.begin_ns // _NANOSECONDS,
            "end_time": batch.end_ns // _NANOSECONDS,
        },
    }
    slurm = _slurm(claims)
    if slurm is not None:
        sections["sams.sampler.SlurmInfo"] = slurm
    return sections


def write(batch: wire.Batch, settings: config.SamsJson) -> Path:
    """Write the file as configured; durable and whole, or not at all.

    Needs CAP_SETUID for `write_as_uid`. Raises SamsJsonError.
    """
    text = json.dumps(document(batch), sort_keys=True, separators=(",", ":")).encode()
    job = batch.claims.job_id or 0
    name = settings.file_pattern % {"jobid": job, "node": batch.claims.node}
    if "/" in name or name.startswith("."):
        raise SamsJsonError(
            f"{name!r} is no name for a file: check file_pattern and the node's name"
        )
    folder = settings.base_path
    if settings.jobid_hash_size is not None:
        folder /= str(job // settings.jobid_hash_size)
    try:
        with _file_system_user(settings.write_as_uid):
            if settings.jobid_hash_size is not None:
                folder.mkdir(mode=0o755, exist_ok=True)
            durable.write(folder / name, text, mode=0o644)
    except OSError as error:
        raise SamsJsonError(f"{folder / name}: cannot be written: {error.strerror}") from error
    return folder / name


def _executables(batch: wire.Batch) -> dict[str, dict[str, float]]:
    """CPU seconds by path; what left the job's cgroup is not the job's."""
    nanoseconds: dict[str, list[int]] = {}
    for record in batch.records:
        if record.flags & wire.OUTSIDE:
            continue
        sums = nanoseconds.setdefault(_name(record), [0, 0])
        system = record.system_ns or 0
        sums[0] += record.user_ns if record.user_ns is not None else record.cpu_ns - system
        sums[1] += system
    return {
        name: {"user": user / _NANOSECONDS, "system": system / _NANOSECONDS}
        for name, (user, system) in nanoseconds.items()
    }


def _name(record: wire.Record) -> str:
    if record.path:
        return paths.show(record.path)
    return "(overflow)" if record.flags & wire.OVERFLOW else "(unknown)"


def _slurm(claims: wire.Claims) -> dict[str, object] | None:
    start = _start(claims)
    if None in (claims.account, claims.user, claims.cpus, start):
        return None
    known: dict[str, object] = {
        "account": claims.account,
        "username": claims.user,
        "uid": claims.uid,
        "cpus": claims.cpus,
        "nodes": claims.nodes,
        "partition": claims.partition,
        "starttime": start,
        "jobname": claims.job_name,
    }
    # Upstream has it from the text of `scontrol show job`: all strings.
    return {key: str(value) for key, value in known.items() if value is not None}


def _start(claims: wire.Claims) -> str | None:
    """Start as `scontrol` prints it, in the zone of the site: the record's id is made of it."""
    digits = claims.start_text
    if digits is None and claims.start_ns is not None:
        digits = time.strftime("%Y%m%d%H%M%S", time.localtime(claims.start_ns // _NANOSECONDS))
    if digits is None or len(digits) != 14 or not (digits.isascii() and digits.isdigit()):
        return None
    day = f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}"
    return f"{day}T{digits[8:10]}:{digits[10:12]}:{digits[12:]}"


@contextmanager
def _file_system_user(uid: int | None) -> Iterator[None]:
    """Be this user for the file system, in this thread (setfsuid(2)), while the block lasts."""
    if uid is None:
        yield
        return
    libc = ctypes.CDLL(None)
    own = os.geteuid()
    libc.setfsuid(ctypes.c_uint(uid))
    # The call reports no error: only a second one tells who we are now.
    if libc.setfsuid(ctypes.c_uint(uid)) != uid:
        raise SamsJsonError(f"write_as_uid: cannot become user {uid}: CAP_SETUID is needed")
    try:
        yield
    finally:
        libc.setfsuid(ctypes.c_uint(own))
