"""A command run on this machine: what the report says is what the collector's last batch said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sams_ebpf import paths, wire
from sams_receiver.archive import Appender, Item, Kind

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

SCRIPT = "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done; gzip -c /bin/bash >/dev/null"


def test_the_last_batch_and_the_report_say_the_same(tmp_path: Path) -> None:
    spool, archive = tmp_path / "spool", tmp_path / "archive"
    spool.mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({
        "site": {"cluster": "c1"},
        "aggregator": {"data": str(tmp_path / "data"), "archives": [str(archive)]},
    }))  # fmt: skip
    run(
        "sams_ebpf",
        "run",
        "-o",
        str(tmp_path / "out"),
        "--spool",
        str(spool),
        "--",
        "sh",
        "-c",
        SCRIPT,
    )
    batches = [path.read_bytes() for path in spool.glob("*.msgpack")]
    with Appender.open(archive, partitions=1) as appender:
        appender.append([Item(Kind.COUNTERS, data) for data in batches])
    run("sams_aggregator", "ingest", "--config", str(config))
    said = json.loads(
        run("sams_aggregator", "report", "--by", "path", "--json", "--config", str(config))
    )
    last = max(map(wire.decode, batches), key=lambda batch: (batch.generation, batch.sequence))
    assert last.ledger is not None
    assert last.ledger.cgroup_cpu_ns is not None
    expected: dict[str, int] = {}
    for record in last.records:
        if not record.flags & wire.OUTSIDE:
            name = paths.show(record.path)
            expected[name] = expected.get(name, 0) + record.cpu_ns
    rows = said["rows"]
    found = {row["path"]: row["cpu_ns"] for row in rows if row["kind"] == "undetermined"}
    assert found == expected
    assert any(name.endswith("/gzip") for name in found)
    rest = sum(row["cpu_ns"] for row in rows if row["kind"] == "unattributed")
    assert rest == last.ledger.cgroup_cpu_ns - last.ledger.attributed_cpu_ns
    assert said["total"]["cpu_ns"] == last.ledger.cgroup_cpu_ns + last.ledger.outside_cpu_ns


def run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
