"""The shipper's spool: bounds, tombstones, full disks, interrupted deletions; pure waits."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import shipping
from hypothesis import given
from hypothesis import strategies as st
from shipping import Receiver, configure, fill, once, service, until, waiting

from sams_ebpf import config, outbox, post, rejected, ship, spool, wire
from sams_ebpf.inotify import Arrivals
from sams_ebpf.progress import Progress

SITE = config.Site(cluster="c1", node="n1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


def opened(folder: Path, **bounds: int) -> outbox.Outbox:
    settings = config.Spool(folder=folder, **({"keep_free_bytes": 0} | bounds))  # type: ignore[arg-type]
    box = outbox.Outbox(settings, SITE)
    box.register("main", required=True, offer=lambda _name: None, away=lambda: False)
    box.scan()
    return box


def tombstones(folder: Path) -> list[wire.Batch]:
    return [
        wire.decode((folder / name).read_bytes())
        for name in waiting(folder)
        if name.endswith("-tombstone.msgpack")
    ]


# Bounds --------------------------------------------------------------------------------


def test_over_its_size_the_oldest_go_and_a_tombstone_tells(folder: Path) -> None:
    fill(folder, 40)
    box = opened(folder, max_bytes=64 << 10)
    box.keep_bounds()
    (tombstone,) = tombstones(folder)
    assert tombstone.dropped is not None
    assert (tombstone.dropped.first_sequence, tombstone.dropped.reason) == (0, "size")
    gone = tombstone.dropped.last_sequence + 1
    assert tombstone.dropped.batches == gone
    assert spool.Entry(shipping.batch(gone).identity, "delta").name in waiting(folder)
    assert len(waiting(folder)) == 40 - gone + 1
    assert 4096 * len(waiting(folder)) <= 64 << 10
    assert tombstone.claims == wire.Claims(cluster="c1", node="n1", job_id=5)
    box.close()


def test_what_a_full_batch_has_goes_without_a_word(folder: Path) -> None:
    fill(folder, 20)
    fill(folder, 1, first=20, full=True)
    fill(folder, 3, first=21)
    box = opened(folder, max_bytes=64 << 10)
    box.keep_bounds()
    assert tombstones(folder) == []
    assert 4 <= len(waiting(folder)) <= 16
    assert spool.Entry(shipping.batch(20).identity, "full").name in waiting(folder)
    box.close()


def test_too_old_is_told_by_a_clock_that_nobody_sets(folder: Path) -> None:
    fill(folder, 2)
    old = folder / waiting(folder)[0]
    os.utime(old, (0, 0))
    box = opened(folder, max_age_s=86400)
    box.keep_bounds()
    (tombstone,) = tombstones(folder)
    assert tombstone.dropped is not None
    assert (tombstone.dropped.reason, tombstone.dropped.batches) == ("age", 1)
    # Once seen, a file ages by the clock that nobody sets, whatever its time says.
    young = next(name for name in waiting(folder) if not name.endswith("tombstone.msgpack"))
    os.utime(folder / young, (0, 0))
    box.scan()
    box._looked_s = float("-inf")  # it would look again after a minute
    box.keep_bounds()
    assert young in waiting(folder)
    box.close()


def test_a_clock_that_was_wrong_makes_nothing_old(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At boot, before the time was set; and a jump while batches wait."""
    fill(folder, 2)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 10 * 365 * 86400)
    box = opened(folder, max_age_s=86400)
    box.keep_bounds(by_age=False)
    monkeypatch.setattr(time, "time", right)
    box._looked_s = float("-inf")  # it would look again after a minute
    box.keep_bounds()
    box.close()
    # It jumps after the shipper has seen them.
    box = opened(folder, max_age_s=86400)
    monkeypatch.setattr(time, "time", lambda: right() + 10 * 365 * 86400)
    box.keep_bounds()
    box.close()
    assert tombstones(folder) == []
    assert len(waiting(folder)) == 2


