"""`make demo`: a real job, measured, and followed from the node to a report and a SAMS record.

1. A job of many kinds runs under `sams-ebpf run`, with a poller of the usual kind beside it.
2. A second one runs as on a Slurm node: `collect` measures it, `ship` sends its batches to a
   receiver, the aggregator makes a report and XML of the archive.

Everything is made in a temporary folder and goes with it; only loopback is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from sams_ebpf import cgroups, report
from sams_ebpf.errors import SamsError
from sams_receiver import auth

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
POLL_S = 30
JOB = 4711
CLUSTER, NODE = "demo", "n1"
RULES = [
    {"match": "/usr/(local/)?bin/(?P<name>[^/]+)$", "software": "%(name)s", "version": "",
     "versionstr": ""},
    {"match": ".*/work/(?P<name>[^/]+)$", "software": "demo-%(name)s", "version": "1.0",
     "versionstr": "1.0", "user_provided": True},
    {"match": "/usr/lib(exec)?/gcc/", "software": "GCC", "version": "12", "versionstr": "12.2"},
]  # fmt: skip


def main() -> int:
    """Run both parts; 0 if every program did."""
    with tempfile.TemporaryDirectory(prefix="sams-ebpf-demo-") as folder:
        try:
            _one_command(Path(folder) / "run")
            _whole_way(Path(folder) / "site")
        except (SamsError, subprocess.CalledProcessError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
    return 0


def _one_command(folder: Path) -> None:
    _title("1. One command: sams-ebpf run -- job.sh")
    folder.mkdir()
    output = folder / "report.json"
    run = subprocess.Popen(
        [BIN / "sams-ebpf", "run", "--json", "-o", output, "--", HERE / "job.sh", folder / "work"]
    )
    try:
        poller = _poll_beside(run)
        if run.wait() != 0:
            raise SamsError(f"the job ended with {run.returncode}")
    finally:
        run.kill()
    made = json.loads(output.read_text())
    print(report.table(made))
    _side_by_side(made, json.loads(poller.communicate()[0])["executables"])


def _poll_beside(run: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Start a poller on the cgroup of the run; it ends with the cgroup's last process."""
    name = f"sams-ebpf-run-{run.pid}"
    end = time.monotonic() + 30
    while run.poll() is None and time.monotonic() < end:
        for tree in cgroups.mounted():
            mine = cgroups.own(tree)
            folder = Path(mine.folder if mine is not None else tree.mount, name)
            if folder.is_dir() or (folder := Path(tree.mount, name)).is_dir():
                poller = subprocess.Popen(
                    [sys.executable, "-m", "bench.poller", folder, "--interval", str(POLL_S)],
                    stdout=subprocess.PIPE,
                )
                run.wait()
                poller.send_signal(signal.SIGTERM)
                return poller
        time.sleep(0.01)
    raise SamsError("the run has made no cgroup")


def _side_by_side(made: dict[str, object], polled: dict[str, int]) -> None:
    ledger = made["ledger"]
    executables = made["executables"]
    assert isinstance(ledger, dict)
    assert isinstance(executables, list)
    whole = ledger["cgroup_cpu_ns"]
    print(f"The same job as a poller of /proc sees it every {POLL_S} s:\n")
    print(f"{'sams-ebpf':>10}  {'poller':>10}  executable")
    for one in executables[:12]:
        print(
            f"{report.seconds(one['cpu_ns']):>10}  "
            f"{report.seconds(polled.get(one['path'], 0)):>10}  {one['path']}"
        )
    seen = sum(polled.values())
    print(
        f"\nof {report.seconds(whole)} s: sams-ebpf {ledger['attributed_cpu_ns'] / whole:.2%}, "
        f"poller {seen / whole:.1%}\n"
    )


