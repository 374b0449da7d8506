"""`sams-ebpf collect`: the collector of one job on this node."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sams_ebpf import cgroups, config, daemon, envfile, privileges, program, unclaimed, wire, writer
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.errors import PartialError, UsageError
from sams_ebpf.opening import Opener
from sams_ebpf.tracing import BpfMeter

if TYPE_CHECKING:
    from sams_ebpf.procfs import ProcMeter

# Sampling reads other users' processes; the spool belongs to the shipper's group.
_KEPT = ("CAP_DAC_OVERRIDE", "CAP_SETUID")
_KEPT_TO_SAMPLE = (*_KEPT, "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")
_MAYBE_KEPT = ("CAP_BPF", "CAP_SYS_ADMIN")

_log = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> int:
    """Measure the job until it has ended."""
    site = config.load(arguments.config)
    job = envfile.job_of(arguments.jobid)
    claims = claims_of(arguments.env_file, job, arguments.node or site.site.node, site.site.cluster)
    program.start_log("sams-ebpf", f"collect job={job} node={claims.node}")
    collector = Collector(site, claims, arguments.jobid, arguments.cgroup)
    with daemon.sleeping() as (signals, watch, sleeper):
        # The handlers stand: an Epilog from here on is heard, one of before left its mark.
        if arguments.finish or (arguments.env_file and envfile.ended(arguments.env_file)):
            signals.came = "SIGHUP"
        return collector.run(signals, watch, sleeper)


def claims_of(
    env_file: Path | None, job: int, node: str | None, cluster: str | None
) -> wire.Claims:
    """Put together who the job run is; what the site configured goes before what Slurm says."""
    claims = wire.Claims()
    if env_file is not None:
        try:
            claims = envfile.read(env_file)
        except UsageError as error:
            _log.warning("%s: job %d is measured under its id alone", error, job)
    named = writer.with_claims(claims, job_id=job, node=node, cluster=cluster)
    named = writer.with_claims(named, boot_id=writer.boot_id())
    return named if named.node else writer.with_claims(named, node=config.Site().node_name())


class Collector:
    """One job: where it is, what measures it, what is written of it."""

    def __init__(
        self, site: config.Config, claims: wire.Claims, instance: str, cgroup: str | None
    ) -> None:
        self._site = site
        self._claims = claims
        self._instance = instance
        self._cgroup = cgroup
        names = [name for name in (f"job_{claims.job_id}", claims.sluid) if name]
        named = None if cgroup is None else cgroups.resolve(cgroup)
        self._opener = Opener(site, names, named)
        if self._opener.choice.reason:
            _log.warning("mode %s: %s", self._opener.choice.mode, self._opener.choice.reason)

    def locate(self) -> list[Cgroup]:
        """Find the job's cgroups that are there now, one per place."""
        hierarchies = self._opener.hierarchies
        if self._cgroup is not None:
            try:
                return [cgroups.resolve(self._cgroup, hierarchies)]
            except UsageError:
                return []
        return cgroups.find_slurm_job(
            self._claims.job_id or 0,
            sluid=self._claims.sluid,
            node=self._claims.node,
            hierarchies=hierarchies,
        )[:1]

    def above(self) -> list[str]:
        """List the folders in which the job's cgroup can appear."""
        hierarchies = self._opener.hierarchies
        if self._cgroup is None:
            return cgroups.slurm_watch_folders(hierarchies)
        folders: list[str] = []
        for hierarchy in hierarchies:
            path = self._cgroup.removeprefix(hierarchy.mount)
            folders += cgroups.subpaths(hierarchy, path)[:-1]
        return folders

    def run(self, signals: daemon.Signals, watch: cgroups.Watch, sleeper: daemon.Sleeper) -> int:
        """Measure until the end, and write the final batch."""
        places = daemon.Places(self.locate, self.above, watch)
        meter = self._open(places, signals, sleeper)
        if meter is None:
            _log.warning("no cgroup of job %s was found: nothing was measured", self._instance)
            return 0
        if self._opener.in_kernel:
            unclaimed.clear(self._site)
        self._give_up_privileges(meter)
        out = writer.Writer(
            meter,
            self._claims,
            folder=self._site.spool.folder,
            state=self._site.collector.state,
            full_every=self._site.collector.full_every,
        )
        program.notify("READY=1")
        _log.info("taken up in mode %s, generation %d", meter.mode, meter.generation)
        closing = daemon.measure(
            meter,
            out,
            places,
            signals,
            sleeper,
            interval_s=self._site.collector.interval_s,
            grace_period_s=self._site.collector.grace_period_s,
            in_kernel=self._opener.in_kernel,
        )
        if not out.write(closing):
            # What was counted stays where it is, for whoever comes next.
            raise PartialError(f"job {self._instance}: ended, and its last batch was not written")
        meter.close()
        self._write_sams_json(out.last)
        _log.info("ended: %s, %d processes alive", closing.reason, closing.live)
        return 0

    def _open(
        self, places: daemon.Places, signals: daemon.Signals, sleeper: daemon.Sleeper
    ) -> BpfMeter | ProcMeter | None:
        """Open the job's meter as soon as there is something to measure; None: there never was."""

        def in_kernel() -> BpfMeter | None:
            return self._opener.slot() if self._opener.in_kernel else None

        meter = in_kernel()
        if meter is not None:
            self._claims = writer.with_claims(self._claims, cgroup=meter.path)
            return meter
        found = daemon.wait_for_job(places, signals, sleeper, self._site.collector.grace_period_s)
        # Made meanwhile, and perhaps gone again: the kernel side knows.
        meter = in_kernel()
        if meter is not None:
            self._claims = writer.with_claims(self._claims, cgroup=meter.path)
        if meter is not None or not found:
            return meter
        self._claims = writer.with_claims(self._claims, cgroup=found[0].path.encode())
        if self._opener.in_kernel:
            return self._opener.take(found[0])
        return self._opener.sampled(found, self._instance)

    def _write_sams_json(self, last: wire.Batch | None) -> None:
        """Also write upstream's file, where the site still collects those."""
        settings = self._site.collector.sams_json
        if settings is None or last is None:
            return
        from sams_ebpf import sams_json  # noqa: PLC0415 (few sites need it)

        try:
            sams_json.write(last, settings)
        except sams_json.SamsJsonError as error:
            _log.warning("%s; the batch in the spool has it all", error)

    def _give_up_privileges(self, meter: BpfMeter | ProcMeter) -> None:
        if isinstance(meter, BpfMeter):
            privileges.drop_all_but_needed(meter.works, keep=_KEPT, candidates=_MAYBE_KEPT)
        else:
            privileges.drop(_KEPT_TO_SAMPLE)