def test_sequences_of_tombstones_are_never_used_twice(folder: Path) -> None:
    for life in range(3):
        fill(folder, 50, first=50 * life)
        box = opened(folder, max_bytes=128 << 10)
        box.keep_bounds()
        box.close()
    found = tombstones(folder)
    assert len({tombstone.identity for tombstone in found}) == len(found) == 3
    assert b"collectr" not in {tombstone.writer for tombstone in found}
    # Together with what is kept they tell of all of them.
    kept = len(waiting(folder)) - len(found)
    assert kept + sum(t.dropped.batches for t in found if t.dropped) == 150


def test_tombstones_are_shipped_and_the_spool_ends_empty(tmp_path: Path, folder: Path) -> None:
    sent = fill(folder, 60)
    with Receiver() as receiver:
        file = configure(
            tmp_path / "c.yaml",
            folder,
            {"main": {"url": receiver.url}},
            spool={"max_bytes": 64 << 10},
        )
        assert once(file).returncode == 0
    kinds = [wire.decode(data) for data in receiver.batches.values()]
    (dropped,) = [batch.dropped for batch in kinds if batch.dropped is not None]
    assert waiting(folder) == []
    stored = {batch.identity for batch in kinds if batch.kind == "counters"}
    lost = {
        identity
        for identity in sent
        if dropped.first_sequence <= identity.sequence <= dropped.last_sequence
    }
    assert stored | lost == set(sent)
    assert not stored & lost
    assert len(lost) == dropped.batches


def test_a_shipper_killed_between_tombstone_and_deletion(folder: Path) -> None:
    fill(folder, 40)
    box = opened(folder, max_bytes=64 << 10)
    before = set(waiting(folder))
    box.keep_bounds()
    box.close()
    (tombstone,) = tombstones(folder)
    lost = before - set(waiting(folder))
    # Half of what was deleted is back, as after a kill.
    assert tombstone.dropped is not None
    fill(folder, tombstone.dropped.batches // 2, first=tombstone.dropped.batches // 2)
    box = opened(folder, max_bytes=64 << 10)
    box.finish_losses()
    box.keep_bounds()
    assert not lost & set(waiting(folder))
    assert tombstones(folder) == [tombstone]
    box.close()


def test_an_outage_with_a_small_spool_and_kills(tmp_path: Path, folder: Path) -> None:
    """Every batch is either stored, or superseded, or told of by a tombstone that is stored."""
    receiver = Receiver()
    receiver.start()
    receiver.stop()
    file = configure(
        tmp_path / "c.yaml",
        folder,
        {"main": {"url": receiver.url}},
        spool={"max_bytes": 96 << 10},
    )
    sent = []
    for round_ in range(4):
        with service(file) as process:
            for sequence in range(25):
                number = round_ * 25 + sequence
                sent += fill(folder, 1, first=number, full=number % 40 == 39)
            until(lambda: 4096 * len(waiting(folder)) <= 96 << 10)
            process.kill()
            process.wait()
    receiver.start()
    with service(file):
        until(lambda: not waiting(folder))
    receiver.stop()
    batches = [wire.decode(data) for data in receiver.batches.values()]
    stored = {batch.identity for batch in batches if batch.kind == "counters"}
    told = {
        sequence
        for batch in batches
        if batch.dropped is not None
        for sequence in range(batch.dropped.first_sequence, batch.dropped.last_sequence + 1)
    }
    last_full = max(
        (b.sequence for b in batches if b.full),
        default=max((s for s in told if s % 40 == 39), default=-1),
    )
    silent = {i for i in set(sent) - stored if i.sequence not in told}
    assert {i.sequence for i in silent if i.sequence >= last_full} == set()
    assert len(stored) < len(sent)


# Disks ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB; made by root."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = "size=4m,mode=0755"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "sams-ship-test", mount], check=True, timeout=30
    )
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True, timeout=30)


def eat(mount: Path) -> Path:
    """Take all the room that is left."""
    filler = mount / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


@pytest.mark.system
def test_on_a_full_disk_everything_still_gets_out(tmp_path: Path, small_disk: Path) -> None:
    folder = small_disk / "spool"
    folder.mkdir()
    sent = fill(folder, 30)
    receivers = [Receiver(), Receiver()]
    with receivers[0], receivers[1]:
        targets = {f"r{at}": {"url": one.url} for at, one in enumerate(receivers)}
        file = configure(tmp_path / "c.yaml", folder, targets)
        filler = eat(small_disk)
        with pytest.raises(OSError, match="No space"):
            fill(folder, 1, first=30)
        with service(file):
            until(lambda: not waiting(folder))
            filler.unlink()
            sent += fill(folder, 1, first=30)
            until(lambda: not waiting(folder))
    for one in receivers:
        assert sorted(one.stored) == sorted(sent)


