"""The same files and rules come to the same as with SAMS' own programs."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import golden_sams
import pytest
from golden_sams import CLUSTER, Case
from lxml import etree

from sams_aggregator import sams_json, sams_xml
from sams_aggregator.rules import Rules
from sams_aggregator.sams_json import Folders, NodeReport

CASES = pytest.mark.parametrize("case", golden_sams.cases(), ids=lambda case: case.folder.name)


def process(case: Case, tmp_path: Path) -> list[NodeReport]:
    """Take over and file every report of the in-folder."""
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
