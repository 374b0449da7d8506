"""What ran on this machine: what the report says is what the collector's last batch said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import receiving
import shipping
import synthetic
from golden_sams import records
from groups import HIERARCHIES, Hierarchy
from jobs import Job, Options, Result
from receiving import Receiver

from sams_ebpf import paths, wire

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

SCRIPT = "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done; gzip -c /bin/bash >/dev/null"
JOB = 4711
RULES = [
    {"match": ".*/(?P<name>gzip|sh|dash)$", "software": "%(name)s", "version": "1",
     "versionstr": "%%(user)s"},
]  # fmt: skip


def test_a_commands_last_batch_and_the_report_say_the_same(tmp_path: Path) -> None:
    spool, archive = tmp_path / "spool", tmp_path / "receiver/archive"
    spool.mkdir()
    run("sams_ebpf", "run", "-o", tmp_path / "out", "--spool", spool, "--", "sh", "-c", SCRIPT)
    batches = [wire.decode(path.read_bytes()) for path in spool.glob("*.msgpack")]
    last = max(batches, key=lambda batch: (batch.generation, batch.sequence))
    ship(tmp_path, spool)
    config = configure(tmp_path, archive)
    run("sams_aggregator", "ingest", "--config", config)
    said = report(config, "--by", "path")
    assert last.ledger is not None
    assert last.ledger.cgroup_cpu_ns is not None
    check_paths(said["rows"], last.records)
    rest = sum(row["cpu_ns"] for row in said["rows"] if row["kind"] == "unattributed")
    assert rest == last.ledger.unattributed_cpu_ns
    assert said["total"]["cpu_ns"] == last.ledger.cgroup_cpu_ns + last.ledger.outside_cpu_ns


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_a_job_from_its_collector_to_report_and_record(
    tmp_path: Path, make_job: Callable[..., Job], hierarchy: Hierarchy
) -> None:
    """Collector (killed once), shipper, receiver, archive, ingest; with losses that are counted."""
    began = int(time.time())
    result = measured(make_job(hierarchy, job_id=JOB, options=Options(interval_s=1, quota=3)))
    ended = int(time.time()) + 1
    assert result.final.generation > 1
    assert sum(result.ledger.lost.values()) > 0
    node = result.final.claims.node
    assert node is not None
    ship(tmp_path, tmp_path / "job1/spool")
    config = configure(tmp_path, tmp_path / "receiver/archive")
    row = synthetic.Row(JOB, began, ended, ended - began, 2, node, 1)
    (tmp_path / "sacct").write_bytes(synthetic.output([row]))
    run("sams_aggregator", "ingest", "--config", config, "--sacct", tmp_path / "sacct")

    said = report(config, "--job", JOB)
    ledger = result.ledger
    assert said["status"] == "sacct"
    assert said["ledger"] == {
        "cgroup_cpu_ns": ledger.cgroup_cpu_ns,
        "attributed_cpu_ns": ledger.attributed_cpu_ns,
        "unattributed_cpu_ns": ledger.unattributed_cpu_ns,
        "outside_cpu_ns": ledger.outside_cpu_ns,
        "unattributed_by": ledger.unattributed_by,
        "lost": ledger.lost,
    }
    (epoch,) = said["epochs"]
    assert epoch["epoch"] == result.final.epoch.hex()
    assert epoch["processes"] == {
        name: getattr(result.processes, name) for name in wire.Processes.__struct_fields__
    }
    told = {
        (one["path"], *one["flags"]): [one[name] for name in wire.COUNTERS]
        for one in said["executables"]
    }
    assert told == {
        (paths.show(record.path), *flag_names(record.flags)): [
            getattr(record, name) for name in wire.COUNTERS
        ]
        for record in result.records.values()
    }
    rows = report(config, "--by", "path")
    check_paths(rows["rows"], list(result.records.values()))
    assert rows["total"]["core_us"] == rows["sacct"]["core_us"] == row.cpu_time * 10**6
    check_record(config, tmp_path / "xml", result)


def measured(job: Job) -> Result:
    """A job whose collector is killed between two runs of a script."""
    job.run("/bin/sh", "-c", SCRIPT)
    assert job.collector is not None
    job.collector.kill()
    job.run("/bin/sh", "-c", SCRIPT)
    job.attach()
    job.run("/bin/sh", "-c", SCRIPT)
    job.ended(job.launch("/bin/sleep", "1.2"))
    return job.finish()


def check_paths(rows: list[dict[str, Any]], said: list[wire.Record]) -> None:
    """CPU per executable of the report against records of the wire."""
    expected: dict[str, int] = {}
    for record in said:
        if not record.flags & wire.OUTSIDE:
            name = paths.show(record.path)
            expected[name] = expected.get(name, 0) + record.cpu_ns
    found: dict[str, int] = {}
    for row in rows:
        if row["kind"] in ("software", "undetermined") and row["path"] is not None:
            found[row["path"]] = found.get(row["path"], 0) + row["cpu_ns"]
    assert found == expected
    assert any(name.endswith("/gzip") or name == "" for name in found)


def check_record(config: Path, folder: Path, result: Result) -> None:
    """The shares of the SAMS record are those of the CPU of what the rules name."""
    run("sams_aggregator", "extract", "--config", config, "-o", folder)
    (file,) = folder.iterdir()
    ((identity, entries),) = records(file.read_bytes()).items()
    assert identity.startswith(f"c1:{JOB}:")
    used: dict[str, int] = {}
    for record in result.records.values():
        name = os.fsdecode(record.path).rpartition("/")[2]
        if name in ("gzip", "sh", "dash") and not record.flags & wire.OUTSIDE:
            used[name] = used.get(name, 0) + record.cpu_ns
    total = sum(used.values())
    assert {name: usage for name, _, _, _, usage in entries} == {
        name: f"{100 * cpu / total:.2f}" for name, cpu in used.items()
    }
    assert {local for _, _, local, _, _ in entries} == {"u1"}


def flag_names(flags: int) -> list[str]:
    return [name for bit, name in wire.FLAG_NAMES.items() if flags & bit]


def ship(folder: Path, spool: Path) -> None:
    """Drain a spool with the real shipper to the real receiver, and check that all arrived."""
    place = folder / "receiver"
    place.mkdir()
    token = receiving.private(folder / "token", receiving.TOKEN)
    with Receiver(place).start() as receiver:
        target = {"url": receiver.url, "token_file": str(token)}
        ran = shipping.once(shipping.configure(folder / "ship.yaml", spool, {"main": target}))
    assert (ran.returncode, shipping.waiting(spool)) == (0, []), ran.stderr


def configure(folder: Path, archive: Path) -> Path:
    config = folder / "config.yaml"
    config.write_text(json.dumps({
        "site": {"cluster": "c1"},
        "aggregator": {"data": str(folder / "data"), "archives": [str(archive)]},
        "software": {"rules": RULES},
    }))  # fmt: skip
    return config


def report(config: Path, *arguments: object) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(
        run("sams_aggregator", "report", *arguments, "--json", "--config", config)
    )
    return said


def run(module: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
