"""`sams-ebpf collect`: the collector of one job on this node."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sams_ebpf import (
    cgroups,
    config,
    daemon,
    envfile,
    leftovers,
    privileges,
    program,
    unclaimed,
    wire,
    writer,
)
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
    node = arguments.node or site.site.node
    claims, doubt = claims_of(arguments.env_file, job, node, site.site.cluster)
    program.start_log("sams-ebpf", f"collect job={job} node={claims.node}")
    collector = Collector(
        site, claims, arguments.jobid, arguments.cgroup, env_file=arguments.env_file, doubt=doubt
    )
    with daemon.sleeping() as (signals, watch, sleeper):
        # The handlers stand: an Epilog from here on is heard, one of before left its mark.
        if arguments.finish or (arguments.env_file and envfile.ended(arguments.env_file)):
            signals.came = "SIGHUP"
        return collector.run(signals, watch, sleeper)


def claims_of(
    env_file: Path | None, job: int, node: str | None, cluster: str | None
) -> tuple[wire.Claims, str]:
    """Put together who the job run is; what the site configured goes before what Slurm says.

    Beside it why Slurm's word could not be read, "" if it could.
    """
    claims = wire.Claims()
    doubt = ""
    if env_file is not None:
        try:
            claims = envfile.read(env_file)
        except UsageError as error:
            doubt = str(error)
    named = writer.with_claims(claims, job_id=job, node=node, cluster=cluster)
    named = writer.with_claims(named, boot_id=writer.boot_id())
    if not named.node:
        named = writer.with_claims(named, node=config.Site().node_name())
    return named, doubt


class Collector:
    """One run of a job: where it is, what measures it, what is written of it.

    env_file: what the Prolog wrote. doubt: why that could not be read.
    """

    def __init__(
        self,
        site: config.Config,
        claims: wire.Claims,
        instance: str,
        cgroup: str | None,
        *,
        env_file: Path | None,
        doubt: str,
    ) -> None:
        self._env_file = env_file
        self._doubt = doubt
        self._site = site
        self._claims = claims
        self._instance = instance
        self._cgroup = cgroup
        names = [name for name in (f"job_{claims.job_id}", claims.sluid) if name]
        named = None if cgroup is None else cgroups.resolve(cgroup)
        self._opener = Opener(site, names, named, envfile.run_of(env_file))
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
        mark = None if self._env_file is None else self._env_file.with_name(envfile.ENDED)
        places = daemon.Places(self.locate, self.above, watch, mark)
        meter = self._open(places, signals, sleeper)
        if meter is None:
            if self._opener.in_kernel:
                self._opener.let_go()
            doubt = f" ({self._doubt})" if self._doubt else ""
            _log.warning(
                "no cgroup of job %s was found: nothing was measured%s", self._instance, doubt
            )
            return 0
        if self._doubt:
            _log.warning("%s: job %s is measured under its id alone", self._doubt, self._instance)
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

        def end_run() -> None:
            if isinstance(meter, BpfMeter):
                meter.end_run(self._ended_ns())

        closing = daemon.measure(
            meter,
            out,
            places,
            signals,
            sleeper,
            interval_s=self._site.collector.interval_s,
            grace_period_s=self._site.collector.grace_period_s,
            in_kernel=self._opener.in_kernel,
            on_mark=end_run,
        )
        end_run()
        if not out.write(closing):
            # What was counted stays where it is, for whoever comes next.
            raise PartialError(
                f"{out.problem}; job {self._instance} has ended, its counts are kept for later"
            )
        meter.close()
        self._write_sams_json(out.last)
        _log.info("ended: %s, %d processes alive", closing.reason, closing.live)
        return 0

    def _open(
        self, places: daemon.Places, signals: daemon.Signals, sleeper: daemon.Sleeper
    ) -> BpfMeter | ProcMeter | None:
        """Open the job's meter as soon as there is something to measure; None: there never was."""
        meter = self._claim()
        if meter is not None:
            return meter
        found = daemon.wait_for_job(places, signals, sleeper, self._site.collector.grace_period_s)
        # Made meanwhile, and perhaps gone again: the kernel side knows.
        meter = self._claim()
        if meter is not None or not found:
            return meter
        self._claims = writer.with_claims(self._claims, cgroup=found[0].path.encode())
        if not self._opener.in_kernel:
            return self._sampled(found)
        before = self._opener.left_behind()
        if before is not None:
            before.end_run(envfile.run_of(self._env_file).began_ns)
            unclaimed.clear_one(self._site, before)
        return self._opener.take(found[0])

    def _claim(self) -> BpfMeter | None:
        """Claim what the kernel side has counted of this run; None if it knows of nothing."""
        if not self._opener.in_kernel:
            return None
        mine = self._opener.slots_of_run()
        if not mine:
            return None
        meter, *older = mine
        self._claims = writer.with_claims(self._claims, cgroup=meter.path)
        for one in older:
            # Its cgroup went before anyone came: an epoch of its own, of the same run.
            unclaimed.close(self._site, one, self._claims, "cgroup-removed")
        return meter

    def _sampled(self, found: list[Cgroup]) -> ProcMeter:
        claims, run = self._claims, envfile.run_of(self._env_file)
        known = (claims.restart_count, claims.start_ns, claims.sluid, run.began_ns)
        name = "/".join(map(str, known)) if any(part is not None for part in known) else ""
        meter = self._opener.sampled(found, self._instance, name)
        if meter.superseded is not None:
            _log.warning("an earlier run's collector was lost; its job run is closed")
            leftovers.close_lost(
                self._site.collector.state, self._site.spool.folder, meter.superseded
            )
        return meter

    def _ended_ns(self) -> int | None:
        """Tell when the run ended, if the Epilog said that it did: at the latest now."""
        if self._env_file is None or not envfile.ended(self._env_file):
            return None
        ended_ns = envfile.run_of(self._env_file).ended_ns
        return ended_ns or time.clock_gettime_ns(time.CLOCK_BOOTTIME)

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
