"""The archive keeps what it acknowledged, and says what it could not keep."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import batches
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from sams_receiver import archive
from sams_receiver.archive import Appender, Archive, ArchiveError, Item, Kind, Limits, reader
from sams_receiver.archive import format as fmt

PAYLOADS = [batches.encoded(sequence=n, records=1 + n % 7) for n in range(200)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "archive"


@pytest.fixture
def appender(folder: Path) -> Iterator[Appender]:
    with Appender.open(folder, partitions=1) as made:
        yield made


def fill(appender: Appender, payloads: list[bytes], group: int = 8) -> None:
    for at in range(0, len(payloads), group):
        appender.append([Item(Kind.COUNTERS, data) for data in payloads[at : at + group]])


def stored(folder: Path) -> list[bytes]:
    return [frame.data for s in Archive.open(folder).segments() for frame in s.frames()]


def raw_file(folder: Path) -> Path:
    (found,) = (folder / "p0000").glob("*.raw")
    return found


def flip(path: Path, offset: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1 << bit]))


def test_reads_back_in_order_live_and_sealed(folder: Path, appender: Appender) -> None:
    fill(appender, PAYLOADS)
    assert stored(folder) == PAYLOADS
    (live,) = Archive.open(folder).segments()
    places = [(frame.offset, frame.end) for frame in live.frames()]
    name, end = str(live.id), live.end()
    assert not live.sealed
    assert appender.seal(everything=True) == 1
    (sealed,) = Archive.open(folder).segments()
    assert sealed.sealed
    assert (str(sealed.id), sealed.end()) == (name, end)
    assert [(frame.offset, frame.end) for frame in sealed.frames()] == places
    assert [frame.data for frame in sealed.frames(places[120][0])] == PAYLOADS[120:]
    assert sealed.index().kinds == {Kind.COUNTERS: 200}
    assert not list((folder / "p0000").glob("*.raw"))


def test_a_sealed_segment_is_plain_zstd_of_the_raw_one(folder: Path, appender: Appender) -> None:
    fill(appender, PAYLOADS)
    raw = raw_file(folder).read_bytes()
    appender.seal(everything=True)
    (sealed,) = (folder / "p0000").glob("*.seg")
    assert zstd.decompress(sealed.read_bytes()) == raw


def test_each_node_has_one_partition(folder: Path) -> None:
    with Appender.open(folder, partitions=8) as appender:
        for node in range(40):
            data = batches.encoded(node=f"n{node}")
            for _ in range(2):
                appender.append([Item(Kind.COUNTERS, data)], cluster="c1", node=f"n{node}")
    used = {
        s.partition: [frame.data for frame in s.frames()] for s in Archive.open(folder).segments()
    }
    assert 5 < len(used) <= 8
    where = [p for p, found in used.items() for _ in set(found)]
    assert len(where) == 40
    with Appender.open(folder, partitions=2) as again:
        assert again.archive.manifest.partitions == 8


def test_partition_of_a_node_never_changes() -> None:
    found = [archive.partition_of("c1", f"n{n}", 8) for n in range(8)]
    assert found == [1, 7, 1, 1, 4, 0, 7, 1]
    assert archive.partition_of(None, None, 8) == archive.partition_of("", "", 8)


@pytest.mark.usefixtures("appender")
def test_one_writer_at_a_time(folder: Path) -> None:
    with pytest.raises(ArchiveError, match="another process"):
        Appender.open(folder)


def test_a_closed_segment_is_followed_by_the_next_number(folder: Path) -> None:
    with Appender.open(folder, partitions=1, limits=Limits(segment_frames=50)) as appender:
        fill(appender, PAYLOADS, group=10)
        assert appender.seal() == 4
    assert [s.number for s in Archive.open(folder).segments()] == [1, 2, 3, 4]
    assert stored(folder) == PAYLOADS
    with Appender.open(folder) as appender:
        fill(appender, PAYLOADS[:1])
    assert [s.number for s in Archive.open(folder).segments()] == [1, 2, 3, 4, 5]


def test_goes_on_in_the_live_segment_after_a_restart(folder: Path) -> None:
    for at in range(3):
        with Appender.open(folder, partitions=1) as appender:
            fill(appender, PAYLOADS[at * 50 : at * 50 + 50])
    assert len(list((folder / "p0000").glob("*.raw"))) == 1
    assert stored(folder) == PAYLOADS[:150]


@pytest.mark.parametrize("garbage", [b"\0" * 5000, b"x", PAYLOADS[3], os.urandom(3000)])
def test_cuts_a_torn_tail(folder: Path, garbage: bytes) -> None:
    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:20])
    path = raw_file(folder)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(garbage)
    assert stored(folder) == PAYLOADS[:20]
    with Appender.open(folder) as appender:
        assert path.stat().st_size == size
        fill(appender, PAYLOADS[20:40])
    assert stored(folder) == PAYLOADS[:40]
    (aside,) = (folder / "aside").iterdir()
    assert aside.read_bytes().endswith(garbage)
    assert b"torn tail" in aside.read_bytes()


def test_a_frame_cut_anywhere_is_a_torn_tail(folder: Path) -> None:
    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:3], group=1)
    path = raw_file(folder)
    whole = path.read_bytes()
    (segment,) = Archive.open(folder).segments()
    last = [frame.offset for frame in segment.frames()][-1]
    (folder / "p0000" / "committed").unlink()
    for size in range(last, len(whole), 7):
        path.write_bytes(whole[:size])
        (folder / "p0000" / "committed").unlink(missing_ok=True)
        assert stored(folder) == PAYLOADS[:2]
        with Appender.open(folder):
            assert path.stat().st_size == last


def test_never_cuts_below_what_was_committed(folder: Path) -> None:
    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:10], group=1)
    path = raw_file(folder)
    size = path.stat().st_size
    (segment,) = Archive.open(folder).segments()
    flip(path, [frame.offset for frame in segment.frames()][-1] + 40)
    with Appender.open(folder) as appender:
        assert path.stat().st_size == size
        fill(appender, PAYLOADS[10:12])
    assert stored(folder) == PAYLOADS[:9] + PAYLOADS[10:12]


def test_a_flipped_bit_costs_the_frame_it_hit_and_no_other(folder: Path) -> None:
    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:60])
    path = raw_file(folder)
    whole = path.read_bytes()
    (segment,) = Archive.open(folder).segments()
    frames = list(segment.frames())
    chance = random.Random(4)
    for _ in range(300):
        path.write_bytes(whole)
        offset = chance.randrange(len(whole))
        flip(path, offset, chance.randrange(8))
        hit = [at for at, frame in enumerate(frames) if frame.offset <= offset < frame.end]
        expected = [data for at, data in enumerate(PAYLOADS[:60]) if at not in hit]
        assert stored(folder) == expected, offset
    # One more, through recovery and sealing: the damage is reported, kept, and passed over.
    path.write_bytes(whole)
    flip(path, frames[30].offset + 10)
    with Appender.open(folder) as appender:
        fill(appender, PAYLOADS[60:70])
        appender.seal(everything=True)
    expected = PAYLOADS[:30] + PAYLOADS[31:70]
    assert stored(folder) == expected
    (aside,) = (folder / "aside").iterdir()
    assert b"damaged, passed over" in aside.read_bytes()


def test_damage_is_reported_with_its_place(folder: Path, appender: Appender) -> None:
    fill(appender, PAYLOADS[:10])
    (segment,) = Archive.open(folder).segments()
    frame = list(segment.frames())[4]
    flip(raw_file(folder), frame.offset + 30)
    problems: list[archive.Problem] = []
    assert len(list(segment.frames(on_damage=problems.append))) == 9
    assert [(p.offset, p.length) for p in problems] == [(frame.offset, frame.end - frame.offset)]


def test_a_flipped_bit_in_a_sealed_segment_costs_no_more_than_its_block(
    folder: Path, appender: Appender
) -> None:
    payloads = [batches.encoded(sequence=n, records=60) for n in range(300)]
    fill(appender, payloads, group=50)
    appender.seal(everything=True)
    (path,) = (folder / "p0000").glob("*.seg")
    whole = path.read_bytes()
    (segment,) = Archive.open(folder).segments()
    blocks = segment.index().blocks
    assert len(blocks) > 20
    places = [(frame.offset, frame.data) for frame in segment.frames()]
    chance = random.Random(5)
    # Every byte of the header's block, then anywhere.
    places_hit = [*range(blocks[1].offset + 20), *(chance.randrange(len(whole)) for _ in range(99))]
    costs = []
    for offset in places_hit:
        path.write_bytes(whole)
        flip(path, offset, chance.randrange(8))
        outside = [
            data
            for at, data in places
            if not any(
                b.raw_offset <= at < b.raw_offset + b.raw_length
                and b.offset <= offset < b.offset + b.length
                for b in blocks
            )
        ]
        found = stored(folder)
        assert set(outside) <= set(found), offset
        assert set(found) <= set(payloads)
        costs.append(len(payloads) - len(found))
    assert max(costs) <= 65536 // min(map(len, payloads)) + 1
    assert max(costs[: blocks[1].offset]) == 0, "the header can be done without"
    print(f"{len(costs)} flips cost {sum(costs) / len(costs):.1f} frames, {max(costs)} at most")


def test_a_sealed_segment_that_was_cut_gives_what_is_left_and_says_so(
    folder: Path, appender: Appender
) -> None:
    fill(appender, PAYLOADS)
    appender.seal(everything=True)
    (path,) = (folder / "p0000").glob("*.seg")
    (segment,) = Archive.open(folder).segments()
    blocks, frames = segment.index().blocks, list(segment.frames())
    whole = path.read_bytes()
    for size in range(blocks[1].offset, len(whole), 997):
        path.write_bytes(whole[:size])
        problems: list[archive.Problem] = []
        (cut,) = Archive.open(folder).segments()
        found = [frame.data for frame in cut.frames(on_damage=problems.append)]
        left = [b for b in blocks if b.offset + b.length <= size]
        end = left[-1].raw_offset + left[-1].raw_length
        assert found[: sum(frame.end <= end for frame in frames)] == [
            frame.data for frame in frames if frame.end <= end
        ]
        assert found == PAYLOADS[: len(found)]
        # Behind the last block stand only directory and index: all is there, whatever they say.
        assert bool(problems) is (len(left) < len(blocks) or size < left[-1].offset + 4)
    for size in (0, 1, blocks[1].offset // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ArchiveError, match="header"):
            stored(folder)


def test_no_payload_passes_for_a_frame_behind_damage(folder: Path, appender: Appender) -> None:
    # What a hostile node would send: a payload full of frames, with a marker of its own.
    fake = fmt.pack_frame(fmt.new_marker(), Kind.COUNTERS, 1, 1, PAYLOADS[0])
    appender.append([Item(Kind.RULES, fake * 50), Item(Kind.RULES, b"after")])
    (segment,) = Archive.open(folder).segments()
    first = next(segment.frames())
    flip(raw_file(folder), first.offset + 9)
    assert stored(folder) == [b"after"]


def test_both_copies_of_the_header_have_to_go_before_it_is_lost(folder: Path) -> None:
    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:5])
    flip(raw_file(folder), 60)
    assert stored(folder) == PAYLOADS[:5]
    flip(raw_file(folder), 120)
    with pytest.raises(ArchiveError, match="header"):
        stored(folder)
    with Appender.open(folder) as appender:
        fill(appender, PAYLOADS[5:6])
    assert stored(folder) == PAYLOADS[5:6]
    (aside,) = (folder / "aside").iterdir()
    assert PAYLOADS[0] in aside.read_bytes()


def test_a_segment_of_another_archive_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with Appender.open(tmp_path / name, partitions=1) as appender:
            fill(appender, PAYLOADS[:5])
    raw_file(tmp_path / "two").write_bytes(raw_file(tmp_path / "one").read_bytes())
    with pytest.raises(ArchiveError, match="elsewhere"):
        stored(tmp_path / "two")
    with pytest.raises(ArchiveError, match="elsewhere"):
        Appender.open(tmp_path / "two")


def test_what_is_not_known_to_be_on_disk_is_not_read(
    folder: Path, appender: Appender, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(appender, PAYLOADS[:5])
    seen: list[int] = []

    def fails(_fd: int) -> None:
        seen.append(len(stored(folder)))
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(archive.SyncFailedError, match="nothing more is acknowledged"):
        fill(appender, PAYLOADS[5:10])
    monkeypatch.undo()
    assert seen == [5]
    with pytest.raises(archive.SyncFailedError, match="earlier sync failed"):
        fill(appender, PAYLOADS[10:11])
    assert stored(folder) == PAYLOADS[:5]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(
    folder: Path, appender: Appender, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fill(appender, PAYLOADS[:5])
    real = os.pwrite

    def half(fd: int, data: bytes, offset: int) -> int:
        # Whole frames get to the disk as well, and nobody may ever read them.
        if len(data) > 500:
            return real(fd, data[:-400], offset)
        raise OSError(code, os.strerror(code))

    def refuse(_fd: int, _length: int) -> None:
        raise OSError(code, os.strerror(code))

    for cut_fails in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", half)
            if cut_fails:
                patch.setattr(os, "ftruncate", refuse)
            with pytest.raises(OSError, match=os.strerror(code)):
                fill(appender, PAYLOADS[5:10])
        assert stored(folder) == PAYLOADS[:5]
    fill(appender, PAYLOADS[10:12])
    assert stored(folder) == PAYLOADS[:5] + PAYLOADS[10:12]
    # Not even by one who does not know how far it is good.
    (folder / "p0000" / reader.MARK).unlink()
    assert stored(folder) == PAYLOADS[:5] + PAYLOADS[10:12]


def test_a_disk_that_is_gone_stops_the_writer(
    folder: Path, appender: Appender, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(appender, PAYLOADS[:5])

    def gone(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", gone)
        with pytest.raises(archive.SyncFailedError, match="write failed"):
            fill(appender, PAYLOADS[5:10])
    with pytest.raises(archive.SyncFailedError, match="earlier"):
        fill(appender, PAYLOADS[5:10])
    assert stored(folder) == PAYLOADS[:5]


def test_nothing_is_acknowledged_that_goes_to_a_file_without_a_name(
    folder: Path, appender: Appender
) -> None:
    fill(appender, PAYLOADS[:5])
    shutil.rmtree(folder)
    with pytest.raises(archive.SyncFailedError, match="was removed while in use"):
        fill(appender, PAYLOADS[5:10])
    with pytest.raises(archive.SyncFailedError, match="earlier"):
        fill(appender, PAYLOADS[5:10])


def test_an_archive_without_one_of_its_partitions_is_not_read_as_if_it_were_whole(
    folder: Path, appender: Appender
) -> None:
    fill(appender, PAYLOADS[:5])
    shutil.rmtree(folder / "p0000")
    with pytest.raises(ArchiveError, match="p0000: is not there"):
        Archive.open(folder).segments()


@pytest.mark.parametrize("step", ["before rename", "after rename"])
def test_a_death_while_sealing_neither_loses_nor_doubles(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:50])
        name = "rename" if step == "before rename" else "unlink"
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, die)
            with pytest.raises(Killed):
                appender.seal(everything=True)
    assert stored(folder) == PAYLOADS[:50]
    with Appender.open(folder) as appender:
        appender.seal(everything=True)
    assert stored(folder) == PAYLOADS[:50]
    assert sorted(p.name for p in (folder / "p0000").iterdir()) == [
        "000000000001.seg",
        "committed",
    ]


def test_a_sealed_copy_that_differs_never_replaces_its_source(folder: Path) -> None:
    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:50])
        kept = raw_file(folder).read_bytes()
        appender.seal(everything=True)
    (sealed,) = (folder / "p0000").glob("*.seg")
    sealed.with_suffix(".raw").write_bytes(kept)
    flip(sealed, 400)
    with Appender.open(folder) as appender:
        appender.seal(everything=True)
    assert stored(folder) == PAYLOADS[:50]
    assert len(list((folder / "aside").iterdir())) == 1


def test_a_copy_that_reads_back_differently_leaves_the_raw_segment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back something else than was written: noticed before the source goes."""
    real = os.fsync

    def rot(fd: int) -> None:
        real(fd)
        place = Path(f"/proc/self/fd/{fd}").readlink()
        if place.name.endswith(".seg.tmp"):
            flip(place, place.stat().st_size // 2)

    with Appender.open(folder, partitions=1) as appender:
        fill(appender, PAYLOADS[:50])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", rot)
            with pytest.raises(ArchiveError, match="differs when read back"):
                appender.seal(everything=True)
        assert sorted(p.name for p in (folder / "p0000").iterdir()) == [
            "000000000001.raw",
            "committed",
        ]
        assert stored(folder) == PAYLOADS[:50]
        assert appender.seal() == 1
    assert stored(folder) == PAYLOADS[:50]


def test_the_index_finds_what_is_stored_and_nothing_else(folder: Path, appender: Appender) -> None:
    kept = [batches.encoded(job=job, sequence=n) for job in range(9) for n in range(0, 40, 2)]
    fill(appender, kept)
    appender.seal(everything=True)
    index = Archive.open(folder).segments()[0].index()
    for data in kept:
        tag = fmt.tag_of(Kind.COUNTERS, data)
        assert index.digest(tag.key, tag.sequence) == tag.digest
        assert index.digest(tag.key, tag.sequence + 1) is None
    assert index.digest(b"\0" * 16, 0) is None
    assert index.digest(b"\xff" * 16, 0) is None
    assert {(low, high) for _, low, high in index.writers()} == {(0, 38)}


def test_a_bomb_in_place_of_a_sealed_block_is_bounded() -> None:
    bomb = zstd.compress(bytes(50 << 20), 19)
    out, problem = fmt.salvage(bomb, 1 << 20)
    assert len(out) <= 1 << 20
    assert problem is not None
    assert "more than" in problem
    wide = zstd.compress(
        os.urandom(1 << 10), options={zstd.CompressionParameter.window_log: 27,
                                      zstd.CompressionParameter.content_size_flag: 0}
    )  # fmt: skip
    stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    wide = stream.compress(bytes(1 << 20)) + stream.flush()
    with pytest.raises(fmt.FormatError, match="not valid zstd"):
        fmt.decompress(wide, 1 << 30)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=30), st.data())
