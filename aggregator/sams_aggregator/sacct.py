"""Rows of Slurm's accounting: asked for, archived as they were read, and parsed.

What is read is the output of `TZ=UTC sacct -P -D -X --format=…` with its head line.
Fields that an older sacct lacks are left out; those of REQUIRED have to be there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import subprocess
import time
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from sams_aggregator import nodelist
from sams_ebpf import wire
from sams_ebpf.errors import SamsError

# In this order; a job's name may hold the delimiter, so it comes last.
FIELDS: Final = (
    "JobIDRaw", "Cluster", "User", "UID", "Account", "Partition", "Submit", "Start", "End",
    "ElapsedRaw", "Suspended", "CPUTimeRAW", "AllocCPUS", "NNodes", "NodeList", "State",
    "Restarts", "SLUID", "JobName",
)  # fmt: skip
REQUIRED: Final = frozenset(
    {"JobIDRaw", "Submit", "Start", "End", "ElapsedRaw", "CPUTimeRAW", "AllocCPUS", "NodeList",
     "State"}
)  # fmt: skip
CHUNK_BYTES: Final = 8 << 20
MAX_LINE: Final = 1 << 20
SECOND: Final = 1_000_000_000
# Between the clocks of two hosts; and between sacct's answer and the file that holds it.
_CLOCK_S: Final = 300
_OLD_S: Final = 86400
# A hundred days of half a million CPUs: no run has more, and amounts of it fit into 64 bits.
_MOST_CPU_S: Final = 1 << 42
_TIME_LENGTH: Final = len("2026-01-02T03:04:05")
_EPOCH: Final = dt.datetime(1970, 1, 1)  # noqa: DTZ001 - sacct's times name no zone; they are UTC
_NO_TIME: Final = frozenset({"Unknown", "None", "NONE", "", "N/A"})
_TEXT = {
    "Cluster": "cluster", "User": "user", "Account": "account", "Partition": "partition",
    "SLUID": "sluid", "JobName": "job_name",
}  # fmt: skip


class SacctError(SamsError):
    """sacct could not be asked, or what it says is not what was asked for."""


class Job(NamedTuple):
    """One row of sacct: one run of a job, or one of several sizes of it.

    Times in ns since the Unix epoch; end_ns None: not ended when read at read_ns.
    elapsed_s leaves out suspension. cpu_time_s is sacct's own CPUs x elapsed.
    """

    cluster: str | None
    job_id: int
    submit_ns: int
    start_ns: int
    end_ns: int | None
    elapsed_s: int
    cpu_time_s: int
    cpus: int
    nodes: int | None
    node_list: str
    state: str
    restarts: int | None
    sluid: str | None
    user: str | None
    uid: int | None
    account: str | None
    partition: str | None
    job_name: str | None
    read_ns: int
    tie: int


class Problem(NamedTuple):
    """A line that was passed over, counted from 1, and why."""

    line: int
    reason: str


def ask(command: list[str], *, since: float, until: float, timeout_s: int) -> bytes:
    """Run sacct for all users between two moments (Unix seconds). Raises SacctError."""
    known = {name.lower() for name in _run([*command, "--helpformat"], timeout_s).decode().split()}
    fields = [name for name in FIELDS if name.lower() in known]
    missing = sorted(REQUIRED - set(fields))
    if missing:
        raise SacctError(f"{command[0]}: this sacct has no {', '.join(missing)}")
    return _run(
        [*command, "-a", "-P", "-D", "-X", f"--format={','.join(fields)}", "-S", _shown(since),
         "-E", _shown(until)],
        timeout_s,
    )  # fmt: skip


def payloads(output: bytes, cluster: str | None, read_ns: int) -> Iterator[bytes]:
    """Split sacct's output into archive payloads, each with what is needed to read it."""
    head_line, _, rest = output.partition(b"\n")
    head = json.dumps({"cluster": cluster, "read_ns": read_ns}).encode() + b"\n" + head_line + b"\n"
    at = 0
    while at < len(rest):
        end = len(rest)
        if end - at > CHUNK_BYTES:
            end = rest.rfind(b"\n", at, at + CHUNK_BYTES) + 1
            if end <= at:
                raise SacctError(f"a line of more than {CHUNK_BYTES} bytes is no row of sacct")
        yield head + rest[at:end]
        at = end


def check_head(output: bytes) -> None:
    """Refuse what is not sacct's output with the fields needed. Raises SacctError."""
    _columns(output.partition(b"\n")[0])


