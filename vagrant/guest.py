"""Runs inside a test machine: install the product as a site would, test it, write results.

Only the standard library: this is started by the system's Python. Every step is tried
whatever became of the ones before, and what went wrong stands in the results.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRODUCT = Path("/opt/sams-ebpf")
PYTHON = PRODUCT / "bin/python"
SAMS = PRODUCT / "bin/sams-ebpf"
# A long solver, a shell full of short commands with a longer one among them, a storm.
WORK = {
    "solver": ["@burn", "5"],
    "mixed": [
        "/bin/sh",
        "-c",
        (
            "for i in 1 2 3 4 5 6 7 8; do seq 20000 | sort -r | gzip -9 | "
            "wc -c; done; python3 -c 'print(sum(i * i for i in range(2000000)))'"
        ),
    ],
    "storm": ["/bin/sh", "-c", "i=0; while [ $i -lt 300 ]; do /bin/true; i=$((i+1)); done"],
}
LEDGER = (
    "true_from_a_shell or fork_without_exec or leader_first or detached_threads or sigchld_ignored"
    " or exec_from_a_thread or exec_chain or threads_killed or zombies or daemons or vfork"
    " or memfd or script or process_moved or group_moved or cloned or before_attach or nested"
    " or made_again or quota"
)
BURN = "import time\nend = time.process_time() + %s\nwhile time.process_time() < end: pass\n"


def main() -> None:
    """Take the steps, and write what came of them after each."""
    share = Path(sys.argv[1])
    row = json.loads((share / "row.json").read_text())
    result: dict[str, Any] = {"kernel": platform.release(), "steps": {}}
    loaders = row["loaders"]
    ways = [("bpf", loader) for loader in loaders] + [("proc", None)]
    steps: list[tuple[str, Callable[[], object]]] = [
        ("install", lambda: install(share)),
        ("probe", probe),
        *((f"work-{loader or mode}", lambda m=mode, x=loader: work(m, x)) for mode, loader in ways),
        ("unit", lambda: unit(row)),
        *((f"tests-{x}", lambda x=x: tests(share, x)) for x in loaders or [None]),
    ]
    for name, step in steps:
        began = time.monotonic()
        try:
            result["steps"][name] = step()
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            text = getattr(error, "stderr", "") or ""
            lines = text.strip().splitlines()[-2:]
            result["steps"][name] = {"error": " / ".join([str(error)[:200], *lines])}
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        temporary = share / "result.json.tmp"
        temporary.write_text(json.dumps(result))
        temporary.rename(share / "result.json")


def call(*command: str | Path, timeout: float = 300, **environment: str) -> str:
    """Run a command that has to succeed; its output."""
    done = subprocess.run(
        [str(part) for part in command],
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    return done.stdout


def install(share: Path) -> dict[str, Any]:
    """Install the wheel; what it depends on is in the environment already."""
    wheel = next(share.glob("sams_ebpf-*.whl"))
    call(PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel)
    return {"version": call(SAMS, "--version").strip()}


def probe() -> Any:  # noqa: ANN401 (as the product gives it)
    """Ask the product what this host can do."""
    return json.loads(call(SAMS, "probe", "--json"))


def work(mode: str, loader: str | None) -> dict[str, Any]:
    """Run the three workloads; how much of each was attributed, and at what cost."""
    found = {}
    for name, command in WORK.items():
        words = [sys.executable, "-c", BURN % command[1]] if command[0] == "@burn" else command
        out = Path("/tmp/report.json")  # noqa: S108 (a machine of its own)
        options = ["--mode", mode, *(("--loader", loader) if loader else ())]
        began = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call(SAMS, "run", "--json", "-o", out, "--interval", "1", *options, "--", *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(out.read_text())
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rows = report["executables"]
        found[name] = {
            "ledger": report["ledger"],
            "mode": report["mode"],
            "loader": report["loader"],
            "execs": sum(one["execs"] or 0 for one in rows),
            "forks": sum(one["forks"] or 0 for one in rows),
            "exits": sum(one["exits"] or 0 for one in rows),
            "executables": {one["path"]: one["cpu_ns"] for one in rows},
            "wall_s": round(time.monotonic() - began, 2),
            "cpu_s": round(used, 2),
            "rss_kib": after.ru_maxrss,
        }
    return found


def unit(row: dict[str, Any]) -> dict[str, Any]:
    """Start a job's unit as a Prolog would, end it as an Epilog would, ship what it left."""
    config = Path("/etc/sams-ebpf.yaml")
    config.write_text("site: {cluster: vm}\n")
    call(SAMS, "install-units", "--program", SAMS, "--config", config)
    call("systemd-sysusers")
    with contextlib.suppress(subprocess.CalledProcessError):
        call("systemd-tmpfiles", "--create")
    call("systemctl", "daemon-reload")
    loaded = subprocess.run(
        ["systemctl", "start", "sams-ebpf-load.service"], check=False, capture_output=True
    )
    controller = "cpu,cpuacct" if row["cgroup"] == "v1" else ""
    parent = Path("/sys/fs/cgroup", controller, "slurm_node1/uid_0" if controller else "slurm")
    job = parent / "job_4711"
    folder = Path("/run/sams-ebpf/jobs/4711")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "env").write_text(f"SLURM_JOB_ID=4711\nSAMS_CGROUP={job}\n")
    call("systemctl", "start", "sams-ebpf@4711")
    time.sleep(2)
    job.mkdir(parents=True)
    enter = f"echo $$ > {job}/cgroup.procs; for i in $(seq 100); do /bin/true; done"
    call("/bin/sh", "-c", enter)
    time.sleep(3)
    job.rmdir()
    subprocess.run(["systemctl", "stop", "sams-ebpf@4711"], check=False, timeout=60)
    journal = call("journalctl", "-u", "sams-ebpf@4711", "-o", "cat", "--no-pager").strip()
    spool = sorted(Path("/var/spool/sams-ebpf").glob("**/*.msgpack"))
    shown = call(SAMS, "dump", *spool) if spool else ""
    batches = [json.loads(line) for line in shown.splitlines()]
    final = [one for one in batches if one.get("final")]
    return {
        "load": loaded.returncode,
        "batches": len(batches),
        "final": final[-1] if final else None,
        "journal": journal.splitlines()[-8:],
    }


def tests(share: Path, loader: str | None) -> dict[str, Any]:
    """Run the kernel tests with one loader (None: those of a host without BPF)."""
    copy = Path("/root/repo")
    if not copy.exists():
        call("cp", "-r", share / "repo", copy)
    log = share / f"pytest-{loader or 'proc'}.log"
    found = Path("/tmp/junit.xml")  # noqa: S108 (a machine of its own)
    chosen = (
        ["tests/kernel/test_ledger.py", "tests/kernel/test_split.py", "-k", LEDGER + " or split"]
        if loader
        else ["tests/kernel/test_procfs.py"]
    )
    with log.open("w") as output:
        subprocess.run(
            [PYTHON, "-m", "pytest", "-q", "--timeout=300", f"--junitxml={found}", *chosen],
            check=False,
            cwd=copy,
            stdout=output,
            stderr=output,
            timeout=900,
            env={**os.environ, "SAMS_TEST_LOADER": loader or "auto", "SAMS_TEST_START_S": "240"},
        )
    suite = ET.parse(found).getroot()[0]  # noqa: S314 (written by pytest a moment ago)
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    bad = [
        case.get("name", "")
        for case in suite
        if any(child.tag in ("failure", "error") for child in case)
    ]
    return {**counts, "failed": bad}


if __name__ == "__main__":
    main()