def _whole_way(folder: Path) -> None:
    _title("2. The whole way: collect, ship, receiver, archive, ingest, report, SAMS record")
    for name in ("spool", "state", "xml", "receiver"):
        (folder / name).mkdir(parents=True)
    config = _configure(folder)
    began = int(time.time())
    with _receiver(config, folder):
        _measure_a_job(config, folder)
        _program("sams-ebpf", "ship", "--once", "--config", config)
        _program("sams-receiver", "archive", "list", folder / "archive")
    ended = max(int(time.time()), began + 1)
    sacct = folder / "sacct.txt"
    sacct.write_text(_sacct(began, ended))
    _program("sams-aggregator", "ingest", "--config", config, "--sacct", sacct)
    _program("sams-aggregator", "software", "update", "--config", config)
    _program("sams-aggregator", "report", "--config", config)
    _program("sams-aggregator", "report", "--config", config, "--coverage")
    _program("sams-aggregator", "extract", "--config", config, "-o", folder / "xml")
    for record in sorted((folder / "xml").rglob("*.xml")):
        print(f"\n{record.name}:\n{record.read_text()[:1500]}")


def _configure(folder: Path) -> Path:
    token = secrets.token_urlsafe(24)
    node_token = _private(folder / "token", token)
    tokens = _private(folder / "tokens", f"{NODE} {auth.hash_token(token)}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "config.yaml"
    document = {
        "site": {"cluster": CLUSTER, "node": NODE},
        "collector": {"state": str(folder / "state"), "interval_s": 2},
        "spool": {"folder": str(folder / "spool"), "keep_free_bytes": 0},
        "ship": {
            "spread_s": 0,
            "receivers": {"main": {"url": f"http://{address}", "token_file": str(node_token)}},
        },
        "receiver": {
            "archive": str(folder / "archive"),
            "listen": [{"address": address}],
            "tokens_file": str(tokens),
        },
        "aggregator": {
            "data": str(folder / "facts"),
            "archives": [str(folder / "archive")],
            "settle_s": 0,
        },
        "software": {"rules": RULES},
    }
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    return config


def _private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@contextlib.contextmanager
def _receiver(config: Path, folder: Path) -> Iterator[None]:
    with (folder / "receiver.log").open("wb") as log:
        served = subprocess.Popen(
            [BIN / "sams-receiver", "serve", "--config", config], stdout=log, stderr=log
        )
        try:
            yield
        finally:
            served.terminate()
            served.wait(30)


def _measure_a_job(config: Path, folder: Path) -> None:
    """Run the job in a cgroup of its own with `collect` on it, as a node would."""
    cgroup = cgroups.create(f"sams-demo-{os.getpid()}")
    ready = folder / "ready"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(ready))
        notified.settimeout(60)
        collector = subprocess.Popen(
            [BIN / "sams-ebpf", "collect", "--jobid", str(JOB), "--cgroup", cgroup.folder,
             "--config", config],
            env=os.environ | {"NOTIFY_SOCKET": str(ready)},
        )  # fmt: skip
        try:
            while b"READY=1" not in notified.recv(4096):
                pass
            subprocess.run(
                [HERE / "job.sh", folder / "work"],
                check=True,
                preexec_fn=lambda: cgroups.enter(cgroup),
            )
        finally:
            collector.send_signal(signal.SIGHUP)
            collector.wait(60)
            cgroups.remove(cgroup)


def _sacct(began: int, ended: int) -> str:
    """What sacct would say of the job."""
    names = (
        "JobIDRaw|Cluster|User|Account|Partition|Submit|Start|End|ElapsedRaw|CPUTimeRAW|AllocCPUS"
        "|NNodes|NodeList|State"
    )
    start, end = (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(t)) for t in (began, ended))
    elapsed = ended - began
    cpus = os.cpu_count() or 1
    row = (JOB, CLUSTER, "ada", "proj-1", "batch", start, start, end, elapsed, elapsed * cpus,
           cpus, 1, NODE, "COMPLETED")  # fmt: skip
    return f"{names}\n{'|'.join(map(str, row))}\n"


def _program(*argv: object) -> None:
    words = [str(word) for word in argv]
    print(f"\n$ {' '.join(words)}", flush=True)
    subprocess.run([BIN / words[0], *words[1:]], check=True)


def _title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