def doubt(output: bytes, read_ns: int) -> str | None:
    """Why the rows may not have been read at this moment, in UTC; None if nothing speaks so.

    A running job's start and elapsed time say when sacct was asked, if it was never suspended.
    """
    head, _, body = output.partition(b"\n")
    columns = _columns(head)
    asked = []
    for line in body.split(b"\n"):
        with contextlib.suppress(ValueError, SamsError):
            job = _job(line, columns, None, read_ns) if b"Unknown" in line else None
            if job is not None and job.end_ns is None:
                asked.append(job.start_ns + job.elapsed_s * SECOND)
    if not asked:
        return None
    late = (read_ns - max(asked)) // SECOND
    if late < -_CLOCK_S:
        return (
            f"its running jobs go on for {-late} s after the file was written: was sacct asked"
            " with TZ=UTC?"
        )
    if late > _OLD_S:
        return (
            f"its running jobs end {late} s before the file was written, which is taken for when"
            " sacct was asked: set its time (touch -d)"
        )
    return None


def parse(payload: bytes) -> tuple[list[Job], list[Problem]]:
    """Rows of one archive payload, and the lines that are none. Raises SacctError."""
    first, _, rest = payload.partition(b"\n")
    try:
        meta = json.loads(first)
        cluster, read_ns = meta["cluster"], int(meta["read_ns"])
    except (ValueError, KeyError, TypeError) as error:
        raise SacctError("accounting rows without their head") from error
    head, _, body = rest.partition(b"\n")
    columns = _columns(head)
    jobs: list[Job] = []
    problems: list[Problem] = []
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            job = _job(line, columns, cluster, read_ns)
        except (ValueError, nodelist.NodeListError) as error:
            problems.append(Problem(number, str(error)[:200]))
        else:
            if job is not None:
                jobs.append(job)
    return jobs, problems


def _columns(head: bytes) -> list[str]:
    names = head.decode("utf-8", "replace").rstrip("\r").split("|")
    by_lower = {name.lower(): name for name in FIELDS}
    columns = [by_lower.get(name.lower(), name) for name in names]
    missing = sorted(REQUIRED - set(columns))
    if missing:
        raise SacctError(
            f"not the output of sacct -P with the fields needed: no {', '.join(missing)} in"
            f" '{head[:60].decode('utf-8', 'replace')}'"
        )
    return columns


def _job(line: bytes, columns: list[str], cluster: str | None, read_ns: int) -> Job | None:
    if len(line) > MAX_LINE:
        raise ValueError("line too long")
    parts = line.decode("utf-8", "replace").rstrip("\r").split("|", len(columns) - 1)
    if len(parts) != len(columns):
        raise ValueError(f"{len(parts)} fields, {len(columns)} expected")
    row = dict(zip(columns, parts, strict=True))
    start = time_ns(row["Start"])
    if start is None:
        return None  # It has not run.
    text = {name: row.get(field) or None for field, name in _TEXT.items()}
    state = row["State"].split()[0] if row["State"] else ""
    nodelist.expand(row["NodeList"])
    return Job(
        cluster=text["cluster"] or cluster,
        job_id=_count(row, "JobIDRaw"),
        submit_ns=time_ns(row["Submit"]) or start,
        start_ns=start,
        end_ns=time_ns(row["End"]),
        elapsed_s=_count(row, "ElapsedRaw"),
        cpu_time_s=_count(row, "CPUTimeRAW", _MOST_CPU_S),
        cpus=_count(row, "AllocCPUS"),
        nodes=_maybe(row.get("NNodes")),
        node_list=row["NodeList"],
        state=state,
        restarts=_maybe(row.get("Restarts")),
        sluid=text["sluid"],
        user=text["user"],
        uid=_maybe(row.get("UID")),
        account=text["account"],
        partition=text["partition"],
        job_name=text["job_name"],
        read_ns=read_ns,
        tie=int.from_bytes(blake2b(line, digest_size=8).digest()) & wire.INT64_MAX,
    )


def time_ns(text: str) -> int | None:
    """Read a time of sacct, printed with TZ=UTC; None for what did not happen yet."""
    if text in _NO_TIME:
        return None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"not a time: '{text:.40}'") from error
    if len(text) != _TIME_LENGTH or moment.tzinfo is not None or not 1970 <= moment.year <= 2261:
        raise ValueError(f"not a time: '{text:.40}'")
    since = moment - _EPOCH
    return (since.days * 86400 + since.seconds) * SECOND


def _count(row: dict[str, str], field: str, most: int = wire.INT64_MAX) -> int:
    value = _maybe(row[field])
    if value is None:
        raise ValueError(f"{field} is not a number: '{row[field]:.40}'")
    if value > most:
        raise ValueError(f"{field} is beyond all measure: {value}")
    return value


def _maybe(text: str | None) -> int | None:
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 18:
        return None
    return int(text)


def _shown(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def _run(command: list[str], timeout_s: int) -> bytes:
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            timeout=timeout_s,
            env=os.environ | {"TZ": "UTC", "SLURM_TIME_FORMAT": "standard"},
        )
    except OSError as error:
        raise SacctError(f"{command[0]}: cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SacctError(f"{command[0]}: no answer in {timeout_s} s") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[:200]
        raise SacctError(f"{command[0]}: ended with status {done.returncode}: {said}")
    return done.stdout
