"""The commands as a person uses them: bad input, forms of reports, one job to the digit."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
import synthetic

from sams_aggregator import __main__, cli
from sams_ebpf import program, wire
from sams_receiver.archive import Appender, Archive, Item, Kind

BEGIN = 1_760_000_000
ROW = synthetic.Row(42, BEGIN, BEGIN + 1800, 1800, 8, "n[1-2]", 2, name="=cmd()")
PATHS = [b"/usr/bin/bash", b"=HYPERLINK(1)", b"/odd/\xff\n"]


class Site:
    """An archive, a configuration, and the program."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.archive = folder / "archive"
        self.capsys = capsys
        self.config = folder / "config.yaml"
        self.config.write_text(json.dumps({
            "site": {"cluster": "c1"},
            "aggregator": {"data": str(folder / "data"), "archives": [str(self.archive)],
                           "workers": 1},
            "software": {"rules": [{"match": "^/usr/bin/", "software": "=system", "version": "1",
                                    "versionstr": ""}]},
        }))  # fmt: skip

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        status = program.run(cli.build, [*arguments, "--config", str(self.config)])
        out, err = self.capsys.readouterr()
        return status, out, err

    def fill(self) -> list[synthetic.Epoch]:
        chance = random.Random(1)
        epochs = [
            synthetic.epoch(chance, synthetic.claims(ROW, node), BEGIN,
                            synthetic.harvests(BEGIN, BEGIN + 1800), paths=PATHS, outside=True)
            for node in ("n1", "n2")
        ]  # fmt: skip
        with Appender.open(self.archive, partitions=1) as appender:
            for one in epochs:
                appender.append([Item(Kind.COUNTERS, data) for data in one.encoded()])
            appender.seal(everything=True)
        rows = self.folder / "rows"
        rows.write_bytes(synthetic.output([ROW]))
        assert self("ingest", "--archive", str(self.archive), "--sacct", str(rows))[0] == 0
        return epochs


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    return Site(tmp_path, capsys)


def test_one_job_is_told_to_the_digit(site: Site) -> None:
    epochs = site.fill()
    status, out, _ = site("report", "--job", "42", "--json")
    said = json.loads(out)
    assert status == 0
    expected: dict[tuple[bytes, int], int] = {}
    for one in epochs:
        for record in one.last.records:
            expected[record.key] = expected.get(record.key, 0) + record.cpu_ns
    assert sorted(e["cpu_ns"] for e in said["executables"]) == sorted(expected.values())
    assert [e["cpu_ns"] for e in said["executables"]] == sorted(expected.values(), reverse=True)
    ledgers = [one.last.ledger for one in epochs]
    for name in ("cgroup_cpu_ns", "attributed_cpu_ns", "unattributed_cpu_ns", "outside_cpu_ns"):
        assert said["ledger"][name] == sum(getattr(ledger, name) for ledger in ledgers)
    assert said["job"] == 42
    assert said["mode"] == "bpf"
    assert said["wall_s"] == 1800
    assert said["start"] == "2025-10-09T08:53:20Z"
    assert {"execs", "forks", "exits", "max_rss_bytes", "read_bytes"} <= set(said["executables"][0])
    assert sum(row["core_us"] for row in said["accounts"].values()) == ROW.cpu_time * 10**6


def test_a_report_in_every_form_holds_the_same(site: Site) -> None:
    site.fill()
    keys = ("--by", "software,path,user,month")
    said = json.loads(site("report", *keys, "--json")[1])
    assert said["total"]["core_us"] == said["sacct"]["core_us"] == ROW.cpu_time * 10**6
    assert sum(row["core_us"] for row in said["rows"]) == ROW.cpu_time * 10**6
    rows = list(csv.DictReader(io.StringIO(site("report", *keys, "--format", "csv")[1])))
    assert [int(row["core_us"]) for row in rows] == [row["core_us"] for row in said["rows"]]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    assert any(row["software"] == "'=system" for row in rows)
    file = site.folder / "report.parquet"
    assert site("report", *keys, "--format", "parquet", "-o", str(file))[0] == 0
    found = duckdb.sql(f"SELECT core_us, path FROM '{file}'").fetchall()  # noqa: S608 - ours
    assert [int(row[0]) for row in found] == [row["core_us"] for row in said["rows"]]
    table = site("report", *keys)[1]
    assert "/odd/\\xff\\x0a" in table
    for kind in ("ignored", "undetermined", "unattributed", "outside", "no CPU", "no data"):
        assert kind in table


@pytest.mark.parametrize("option", ["--top", "--undetermined", "--coverage"])
def test_other_reports(site: Site, option: str) -> None:
    site.fill()
    said = json.loads(site("report", option, "--json")[1])
    if option == "--top":
        assert {row["path"] for row in said["rows"]} >= {"/usr/bin/bash", "=HYPERLINK(1)"}
    elif option == "--undetermined":
        assert {row["kind"] for row in said["rows"]} == {"undetermined"}
    else:
        facts = {row["what"]: row["value"] for row in said["rows"]}
        assert facts["runs in sacct"] == 1
        assert facts["share of core-hours with data, %"] == "100.000"


def test_a_timeline_adds_up_to_the_last_batch(site: Site) -> None:
    epochs = site.fill()
    said = json.loads(site("timeline", "42", "--format", "json")[1])
    assert sum(row["cpu_ns"] for row in said["rows"]) == sum(
        record.cpu_ns for one in epochs for record in one.last.records
    )