@pytest.mark.system
def test_a_tombstone_can_be_written_on_a_full_disk(small_disk: Path) -> None:
    folder = small_disk / "spool"
    folder.mkdir()
    fill(folder, 40)
    box = opened(folder, max_bytes=64 << 10)
    eat(small_disk)
    box.keep_bounds()
    assert len(tombstones(folder)) == 1
    assert len(waiting(folder)) < 16
    # And the room for the next one is held again.
    assert (folder / "shipper" / "reserve").stat().st_size == 64 << 10
    box.close()


@pytest.mark.system
def test_a_disk_that_others_fill_loses_what_is_superseded_and_nothing_else(
    small_disk: Path,
) -> None:
    folder = small_disk / "spool"
    folder.mkdir()
    fill(folder, 20)
    fill(folder, 1, first=20, full=True)
    fill(folder, 5, first=21)
    box = opened(folder, keep_free_bytes=1 << 30)
    eat(small_disk)
    box.keep_bounds()
    assert len(waiting(folder)) == 6
    assert tombstones(folder) == []
    box.close()


@pytest.mark.system
def test_a_power_cut_between_tombstones_and_deletions(tmp_path: Path) -> None:
    """What `put` returned for is, after the power is back, there or told of."""
    image, mount = tmp_path / "image", tmp_path / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    run = partial(subprocess.run, check=True, capture_output=True, timeout=60)
    run(["mkfs.ext4", "-q", "-F", str(image)])
    folder = mount / "spool"
    sent: list[wire.Identity] = []
    for cut in range(3):
        run(["mount", "-o", "loop", str(image), str(mount)])
        try:
            folder.mkdir(exist_ok=True)
            for _ in range(3):
                sent += fill(folder, 15, first=len(sent))
                box = opened(folder, max_bytes=192 << 10)
                box.finish_losses()
                box.keep_bounds()
                box.close()
            fd = os.open(mount, os.O_RDONLY)
            try:
                # EXT4_IOC_SHUTDOWN without a flush of the journal: the power is gone.
                fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
            finally:
                os.close(fd)
        finally:
            run(["umount", str(mount)])
        run(["mount", "-o", "loop", str(image), str(mount)])
        try:
            kept = {entry.identity for name in waiting(folder) if (entry := spool.parse(name))}
            told = {
                sequence
                for tombstone in tombstones(folder)
                if tombstone.dropped is not None
                for sequence in range(
                    tombstone.dropped.first_sequence, tombstone.dropped.last_sequence + 1
                )
            }
            missing = [one for one in sent if one not in kept and one.sequence not in told]
            assert missing == [], f"cut {cut}"
            assert cut == 0 or told
        finally:
            run(["umount", str(mount)])


@pytest.mark.system
def test_a_spool_gone_read_only_deletes_nothing_and_sends_nothing_twice(
    tmp_path: Path, small_disk: Path
) -> None:
    folder = small_disk / "spool"
    folder.mkdir()
    fill(folder, 5)
    with Receiver() as receiver:
        file = configure(tmp_path / "c.yaml", folder, {"main": {"url": receiver.url}})
        receiver.behave = lambda number: shipping.status(503) if number < 1 else None
        with service(file):
            until(lambda: receiver.attempts)
            remount = ["mount", "-o", "remount,ro", str(small_disk)]
            subprocess.run(remount, check=True, timeout=30)
            until(lambda: len(receiver.stored) == 5)
            remount[2] = "remount,rw"
            subprocess.run(remount, check=True, timeout=30)
            assert receiver.attempts <= 7
        # What was acknowledged but could not be deleted is sent again by the next life.
        with service(file):
            until(lambda: not waiting(folder))
    assert (len(receiver.stored), receiver.conflicts) == (5, 0)


