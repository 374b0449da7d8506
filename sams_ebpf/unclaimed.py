"""Jobs that the kernel side counted and no collector closed: spooled as such, then cleared.

The Prolog did not run, or the collector could not be started again. What is known of the
job is in the name of its cgroup. Looked for by `gc`, and by every collector at its end.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator

import msgspec

from sams_ebpf import config, layout, leftovers, meters, opening, pins, slots, wire, writer
from sams_ebpf.programs import ProgramSet
from sams_ebpf.tracing import BpfMeter

_JOB = re.compile(rb"job_(\d{1,10})")

_log = logging.getLogger(__name__)


def clear(site: config.Config) -> int:
    """Spool and release what nobody has claimed for long; gives the number of jobs.

    Jobs that still have processes are left alone: their counts are safe where they are.
    """
    with pins.lock():
        tree = meters.tree_of_jobs(site.collector.cgroup_tree)
        found = [
            BpfMeter(used, slot, opening.place(os.fsdecode(slot.path), tree), let_go=pins.let_go)
            for used, slot in _overdue(site.collector.unclaimed_after_s)
        ]
    return sum(clear_one(site, meter) for meter in found)


def _overdue(after_s: float) -> Iterator[tuple[ProgramSet, layout.Slot]]:
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for _, used in pins.readable_sets():
        found = []
        for slot in slots.used(used):
            claim = slots.claim_of(used, slot.id)
            known_ns = max(slot.birth_ns, 0 if claim is None else claim.last_read_ns)
            if (
                slot.live <= 0
                and now_ns - known_ns > after_s * 1e9
                and opening.holder(used, slot) is None
            ):
                found.append(slot)
        yield from ((used, slot) for slot in found)
        if not found:
            used.close()


def clear_one(site: config.Config, meter: BpfMeter) -> bool:
    """Spool what nobody has closed as unclaimed, and release it; False if that failed."""
    # A collector that died for good may have known who the job is.
    claims = leftovers.claims(site.collector.state, meter.epoch) or claims_of(site, meter.path)
    if not close(site, meter, claims, "unclaimed"):
        return False
    _log.warning("%s: no collector closed this job; spooled as unclaimed", os.fsdecode(meter.path))
    return True


def close(site: config.Config, meter: BpfMeter, claims: wire.Claims, reason: str) -> bool:
    """Spool the only and final batch of a slot that had no collector, and release it.

    False, logged, if it could not be spooled: the slot stays.
    """
    composer = writer.Composer(meter, claims, full_every=1)
    closing = wire.Closing(reason=reason, live=meter.live())
    batch = composer.compose(meter.harvest(), time.time_ns(), closing)
    batch = msgspec.structs.replace(batch, unclaimed=reason == "unclaimed")
    if writer.put(composer, site.spool.folder, batch) is None:
        return False
    leftovers.forget(site.collector.state, meter.epoch)
    meter.close()
    return True


def claims_of(site: config.Config, path: bytes) -> wire.Claims:
    """Tell from a job cgroup's path what can be told."""
    name = path.rpartition(b"/")[2]
    job = _JOB.fullmatch(name)
    claims = wire.Claims(node=site.site.node_name(), cgroup=path)
    return writer.with_claims(
        claims,
        cluster=site.site.cluster,
        job_id=None if job is None else int(job[1]),
        sluid=None if job is not None else os.fsdecode(name),
        boot_id=writer.boot_id(),
    )
