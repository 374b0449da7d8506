"""Batches of one writer: what they hold, and that none of them is needed twice."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from sams_ebpf import config, leftovers, unclaimed, wire, writer
from sams_ebpf.meter import Snapshot


def record(path: bytes, cpu_ns: int, *, flags: int = 0, rss: int | None = None) -> wire.Record:
    return wire.Record(path, flags, None, cpu_ns, execs=1, max_rss_bytes=rss)


class FakeMeter:
    mode = "bpf"
    loader = "libbpf"
    epoch = bytes(range(16))
    generation = 2
    begin_ns = 5

    def __init__(self) -> None:
        self.records = [record(b"/a", 10, rss=7), record(b"/b", 20, rss=9)]
        self.total: int | None = 31

    def harvest(self) -> Snapshot:
        return Snapshot(records=list(self.records), cgroup_cpu_ns=self.total)


@pytest.fixture(name="meter")
def _meter() -> FakeMeter:
    return FakeMeter()


def made(meter: FakeMeter, tmp_path: Path, *, full_every: int = 3) -> writer.Writer:
    for name in ("spool", "state"):
        (tmp_path / name).mkdir(exist_ok=True)
    return writer.Writer(
        meter,  # type: ignore[arg-type]
        wire.Claims(job_id=1),
        folder=tmp_path / "spool",
        state=tmp_path / "state",
        full_every=full_every,
        clock=lambda: 99,
    )


def spooled(tmp_path: Path) -> list[wire.Batch]:
    batches = [wire.decode(path.read_bytes()) for path in (tmp_path / "spool").glob("*.msgpack")]
    return sorted(batches, key=lambda batch: batch.sequence)


def test_holds_what_changed_and_now_and_then_everything(meter: FakeMeter, tmp_path: Path) -> None:
    out = made(meter, tmp_path)
    for _ in range(5):
        assert out.write()
        meter.records[0] = record(b"/a", meter.records[0].cpu_ns + 1)
    batches = spooled(tmp_path)
    assert [batch.full for batch in batches] == [True, False, False, True, False]
    assert [len(batch.records) for batch in batches] == [2, 1, 1, 2, 1]
    assert [batch.sequence for batch in batches] == [0, 1, 2, 3, 4]
    assert {batch.executables for batch in batches} == {2}
    assert [batch.sums[0] for batch in batches] == [30, 31, 32, 33, 34]


def test_sums_and_ledger(meter: FakeMeter, tmp_path: Path) -> None:
    meter.records.append(record(b"/c", 400, flags=wire.OUTSIDE))
    made(meter, tmp_path).write()
    (batch,) = spooled(tmp_path)
    sums = dict(zip(wire.COUNTERS, batch.sums, strict=True))
    assert (sums["cpu_ns"], sums["max_rss_bytes"], sums["forks"]) == (430, 9, None)
    assert batch.ledger == wire.Ledger(
        cgroup_cpu_ns=31, attributed_cpu_ns=30, unattributed_cpu_ns=1, outside_cpu_ns=400
    )


def test_without_a_counter_nothing_is_called_unattributed(meter: FakeMeter, tmp_path: Path) -> None:
    meter.total = None
    made(meter, tmp_path).write()
    (batch,) = spooled(tmp_path)
    assert batch.ledger is not None
    assert batch.ledger.unattributed_cpu_ns is None


def test_the_final_batch_is_whole_and_closes_the_epoch(meter: FakeMeter, tmp_path: Path) -> None:
    out = made(meter, tmp_path)
    out.write()
    assert len(leftovers.open_batches(tmp_path / "state")) == 1
    out.write(wire.Closing(reason="signal", live=0))
    assert leftovers.open_batches(tmp_path / "state") == []
    final = spooled(tmp_path)[-1]
    assert final.full
    assert len(final.records) == 2
    assert final.final == wire.Closing(reason="signal", live=0)


def test_after_a_batch_that_could_not_be_written_the_next_is_whole(
    meter: FakeMeter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = made(meter, tmp_path)
    out.write()
    aside = tmp_path / "aside"
    (tmp_path / "spool").rename(aside)
    with caplog.at_level(logging.INFO):
        assert not out.write()
        assert not out.write()
        aside.rename(tmp_path / "spool")
        assert out.write()
    batches = spooled(tmp_path)
    assert [batch.sequence for batch in batches] == [0, 3]
    assert batches[-1].full
    said = [line.getMessage() for line in caplog.records]
    assert len(said) == 2
    assert "No such file" in said[0]
    assert "written again" in said[1]


def test_two_writers_of_an_epoch_share_no_identity(meter: FakeMeter, tmp_path: Path) -> None:
    made(meter, tmp_path).write()
    made(meter, tmp_path).write()
    assert len({batch.identity for batch in spooled(tmp_path)}) == 2


def test_who_takes_an_epoch_up_keeps_its_cluster_and_node(meter: FakeMeter, tmp_path: Path) -> None:
    first = made(meter, tmp_path)
    first.composer.claims = wire.Claims(cluster="c1", node="n1", job_id=1)
    assert first.write()
    assert made(meter, tmp_path).write()
    assert {(one.claims.cluster, one.claims.node) for one in spooled(tmp_path)} == {("c1", "n1")}


def test_an_unclaimed_job_is_who_its_last_collector_said(meter: FakeMeter, tmp_path: Path) -> None:
    class Slot(FakeMeter):
        path = b"/slurmstepd.scope/job_7"
        closed = False

        def live(self) -> int:
            return 0

        def close(self) -> None:
            self.closed = True

    site = config.Config(
        site=config.Site(node="n1"),
        spool=config.Spool(folder=tmp_path / "spool"),
        collector=config.Collector(state=tmp_path / "state"),
    )
    out = made(meter, tmp_path)
    for claims in (wire.Claims(node="n1", job_id=7, cgroup=Slot.path, boot_id=writer.boot_id()),
                   wire.Claims(cluster="c1", node="other", job_id=7, user="u1")):  # fmt: skip
        slot = Slot()
        assert unclaimed.clear_one(site, slot)  # type: ignore[arg-type]
        (batch,) = [one for one in spooled(tmp_path) if one.unclaimed]
        assert slot.closed
        assert batch.claims == claims
        shutil.rmtree(tmp_path / "spool")
        (tmp_path / "spool").mkdir()
        # The next one had a collector, which died.
        out.composer.claims = wire.Claims(cluster="c1", node="other", job_id=7, user="u1")
        assert out.write()