@settings(max_examples=200, deadline=None)
def test_scan_finds_every_frame_around_any_damage(
    payloads: list[bytes], data: st.DataObject
) -> None:
    marker = b"\x01marker!"
    frames = [fmt.pack_frame(marker, 1, 0, 5, payload) for payload in payloads]
    parts: list[bytes] = []
    for frame in frames:
        if data.draw(st.booleans()):
            parts.append(data.draw(st.binary(max_size=50)))
        parts.append(frame)
    whole = b"".join(parts)
    found = list(fmt.scan(lambda at, n: whole[at : at + n], 0, len(whole), marker))
    assert [item.data for item in found if isinstance(item, fmt.Frame)] == payloads
    covered = sum(
        item.end - item.offset if isinstance(item, fmt.Frame) else item.length for item in found
    )
    assert covered == len(whole)


def test_scan_with_frames_larger_than_its_window() -> None:
    marker = b"\x01marker!"
    payloads = [bytes([n]) * (700_000 * n) for n in range(1, 6)]
    whole = b"garbage" + b"?".join(fmt.pack_frame(marker, 1, 0, 5, p) for p in payloads)
    found = list(fmt.scan(lambda at, n: whole[at : at + n], 0, len(whole), marker))
    assert [item.data for item in found if isinstance(item, fmt.Frame)] == payloads


