"""Picked by its directory, a segment says what it says frame by frame, and a plain loop too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from backports import zstd

from sams_aggregator import ingest, manifest, sources, tables, work
from sams_aggregator.months import of_zone
from sams_aggregator.work import KIND_COUNTERS, Options, Payload
from sams_ebpf import wire
from sams_receiver.archive import Appender, Archive, Item, Kind
from sams_receiver.archive import format as fmt

OPTIONS = Options("Europe/Stockholm", 600, "c1")
# Half an hour before the end of October 2025 in Stockholm.
BEGIN = 1_761_949_800


def history(seed: int) -> list[bytes]:
    """Batches of several nodes and epochs, out of order, some twice, some that nobody reads."""
    chance = random.Random(seed)
    batches: list[bytes] = []
    for job in range(8):
        start = BEGIN + chance.randrange(1200)
        end = start + chance.randint(120, 3600)
        row = synthetic.Row(job + 1, start, end, end - start, 8, "n[1-2]", 2)
        for node in ("n1", "n2"):
            made = synthetic.epoch(
                chance, synthetic.claims(row, node), start, synthetic.harvests(start, end, 60),
                outside=chance.random() < 0.3,
            )  # fmt: skip
            batches += made.encoded()
    batches += chance.sample(batches, 20)
    # The same identity with other bytes: one of the two counts, everywhere the same one.
    header = wire.decode(batches[5])
    values = {name: getattr(header, name) for name in header.__struct_fields__}
    batches.append(wire.encode(wire.Batch(**values | {"software": "another 1.0"})))
    tombstone = wire.Dropped(
        generation=0, writer=bytes(8), first_sequence=3, last_sequence=4, batches=2, bytes=9,
        reason="size",
    )  # fmt: skip
    batches.append(
        wire.encode(
            wire.Batch(
                v=1, kind="tombstone", epoch=header.epoch, generation=header.generation,
                writer=b"shipper1", sequence=0, claims=wire.Claims(cluster="c1", node="n1"),
                dropped=tombstone,
            )
        )
    )  # fmt: skip
    # Its records are no records: it counts for nothing, and is told.
    last = max((wire.decode(one) for one in batches[:-1]), key=lambda one: one.end_ns or 0)
    values = {name: getattr(last, name) for name in last.__struct_fields__}
    bad = wire.encode(wire.Batch(**values | {"sequence": 10**6}))
    batches.append(bad.replace(wire.encode(last)[-40:], b"\xc1" * 40))
    batches.append(b"\x81\xa1v\x63")  # another version
    chance.shuffle(batches)
    return batches


@pytest.fixture(scope="module", params=[1, 2, 3])
def archive(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("directory") / "archive"
    with Appender.open(folder, partitions=1) as appender:
        appender.append([Item(Kind.COUNTERS, data) for data in history(request.param)])
        appender.seal(everything=True)
    return folder


def facts(folder: Path, result: work.Result) -> dict[str, Any]:
    connection = tables.connect()
    said: dict[str, Any] = {"bad": sorted(result.bad), "paths": result.paths,
                            "frames": result.frames, "records": result.records}  # fmt: skip
    for table in result.tables:
        path = tables.quoted(folder / str(result.name) / f"{table}{tables.SUFFIX}")
        said[table] = sorted(connection.execute(f"FROM read_parquet({path})").fetchall(), key=repr)
    return said


def by_frames(ref: sources.SegmentRef, folder: Path) -> dict[str, Any]:
    return facts(folder, work.work(sources.Reading(ref), OPTIONS, folder))


def by_directory(ref: sources.SegmentRef, folder: Path) -> dict[str, Any]:
    picked = sources.Reading(ref).picked()
    assert picked is not None
    result = work.work_picked(picked, OPTIONS, folder)
    assert result is not None
    return facts(folder, result)


def test_by_directory_as_by_frames(archive: Path, tmp_path: Path) -> None:
    (ref,) = sources.segments(archive)
    found = by_directory(ref, tmp_path)
    assert found == by_frames(ref, tmp_path)
    assert len(found["bad"]) == 2
    assert set(found) >= {"points", "totals", "epochs", "claims", "dropped"}


def plain(archive: Path) -> Iterator[wire.Batch]:
    for segment in Archive.open(archive).segments():
        for frame in segment.frames():
            try:
                yield wire.decode(frame.data)
            except wire.WireError:
                continue


@pytest.mark.parametrize("table", ["totals", "points"])
def test_a_plain_loop_finds_the_same(archive: Path, tmp_path: Path, table: str) -> None:
    """The latest value of each executable in each interval, as `docs/wire.md` has it."""
    (ref,) = sources.segments(archive)
    latest: dict[Any, tuple[Any, ...]] = {}
    counters = [one for one in plain(archive) if one.kind == "counters"]
    for one in counters:
        end = one.end_ns or 0
        interval = of_zone(OPTIONS.zone).of(end) if table == "totals" else end // (600 * 10**9)
        place = (one.epoch, one.claims.node, interval)
        order = (one.generation, one.sequence, work_tie(one))
        for record in one.records:
            key = (*place, record.path, record.flags)
            value = (order, record.script, *[getattr(record, name) for name in wire.COUNTERS])
            latest[key] = max(latest.get(key, value), value, key=lambda found: found[0])
    names = ", ".join(wire.COUNTERS)
    found = by_directory(ref, tmp_path)
    columns = list(tables.SCHEMA[table])
    told = {}
    for row in found[table]:
        value = dict(zip(columns, row, strict=True))
        key = (
            value["epoch"][:16],
            sender(counters, value["epoch"]),
            value["slot" if table == "points" else "month"],
            value["path"],
            value["flags"],
        )
        assert key not in told
        told[key] = (
            (value["generation"], value["sequence"], value["tie"]), value["script"],
            *[value[name] for name in names.split(", ")],
        )  # fmt: skip
    assert told == latest


def work_tie(one: wire.Batch) -> int:
    digest = fmt.content_digest(wire.encode(one))
    return int.from_bytes(digest, "little") & wire.INT64_MAX


def sender(batches: list[wire.Batch], epoch: bytes) -> str | None:
    return next(one.claims.node for one in batches if one.epoch == epoch[:16])


def rewritten(archive: Path, change: Any) -> sources.SegmentRef:
    (file,) = (archive / "p0000").glob("*.seg")
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)
    (ref,) = sources.segments(archive)
    return ref


@pytest.fixture
def copy(archive: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    (target / "p0000").mkdir(parents=True)
    for path in ("archive.json", *(f"p0000/{one.name}" for one in (archive / "p0000").iterdir())):
        (target / path).write_bytes((archive / path).read_bytes())
    return target


def test_without_its_directory_a_segment_is_read_by_frames(copy: Path, tmp_path: Path) -> None:
    (ref,) = sources.segments(copy)
    expected = by_directory(ref, tmp_path)

    def damage(data: bytearray) -> None:
        data[data.rindex(b"SAMSDIR1") - 30] ^= 1

    ref = rewritten(copy, damage)
    assert sources.Reading(ref).picked() is None
    outcome = ingest.read_segment(ingest.Task(ref, OPTIONS, tmp_path))
    assert not outcome.damage
    assert facts(tmp_path, outcome.result) == expected


def test_a_damaged_block_is_found_and_told(copy: Path, tmp_path: Path) -> None:
    """A flipped bit that zstd would pass on costs the frames it reaches, and is told."""
    (before,) = sources.segments(copy)
    (_, block, *_) = Archive.open(copy).segments()[0].index().blocks
    end = block.offset + block.length

    def damage(data: bytearray) -> None:
        for at in range(block.offset + block.length // 2, end):
            data[at] ^= 4
            packed = bytes(data[block.offset : end])
            with pytest.raises(fmt.FormatError):
                fmt.decompress(packed, block.raw_length)
            if len(fmt.salvage(packed, block.raw_length)[0]) == block.raw_length:
                return
            data[at] ^= 4
        pytest.fail("no such bit")

    ref = rewritten(copy, damage)
    assert ref.extent == before.extent
    outcome = ingest.read_segment(ingest.Task(ref, OPTIONS, tmp_path))
    frames = sum(Archive.open(copy).segments()[0].index().kinds.values())
    assert outcome.damage
    assert 0 < outcome.result.frames < frames
    assert outcome.extent == before.extent


def test_what_a_directory_says_of_records_is_checked(tmp_path: Path) -> None:
    """A directory that tells of more than there is gives no other facts."""
    batches = [one for one in history(1) if wire_reads(one)]
    with Appender.open(tmp_path / "archive", partitions=1) as appender:
        appender.append([Item(Kind.COUNTERS, data) for data in batches])
        appender.seal(everything=True)
    (ref,) = sources.segments(tmp_path / "archive")
    expected = by_frames(ref, tmp_path)
    picked = sources.Reading(ref).picked()
    assert picked is not None
    picked.directory.columns["records_at"][3] += 1
    picked.directory.columns["records"][7] += 1
    result = work.work_picked(picked, OPTIONS, tmp_path)
    assert result is not None
    assert facts(tmp_path, result) == expected


def wire_reads(data: bytes) -> bool:
    try:
        wire.decode(data)
    except wire.WireError:
        return False
    return True


def test_a_sealed_segment_still_decompresses_to_the_raw_one(copy: Path) -> None:
    (file,) = (copy / "p0000").glob("*.seg")
    (segment,) = Archive.open(copy).segments()
    assert zstd.decompress(file.read_bytes()) == b"".join(segment.raw_bytes())
    found = segment.contents()
    assert found is not None
    frames = list(segment.frames())
    assert found.columns["length"].tolist() == [len(frame.data) for frame in frames]
    assert segment.end() == frames[-1].end


def test_one_payload_at_a_time_and_picked_are_recorded_alike(archive: Path, tmp_path: Path) -> None:
    (ref,) = sources.segments(archive)
    payloads = [
        Payload(KIND_COUNTERS, str(number), frame.data)
        for number, frame in enumerate(Archive.open(archive).segments()[0].frames())
    ]
    random.Random(4).shuffle(payloads)
    folder = manifest.facts_folder(tmp_path)
    shuffled = facts(folder, work.work(payloads, OPTIONS, folder))
    picked = by_directory(ref, folder)
    shuffled.pop("bad")
    picked.pop("bad")
    assert shuffled == picked
