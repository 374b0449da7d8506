"""A crash of the node leaves epochs open: they are closed at the next start, once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sams_ebpf import leftovers, spool, wire, writer

EPOCH = bytes(range(16))
RECORD = wire.Record(b"/bin/x", 0, None, 5)


def batch(sequence: int, *, boot: str = "old", epoch: bytes = EPOCH) -> wire.Batch:
    return wire.Batch(
        v=wire.VERSION,
        kind="counters",
        epoch=epoch,
        generation=3,
        writer=bytes(8),
        sequence=sequence,
        claims=wire.Claims(node="n1", job_id=5, boot_id=boot),
        mode="bpf",
        begin_ns=10,
        end_ns=100 + sequence,
        full=True,
        ledger=wire.Ledger(
            cgroup_cpu_ns=6, attributed_cpu_ns=5, unattributed_cpu_ns=1, lost={"tasks": 2}
        ),
        executables=1,
        fields=wire.FIELDS,
        sums=[5, *[None] * (len(wire.COUNTERS) - 1)],
        records=[RECORD],
    )


@pytest.fixture(name="places")
def _places(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    return tmp_path / "state", tmp_path / "spool"


def noted(state: Path, folder: Path, one: wire.Batch) -> Path:
    path = spool.put(folder, one)
    leftovers.note(state, path, one.epoch)
    return path


def in_spool(folder: Path) -> list[wire.Batch]:
    return [wire.decode(path.read_bytes()) for path in sorted(folder.glob("*.msgpack"))]


def test_an_epoch_of_another_boot_is_closed_with_what_was_known_last(
    places: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    state, folder = places
    for sequence in (0, 1):
        noted(state, folder, batch(sequence)).unlink()  # shipped
    with caplog.at_level(logging.WARNING):
        assert leftovers.close_last_boot(state, folder, "new") == 1
    (closing,) = in_spool(folder)
    last = batch(1)
    assert closing.final == wire.Closing(reason="reboot", live=0)
    assert (closing.epoch, closing.claims, closing.sums) == (EPOCH, last.claims, last.sums)
    assert closing.identity[1] > last.identity.generation
    assert closing.ledger is not None
    assert closing.ledger.attributed_cpu_ns == 5
    assert closing.ledger.lost["tasks"] == 2
    assert closing.ledger.lost[leftovers.WINDOW] > 0
    assert closing.end_ns == last.end_ns
    assert "job 5: the node went down" in caplog.text
    assert leftovers.close_last_boot(state, folder, "new") == 0


def test_epochs_of_this_boot_stay_open(places: tuple[Path, Path]) -> None:
    state, folder = places
    noted(state, folder, batch(0, boot="new")).unlink()
    assert leftovers.close_last_boot(state, folder, "new") == 0
    assert [header.sequence for _, header in leftovers.open_batches(state)] == [0]


def test_a_final_batch_closes(places: tuple[Path, Path]) -> None:
    state, folder = places
    noted(state, folder, batch(0))
    leftovers.forget(state, EPOCH)
    leftovers.forget(state, EPOCH)
    assert leftovers.open_batches(state) == []


def test_nothing_is_noted_of_a_batch_that_was_shipped_at_once(places: tuple[Path, Path]) -> None:
    state, folder = places
    path = spool.put(folder, batch(0))
    path.unlink()
    leftovers.note(state, path, EPOCH)
    assert leftovers.open_batches(state) == []
    assert list((state / leftovers.FOLDER).iterdir()) == []


def test_what_cannot_be_read_is_said_and_does_not_stop_the_others(
    places: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    state, folder = places
    noted(state, folder, batch(0))
    (state / leftovers.FOLDER / f"{'f' * 32}.msgpack").write_bytes(b"\xc1")
    with caplog.at_level(logging.WARNING):
        assert leftovers.close_last_boot(state, folder, "new") == 1
    assert "not a batch" in caplog.text


def test_an_epoch_keeps_its_cluster_and_node(places: tuple[Path, Path]) -> None:
    state, folder = places
    now = wire.Claims(cluster="c1", node="other", job_id=5, user="u1")
    assert writer.same_sender(now, state, EPOCH) == now
    noted(state, folder, batch(0))
    assert writer.same_sender(now, state, EPOCH) == wire.Claims(node="n1", job_id=5, user="u1")
    leftovers.forget(state, EPOCH)
    assert writer.same_sender(now, state, EPOCH) == now


def test_an_epoch_whose_collector_was_lost_is_closed_by_its_name(
    places: tuple[Path, Path],
) -> None:
    state, folder = places
    noted(state, folder, batch(0))
    noted(state, folder, batch(0, epoch=bytes(16)))
    assert leftovers.close_lost(state, folder, EPOCH)
    assert not leftovers.close_lost(state, folder, EPOCH)
    last = max(
        (one for one in in_spool(folder) if one.epoch == EPOCH), key=lambda one: one.generation
    )
    assert last.final == wire.Closing(reason="collector-lost", live=0)
    assert last.ledger is not None
    assert set(last.ledger.lost) == {"tasks", "collector_lost_window_ns"}
    assert [header.epoch for _, header in leftovers.open_batches(state)] == [bytes(16)]
