"""The same files and rules come to the same as with SAMS' own programs."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from pathlib import Path

import golden_sams
import pytest
from golden_sams import CLUSTER, Case
from lxml import etree
from sams_site import Site

from sams_aggregator import sams_json, sams_xml
from sams_aggregator.rules import Rules
from sams_aggregator.sams_json import Folders, NodeReport
from sams_ebpf import wire

CASES = pytest.mark.parametrize("case", golden_sams.cases(), ids=lambda case: case.folder.name)


def process(case: Case, tmp_path: Path) -> list[NodeReport]:
    """Take over and file every report of the in-folder."""
    tmp_path.mkdir(exist_ok=True)
    shutil.copytree(case.incoming, tmp_path / "in")
    folders = Folders(tmp_path / "in", tmp_path / "archive", tmp_path / "error")
    reports = []
    for name in list(folders.names()):
        found = folders.read(name)
        assert found is not None
        try:
            reports.append(sams_json.parse(found.data))
        except sams_json.SamsJsonError:
            folders.reject(found)
        else:
            folders.archive(found)
    return reports


def extract(reports: list[NodeReport], rules: Rules) -> bytes:
    jobs = defaultdict(list)
    for report in reports:
        jobs[report.job_id].append(report)
    records = []
    for job_id, nodes in jobs.items():
        execs = [one for node in nodes for one in node.execs]
        software = rules.map_many(one.path for one in execs)
        first = nodes[0]
        record = sams_xml.make_record(
            sams_xml.record_id(CLUSTER, job_id, first.start_text),
            first.user,
            first.account,
            [
                (name, one.user_ns + one.system_ns)
                for name, one in zip(software, execs, strict=True)
            ],
        )
        if record is not None:
            records.append(record)
    return sams_xml.document(records, 1_700_000_000)


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@CASES
def test_mapping(case: Case) -> None:
    expected = case.software()
    assert len(expected) > 100
    rules = Rules.from_file(case.rules)
    assert dict(zip(expected, rules.map_many(expected), strict=True)) == expected


@CASES
def test_files(case: Case, tmp_path: Path) -> None:
    process(case, tmp_path)
    assert files_below(tmp_path / "archive") == sorted(case.files("archived"))
    assert files_below(tmp_path / "error") == sorted(case.files("error"))
    assert files_below(tmp_path / "in") == []


@CASES
def test_records(case: Case, tmp_path: Path) -> None:
    document = extract(process(case, tmp_path), Rules.from_file(case.rules))
    assert golden_sams.records(document) == case.records()
    etree.XMLSchema(etree.parse(sams_xml.SCHEMA)).assertValid(etree.fromstring(document))


@CASES
def test_layout_is_that_of_sams(case: Case, tmp_path: Path) -> None:
    """Not only the content: line by line, but for the order within a record."""
    document = extract(process(case, tmp_path), Rules.from_file(case.rules)).decode()
    ours = document.replace("2023-11-14T22:13:20Z", "T").splitlines()
    theirs = (case.folder / "expected.xml").read_text().splitlines()
    assert sorted(ours) == sorted(theirs)
    assert ours[:4] == theirs[:4]


@CASES
def test_written_and_read_again(case: Case, tmp_path: Path) -> None:
    reports = process(case, tmp_path)
    assert len(reports) > 30
    assert [sams_json.parse(sams_json.render(report)) for report in reports] == reports


# ------------------------------------------------------------------ the same by command line


def site(case: Case, folder: Path, **sources: str) -> Site:
    found = {name: [str(folder / path)] for name, path in sources.items()}
    return Site(folder, {"file": str(case.rules)}, **found)


def check(case: Case, made: Site) -> None:
    made.run("extract")
    assert made.records() == case.records()
    assert sorted(made.lines()) == sorted((case.folder / "expected.xml").read_text().splitlines())
    again = made.run("extract")
    assert "0 files written: 0 new records, 0 changed" in again.err


@CASES
def test_ingested_extracted_exported_and_back(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.incoming, tmp_path / "site/json/in")
    made = site(case, tmp_path / "site", sams_json="json")
    refused = made.run("ingest", status=4).err
    assert refused.count("set aside:") == len(case.files("error"))
    assert files_below(tmp_path / "site/json/archive") == sorted(case.files("archived"))
    assert files_below(tmp_path / "site/json/error") == sorted(case.files("error"))
    check(case, made)

    made.run("export-sams-json", tmp_path / "back/json/in", "--jobid-hash-size", "10")
    assert files_below(tmp_path / "back/json/in") == sorted(case.files("archived"))
    back = site(case, tmp_path / "back", sams_json="json")
    back.run("ingest")
    assert files_below(tmp_path / "back/json/error") == []
    check(case, back)


@CASES
def test_the_same_jobs_as_batches(case: Case, tmp_path: Path) -> None:
    chance = random.Random(case.folder.name)
    folder = tmp_path / "batches/in"
    folder.mkdir(parents=True)
    files = [
        wire.encode(batch)
        for report in process(case, tmp_path / "read")
        for batch in batches(report, chance)
    ]
    chance.shuffle(files)
    for number, data in enumerate(files):
        (folder / f"{number}.msgpack").write_bytes(data)
    made = site(case, tmp_path, batches="batches")
    made.run("ingest")
    check(case, made)


def batches(report: NodeReport, chance: random.Random) -> list[wire.Batch]:
    """What a collector would have sent of this: counters that grow, the last one final."""
    epoch, writer = chance.randbytes(16), chance.randbytes(8)
    made = []
    steps = chance.randint(1, 4)
    for sequence in range(steps):
        part = sequence + 1
        records = [
            wire.Record(
                one.path,
                0,
                None,
                one.user_ns * part // steps + one.system_ns * part // steps,
                one.user_ns * part // steps,
                one.system_ns * part // steps,
            )
            for one in report.execs
        ]
        total = sum(record.cpu_ns for record in records)
        made.append(
            wire.Batch(
                v=wire.VERSION,
                kind="counters",
                epoch=epoch,
                generation=1,
                writer=writer,
                sequence=sequence,
                claims=wire.Claims(
                    cluster=CLUSTER,
                    node=report.node,
                    job_id=report.job_id,
                    start_text=report.start_text,
                    user=report.user,
                    account=report.account,
                    nodes=report.nodes,
                ),
                mode="bpf",
                loader="libbpf",
                begin_ns=report.begin_s * 10**9,
                end_ns=report.begin_s * 10**9 + part,
                full=True,
                final=wire.Closing(reason="signal", live=0) if part == steps else None,
                ledger=wire.Ledger(
                    cgroup_cpu_ns=total + 5, attributed_cpu_ns=total, unattributed_cpu_ns=5
                ),
                executables=len(records),
                fields=wire.FIELDS,
                records=records,
            )
        )
    return made
