"""Duplicates: found however far back, within the window, in memory that does not grow."""

from __future__ import annotations

from pathlib import Path

import batches
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sams_receiver.archive import Appender, Archive, Item, Kind, Limits
from sams_receiver.archive import format as fmt
from sams_receiver.archive.seal import seal
from sams_receiver.archive.seen import Seen, Verdict

HOUR = 3_600 * 10**9
FOREVER = 1 << 62


class Partition:
    """An archive of one partition, with its duplicates kept as the receiver keeps them."""

    def __init__(self, folder: Path, window_ns: int = FOREVER) -> None:
        self.appender = Appender.open(
            folder, partitions=1, limits=Limits(segment_frames=7, segment_seconds=10**9)
        )
        self.writer = self.appender.writers[0]
        self.seen = Seen(self.appender.archive, 0, window_ns)

    def offer(self, data: bytes, received_ns: int = 0) -> Verdict:
        tag = fmt.tag_of(Kind.COUNTERS, data)
        verdict = self.seen.check(tag)
        if verdict is Verdict.NEW:
            self.writer.commit([Item(Kind.COUNTERS, data, received_ns=received_ns)])
            number = self.writer.number
            assert number is not None
            self.seen.add([tag], number)
            self.writer.roll_if_due()
        return verdict

    def seal(self) -> None:
        while self.writer.to_seal:
            number = self.writer.to_seal.pop(0)
            seal(self.appender.archive.segment(0, number))
            self.seen.record_sealed(number)
            self.seen.release(number)

    def close(self) -> None:
        self.seen.close()
        self.appender.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 1)),
            st.sampled_from(["seal", "restart", "forget"]),
        ),
        max_size=80,
    )
)
def test_agrees_with_a_set_of_everything(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int] | str]
) -> None:
    folder = tmp_path_factory.mktemp("seen")
    partition = Partition(folder)
    model: dict[tuple[int, int], int] = {}
    for step in steps:
        if isinstance(step, tuple):
            job, sequence, content = step
            stored = model.get((job, sequence))
            model.setdefault((job, sequence), content)
            verdict = partition.offer(batches.encoded(job=job, sequence=sequence, seed=content))
            if stored is None:
                assert verdict is Verdict.NEW
            else:
                assert verdict is (Verdict.DUPLICATE if stored == content else Verdict.CONFLICT)
        elif step == "seal":
            partition.seal()
        else:
            partition.close()
            if step == "forget":
                (folder / "p0000" / "seen.sqlite").unlink()
            partition = Partition(folder)
    partition.close()
    found = [frame.data for s in Archive.open(folder).segments() for frame in s.frames()]
    assert len(found) == len(model)


def test_memory_holds_only_what_is_not_sealed(tmp_path: Path) -> None:
    partition = Partition(tmp_path)
    for n in range(700):
        partition.offer(batches.encoded(job=n, sequence=0))
        if n % 50 == 49:
            partition.seal()
            assert partition.seen.in_memory < 7
    assert len(partition.seen._marks) < 7
    assert partition.offer(batches.encoded(job=3, sequence=0)) is Verdict.DUPLICATE
    partition.close()


def test_beyond_the_window_it_may_be_stored_again(tmp_path: Path) -> None:
    partition = Partition(tmp_path, window_ns=10 * HOUR)
    old = [batches.encoded(job=1, sequence=n) for n in range(7)]
    for data in old:
        partition.offer(data, received_ns=HOUR)
    partition.seal()
    assert partition.offer(old[0]) is Verdict.DUPLICATE
    for at, hour in ((2, 9), (3, 30)):
        for n in range(7):
            partition.offer(batches.encoded(job=at, sequence=n), received_ns=hour * HOUR)
        partition.seal()
        expected = Verdict.DUPLICATE if hour == 9 else Verdict.NEW
        assert partition.offer(old[0]) is expected
    partition.close()


def test_segments_that_were_moved_away_are_not_taken_for_known(tmp_path: Path) -> None:
    partition = Partition(tmp_path)
    first = [batches.encoded(job=1, sequence=n) for n in range(7)]
    for data in first:
        partition.offer(data)
    partition.seal()
    (sealed,) = (tmp_path / "p0000").glob("*.seg")
    sealed.unlink()
    assert partition.offer(first[0]) is Verdict.NEW
    partition.close()


def test_one_node_cannot_take_the_place_of_another(tmp_path: Path) -> None:
    partition = Partition(tmp_path)
    epoch, writer = b"e" * 16, b"w" * 8
    stolen = batches.encoded(node="n2", epoch=epoch, writer=writer)
    assert partition.offer(stolen) is Verdict.NEW
    assert partition.offer(batches.encoded(node="n1", epoch=epoch, writer=writer)) is Verdict.NEW
    partition.close()
