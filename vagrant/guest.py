"""Runs inside a test machine: install the product as a site would, test it, write results.

Only the standard library: this is started by the system's Python. Every step is tried
whatever became of the ones before, and what went wrong stands in the results.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import resource
import signal
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
RECEIVER = PRODUCT / "bin/sams-receiver"
UNPACKED = Path("/root/unpacked")
PROGRAMS = Path("/root/programs")
CONFIG = Path("/etc/sams-ebpf/config.yaml")
SPOOL = Path("/var/spool/sams-ebpf")
ARCHIVE = Path("/var/lib/sams-receiver/archive")
SOURCE = (PYTHON, "-m", "sams_ebpf")
LIMIT_S = 600  # of one command

# A long solver, a shell full of short commands with a longer one among them, a storm.
BURN = "import time\nend = time.process_time() + %d\nwhile time.process_time() < end: pass\n"
MIXED = (
    "for i in 1 2 3 4; do seq 20000 | sort -r | gzip -9 | wc -c; done; "
    "python3 -c 'print(sum(i * i for i in range(1000000)))'"
)
STORM = "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done"
WORK = {
    "solver": [sys.executable, "-c", BURN % 5],
    "mixed": ["/bin/sh", "-c", MIXED],
    "storm": ["/bin/sh", "-c", STORM],
}

SITE = """\
site: {cluster: vm}
collector: {interval_s: 5}
ship:
  spread_s: 0
  receivers:
    main: {url: "http://127.0.0.1:8080", token_file: /etc/sams-ebpf/token}
receiver:
  archive: /var/lib/sams-receiver/archive
  listen: [{address: "127.0.0.1:8080"}]
  tokens_file: /etc/sams-ebpf/tokens
  min_free_bytes: 0
"""


def main() -> None:
    """Take the steps the host asked for, and write what came of them after each."""
    share = Path(sys.argv[1])
    row = json.loads((share / "row.json").read_text())
    result: dict[str, Any] = {"kernel": platform.release(), "steps": {}}
    known: dict[str, Callable[[], object]] = {
        "install": lambda: install(share),
        "unpack": lambda: unpack(share),
        "probe": probe,
        "work-libbpf": lambda: work("bpf", "libbpf"),
        "work-proc": lambda: work("proc", None),
        "unit": lambda: unit(share, row),
        "tests-proc": lambda: tests_without_bpf(share, row),
    }
    for loader in ("libbpf", "bcc"):
        for stage in STAGES:
            known[f"tests-{loader}-{stage}"] = functools.partial(tests, share, row, loader, stage)
    for name in row["steps"]:
        began = time.monotonic()
        try:
            result["steps"][name] = known[name]()
        except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
            text = getattr(error, "stderr", "") or ""
            lines = text.strip().splitlines()[-2:]
            result["steps"][name] = {"error": " / ".join([str(error)[:300], *lines])}
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        temporary = share / "result.json.tmp"
        temporary.write_text(json.dumps(result))
        temporary.rename(share / "result.json")


def call(*command: str | Path, timeout: float = LIMIT_S, **environment: str) -> str:
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


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait until the condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


def install(share: Path) -> dict[str, Any]:
    """Install the wheel with what the receiver needs, from a folder of wheels as a site has it."""
    wheel = next(share.glob("sams_ebpf-*.whl"))
    call(PYTHON, "-m", "pip", "install", "-q", "--no-index", f"{wheel}[receiver]")
    return {"version": call(SAMS, "--version").strip()}


def unpack(share: Path) -> dict[str, Any]:
    """Take the wheel's content as it is, which spares minutes of pip where tests are run."""
    call("tar", "-xf", share / "tests.tar", "-C", "/root")
    return {"version": call(*SOURCE, "--version", PYTHONPATH=str(UNPACKED)).strip()}


def probe() -> Any:  # noqa: ANN401 (as the product gives it)
    """Ask the product what this host can do."""
    return json.loads(call(SAMS, "probe", "--json"))


