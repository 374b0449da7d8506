"""Upstream's JSON: what is taken, what is refused, and how files are filed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sams_aggregator import sams_json
from sams_aggregator.sams_json import Exec, Folders, NodeReport, SamsJsonError


def document(**sections: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "sams.sampler.Core": {"jobid": 123, "node": "n1"},
        "sams.sampler.SlurmInfo": {
            "account": "p1", "username": "u", "uid": "1000", "cpus": "8", "nodes": "1",
            "partition": "x", "starttime": "2026-01-02T03:04:05", "jobname": "j",
        },
        "sams.sampler.Software": {
            "execs": {"/path/to/exe": {"user": 1.5, "system": 0.25}},
            "start_time": 1700000000, "end_time": 1700000100,
        },
    }  # fmt: skip
    for name, section in sections.items():
        full = f"sams.sampler.{name}"
        if section is None:
            del made[full]
        elif isinstance(section, dict) and full in made:
            made[full] = {
                key: value for key, value in (made[full] | section).items() if value is not REMOVED
            }
        else:
            made[full] = section
    return made


REMOVED = object()


def parse(value: object) -> NodeReport:
    return sams_json.parse(json.dumps(value).encode())


def test_the_documented_example() -> None:
    assert parse(document()) == NodeReport(
        job_id=123,
        node="n1",
        begin_s=1700000000,
        end_s=1700000100,
        execs=(Exec(b"/path/to/exe", 1_500_000_000, 250_000_000),),
        start_text="20260102030405",
        user="u",
        uid=1000,
        account="p1",
        partition="x",
        job_name="j",
        cpus=8,
        nodes=1,
    )


def test_forms_that_upstream_takes_too() -> None:
    found = parse(
        document(
            Core={"jobid": "77"},
            SlurmInfo={
                "account": 12, "cpus": 4, "uid": "?", "nodes": REMOVED, "starttime": "Unknown",
                "starttimestamp": 1767323045.0, "more": [],
            },
            Software={
                "execs": {"/a": {"user": 1, "system": 0}}, "start_time": "1700000000",
                "end_time": 1700000100.9,
            },
            Other={"anything": None},
        )
    )  # fmt: skip
    assert (found.job_id, found.account, found.cpus, found.uid, found.nodes) == (
        77,
        "12",
        4,
        None,
        None,
    )
    assert (found.begin_s, found.end_s) == (1700000000, 1700000100)
    assert found.start_text == "Unknown"
    assert found.start_ns == 1767323045 * 10**9
    bare = parse(document(SlurmInfo=dict.fromkeys(document()["sams.sampler.SlurmInfo"], REMOVED)))
    assert (bare.user, bare.account, bare.start_text, bare.cpus) == (None, None, None, None)


REFUSED = [
    (document(Core=None), "no sams.sampler.Core"),
    (document(SlurmInfo=None), "no sams.sampler.SlurmInfo"),
    (document(Software=None), "no sams.sampler.Software"),
    (document(Core={"jobid": REMOVED}), "sams.sampler.Core: no jobid"),
    (document(Core={"node": REMOVED}), "sams.sampler.Core: no node"),
    (document(Core={"node": None}), "sams.sampler.Core: node: not a text"),
    (document(Core={"jobid": "12a"}), "sams.sampler.Core: jobid: '12a' is not a number"),
    (document(Core={"jobid": -1}), "sams.sampler.Core: jobid: -1 is out of bounds"),
    (document(Core={"jobid": True}), "sams.sampler.Core: jobid: not a number"),
    (document(Core={"jobid": 10**40}), "sams.sampler.Core: jobid: 1000"),
    (document(Software={"execs": {}}), "sams.sampler.Software: no execs"),
    (document(Software={"execs": []}), "sams.sampler.Software: no execs"),
    (document(Software={"execs": None}), "sams.sampler.Software: no execs"),
    (document(Software={"execs": REMOVED}), "sams.sampler.Software: no execs"),
    (document(Software={"start_time": REMOVED}), "sams.sampler.Software: no start_time"),
    (document(Software={"end_time": None}), "end_time: not a number"),
    (document(Software={"execs": {"/a": 1}}), "execs: '/a': no CPU times"),
    (document(Software={"execs": {"/a": {"user": 1}}}), "execs: '/a': no system"),
    (document(Software={"execs": {"/a": {"user": -1, "system": 0}}}), "execs: '/a': user: -1"),
    (document(Software={"execs": {"/a": {"user": [], "system": 0}}}), "execs: '/a': user: not"),
    (document(SlurmInfo={"username": None}), "sams.sampler.SlurmInfo: username: not a text"),
    (document(SlurmInfo={"account": "x" * 2000}), "sams.sampler.SlurmInfo: account: not a text"),
    ([document()], "not a JSON object"),
    (None, "not a JSON object"),
    ({}, "no sams.sampler.Core"),
]


@pytest.mark.parametrize(("value", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused_with_a_reason(value: object, reason: str) -> None:
    with pytest.raises(SamsJsonError) as caught:
        parse(value)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a": NaN}',
        b'{"sams.sampler.Core": {"jobid": Infinity, "node": "n"}}',
        b'{"sams.sampler.Core": {"jobid": 1e999999999, "node": "n"}}',
        b'{"sams.sampler.Core": {"jobid": ' + b"9" * 5000 + b', "node": "n"}}', b"1" * 10,
    ],
)  # fmt: skip
def test_broken_files_are_refused(data: bytes) -> None:
    with pytest.raises(SamsJsonError):
        sams_json.parse(data)


def test_a_file_too_large_is_refused() -> None:
    with pytest.raises(SamsJsonError, match="more than"):
        sams_json.parse(b" " * (sams_json.MAX_BYTES + 1))


@given(st.binary(max_size=200))
def test_no_bytes_lead_to_anything_else_than_a_refusal(data: bytes) -> None:
    with pytest.raises(SamsJsonError):
        sams_json.parse(data)


# ------------------------------------------------------------------ writing

names = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
times = st.integers(0, 2**60)
paths = st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace"))
reports = st.builds(
    NodeReport,
    job_id=st.integers(0, 2**32),
    node=names,
    begin_s=st.integers(0, 2**33),
    end_s=st.integers(0, 2**33),
    execs=st.dictionaries(paths, st.tuples(times, times), min_size=1, max_size=5).map(
        lambda found: tuple(sorted(Exec(path, *used) for path, used in found.items()))
    ),
    start_text=st.none() | st.sampled_from(["20260102030405", "Unknown", "19991231235959"]),
    start_ns=st.none() | times,
    user=st.none() | names,
    uid=st.none() | st.integers(0, 2**32),
    account=st.none() | names,
    partition=st.none() | names,
    job_name=st.none() | names,
    cpus=st.none() | st.integers(0, 2**20),
    nodes=st.none() | st.integers(0, 2**20),
)


@given(reports)
def test_written_and_read_again_to_the_nanosecond(report: NodeReport) -> None:
    assert sams_json.parse(sams_json.render(report)) == report


def test_what_is_written_is_what_upstream_reads() -> None:
    report = parse(document())
    assert json.loads(sams_json.render(report)) == document()


def test_bytes_that_are_no_utf8_are_spelled_out_and_added_up() -> None:
    report = dataclasses.replace(
        parse(document()), execs=(Exec(b"/\\xff", 1, 1), Exec(b"/\xff", 10**9, 5))
    )
    found = sams_json.parse(sams_json.render(report))
    assert found.execs == (Exec(b"/\\xff", 10**9 + 1, 6),)


def test_surrogates_of_upstreams_collector_become_the_bytes_they_stand_for() -> None:
    execs = {"/a\udcff": {"user": 1, "system": 0}, "/b\ud800": {"user": 1, "system": 0}}
    found = parse(document(Software={"execs": execs}))
    assert [one.path for one in found.execs] == [b"/a\xff", b"/b\xed\xa0\x80"]


def test_file_names_are_those_of_upstreams_receiver() -> None:
    assert sams_json.file_name(1234, "n1") == PurePosixPath("1234.n1.json")
    assert sams_json.file_name(1234, "n1", hash_size=100) == PurePosixPath("12/1234.n1.json")
    assert sams_json.file_name(1, "../x") == PurePosixPath("1..._x.json")


# ------------------------------------------------------------------ folders


def folders(tmp_path: Path) -> Folders:
    for name in ("in", "archive", "error"):
        (tmp_path / name).mkdir(exist_ok=True)
    return Folders(tmp_path / "in", tmp_path / "archive", tmp_path / "error")


def put(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_only_whole_regular_files_of_the_pattern(tmp_path: Path) -> None:
    here = folders(tmp_path)
    for name in ("1.json", "a/2.json", "a/b/3.json", ".4.json", "5.txt", "a/.6.json.tmp"):
        put(tmp_path / "in" / name)
    (tmp_path / "in/7.json").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "in" / "8.json")
    (tmp_path / "in" / "9.json").mkdir()
    names = list(here.names())
    found = [one for name in names if (one := here.read(name)) is not None]
    assert [str(one.name) for one in found] == ["1.json", "a/2.json", "a/b/3.json"]
    assert here.read(PurePosixPath("gone.json")) is None


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    here = folders(tmp_path)
    for text in ("one", "two", "two", "three"):
        put(tmp_path / "in/a/1.json", text)
        found = here.read(PurePosixPath("a/1.json"))
        assert found is not None
        here.archive(found)
    kept = {path.name: path.read_text() for path in (tmp_path / "archive/a").iterdir()}
    assert kept == {"1.json": "one", "1.json.1": "two", "1.json.2": "three"}
    assert list(here.names()) == []


def test_a_file_that_came_in_between_is_left_for_its_turn(tmp_path: Path) -> None:
    here = folders(tmp_path)
    put(tmp_path / "in/1.json", "old")
    found = here.read(PurePosixPath("1.json"))
    assert found is not None
    put(tmp_path / "in/new", "new")
    (tmp_path / "in/new").rename(tmp_path / "in/1.json")
    here.reject(found)
    assert (tmp_path / "in/1.json").read_text() == "new"
    assert list((tmp_path / "error").iterdir()) == []


def test_filed_by_another_process_meanwhile(tmp_path: Path) -> None:
    here = folders(tmp_path)
    put(tmp_path / "in/1.json")
    found = here.read(PurePosixPath("1.json"))
    assert found is not None
    here.archive(found)
    here.archive(found)
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["1.json"]


def test_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(_source: object, _target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    here = folders(tmp_path)
    monkeypatch.setattr(os, "link", no_link)
    for text in ("one", "two", "two"):
        put(tmp_path / "in/1.json", text)
        found = here.read(PurePosixPath("1.json"))
        assert found is not None
        here.archive(found)
    kept = {path.name: path.read_text() for path in (tmp_path / "archive").iterdir()}
    assert kept == {"1.json": "one", "1.json.1": "two"}


WORKER = """
import sys
from pathlib import Path
from sams_aggregator import sams_json
here = sams_json.Folders(*(Path(sys.argv[1]) / n for n in ("in", "archive", "error")))
print("ready", flush=True)
for name in list(here.names()):
    found = here.read(name)
    if found is not None:
        (here.reject if found.data == b"bad" else here.archive)(found)
"""


def test_killed_again_and_again_every_file_is_in_one_place(tmp_path: Path) -> None:
    here = folders(tmp_path)
    expected = {}
    for number in range(400):
        text = "bad" if number % 7 == 0 else f"good {number}"
        put(tmp_path / f"in/{number % 5}/{number}.json", text)
        expected[f"{number % 5}/{number}.json"] = text
    for delay_ms in range(8):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE
        )
        with worker:
            assert worker.stdout is not None
            worker.stdout.readline()
            time.sleep(delay_ms / 1000)
            worker.send_signal(signal.SIGKILL)
    for name in list(here.names()):
        found = here.read(name)
        assert found is not None
        (here.reject if found.data == b"bad" else here.archive)(found)
    filed = {
        str(path.relative_to(tmp_path / kind)): (kind, path.read_text())
        for kind in ("archive", "error")
        for path in (tmp_path / kind).rglob("*.json*")
    }
    assert filed == {
        name: ("error" if text == "bad" else "archive", text) for name, text in expected.items()
    }
    assert list(here.names()) == []
