"""A node of a site: testbed machine, Slurm, the product's units, and a look at what came out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sams_ebpf import spool, wire
from testbed import Machine, TestbedError, wait_for
from testbed.product import BIN, HOOKS, PROGRAM
from testbed.slurm import Slurm

SPOOL = "/var/spool/sams-ebpf"
JOBS = "/run/sams-ebpf/jobs"
PINS = "/sys/fs/bpf"
CONFIG = "/etc/sams-ebpf/config.yaml"
WORK = f"{BIN}/work"


class Run(NamedTuple):
    """All batches of one epoch, in order; the last one counts."""

    batches: list[wire.Batch]

    @property
    def last(self) -> wire.Batch:
        """The batch that supersedes the others."""
        return self.batches[-1]

    @property
    def claims(self) -> wire.Claims:
        """Who the job run is."""
        return self.last.claims

    @property
    def finals(self) -> list[wire.Batch]:
        """The batches that claim to be the last."""
        return [batch for batch in self.batches if batch.final is not None]

    @property
    def records(self) -> dict[bytes, wire.Record]:
        """Newest record of each executable by path (flags beside, see `keys`)."""
        newest: dict[bytes, wire.Record] = {}
        for batch in self.batches:
            for record in batch.records:
                if not record.flags & wire.OUTSIDE:
                    newest[record.path] = record
        return newest

    @property
    def ledger(self) -> wire.Ledger:
        """Proof of the newest figures."""
        assert self.last.ledger is not None
        return self.last.ledger

    def cpu_ns(self, prefix: str) -> int:
        """CPU of all executables below a folder."""
        start = prefix.encode()
        return sum(r.cpu_ns for path, r in self.records.items() if path.startswith(start))

    def execs(self, path: str) -> int:
        """How often an executable was executed; 0 where it has no record."""
        record = self.records.get(path.encode())
        return 0 if record is None or record.execs is None else record.execs


class Site:
    """The product on one machine, set up by the site's own steps."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.slurm = Slurm(machine)
        machine.run(["systemd-tmpfiles", "--create", "sams-ebpf.conf"])
        self.configure()
        machine.systemctl("daemon-reload")
        machine.systemctl("start", "sams-ebpf-load.service", "sams-ebpf-ship.service")
        self.slurm.start(prolog=f"{HOOKS}/prolog.sh", epilog=f"{HOOKS}/epilog.sh")

    def configure(self, **collector: object) -> None:
        """Write the site's configuration file."""
        name, host = self.machine.name, self.machine.hostname
        parents = [
            f"/{name}/{parent}"
            for parent in (
                "slurm",
                f"slurm_{host}",
                "system.slice/slurmstepd.scope",
                f"system.slice/{host}_slurmstepd.scope",
            )
        ]
        section = {"cgroup_parents": parents, "interval_s": 2, **collector}
        # JSON is YAML.
        self.machine.write(CONFIG, json.dumps({"collector": section}))

    def runs(self) -> list[Run]:
        """Every epoch in the spool."""
        epochs: dict[bytes, list[wire.Batch]] = {}
        for path in sorted(self.machine.path(SPOOL).iterdir()):
            if spool.parse(path.name) is None:
                continue
            with suppress(FileNotFoundError):
                batch = wire.decode(path.read_bytes())
                epochs.setdefault(batch.epoch, []).append(batch)
        return [Run(sorted(batches, key=_order)) for batches in epochs.values()]

    def of(self, job: int) -> list[Run]:
        """Epochs of one job, first run first."""
        found = [run for run in self.runs() if run.claims.job_id == job]
        return sorted(found, key=lambda run: run.last.begin_ns or 0)

    def wait_final(self, *jobs: int, runs: int = 1, seconds: float = 30) -> None:
        """Wait for the final batch of each job and for its unit to be gone."""

        def closed() -> bool:
            units = self.units()
            return all(
                len([run for run in self.of(job) if run.finals]) >= runs
                and not any(re.match(rf"sams-ebpf@{job}[.@]", unit) for unit in units)
                for job in jobs
            )

        try:
            wait_for(f"final batches of {jobs}", closed, seconds=seconds)
        except TestbedError as error:
            raise TestbedError(f"{error}\n{self.report(*jobs)}") from error

    def one(self, job: int) -> Run:
        """Give the only run of a job that has ended."""
        self.wait_final(job)
        runs = self.of(job)
        assert len(runs) == 1, f"job {job}: {len(runs)} epochs\n{self.report(job)}"
        return runs[0]

    def units(self) -> list[str]:
        """Units of jobs that the manager knows, in whatever state."""
        shown = self.machine.systemctl(
            "list-units", "--all", "--plain", "--no-legend", "sams-ebpf@*"
        )
        return [line.split()[0] for line in shown.splitlines()]

    def journal(self, job: int | str) -> list[str]:
        """What a job's unit logged."""
        return self.machine.journal("-u", f"sams-ebpf@{job}.service")

    def report(self, *jobs: int) -> str:
        """For the message of a failed test."""
        parts = [f"units: {self.units()}", f"jobs: {self.slurm.jobs()}"]
        for job in jobs:
            parts += [f"--- journal of {job}", *self.journal(job)]
            for run in self.of(job):
                parts += [f"epoch {run.last.epoch.hex()}: {len(run.batches)} batches"]
                parts += [f"  {run.last.final} {run.ledger} {run.last.mode}"]
                parts += [f"  {r.path!r} {r.cpu_ns} ns {r.execs} execs" for r in run.last.records]
        parts += ["--- load", *self.machine.journal("-u", "sams-ebpf-load.service")]
        return "\n".join(parts)

    def output(self, job: int | str) -> dict[str, int]:
        """What the workload of a batch job counted itself: the last JSON line it printed."""
        return printed(self.machine.path(f"/tmp/out-{job}").read_text())

    def status(self) -> dict[str, Any]:
        """`sams-ebpf status --json`."""
        status: dict[str, Any] = json.loads(self.machine.run([PROGRAM, "status", "--json"]).stdout)
        return status

    def job_folders(self) -> list[str]:
        """Folders of job runs that are left over."""
        return sorted(path.name for path in self.machine.path(JOBS).iterdir())

    def pins(self) -> list[str]:
        """Everything pinned; the kernel's own `*.debug` are in every bpffs."""
        top = self.machine.path(PINS)
        found = (str(path.relative_to(top)) for path in top.rglob("*"))
        return sorted(name for name in found if name not in ("maps.debug", "progs.debug"))

    def job_cgroups(self) -> list[str]:
        """Cgroups of jobs that exist now."""
        top = self.machine.path("/sys/fs/cgroup")
        return [str(path) for path in _folders(top) if re.fullmatch(r"job_\d+", path.name)]


def printed(text: str) -> dict[str, int]:
    """Give the last line of JSON in a text."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise TestbedError(f"the workload printed no figures: {text!r}")
    figures: dict[str, int] = json.loads(lines[-1])
    return figures


def _order(batch: wire.Batch) -> tuple[int, int]:
    return batch.generation, batch.sequence


def _folders(top: Path) -> Iterable[Path]:
    with suppress(OSError):
        for path in top.iterdir():
            if path.is_dir() and not path.is_symlink():
                yield path
                yield from _folders(path)
