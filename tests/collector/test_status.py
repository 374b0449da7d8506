"""What a person, or a program, is told of a node."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from sams_ebpf import cli, config, leftovers, program, rejected, spool, status, wire

NOW = 1_800_000_000_000_000_000
SET = status.ProgramSet(
    name="abc-v2",
    loader="libbpf",
    stays=True,
    closed=False,
    tripped=False,
    slots_used=3,
    unclaimed=1,
    abandoned=0,
    slots_full=0,
    events=1000,
    cost_ns=700_000,
    cost_share=0.00012,
)
LOADED = status.Programs(sets=[SET], slots_used=3)


def batch(job: int, sequence: int = 0) -> wire.Batch:
    return wire.Batch(
        v=wire.VERSION,
        kind="counters",
        epoch=job.to_bytes(16, "big"),
        generation=1,
        writer=bytes(8),
        sequence=sequence,
        claims=wire.Claims(node="n1", job_id=job, user="a\x1b[1m", restart_count=0),
        mode="bpf",
        loader="libbpf",
        begin_ns=NOW - 3_700 * 10**9,
        end_ns=NOW - 42 * 10**9,
        ledger=wire.Ledger(
            cgroup_cpu_ns=200 * 10**9, attributed_cpu_ns=199 * 10**9, unattributed_cpu_ns=10**9
        ),
        executables=3,
    )


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> config.Config:
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    return config.Config(
        site=config.Site(node="n1"),
        collector=config.Collector(state=tmp_path / "state"),
        spool=config.Spool(folder=tmp_path / "spool"),
    )


def test_shows_jobs_and_spool(site: config.Config) -> None:
    for job in (12, 7):
        one = batch(job)
        path = spool.put(site.spool.folder, one)
        os.utime(path, ns=(NOW, NOW - 5 * 10**9))
        leftovers.note(site.collector.state, path, one.epoch)
    (site.spool.folder / "README").write_text("not a batch")
    text = status.show(status.read(site, NOW, LOADED))
    lines = text.splitlines()
    assert lines[0] == "node n1: 2 jobs"
    assert [line.split()[0] for line in lines[2:5]] == ["JOB", "7", "12"]
    assert "bpf/libbpf" in lines[3]
    assert "42 s ago" in lines[3]
    assert "3 m 19 s" in lines[3]
    assert "0.50 %" in lines[3]
    assert "\x1b" not in text
    assert "2 batches (2 delta), 0.0 of 268 MB, oldest 5.00 s ago" in lines[-2]
    assert lines[-1] == (
        "programs abc-v2 (libbpf): loaded to stay, 3 of 512 slots in use (1 unclaimed), "
        "1000 events of 700 ns, 0.012 % of a CPU"
    )


def test_a_set_that_needs_attention(site: config.Config) -> None:
    tripped = msgspec.structs.replace(
        SET, tripped=True, closed=True, stays=False, slots_full=2, abandoned=1
    )
    text = status.show(status.read(site, NOW, status.Programs(sets=[tripped], slots_used=3)))
    for words in (
        "SWITCHED OFF",
        "no new jobs",
        "2 jobs found none",
        "loaded for its jobs",
        "1 wait for",
    ):
        assert words in text


def test_no_programs(site: config.Config) -> None:
    assert "none loaded" in status.show(status.read(site, NOW, status.Programs()))
    unread = status.Programs(unread="x: Operation not permitted")
    assert "cannot be seen: x" in status.show(status.read(site, NOW, unread))


def test_an_idle_node(site: config.Config) -> None:
    text = status.show(status.read(site, NOW, LOADED))
    assert "no job is being measured" in text
    assert "0 batches, 0.0 of 268 MB" in text


def test_a_spool_that_cannot_be_read_is_said(site: config.Config) -> None:
    site.spool.folder.rmdir()
    state = status.read(site, NOW, LOADED)
    assert state.spool.batches is None
    assert "cannot be read" in status.show(state)


def test_what_was_set_aside_is_shown(site: config.Config) -> None:
    assert "rejected" not in status.show(status.read(site, NOW, LOADED))
    aside = site.spool.folder / "rejected"
    aside.mkdir()
    path = spool.put(aside, batch(7))
    rejected.put_reason(path, "main", "400 no")
    text = status.show(status.read(site, NOW, LOADED))
    assert "rejected: 1 batches set aside, see the .reason beside each" in text
    (site.spool.folder / "shipper").mkdir()
    rejected.remove(rejected.kept(aside), site.spool.folder / "shipper" / rejected.TALLY)
    state = status.read(site, NOW, LOADED)
    assert (state.spool.aside, state.spool.gone.batches, state.spool.gone.bytes) == (0, 1, 8192)
    assert "0 batches set aside" in status.show(state)
    assert f"1 more found no room since {state.spool.gone.since}" in status.show(state)


def test_json_is_whole(
    site: config.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = batch(7)
    leftovers.note(site.collector.state, spool.put(site.spool.folder, one), one.epoch)
    file = tmp_path / "config.yaml"
    section = {"collector": {"state": str(site.collector.state)}}
    section |= {"spool": {"folder": str(site.spool.folder)}}
    file.write_text(json.dumps(section))
    assert program.run(cli.build, ["status", "--json", "--config", str(file)]) == 0
    told = msgspec.json.decode(capsys.readouterr().out, type=status.Status)
    assert [job.job for job in told.jobs] == [7]
    assert told.spool.batches == {"delta": 1}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.40 s"),
        (42, "42 s"),
        (60, "1 m 00 s"),
        (3599, "59 m 59 s"),
        (3660, "1 h 01 m"),
        (90000, "1 d 01 h"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert status.span(seconds) == text
