"""SAMS XML records: which software a job's CPU went to, in the form the SAMS service takes. Pure.

One record per run of a job. A software's `Usage` is its share, in percent, of the CPU of
all software of the job that is known and not ignored. The steps are those of SAMS, as
its records show: see `docs/sams-xml.md`.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Final

from sams_aggregator.rules import Software

NAMESPACE: Final = "http://sams.snic.se/namespaces/2019/01/softwareaccountingrecords"
SCHEMA: Final = Path(__file__).parent / "sams-records.xsd"
JOBS_PER_FILE: Final = 1000
REMOVE_LESS_THEN: Final = Decimal(1)  # percent; the name is the one in SAMS' configuration

_FILL: Final = re.compile(r"%(?:%|\((user|project)\)s)")
# What XML 1.0 has no way to write; line ends and tabs would come back as something else.
_UNWRITABLE: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPES: Final = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&quot;",
    "\t": "&#9;",
    "\n": "&#10;",
    "\r": "&#13;",
}

_Key = tuple[str, str, str, bool]


@dataclass(frozen=True, slots=True)
class Entry:
    """One software of a record. `usage`: percent with two decimals, as it is written."""

    name: str
    version: str
    local_version: str
    user_provided: bool
    usage: str


@dataclass(frozen=True, slots=True)
class Record:
    """What is said of one run. `record_id` is what the receiving side knows it by."""

    record_id: str
    entries: tuple[Entry, ...]

    @property
    def digest(self) -> str:
        """Changes exactly when the content changes; the time of writing is no content."""
        return hashlib.sha256("\n".join(_render(self, "")).encode()).hexdigest()


def record_id(cluster: str, job_id: int, start_text: str | None) -> str:
    """Give `cluster:jobid:YYYYMMDDHHMMSS`, or without the time where none is known.

    start_text: the digits of the start as Slurm printed them, in the site's own zone, so
    that they equal those of the site's usage records.
    """
    return f"{cluster}:{job_id}:{start_text}" if start_text else f"{cluster}:{job_id}"


def fill(text: str, user: str | None, project: str | None) -> str:
    """Put a job's user and project in for `%(user)s` and `%(project)s`.

    `%%` stands for one `%`. Any other `%` is a part of the name and stays. None prints
    as SAMS prints it.
    """
    values = {"user": str(user), "project": str(project)}
    return _FILL.sub(lambda m: values[m.group(1)] if m.group(1) else "%", text)


def make_record(
    identity: str,
    user: str | None,
    project: str | None,
    cpu_ns: Iterable[tuple[Software | None, int]],
    *,
    remove_less_then: Decimal = REMOVE_LESS_THEN,
) -> Record | None:
    """Make the record of one run from CPU time (ns) by software, or None if there is none.

    cpu_ns: one pair per executable and node or already summed, in any order; None is an
    undetermined path. Nothing is said of a run without CPU in known software, nor of
    software without a name, which the receiving side refuses.
    """
    sums: dict[_Key, int] = {}
    for software, used in cpu_ns:
        if software is not None and not software.ignore:
            key = software[:4]
            sums[key] = sums.get(key, 0) + used
    sums = {key: used for key, used in sums.items() if used > 0 and fill(key[0], user, project)}
    entries = tuple(
        Entry(
            fill(name, user, project),
            fill(version, user, project),
            fill(local, user, project),
            provided,
            usage,
        )
        for (name, version, local, provided), usage in _shares(sums, remove_less_then)
    )
    return Record(identity, entries) if entries else None


def _shares(sums: Mapping[_Key, int], threshold: Decimal) -> list[tuple[_Key, str]]:
    """Cut what is small and give the rest in percent, in SAMS' three steps.

    Each sum is exact; the one division is rounded once, to a double, and then printed.
    """
    limit = Fraction(threshold)
    total = sum(sums.values())
    # What counts as the whole when the cut is made has itself lost all below 1 percent,
    # whatever the threshold: so a share a little below it may stay.
    whole = _sum_from(sums, total, Fraction(1)) if limit else total
    if not whole:
        return []
    scale = _sum_from(sums, total, limit) or whole
    return [
        (key, f"{100 * sums[key] / scale:.2f}")
        for key in sorted(sums)
        if 100 * sums[key] >= limit * whole
    ]


def _sum_from(sums: Mapping[_Key, int], total: int, percent: Fraction) -> int:
    return sum(used for used in sums.values() if 100 * used >= percent * total)


def document(records: Sequence[Record], create_time_s: int) -> bytes:
    """Write a file of records; create_time_s: seconds since the Unix epoch."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(create_time_s))
    head = f'<sa:SoftwareAccountingRecords xmlns:sa="{NAMESPACE}"'
    lines = ['<?xml version="1.0" encoding="UTF-8"?>']
    if records:
        lines.append(f"{head}>")
        for record in records:
            lines += _render(record, created)
        lines.append("</sa:SoftwareAccountingRecords>")
    else:
        lines.append(f"{head}/>")
    return ("\n".join(lines) + "\n").encode()


def _render(record: Record, created: str) -> list[str]:
    identity = _text(record.record_id)
    lines = [
        "  <sa:SoftwareAccountingRecord>",
        f'    <sa:RecordIdentity sa:createTime="{created}" sa:recordId="{identity}"/>',
        f"    <sa:JobRecordID>{identity}</sa:JobRecordID>",
    ]
    for entry in record.entries:
        lines += [
            "    <sa:Software>",
            _element("Name", entry.name),
            _element("Version", entry.version),
            _element("LocalVersion", entry.local_version),
            _element("UserProvided", "true" if entry.user_provided else "false"),
            _element("Usage", entry.usage),
            "    </sa:Software>",
        ]
    lines.append("  </sa:SoftwareAccountingRecord>")
    return lines


def _element(name: str, text: str) -> str:
    if not text:
        return f"      <sa:{name}/>"
    return f"      <sa:{name}>{_text(text)}</sa:{name}>"


def _text(text: str) -> str:
    r"""Escape for XML; characters it cannot hold become `\xHH` (or `\uHHHH`)."""
    plain = _UNWRITABLE.sub(_spelled, text)
    return "".join(_ESCAPES.get(character, character) for character in plain)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