def test_a_damaged_segment_is_told_and_the_rest_is_read(site: Site) -> None:
    chance = random.Random(4)
    one = synthetic.epoch(chance, synthetic.claims(ROW, "n1"), BEGIN,
                          synthetic.harvests(BEGIN, BEGIN + 1800), paths=PATHS)  # fmt: skip
    with Appender.open(site.archive, partitions=1) as appender:
        appender.append([Item(Kind.COUNTERS, data) for data in one.encoded()])
    raw = Archive.open(site.archive).segments()[0].raw_path
    data = bytearray(raw.read_bytes())
    data[2000] ^= 0xFF
    raw.write_bytes(data)
    status, _, err = site("ingest")
    assert status == 4
    assert "no valid frame" in err
    said = json.loads(site("report", "--job", "42", "--json")[1])
    assert sorted(e["cpu_ns"] for e in said["executables"]) == sorted(
        record.cpu_ns for record in one.last.records
    )


def test_payloads_that_cannot_be_read_are_set_aside(site: Site) -> None:
    chance = random.Random(5)
    one = synthetic.epoch(chance, synthetic.claims(ROW, "n1"), BEGIN, [BEGIN + 60], paths=PATHS)
    good = one.encoded()[0]
    later = msgspec.msgpack.decode(good) | {"v": 2}
    bad_records = msgspec.msgpack.decode(good) | {"records": [[1]], "sequence": 9}
    payloads = [b"\xc1 foreign", msgspec.msgpack.encode(later), msgspec.msgpack.encode(bad_records)]
    with Appender.open(site.archive, partitions=1) as appender:
        appender.append([Item(Kind.COUNTERS, data) for data in [*payloads, good]])
        appender.append([Item(Kind.UPSTREAM_JSON, b"{}"), Item(Kind.SACCT, b"x\ny\n"),
                         Item(99, struct.pack("<q", 7))])  # fmt: skip
    status, _, err = site("ingest")
    assert status == 4
    assert err.count("set aside") >= 5
    assert "wire version 2" in err
    assert "Traceback" not in err
    assert json.loads(site("report", "--job", "42", "--json")[1])["executables"]


def test_folders_are_filed_as_upstream_does(site: Site) -> None:
    chance = random.Random(6)
    one = synthetic.epoch(chance, synthetic.claims(ROW, "n1"), BEGIN, [BEGIN + 60], paths=PATHS)
    batches = site.folder / "batches"
    (batches / "in" / "sub").mkdir(parents=True)
    (batches / "in" / "sub" / "a.msgpack").write_bytes(one.encoded()[0])
    (batches / "in" / "b.msgpack").write_bytes(b"nonsense")
    (batches / "in" / "c.txt").write_bytes(b"not ours")
    status, _, _ = site("ingest", "--batches", str(batches))
    assert status == 4
    assert (batches / "archive" / "sub" / "a.msgpack").exists()
    assert (batches / "error" / "b.msgpack").exists()
    assert (batches / "in" / "c.txt").exists()
    before = json.loads(site("report", "--job", "42", "--json")[1])
    # The archived files alone rebuild the same.
    assert site("reprocess", "--replace", "--batches", str(batches))[0] == 0
    assert json.loads(site("report", "--job", "42", "--json")[1]) == before


def test_upstreams_json_counts_unless_there_are_batches(site: Site) -> None:
    folder = site.folder / "json"
    (folder / "in").mkdir(parents=True)
    document: dict[str, Any] = {
        "sams.sampler.Core": {"jobid": 42, "node": "n1"},
        "sams.sampler.SlurmInfo": {"account": "p1", "username": "u1", "cpus": "8", "nodes": "1",
                                   "starttime": synthetic.stamp(BEGIN)},
        "sams.sampler.Software": {"execs": {"/usr/bin/x": {"user": 1.5, "system": 0.25}},
                                  "start_time": BEGIN, "end_time": BEGIN + 100},
    }  # fmt: skip
    (folder / "in" / "42.n1.json").write_text(json.dumps(document))
    del document["sams.sampler.SlurmInfo"]
    (folder / "in" / "43.n1.json").write_text(json.dumps(document))
    assert site("ingest", "--sams-json", str(folder))[0] == 4
    assert (folder / "error" / "43.n1.json").exists()
    said = json.loads(site("report", "--job", "42", "--json")[1])
    assert [e["cpu_ns"] for e in said["executables"]] == [1_750_000_000]
    assert said["mode"] == "proc"
    assert said["ledger"]["cgroup_cpu_ns"] is None
    site.fill()
    said = json.loads(site("report", "--job", "42", "--json")[1])
    assert {one["origin"] for one in said["epochs"]} == {"batch"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("report", "--by", "colour"), "no key 'colour'"),
        (("report", "--from", "2026"), "no month"),
        (("report", "--job", "1"), "neither in the facts"),
        (("timeline", "1"), "no points"),
        (("ingest", "--archive", "/nowhere"), "no archive here"),
        (("ingest", "--sacct", "/nowhere"), "cannot be read"),
        (("ingest", "--batches", "/nowhere"), "no such folder"),
        (("report", "--format", "parquet"), "name it with --output"),
    ],
)
def test_errors_are_one_line(site: Site, arguments: tuple[str, ...], reason: str) -> None:
    status, _, err = site(*arguments)
    assert status != 0
    assert reason in err
    assert len(err.strip().splitlines()) == 1 or "not there yet" in err


def test_reprocess_does_not_overwrite_unasked(site: Site) -> None:
    site.fill()
    status, _, err = site("reprocess")
    assert status == 2
    assert "--replace" in err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ingest", "report", "timeline", "reprocess", "gc", "check-config"):
        with pytest.raises(SystemExit) as stopped:
            program.run(cli.build, [command, "--help"])
        assert stopped.value.code == 0
        assert "--config" in capsys.readouterr().out
    assert callable(__main__.main)
    assert wire.VERSION == 1