def test_a_mark_that_cannot_be_read_hides_nothing(folder: Path, appender: Appender) -> None:
    fill(appender, PAYLOADS[:5])
    (folder / "p0000" / reader.MARK).write_bytes(b"nonsense")
    assert stored(folder) == PAYLOADS[:5]


@pytest.mark.parametrize("manifest", [b"", b"{}", b'{"format":9,"archive":"00","partitions":1}'])
def test_refuses_what_is_no_archive(tmp_path: Path, manifest: bytes) -> None:
    with pytest.raises(ArchiveError, match="no archive here"):
        Archive.open(tmp_path)
    (tmp_path / reader.MANIFEST).write_bytes(manifest)
    with pytest.raises(ArchiveError):
        Archive.open(tmp_path)


def test_an_archive_without_its_manifest_is_not_begun_anew(folder: Path) -> None:
    with Appender.open(folder, partitions=1) as made:
        fill(made, PAYLOADS[:10])
    manifest = (folder / reader.MANIFEST).read_bytes()
    (folder / reader.MANIFEST).unlink()
    with pytest.raises(ArchiveError, match=r"segments, but no archive\.json: restore it"):
        Appender.open(folder, partitions=1)
    (folder / reader.MANIFEST).write_bytes(manifest)
    with Appender.open(folder):
        assert stored(folder) == PAYLOADS[:10]


def test_an_archive_is_not_made_where_its_disk_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be written: No such file"):
        Appender.open(tmp_path / "disk" / "archive")
    assert not (tmp_path / "disk").exists()
