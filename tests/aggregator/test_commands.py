"""The commands as a person uses them: bad input, forms of reports, one job to the digit."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import random
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb
import msgspec
import pytest
import synthetic

from sams_aggregator import __main__, cli, sams_json, tables
from sams_aggregator import config as cfg
from sams_aggregator import state as st
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
        (folder / "data").mkdir()
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


def test_a_file_that_cannot_be_read_holds_up_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, two) = site.fill()
    batches = site.folder / "batches"
    (batches / "in").mkdir(parents=True)
    for name, epoch in (("a", one), ("b", two)):
        (batches / "in" / f"{name}.msgpack").write_bytes(epoch.encoded()[0])
    read = sams_json.Folders.read

    def refused(self: sams_json.Folders, name: PurePosixPath) -> sams_json.Found | None:
        if name.name == "a.msgpack":
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return read(self, name)

    monkeypatch.setattr(sams_json.Folders, "read", refused)
    status, _, err = site("ingest", "--batches", str(batches))
    assert status == 4
    assert f"{batches}: 1 files cannot be read, like a.msgpack: Permission denied" in err
    assert (batches / "archive" / "b.msgpack").exists()
    assert (batches / "in" / "a.msgpack").exists()


def test_a_report_takes_the_place_of_no_device_and_no_link(site: Site) -> None:
    site.fill()
    device, link, file = (site.folder / name for name in ("null", "link", "file"))
    device.symlink_to("/dev/null")
    link.symlink_to(file)
    assert site("report", "-o", str(device))[0] == site("report", "-o", str(link))[0] == 0
    assert device.is_symlink()
    assert device.is_char_device()
    assert link.is_symlink()
    assert file.read_text() == site("report")[1]
    status, _, err = site("report", "--format", "parquet", "-o", str(device))
    assert (status, device.is_char_device()) == (2, True)
    assert "parquet goes to a file" in err
    assert site("report", "--format", "parquet", "-o", str(link))[0] == 0
    assert link.is_symlink()
    assert file.read_bytes().startswith(b"PAR1")


@pytest.mark.parametrize(
    ("said", "claimed"),
    [
        ({"begin_ns": wire.INT64_MAX, "end_ns": wire.INT64_MAX}, {}),
        ({"end_ns": wire.INT64_MAX}, {"cpus": wire.INT64_MAX, "nodes": wire.INT64_MAX}),
        ({"begin_ns": 0, "end_ns": 0}, {"job_id": wire.INT64_MAX}),
    ],
)
def test_nonsense_of_one_node_stops_no_report(
    site: Site, said: dict[str, Any], claimed: dict[str, Any]
) -> None:
    epochs = site.fill()
    own = {**msgspec.structs.asdict(epochs[0].claims), "start_ns": None, **claimed}
    bad = msgspec.structs.replace(
        epochs[0].last, epoch=b"b" * 16, claims=wire.Claims(**own),
        records=[wire.Record(b"/a%d" % n, 0, None, wire.INT64_MAX) for n in range(9)], **said,
    )  # fmt: skip
    with Appender.open(site.archive) as appender:
        appender.append([Item(Kind.COUNTERS, wire.encode(bad))])
    assert site("ingest")[0] == 0
    for more in ((), ("--by", "job,month,path"), ("--core-time", "upstream"), ("--coverage",)):
        status, _, err = site("report", *more, "--json")
        assert (status, err) == (0, "")
    total = json.loads(site("report", "--json")[1])
    assert total["total"]["core_us"] == total["sacct"]["core_us"] == ROW.cpu_time * 10**6
    for command in (["report", "--job", "42"], ["timeline", "42"], ["extract", "--dry-run"],
                    ["export-sams-json", str(site.folder / "json")]):  # fmt: skip
        assert site(*command)[0] == 0


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
        (("report", "--by", "user,month,user"), "names a key twice"),
        (("reprocess", "--dask-file", "/nowhere"), "--dask-file /nowhere: no such file"),
        (("report", "--from", "2026"), "no month"),
        (("report", "--job", "1"), "neither in the facts"),
        (("timeline", "1"), "no points"),
        (("ingest", "--archive", "/nowhere"), "no archive here"),
        (("ingest", "--sacct", "/nowhere"), "cannot be read"),
        (("ingest", "--batches", "/nowhere"), "no such folder"),
        (("report", "--format", "parquet"), "name it with --output"),
        (("report", "--format", "parquet", "-o", "/nowhere/x"), "/nowhere/x: cannot be written"),
        (("report", "-o", "/nowhere/x"), "/nowhere/x: cannot be written"),
        (("report", "--from", "2026-05", "--to", "2026-01"), "no month in between"),
        (("report", "--top", "--by", "user"), "--by: not together with --top"),
        (("report", "--cluster", "c9"), "no run of it; there are none"),
        (("export-sams-json", "json", "--cluster", "c9"), "no run of it; there are none"),
        (("ingest", "--data", "/proc/nowhere"), "/proc/nowhere: No such file"),
    ],
)
def test_errors_are_one_line(site: Site, arguments: tuple[str, ...], reason: str) -> None:
    status, _, err = site(*arguments)
    assert status != 0
    assert reason in err
    lines = [line for line in err.splitlines() if "warning: " not in line]
    assert len(lines) == 1


@pytest.mark.parametrize("option", [("report", "--limit", "-1"), ("gc", "--grace", "-1"),
                                    ("report", "--job", "x"), ("report", "--job", "9" * 20),
                                    ("timeline", "1.5"), ("timeline", "9" * 20)])  # fmt: skip
def test_numbers_are_refused_that_are_none(option: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.run(cli.build, option)
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", [
    ("report",), ("report", "--job", "1"), ("timeline", "1"), ("extract", "--dry-run"), ("gc",),
    ("software", "update"), ("software", "show"), ("export-sams-json", "/nowhere"),
])  # fmt: skip
def test_a_mistyped_folder_is_told_and_not_made(site: Site, command: tuple[str, ...]) -> None:
    status, out, err = site(*command, "--data", str(site.folder / "dtaa"))
    assert (status, out) == (2, "")
    reason = f"{site.folder}/dtaa: no such folder; `ingest` and `reprocess` make it"
    assert err.splitlines() == [f"sams-aggregator: error: {reason}"]
    assert not (site.folder / "dtaa").exists()


def test_an_empty_report_says_that_it_is_empty(site: Site) -> None:
    status, out, err = site("report")
    assert status == 0
    assert "holds no facts yet" in err
    assert "runs: none" in out
    site.fill()
    assert "yet" not in site("report")[2]


def test_facts_that_are_damaged_or_gone_are_one_line_and_can_be_made_again(site: Site) -> None:
    site.fill()
    before = site("report")[1]
    for harm in (lambda path: os.truncate(path, 100), Path.unlink):
        for path in (site.folder / "data/facts").rglob("*.parquet"):
            harm(path)
        shutil.rmtree(site.folder / "data/derived")
        status, _, err = site("report")
        assert (status, len(err.splitlines())) == (1, 1)
        assert "`reprocess --replace` makes facts again" in err
        assert site("reprocess", "--replace")[0] == 0
        assert site("report")[1] == before


def test_accounts_that_are_damaged_are_made_again_without_their_folder(site: Site) -> None:
    site.fill()
    before = site("report")[1]
    for path in (site.folder / "data/derived").rglob("*.parquet"):
        os.truncate(path, 100)
    for options in ((), ("--job", "1")):
        status, _, err = site("report", *options)
        assert (status, len(err.splitlines())) == (1, 1)
        assert "delete the folder `derived`" in err
    shutil.rmtree(site.folder / "data/derived")
    assert site("report")[1] == before


def test_a_state_that_is_damaged_is_one_line_and_can_be_made_again(site: Site) -> None:
    site.fill()
    before = site("report")[1]
    file = site.folder / "data/state.sqlite"
    for junk, harm in ((b"nonsense" * 1000, file.write_bytes), (b"\xff" * 9000, damage(file))):
        harm(junk)
        status, _, err = site("report")
        assert (status, len(err.splitlines())) == (1, 1)
        assert "move it away and `reprocess`" in err
        for path in file.parent.glob("state.sqlite*"):
            path.unlink()
        assert site("reprocess")[0] == 0
        assert site("report")[1] == before


def test_a_full_disk_is_told_with_its_place_and_blamed_on_no_facts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.fill()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_too(*_: object, **__: object) -> None:
        raise duckdb.IOException('IO Error: Could not write file "x": No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        status, _, err = site("software", "update")
        reason = f"{site.folder}/data/archive: cannot be written: No space left on device"
        assert (status, err.splitlines()[-1]) == (1, f"sams-aggregator: error: {reason}")
    with monkeypatch.context() as patch:
        patch.setattr(tables, "copy", full_too)
        status, _, err = site("report")
        assert (status, len(err.splitlines())) == (1, 1)
        assert "make room" in err
        assert "reprocess" not in err
    assert site("report")[0] == 0


def test_a_state_that_may_not_be_written_says_who_may(site: Site) -> None:
    site.fill()
    state = st.open_state(cfg.Aggregator(data=site.folder / "data"))

    def write() -> None:
        with state.begin() as connection:
            connection.exec_driver_sql("PRAGMA query_only = 1")
            connection.execute(st.paths.insert().values(path=b"x"))

    with pytest.raises(st.StateError, match="run this as who runs `ingest`"):
        write()
    state.close()


def damage(file: Path) -> Callable[[bytes], None]:
    def write(junk: bytes) -> None:
        with file.open("r+b") as opened:
            opened.seek(4096)
            opened.write(junk)

    return write


def test_all_but_the_archive_can_be_deleted_and_rebuilt(site: Site) -> None:
    site.fill()
    out = site.folder / "out"
    said = [("report", "--by", "software,month", "--json"), ("report", "--job", "42", "--json"),
            ("report", "--coverage"), ("software", "versions")]  # fmt: skip
    assert site("extract", "-o", str(out))[0] == 0
    before = [site(*command)[1] for command in said]
    for path in (site.folder / "data").iterdir():
        if path.is_dir() and path.name != "archive":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    assert site("reprocess")[0] == 0
    assert [site(*command)[1] for command in said] == before
    assert (
        "0 new records, 0 changed (0 of them partial), 1 unchanged"
        in site("extract", "-o", str(out))[2]
    )


def test_a_newer_database_and_broken_rules_are_refused_by_every_command(site: Site) -> None:
    site.fill()
    document = json.loads(site.config.read_text())
    document["software"]["rules"][0]["match"] = "("
    site.config.write_text(json.dumps(document, indent=1))
    for command in (("report",), ("report", "--job", "42"), ("extract", "--dry-run")):
        status, _, err = site(*command)
        assert (status, len(err.splitlines())) == (2, 1)
        assert re.search(r"config\.yaml:\d+: rule 1: match: broken regexp '\('", err)
    with sqlite3.connect(site.folder / "data/state.sqlite") as database:
        database.execute("INSERT INTO migrations VALUES (999, 'later', 0)")
    for command in (("ingest",), ("report",), ("gc",), ("timeline", "42")):
        status, _, err = site(*command)
        assert status == 1
        assert "made by a newer version of this program" in err.splitlines()[-1]


def test_a_job_in_detail_is_told_with_its_software_and_ledger(site: Site) -> None:
    epochs = site.fill()
    said = json.loads(site("report", "--job", "42", "--json")[1])
    named = {(one["path"], one["kind"]): one["software"] for one in said["executables"]}
    assert named == {
        ("/usr/bin/bash", "software"): "=system",
        ("/usr/bin/podman", "outside"): "=system",
        ("=HYPERLINK(1)", "undetermined"): None,
        ("/odd/\\xff\\x0a", "undetermined"): None,
    }
    table = site("report", "--job", "42")[1]
    assert "job 42 (c1), in sacct, COMPLETED, user u1, project p1, 8 CPUs" in table
    assert "2 of 2 nodes seen, mode bpf" in table
    total = sum(one.last.ledger.unattributed_cpu_ns or 0 for one in epochs if one.last.ledger)
    assert f"unattributed                    {total // 10**9}.{total % 10**9:09d}" in table
    rows = list(csv.DictReader(io.StringIO(site("report", "--job", "42", "--format", "csv")[1])))
    assert {row["flags"] for row in rows} == {"", "outside"}


def test_a_job_id_of_two_clusters_is_not_mixed(site: Site) -> None:
    site.fill()
    other = synthetic.epoch(random.Random(9), synthetic.claims(ROW, "n1", cluster="c2"), BEGIN,
                            [BEGIN + 60], paths=[b"/x"])  # fmt: skip
    with Appender.open(site.archive) as appender:
        appender.append([Item(Kind.COUNTERS, data) for data in other.encoded()])
    assert site("ingest")[0] == 0
    for command in (("report", "--job", "42"), ("timeline", "42")):
        status, _, err = site(*command)
        assert status == 2
        assert "one in each of c1, c2: choose with --cluster" in err
        assert "/x" in site(*command, "--cluster", "c2")[1]
        assert "/x" not in site(*command, "--cluster", "c1")[1]


def test_months_and_clusters_choose_runs_too(site: Site) -> None:
    site.fill()
    for option in ((), ("--from", "2025-10", "--to", "2025-10"), ("--cluster", "c1")):
        said = json.loads(site("report", *option, "--json")[1])
        assert said["runs"]["in sacct"] == 1
        assert said["sacct"]["core_us"] == (None if "--from" in option else 1800 * 8 * 10**6)
    other = json.loads(site("report", "--from", "2025-11", "--json")[1])
    assert other["runs"]["in sacct"] == 0
    coverage = json.loads(site("report", "--coverage", "--from", "2025-11", "--json")[1])
    assert {row["what"]: row["value"] for row in coverage["rows"]}["epochs (job on a node)"] == 0
    upstream = json.loads(site("report", "--core-time", "upstream", "--json")[1])
    assert upstream["sacct"]["core_us"] == 1800 * 8 * 10**6


@pytest.mark.parametrize("limit", [0, 1, 3, 100])
def test_what_a_limit_leaves_out_is_summed_up_by_kind(site: Site, limit: int) -> None:
    site.fill()
    keys = ("--by", "path,user")
    every = json.loads(site("report", *keys, "--json")[1])["rows"]
    cut = json.loads(site("report", *keys, "--limit", str(limit), "--json")[1])["rows"]
    amounts = ("core_us", "cpu_ns")
    by_kind: dict[str, list[int]] = {}
    for row in cut:
        sums = by_kind.setdefault(row["kind"].removesuffix(" (rest)"), [0, 0])
        for at, name in enumerate(amounts):
            sums[at] += row[name]
    for kind, sums in by_kind.items():
        whole = [sum(row[name] for row in every if row["kind"] == kind) for name in amounts]
        assert sums == whole, kind
    assert set(by_kind) == {row["kind"] for row in every}
    rows = list(csv.DictReader(io.StringIO(
        site("report", *keys, "--limit", str(limit), "--format", "csv")[1]
    )))  # fmt: skip
    assert sum(int(row["core_us"]) for row in rows) == ROW.cpu_time * 10**6


def test_one_bad_source_does_not_stop_the_others(site: Site) -> None:
    site.fill()
    bad = site.folder / "bad"
    shutil.copytree(site.archive, bad)
    (bad / "archive.json").write_text("{")
    document = json.loads(site.config.read_text())
    document["aggregator"] |= {
        "archives": [str(bad), str(site.archive)],
        "data": str(site.folder / "other"),
        "batches": [str(site.folder / "nowhere")],
        "sacct": {"command": ["/bin/false"]},
    }
    site.config.write_text(json.dumps(document))
    status, _, err = site("ingest", "--sacct-command")
    assert status == 4
    for reason in ("bad/archive.json: not a manifest", "/bin/false: ended", "no such folder",
                   "3 inputs not read; the rest is in"):  # fmt: skip
        assert reason in err
    assert json.loads(site("report", "--job", "42", "--json")[1])["nodes_seen"] == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip, "no valid frame"),
        (lambda path: os.truncate(path, 700), "does not end in an index"),
        (lambda path: path.with_name("000000000099.seg").write_text("hello"), "sealed segment"),
        (lambda path: path.with_name("notes.txt").write_text("hello"), None),
    ],
    ids=["one bit", "cut", "a foreign segment", "a foreign file"],
)
def test_a_sealed_segment_that_is_harmed_leaves_the_rest(
    site: Site, harm: Callable[[Path], object], reason: str | None
) -> None:
    chance = random.Random(4)
    with Appender.open(site.archive, partitions=1) as appender:
        for job in (42, 43):
            one = synthetic.epoch(chance, synthetic.claims(ROW, "n1", job_id=job), BEGIN,
                                  synthetic.harvests(BEGIN, BEGIN + 1800), paths=PATHS)  # fmt: skip
            appender.append([Item(Kind.COUNTERS, data) for data in one.encoded()])
            appender.seal(everything=True)
    harm(Archive.open(site.archive).segments()[0].sealed_path)
    status, _, err = site("ingest")
    assert status == (4 if reason else 0)
    assert reason is None or reason in err
    assert "Traceback" not in err
    said = json.loads(site("report", "--job", "43", "--json")[1])
    assert sorted(e["cpu_ns"] for e in said["executables"]) == sorted(
        record.cpu_ns for record in one.last.records
    )


def test_the_moment_of_a_file_of_sacct_is_doubted(site: Site) -> None:
    running = synthetic.Row(1, BEGIN, None, 3600, 8, "n1", 1, state="RUNNING")
    file = site.folder / "rows"
    file.write_bytes(synthetic.output([ROW, running]))
    for late, doubt in ((0, ""), (600, ""), (-7200, "TZ=UTC?"), (9 * 86400, "touch -d")):
        os.utime(file, (0, BEGIN + 3600 + late))
        err = site("ingest", "--sacct", str(file))[2]
        assert doubt in err
        assert ("running jobs" in err) is bool(doubt)


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


@pytest.mark.parametrize("sealed", [False, True])
def test_coverage_shows_what_rests_on_trust(site: Site, sealed: bool) -> None:
    """A site that lets nodes write as any: who proved what it is is told by each frame."""
    chance = random.Random(2)
    n1, n2, n3 = (
        synthetic.epoch(chance, synthetic.claims(ROW, node), BEGIN,
                        synthetic.harvests(BEGIN, BEGIN + 1800), paths=PATHS)
        for node in ("n1", "n2", "n3")
    )  # fmt: skip
    with Appender.open(site.archive, partitions=1) as appender:
        # Of the third node the last batches count, and those were vouched for.
        for one, first, then in ((n1, 1, 1), (n2, 0, 0), (n3, 0, 1)):
            encoded = one.encoded()
            half = len(encoded) // 2
            flags = [first] * half + [then] * (len(encoded) - half)
            items = zip(encoded, flags, strict=True)
            appender.append([Item(Kind.COUNTERS, data, flag) for data, flag in items])
        if sealed:
            appender.seal(everything=True)
    rows = site.folder / "rows"
    rows.write_bytes(synthetic.output([ROW]))
    assert site("ingest", "--archive", str(site.archive), "--sacct", str(rows))[0] == 0
    said = json.loads(site("report", "--coverage", "--json")[1])["rows"]
    found = {row["what"]: row["value"] for row in said}
    assert found["epochs (job on a node)"] == 3
    assert found["epochs whose sender did not prove to be the node"] == 1
    ledgers = [one.last.ledger for one in (n1, n2, n3)]
    cpu = [ledger.attributed_cpu_ns for ledger in ledgers if ledger is not None]
    share = float(found["share of CPU-hours that rests on trust, %"])
    assert share == pytest.approx(100 * cpu[1] / sum(cpu), abs=0.001)
