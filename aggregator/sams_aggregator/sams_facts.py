"""Upstream's JSON as a batch: one final, full batch of an epoch of its own.

The epoch follows from cluster, job, node and start, so that the same report read twice
is one. Of two reports of one run on one node the one with the later end stands.
"""

from __future__ import annotations

import datetime as dt
from hashlib import blake2b, sha256
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from sams_aggregator import sams_json
from sams_ebpf import wire

SECOND: Final = 1_000_000_000


def batch(
    report: sams_json.NodeReport, cluster: str | None, zone: str, digest: bytes
) -> wire.Batch:
    """Give the batch of one report; `zone` is that of its start time."""
    start_ns = report.start_ns
    if start_ns is None and report.start_text is not None:
        start_ns = start_of(report.start_text, zone)
    key = msgspec.json.encode([cluster, report.job_id, report.node, report.start_text])
    records = [
        wire.Record(one.path, 0, None, one.user_ns + one.system_ns, one.user_ns, one.system_ns)
        for one in report.execs
    ]
    total = sum(record.cpu_ns for record in records)
    return wire.Batch(
        v=wire.VERSION,
        kind="counters",
        epoch=blake2b(key, digest_size=16, person=b"sams-json-epoch").digest(),
        generation=report.end_s,
        writer=bytes(8),
        sequence=int.from_bytes(digest[:8]) & wire.INT64_MAX,
        claims=wire.Claims(
            cluster=cluster,
            node=report.node[:256],
            job_id=report.job_id,
            start_ns=start_ns,
            start_text=report.start_text,
            user=report.user,
            uid=report.uid,
            account=report.account,
            partition=report.partition,
            job_name=report.job_name,
            cpus=report.cpus,
            nodes=report.nodes,
        ),
        mode="proc",
        software="upstream SAMS",
        begin_ns=report.begin_s * SECOND,
        end_ns=report.end_s * SECOND,
        full=True,
        final=wire.Closing(reason="sams-json", live=0),
        ledger=wire.Ledger(cgroup_cpu_ns=None, attributed_cpu_ns=total, unattributed_cpu_ns=None),
        executables=len(records),
        fields=wire.FIELDS,
        records=records,
    )


def start_of(text: str, zone: str) -> int | None:
    """Moment of a start given as YYYYMMDDHHMMSS in a zone; None for what is no time."""
    try:
        moment = dt.datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=ZoneInfo(zone))
        return max(0, int(moment.timestamp())) * SECOND
    except ValueError:
        return None


class _Held(msgspec.Struct, frozen=True):
    """What the archive keeps of one report."""

    cluster: str | None
    digest: bytes
    body: bytes


_held = msgspec.msgpack.Decoder(_Held)


def frame_of(body: bytes, cluster: str | None) -> bytes:
    """Give the archive payload of a report read from a folder."""
    return msgspec.msgpack.encode(_Held(cluster, sha256(body).digest(), body))


def batch_of_frame(data: bytes, cluster: str | None, zone: str) -> wire.Batch:
    """Give the batch of a report as the archive keeps it. Raises SamsJsonError or WireError."""
    try:
        held = _held.decode(data)
    except msgspec.MsgspecError as error:
        raise wire.WireError(f"not an archived report: {error}") from error
    return batch(sams_json.parse(held.body), held.cluster or cluster, zone, held.digest)
