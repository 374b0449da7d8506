"""`sams-ebpf collect`: the collector of one job on this node."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from sams_ebpf import cgroups, config, daemon, envfile, privileges, program, wire, writer
from sams_ebpf.cgroups import Cgroup
from sams_ebpf.errors import NotPossibleError, PartialError, UsageError
from sams_ebpf.procfs import ProcMeter

_log = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> int:
    """Measure the job until it has ended."""
    site = config.load(arguments.config)
    job = envfile.job_of(arguments.jobid)
    claims = claims_of(arguments.env_file, job, arguments.node or site.site.node, site.site.cluster)
    program.start_log("sams-ebpf", f"collect job={job} node={claims.node}")
    if arguments.env_file is not None and claims.user is None and not arguments.env_file.exists():
        _log.warning("%s: cannot be read: measured under the job id alone", arguments.env_file)
    with daemon.sleeping() as (signals, watch, sleeper):
        if arguments.finish:
            signals.came = "SIGHUP"
        collector = Collector(site, claims, arguments.jobid, arguments.cgroup)
        places = daemon.Places(collector.locate, collector.above, watch)
        found = daemon.wait_for_job(places, signals, sleeper, site.collector.grace_period_s)
        return collector.run(found, places, signals, sleeper)


def claims_of(
    env_file: Path | None, job: int, node: str | None, cluster: str | None
) -> wire.Claims:
    """Put together who the job run is; what the site configured goes before what Slurm says."""
    claims = wire.Claims()
    if env_file is not None:
        try:
            claims = envfile.read(env_file)
        except UsageError:
            claims = wire.Claims()
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
        self._hierarchies = cgroups.mounted()

    def locate(self) -> list[Cgroup]:
        """Find the job's cgroups that are there now, one per place."""
        if self._cgroup is not None:
            try:
                return [cgroups.resolve(self._cgroup, self._hierarchies)]
            except UsageError:
                return []
        found = cgroups.find_slurm_job(
            self._claims.job_id or 0,
            sluid=self._claims.sluid,
            node=self._claims.node,
            hierarchies=self._hierarchies,
        )
        return found[:1]

    def above(self) -> list[str]:
        """List the folders in which the job's cgroup can appear."""
        if self._cgroup is None:
            return cgroups.slurm_watch_folders(self._hierarchies)
        folders: list[str] = []
        for hierarchy in self._hierarchies:
            path = self._cgroup.removeprefix(hierarchy.mount)
            folders += cgroups.subpaths(hierarchy, path)[:-1]
        return folders

    def run(
        self,
        found: list[Cgroup],
        places: daemon.Places,
        signals: daemon.Signals,
        sleeper: daemon.Sleeper,
    ) -> int:
        """Measure until the end, and write the final batch."""
        if not found:
            _log.warning("no cgroup of job %s was found: nothing was measured", self._instance)
            return 0
        settings = self._site.collector
        meter = self._open(found)
        privileges.drop(("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE"))
        claims = writer.with_claims(self._claims, cgroup=found[0].path.encode())
        out = writer.Writer(
            meter,
            claims,
            folder=self._site.spool.folder,
            state=settings.state,
            full_every=settings.full_every,
        )
        program.notify("READY=1")
        _log.info("taken up in mode %s, generation %d", meter.mode, meter.generation)

        def take_up(there: list[Cgroup]) -> None:
            for cgroup in there:
                meter.add(cgroup)

        closing = daemon.measure(
            meter,
            out,
            places,
            signals,
            sleeper,
            interval_s=settings.interval_s,
            grace_period_s=settings.grace_period_s,
            take_up=take_up,
        )
        if not out.write(closing):
            raise PartialError(f"job {self._instance}: ended, and its last batch was not written")
        meter.close()
        _log.info("ended: %s, %d processes alive", closing.reason, closing.live)
        return 0

    def _open(self, found: list[Cgroup]) -> ProcMeter:
        settings = self._site.collector
        if settings.mode == "bpf":
            raise NotPossibleError("mode bpf: not here")
        state = settings.state / f"proc-{self._instance}.json"
        return ProcMeter(found, state, quota=settings.executables_per_job)
