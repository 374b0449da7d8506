"""Slurm on a testbed machine: one node, both daemons, Prolog and Epilog of the caller."""

from __future__ import annotations

import time

from testbed import USER, Machine, TestbedError, wait_for

CPUS = 64  # more than there are, so that many jobs fit at once
MEMORY_MB = 8000

SLURM_CONF = """\
ClusterName=testcluster
SlurmctldHost={host}(127.0.0.1)
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmdDebug=info
SlurmdParameters=config_overrides
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType={gather}
JobAcctGatherFrequency=task=1
PrologEpilogTimeout=60
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=50
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
MpiDefault=none
KillWait=2
OverTimeLimit=0
JobRequeue=1
CompleteWait=0
{more}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

# Memory is constrained by the kernel on v1; the v2 tree of a host with v1 mounts has no
# controllers, and there Slurm's own polling kills what takes too much.
CGROUP_CONF = """\
CgroupPlugin=cgroup/{layout}
CgroupAutomount=no
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=no
ConstrainRAMSpace={ram}
ConstrainDevices=no
"""


class Slurm:
    """slurmctld and slurmd of one machine."""

    def __init__(self, machine: Machine, shim: str = "/opt/testbed/onlyv2.so") -> None:
        self.machine = machine
        if machine.layout == "v2":
            machine.write(
                "/etc/systemd/system/slurmd.service.d/testbed.conf",
                f"[Service]\nEnvironment=LD_PRELOAD={shim}\n",
            )
        machine.run(["install", "-d", "-o", "slurm", "/var/lib/slurm/slurmctld"])
        machine.run(["install", "-d", "-o", "slurm", "/var/log/slurm"])

    def start(self, *, contain: bool = True, prolog: str = "", epilog: str = "") -> None:
        """(Re)start both daemons with this configuration and wait for an idle node."""
        machine = self.machine
        lines = ["JobAcctGatherParams=OverMemoryKill"] if machine.layout == "v2" else []
        if contain:
            lines.append("PrologFlags=Contain")
        if prolog:
            lines.append(f"Prolog={prolog}")
        if epilog:
            lines.append(f"Epilog={epilog}")
        machine.write(
            "/etc/slurm/slurm.conf",
            SLURM_CONF.format(
                host=machine.hostname,
                cpus=CPUS,
                memory=MEMORY_MB,
                gather="jobacct_gather/" + ("cgroup" if machine.layout == "v1" else "linux"),
                more="\n".join(lines),
            ),
        )
        machine.write(
            "/etc/slurm/cgroup.conf",
            CGROUP_CONF.format(
                layout=machine.layout, ram="yes" if machine.layout == "v1" else "no"
            ),
        )
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", "munge", "slurmctld", "slurmd")
        try:
            wait_for("an idle Slurm node", self.is_idle, seconds=30)
        except TestbedError as error:
            raise TestbedError(f"{error}\n{self.log()}") from error

    def is_idle(self) -> bool:
        """Whether the node runs nothing and takes jobs."""
        shown = self.machine.run(["sinfo", "-h", "-o", "%T"], check=False, timeout=20)
        return shown.stdout.strip() == "idle"

    def log(self) -> str:
        """Last lines of both daemons' logs."""
        shown = ""
        for name in ("slurmctld", "slurmd"):
            path = self.machine.path(f"/var/log/slurm/{name}.log")
            if path.exists():
                shown += f"--- {name}\n" + "\n".join(path.read_text().splitlines()[-25:]) + "\n"
        return shown

    def srun(self, *words: str, timeout: float = 60) -> str:
        """Run one step, give its stdout."""
        return self.machine.run(["srun", *words], user=USER, timeout=timeout).stdout

    def sbatch(self, script: str, *words: str) -> int:
        """Submit a batch script; its job id."""
        command = ["sbatch", "--parsable", "-D", "/tmp", *words]
        shown = self.machine.run(command, user=USER, text=script).stdout
        return int(shown.strip().partition(";")[0])

    def jobs(self) -> dict[str, str]:
        """States of all jobs the controller still knows, by job id (array tasks: raw id)."""
        shown = self.machine.run(["squeue", "-h", "-a", "-t", "all", "-o", "%A %T"], check=False)
        return dict(line.split() for line in shown.stdout.splitlines())

    def wait(self, *jobs: int, seconds: float = 60) -> None:
        """Wait until these jobs have ended and their epilogs too."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")

        def over() -> bool:
            states = self.jobs()
            return not any(states.get(str(job), "gone") in running for job in jobs)

        wait_for(f"the end of jobs {jobs}", over, seconds=seconds)

    def requeue(self, job: int) -> None:
        """Requeue a running job, to start well after slurmd has forgotten its first run.

        Before that (cred_expire after the Epilog) slurmd would skip the Prolog.
        """
        self.machine.run(["scontrol", "requeue", str(job)])
        wait_for(f"job {job} pending", lambda: self.jobs().get(str(job)) == "PENDING", seconds=60)
        self.machine.run(["scontrol", "update", f"jobid={job}", "StartTime=now+15"])

    def wait_idle(self, *, seconds: float = 60) -> None:
        """Wait until the node runs nothing."""
        wait_for("an idle node", self.is_idle, seconds=seconds)

    def wait_running(self, job: int, *, seconds: float = 30) -> None:
        """Wait until a job runs."""
        wait_for(
            f"job {job} running", lambda: self.jobs().get(str(job)) == "RUNNING", seconds=seconds
        )

    def elapsed(self, *words: str) -> float:
        """Seconds that one srun takes."""
        begin = time.monotonic()
        self.srun(*words)
        return time.monotonic() - begin