def work(mode: str, loader: str | None) -> dict[str, Any]:
    """Run the three workloads; how much of each was attributed, and at what cost.

    The cost is CPU time and peak memory of all of it, workload included: what a way adds
    shows beside the others.
    """
    found = {}
    out = Path("/tmp/report.json")  # noqa: S108 (a machine of its own)
    for name, command in WORK.items():
        options = ["--mode", mode, *(("--loader", loader) if loader else ())]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call(SAMS, "run", "--json", "-o", out, "--interval", "1", *options, "--", *command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(out.read_text())
        rows = report["executables"]
        found[name] = {
            "ledger": report["ledger"],
            "mode": report["mode"],
            "loader": report["loader"],
            **{
                column: sum(one[column] or 0 for one in rows)
                for column in ("execs", "forks", "exits")
            },
            "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
            "rss_kib": after.ru_maxrss,
        }
    return found


def unit(share: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A job's unit starts with the Prolog, ends with the Epilog, and ships to a receiver."""
    try:
        _site(share)
        _job(row["cgroup"])
    finally:
        (share / "journal.log").write_text(_journal())
    shown = call(RECEIVER, "archive", "cat", ARCHIVE, "--job", "4711")
    batches = [json.loads(line)["batch"] for line in shown.splitlines()]
    final = [one for one in batches if one.get("final")]
    return {
        "load": _state("sams-ebpf-load.service"),
        "load_s": _took_s("sams-ebpf-load.service"),
        "batches": len(batches),
        "final": final[-1] if final else None,
        "left_in_kernel": json.loads(call(SAMS, "status", "--json"))["programs"]["slots_used"],
    }


def _job(layout: str) -> None:
    """Start a job as Slurm does, run something in it, and end it."""
    environment = {"SLURM_JOB_ID": "4711", "SLURM_CLUSTER_NAME": "vm", "SLURMD_NODENAME": "node1"}
    hooks = Path("/usr/libexec/sams-ebpf")
    call("/bin/sh", hooks / "prolog.sh", **environment)
    name = "sams-ebpf@4711.service"
    wait_for(f"{name} to start", lambda: _state(name) == "active")
    job = _job_cgroup(layout)
    job.mkdir(parents=True)
    enter = f"echo $$ > {job}/cgroup.procs; read go; for i in $(seq 50); do /bin/true; done"
    with subprocess.Popen(["/bin/sh", "-c", enter], stdin=subprocess.PIPE) as work:
        # A job is there for longer than a collector takes to come up, here too.
        wait_for(f"{name} to take it up", lambda: "taken up" in _journal(), 120)
        work.communicate(b"go\n", LIMIT_S)
    time.sleep(2)
    job.rmdir()
    call("/bin/sh", hooks / "epilog.sh", **environment)
    wait_for(f"{name} to end", lambda: _state(name) in ("inactive", "failed"))
    wait_for("the spool to be shipped", lambda: not list(SPOOL.glob("*.msgpack")))


def _journal() -> str:
    return call("journalctl", "-o", "cat", "--no-pager", "-u", "sams-ebpf*", "-n", "60")


def _site(share: Path) -> None:
    """Set up node and server as docs/install.md says, both on this machine."""
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(SITE)
    call(SAMS, "install-units", "--program", SAMS, "--config", CONFIG)
    call("systemd-sysusers", "sams-ebpf.conf")
    call("systemd-tmpfiles", "--create", "sams-ebpf.conf")
    call("useradd", "--system", "sams-receiver")
    made = subprocess.run(
        [RECEIVER, "credential", "token", "node1"],
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    _secret("token", made.stderr.strip().splitlines()[-1].split()[-1], "sams-ebpf")
    _secret("tokens", made.stdout, "sams-receiver")
    service = (share / "sams-receiver.service").read_text()
    service = service.replace("/usr/local/bin/sams-receiver", str(RECEIVER))
    Path("/etc/systemd/system/sams-receiver.service").write_text(service)
    # Here everything starts ten to thirty times slower than on a node.
    slow = Path("/etc/systemd/system/sams-ebpf-load.service.d/slow.conf")
    slow.parent.mkdir(exist_ok=True)
    slow.write_text("[Service]\nTimeoutStartSec=600\n")
    call("systemctl", "daemon-reload")
    call("systemctl", "start", "sams-receiver.service", "sams-ebpf-load.service")


def _secret(name: str, text: str, group: str) -> None:
    path = CONFIG.with_name(name)
    path.write_text(text)
    path.chmod(0o640)
    call("chown", f"root:{group}", path)


def _state(name: str) -> str:
    done = subprocess.run(
        ["systemctl", "is-active", name], check=False, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def _took_s(name: str) -> float:
    """How long the main process of a unit that has ended ran."""
    of = ("-p", "ExecMainStartTimestampMonotonic", "-p", "ExecMainExitTimestampMonotonic")
    shown = call("systemctl", "show", *of, name)
    times = dict(line.split("=", 1) for line in shown.splitlines())
    start, end = (int(times[f"ExecMain{which}TimestampMonotonic"]) for which in ("Start", "Exit"))
    return round((end - start) / 1e6, 1)


def _job_cgroup(layout: str) -> Path:
    """Where Slurm makes a job's cgroup."""
    if layout == "v1":
        return Path("/sys/fs/cgroup/cpu,cpuacct/slurm_node1/uid_0/job_4711")
    stay = "sleep infinity >/dev/null 2>&1 & exit"
    scope = ("--scope", "--unit=slurmstepd", "--slice=system.slice", "-p", "Delegate=yes")
    call("systemd-run", "-q", *scope, "/bin/sh", "-c", stay)
    return Path("/sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711")


# What runs in one go: a set of programs that was loaded to stay serves jobs of any options, so
# it is loaded (and compiled) once for all of them. Cases whose own options matter run without
# one, and with libbpf only: a collector compiles nothing. The test that compares both loaders
# puts another set in the place of the one that stays, so it comes last.
LEDGER, SPLIT, BOTH = (f"tests/kernel/test_{name}.py" for name in ("ledger", "split", "loaders"))
ALIKE = "not quota_too_small and not map_too_small and not no_free"
STAGES: dict[str, tuple[bool | None, list[str]]] = {  # exact or not, and what is run
    "split": (False, [SPLIT, BOTH, "-k", "not exact"]),
    "default": (False, [LEDGER, "-k", f"not exact and {ALIKE}"]),
    "exact": (True, [LEDGER, SPLIT, "-k", f"exact and {ALIKE}"]),
    "small": (None, [LEDGER, "-k", "quota_too_small or map_too_small or no_free"]),
}


def tests(share: Path, row: dict[str, Any], loader: str, stage: str) -> dict[str, Any]:
    """Run the kernel tests with one loader."""
    os.environ["PYTHONPATH"] = str(UNPACKED)
    exact, chosen = STAGES[stage]
    # With BCC loaded, the test that compares both loaders needs libbpf only.
    chosen = [word for word in chosen if loader == "bcc" or word != BOTH]
    if exact is not None:
        _load(loader, exact=exact, scale=row["scale"])
    found = _pytest(share, row, stage, chosen, loader)
    for one in json.loads(call(*SOURCE, "status", "--json"))["programs"]["sets"]:
        if one["loader"] == loader:
            found |= {key: one[key] for key in ("events", "cost_ns")}
    if not _serves_next(row, loader, stage):
        call(*SOURCE, "unload")
    return found


def _serves_next(row: dict[str, Any], loader: str, stage: str) -> bool:
    """Whether the set that stays is the next stage's too: BCC compiles it for minutes."""
    following = row["steps"][row["steps"].index(f"tests-{loader}-{stage}") + 1 :]
    name = following[0].rpartition("-") if following else ("", "", "")
    return name[0] == f"tests-{loader}" and STAGES[name[2]][0] == STAGES[stage][0]


def tests_without_bpf(share: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Run the tests of sampling."""
    os.environ["PYTHONPATH"] = str(UNPACKED)
    other = {"v1": "v2", "v2": "v1"}[row["cgroup"]]
    return _pytest(share, row, "proc", ["tests/kernel/test_procfs.py", "-k", f"not {other}"])


def _load(loader: str, *, exact: bool, scale: int) -> None:
    """Load the set that stays."""
    CONFIG.parent.mkdir(exist_ok=True)
    collector: dict[str, Any] = {"loader": loader, "exact": exact, "mode": "bpf"}
    if scale > 1:
        collector["programs_limit_percent"] = 100
    CONFIG.write_text(json.dumps({"collector": collector}))
    call(*SOURCE, "load", "--config", CONFIG)


def _pytest(
    share: Path, row: dict[str, Any], name: str, chosen: list[str], loader: str = "auto"
) -> dict[str, Any]:
    """Run tests; counts, what failed, and what tests noted of themselves."""
    tree = Path("/run/cgroup2")
    if row["cgroup"] == "v1" and not tree.is_mount():
        # For the few cases on v1 that need to see the other tree.
        tree.mkdir()
        call("mount", "-t", "cgroup2", "none", tree)
    found = Path(f"/tmp/junit-{name}.xml")  # noqa: S108 (a machine of its own)
    words = ("-m", "pytest", "-q", "-o", "junit_family=legacy", "--timeout=480", "--durations=15")
    with (share / f"pytest-{name}.log").open("w") as output:
        process = subprocess.Popen(
            [str(PYTHON), *words, f"--junitxml={found}", *chosen],
            cwd="/root/repo",
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                "SAMS_TEST_LOADER": loader,
                "SAMS_TEST_START_S": "240",
                **({"SAMS_TEST_PROGRAMS": str(PROGRAMS)} if PROGRAMS.is_dir() else {}),
                "SAMS_TEST_SCALE": str(row["scale"]),
                "SAMS_TEST_HIERARCHIES": row["cgroup"],
            },
        )
        try:
            process.wait(max(row["end_s"] - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    suite = ET.parse(found).getroot()[0]  # noqa: S314 (written by pytest a moment ago)
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    cases = [case for case in suite if case.tag == "testcase"]
    notes = []
    for case in cases:
        noted = {one.get("name"): one.get("value") for one in case.iter("property")}
        if noted:
            notes.append({"test": case.get("name"), **noted})
    bad = [
        f"{case.get('name')}: {child.get('message', '').splitlines()[0][:160]}"
        for case in cases
        for child in case
        if child.tag in ("failure", "error") and child.get("message")
    ]
    skipped = [
        f"{case.get('name')}: {child.get('message')}"
        for case in cases
        for child in case
        if child.tag == "skipped"
    ]
    cut = [f"{name} after {time.monotonic():.0f} s"] if process.returncode not in (0, 1) else []
    return {**counts, "failed": bad, "skips": skipped, "cut": cut, "notes": notes}


if __name__ == "__main__":
    main()