def test_a_spool_that_is_not_the_shipper_s_is_refused_at_once(folder: Path) -> None:
    """Made by a run as root, say: else it would send everything again and again."""
    opened(folder).close()
    folder.chmod(0o755)
    file = configure(folder.parent / "c.yaml", folder, {"main": {"url": "http://127.0.0.1:9"}})
    for path in (folder.parent, *folder.parents[:3]):
        path.chmod(0o755)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *shipping.COMMAND, str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"spool.folder: {folder}: user 65534 cannot write to it" in line


def test_what_is_set_aside_has_a_quota(folder: Path) -> None:
    for at in range(30):
        (folder / f"junk{at}.msgpack").write_bytes(b"x" * 5000)
    box = opened(folder, rejected_max_bytes=64 << 10)
    assert box.rejected == 30
    left = list((folder / "rejected").iterdir())
    assert 0 < sum(-(-file.stat().st_size // 4096) * 4096 for file in left) <= 64 << 10
    assert waiting(folder) == []
    box.close()


def test_a_folder_among_the_set_aside_is_left_alone_and_stops_nothing(folder: Path) -> None:
    fill(folder, 20)
    box = opened(folder, rejected_max_bytes=32 << 10)
    kept = folder / "rejected" / "kept"
    kept.mkdir()
    os.utime(kept, (1, 1))
    for name in waiting(folder):
        box.refuse("main", name, b"x" * 4096, "no")
    assert kept.is_dir()
    there = [file for file in kept.parent.iterdir() if file.is_file()]
    assert sum(file.stat().st_blocks * 512 for file in there) <= 32 << 10
    left = sum(file.suffix == ".msgpack" for file in there)
    told = [one.dropped.batches for one in tombstones(folder) if one.dropped is not None]
    assert sum(told) == rejected.tally(folder / "shipper" / rejected.TALLY).batches == 20 - left
    box.close()


def test_what_finds_no_room_among_the_set_aside_is_told(folder: Path) -> None:
    """A receiver that refuses everything: nothing goes without a tombstone and a count."""
    fill(folder, 30)
    names = waiting(folder)
    box = opened(folder, rejected_max_bytes=64 << 10)
    box.register("other", required=True, offer=lambda _name: None, away=lambda: False)
    for name in sorted(names):
        data = box.read(name)
        assert data is not None
        assert box.refuse("main", name, data, "400 no")
    left = rejected.kept(folder / "rejected")
    gone = rejected.tally(folder / "shipper" / rejected.TALLY)
    assert len(left) + gone.batches == 30
    assert sum(one.bytes for one in left) <= 64 << 10
    told = [batch.dropped for batch in tombstones(folder) if batch.dropped is not None]
    assert {one.reason for one in told} == {"rejected"}
    sequences = [n for one in told for n in range(one.first_sequence, one.last_sequence + 1)]
    assert sorted(sequences) == list(range(gone.batches))
    assert tombstones(folder)[0].claims.job_id == 5
    box.close()
    # The other receiver still gets the originals, also from the next shipper.
    again = opened(folder)
    again.finish_losses()
    assert set(names) <= set(waiting(folder))
    again.close()


def test_a_tombstone_that_is_refused_brings_no_other(folder: Path) -> None:
    fill(folder, 40)
    box = opened(folder, max_bytes=64 << 10, rejected_max_bytes=4096)
    box.keep_bounds()
    (name,) = (name for name in waiting(folder) if name.endswith("-tombstone.msgpack"))
    data = box.read(name)
    assert data is not None
    assert box.refuse("main", name, data, "400 no")
    assert tombstones(folder) == []
    assert rejected.tally(folder / "shipper" / rejected.TALLY).batches == 1
    box.close()


def test_temporary_files_of_the_dead_are_removed(folder: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    dead, young = folder / f".a.msgpack.{child.pid}.tmp", folder / f".b.msgpack.{child.pid}.tmp"
    alive = folder / f".a.msgpack.{os.getpid()}.tmp"
    for file in (dead, young, alive):
        file.touch()
    for file in (dead, alive):
        os.utime(file, (0, 0))
    box = opened(folder)
    for name in ("rejected", "shipper"):
        os.utime(shutil.copy(dead, folder / name), (0, 0))
    box.clean()
    assert not list((folder / "rejected").iterdir())
    assert not list((folder / "shipper").glob(".*"))
    assert sorted(f.name for f in folder.iterdir() if f.suffix == ".tmp") == sorted(
        [young.name, alive.name]
    )
    box.close()


# Progress ------------------------------------------------------------------------------


def test_progress_survives_and_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "a.done"
    progress = Progress(path)
    progress.load([])
    names = [f"n{at}" for at in range(1000)]
    for name in names:
        progress.add(name)
    again = Progress(path)
    again.load(names[500:])
    assert [name in again for name in (names[0], names[499], names[500])] == [False, False, True]
    assert len(path.read_text().splitlines()) == 500
    for name in names[500:]:
        again.forget(name)
    assert len(path.read_text().splitlines()) <= 300


def test_a_torn_line_of_progress_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.done"
    path.write_bytes(b"abc\nabcd\nab\xff\0\nabcde")
    progress = Progress(path)
    progress.load(["abc", "abcd", "abcdef"])
    assert ["abc" in progress, "abcd" in progress, "abcdef" in progress] == [True, True, False]


# Pure ----------------------------------------------------------------------------------


@given(st.text(min_size=1), st.floats(0.1, 3600), st.floats(0, 4e9), st.integers())
def test_a_node_waits_for_its_own_moment(name: str, spread: float, now: float, seed: int) -> None:
    wait = ship.slot_s(name, spread, now, random.Random(seed))
    assert 0 <= wait <= spread * 1.1


def test_two_thousand_nodes_are_spread_evenly() -> None:
    chance = random.Random(1)
    seconds = [int(ship.slot_s(f"n{at:04}", 30, 1e9, chance)) for at in range(2000)]
    busiest = max(seconds.count(second) for second in set(seconds))
    assert busiest <= 2 * 2000 / 30


def test_no_spread_means_at_once() -> None:
    assert ship.slot_s("n1", 0, 1e9, random.Random(1)) == 0


@given(st.lists(st.none() | st.floats(0, 3600), min_size=1, max_size=100), st.integers())
def test_waits_grow_are_random_and_never_shorter_than_asked_for(
    asked: list[float | None], seed: int
) -> None:
    backoff = ship.Backoff(config.Ship(backoff_s=1, backoff_max_s=300), random.Random(seed))
    for number, least in enumerate(asked):
        wait = backoff.next_s(least)
        assert wait >= (least or 0)
        assert wait <= (least or 0) + max(min(300, 2**number), (least or 0) / 4)
    backoff.reset()
    assert backoff.next_s() <= 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7),
        (" 7 ", 7),
        ("99999999999999", 3600),
        ("-1", None),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 3600),
        ("", None),
        ("٣", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert post.retry_after(header, now=100.0) == seconds


@given(st.text())
def test_any_retry_after_is_bounded(header: str) -> None:
    assert 0 <= (post.retry_after(header) or 0) <= post.MAX_RETRY_AFTER_S


def test_arrivals_are_told_by_name(folder: Path) -> None:
    arrivals = Arrivals(folder)
    assert arrivals.take() == set()
    fill(folder, 2)
    assert arrivals.take() == set(waiting(folder))
    shutil.rmtree(folder)
    until(lambda: arrivals.take() is None, 5)
    arrivals.close()
    with pytest.raises(FileNotFoundError):
        Arrivals(folder)


def test_an_idle_shipper_does_not_poll(tmp_path: Path, folder: Path) -> None:
    """Nothing to do for seconds: no more than a handful of wake-ups."""
    with Receiver() as receiver:
        file = configure(tmp_path / "c.yaml", folder, {"main": {"url": receiver.url}})
        fill(folder, 1)
        with service(file) as process:
            until(lambda: not waiting(folder))
            time.sleep(0.5)

            def switches() -> int:
                total = 0
                for task in Path(f"/proc/{process.pid}/task").iterdir():
                    text = (task / "status").read_text()
                    total += int(text.split("\nvoluntary_ctxt_switches:\t")[1].split("\n")[0])
                return total

            before = switches()
            time.sleep(3)
            assert switches() - before <= 3
