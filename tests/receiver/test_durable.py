"""What was acknowledged is in the archive, once, whatever happens to the receiver."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import batches
import pytest
import receiving
import requests
from receiving import HEADERS, Load, Receiver

from sams_ebpf import wire
from sams_receiver.archive import Archive, Problem

# Small segments: sealing goes on all the time while things break.
SMALL = {"bytes": 300_000, "frames": 200, "seconds": 3600}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it; the tests have time-outs of their own."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def _kills(receiver: Receiver, load: Load, kills: int, between: float) -> int:
    chance = random.Random(kills)
    extra = 0
    sending = asyncio.create_task(load.run())
    for _ in range(kills):
        before = len(load.acknowledged)
        await asyncio.sleep(between * chance.uniform(0.5, 1.5))
        await until(lambda: len(load.acknowledged) > before + 50)  # noqa: B023
        await asyncio.to_thread(receiver.kill)
        known = set(load.acknowledged)
        found = await asyncio.to_thread(receiving.check, receiver.archive, known)
        extra += found - len(known)
        await asyncio.to_thread(receiver.start)
    load.stop()
    await sending
    return extra


def _kill_test(folder: Path, kills: int, between: float) -> None:
    with Receiver(folder, segments=SMALL).start() as receiver:
        load = Load(receiver.url)

        async def main() -> int:
            return await _kills(receiver, load, kills, between)

        extra = asyncio.run(main())
        assert receiver.stop() == 0
        assert receiving.check(receiver.archive, load.acknowledged) == len(load.acknowledged)
        assert len(load.acknowledged) > 50 * kills
        assert load.retries > 0
        print(
            f"{kills} kills, {len(load.acknowledged)} acknowledged, {extra} stored when killed"
            f" without an answer, {load.duplicates} acknowledged as duplicates"
        )


def test_kills_under_load(tmp_path: Path) -> None:
    _kill_test(tmp_path, 3, 1.0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_kills_under_load_20_times(tmp_path: Path) -> None:
    _kill_test(tmp_path, 20, 2.0)


# -- power cuts ------------------------------------------------------------------------

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2


class LoopFs:
    """An ext4 of its own in a file, which can lose its power."""

    def __init__(self, folder: Path, size: int = 256 << 20) -> None:
        self.image = folder / "disk.img"
        self.mount_point = folder / "mnt"
        self.mount_point.mkdir()
        with self.image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.mount_point)], check=True)

    def umount(self) -> None:
        subprocess.run(["umount", str(self.mount_point)], check=True)

    def cut_power(self) -> None:
        """Nothing that is not on disk by now will ever be: the journal is not flushed."""
        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopFs]:
    made = LoopFs(tmp_path)
    yield made
    with contextlib.suppress(subprocess.CalledProcessError):
        made.umount()


def _power_test(folder: Path, disk: LoopFs, cuts: int) -> None:
    receiver = Receiver(folder, archive=disk.mount_point / "archive", segments=SMALL)
    with receiver.start():
        load = Load(receiver.url)

        async def main() -> None:
            sending = asyncio.create_task(load.run())
            for at in range(cuts):
                wanted = len(load.acknowledged) + 150 + 40 * at
                await until(lambda: len(load.acknowledged) > wanted)  # noqa: B023
                # A machine without power does not go on for a moment: everything stands
                # still at once, what was answered by then has been answered.
                os.kill(receiver.pid, signal.SIGSTOP)
                await asyncio.sleep(0.3)
                known = set(load.acknowledged)
                disk.cut_power()
                receiver.kill()
                disk.umount()
                disk.mount()
                await asyncio.to_thread(receiver.start)
                lost = known - set(await asyncio.to_thread(receiving.stored, receiver.archive))
                assert not lost
            load.stop()
            await sending

        asyncio.run(main())
        assert receiver.stop() == 0
        assert receiving.check(receiver.archive, load.acknowledged) == len(load.acknowledged)
        print(f"{cuts} power cuts, {len(load.acknowledged)} acknowledged, none lost or doubled")


@pytest.mark.system
def test_a_disk_that_goes_away_stops_it_loudly(tmp_path: Path, disk: LoopFs) -> None:
    receiver = Receiver(tmp_path, archive=disk.mount_point / "archive")
    with receiver.start():
        load = Load(receiver.url, clients=10)

        async def main() -> None:
            sending = asyncio.create_task(load.run())
            await until(lambda: len(load.acknowledged) > 100)
            disk.cut_power()
            assert receiver.process is not None
            assert await asyncio.to_thread(receiver.process.wait, 60) == 1
            sending.cancel()

        asyncio.run(main())
        (last,) = [line for line in receiver.lines() if "nothing more is acknowledged" in line]
        assert "error: " in last
        assert "Traceback" not in receiver.log.read_text()


@pytest.mark.system
def test_power_cut(tmp_path: Path, disk: LoopFs) -> None:
    _power_test(tmp_path, disk, 1)


@pytest.mark.system
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_power_cut_8_times(tmp_path: Path, disk: LoopFs) -> None:
    _power_test(tmp_path, disk, 8)


@pytest.mark.system
def test_a_power_cut_without_sync_loses_what_the_test_looks_for(
    tmp_path: Path, disk: LoopFs
) -> None:
    # The negative of the test above: with the sync made a no-op, acknowledged batches go.
    library = tmp_path / "nosync.so"
    source = "int fdatasync(int f){(void)f;return 0;} int fsync(int f){(void)f;return 0;}"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)],
        input=source.encode(), check=True,
    )  # fmt: skip
    receiver = Receiver(tmp_path, archive=disk.mount_point / "archive")
    with receiver.start(LD_PRELOAD=str(library)):
        sent = [batches.batch(sequence=n) for n in range(50)]
        for batch in sent:
            answer = requests.post(
                f"{receiver.url}/v1/batches", wire.encode(batch), headers=HEADERS, timeout=10
            )
            assert answer.status_code == 200
        disk.cut_power()
        receiver.kill()
        disk.umount()
        disk.mount()
        with pytest.raises((AssertionError, Exception), match=r"lost|no archive"):
            receiving.check(receiver.archive, {batch.identity for batch in sent})


# -- a disk that is full, or read-only -------------------------------------------------


def _post(receiver: Receiver, batch: wire.Batch) -> requests.Response:
    return requests.post(
        f"{receiver.url}/v1/batches", wire.encode(batch), headers=HEADERS, timeout=30
    )


@pytest.mark.system
def test_full_ext4_then_freed(tmp_path: Path) -> None:
    # Where blocks are found late and a journal wants some too.
    disk = LoopFs(tmp_path, size=24 << 20)
    try:
        _full_disk(tmp_path, disk.mount_point)
    finally:
        disk.umount()


@pytest.mark.system
def test_full_disk_then_freed(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(folder)], check=True)
    try:
        _full_disk(tmp_path, folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _full_disk(tmp_path: Path, folder: Path) -> None:
    with Receiver(tmp_path, archive=folder / "archive", segments=SMALL).start() as receiver:
        load = Load(receiver.url, clients=20)
        ballast = folder / "ballast"

        async def main() -> None:
            sending = asyncio.create_task(load.run())
            await until(lambda: len(load.acknowledged) >= 200)
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            await until(lambda: load.statuses.get(507, 0) >= 50)
            full = len(load.acknowledged)
            status, _ = await asyncio.to_thread(receiving.get, receiver.url, "/healthz")
            assert status == 503
            assert await asyncio.to_thread(receiving.metric, receiver.url, "write_failures_total")
            ballast.unlink()
            await until(lambda: len(load.acknowledged) >= full + 200)
            load.stop()
            await sending
            status, _ = await asyncio.to_thread(receiving.get, receiver.url, "/healthz")
            assert status == 200

        asyncio.run(asyncio.wait_for(main(), 120))
        assert receiver.stop() == 0
        assert receiving.check(receiver.archive, load.acknowledged) == len(load.acknowledged)
        assert set(load.statuses) <= {200, 503, 507}
        _no_damage(receiver.archive)


@pytest.mark.system
def test_read_only_then_writable(tmp_path: Path) -> None:
    segments = {"frames": 5}
    with Receiver(tmp_path, partitions=1, segments=segments).start() as receiver:
        sent = [batches.batch(sequence=n) for n in range(10)]
        for batch in sent[:5]:
            assert _post(receiver, batch).status_code == 200
        # A new segment has to be made now, on what has become read-only. What the receiver
        # opened through the mount to come would keep it busy: the first is sealed before.
        end = time.monotonic() + 60
        while list(receiver.archive.rglob("*.raw")):
            assert time.monotonic() < end, "the first segment is not sealed"
            time.sleep(0.05)
        place = str(receiver.archive)
        subprocess.run(["mount", "--bind", place, place], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
            for batch in sent[5:]:
                answer = _post(receiver, batch)
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
        finally:
            subprocess.run(["umount", "-l", place], check=True)
        for batch in sent[5:]:
            assert _post(receiver, batch).json() == {"status": "stored"}
        assert receiver.stop() == 0
        assert receiving.check(receiver.archive, {batch.identity for batch in sent}) == 10


def _no_damage(archive: Path) -> None:
    problems: list[Problem] = []
    for segment in Archive.open(archive).segments():
        for _ in segment.frames(on_damage=problems.append):
            pass
    assert problems == []


# -- the network -----------------------------------------------------------------------


def test_connection_reset_before_the_answer(tmp_path: Path) -> None:
    with Receiver(tmp_path).start() as receiver:
        sent = [batches.batch(sequence=n) for n in range(40)]
        for batch in sent:
            body = wire.encode(batch)
            head = (
                f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                + "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
                + "\r\n"
            )
            with socket.create_connection(("127.0.0.1", receiver.ports[0])) as sock:
                sock.sendall(head.encode() + body)
                # Linger of 0: close sends a reset and waits for nothing.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        found = [_post(receiver, batch).json()["status"] for batch in sent]
        assert set(found) <= {"stored", "duplicate"}
        receiver.stop()
        assert receiving.check(receiver.archive, {batch.identity for batch in sent}) == 40
        assert "Traceback" not in receiver.log.read_text()


def test_graceful_stop_answers_what_is_under_way(tmp_path: Path) -> None:
    with Receiver(tmp_path).start() as receiver:
        body = wire.encode(batches.batch())
        with socket.create_connection(("127.0.0.1", receiver.ports[0])) as sock:
            head = f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
            sock.sendall(head.encode() + b"\r\n" + body[:50])
            # The first half has to be there before the stop, or nothing would be under way.
            for _ in range(200):
                if receiving.metric(receiver.url, "in_flight_bytes") >= 50:
                    break
            process = receiver.process
            assert process is not None
            process.terminate()
            while not any("stopping" in line for line in receiver.lines()):
                pass
            sock.sendall(body[50:])
            assert b'{"status":"stored"}' in sock.recv(4096)
        assert receiver.stop() == 0
        assert len(receiving.stored(receiver.archive)) == 1


def test_a_second_receiver_on_the_same_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with Receiver(tmp_path).start() as receiver:
        second = Receiver(tmp_path / "second", archive=receiver.archive)
        with pytest.raises(AssertionError, match="another process writes"):
            second.start()
        second.kill()


def test_duplicates_are_known_after_restart_and_sealing(tmp_path: Path) -> None:
    with Receiver(tmp_path, segments={"frames": 20}).start() as receiver:
        sent = [batches.batch(node=f"n{n % 5}", sequence=n) for n in range(100)]
        for batch in sent:
            assert _post(receiver, batch).json() == {"status": "stored"}
        for restart in range(3):
            for batch in sent:
                assert _post(receiver, batch).json() == {"status": "duplicate"}
            for batch in sent[::10]:
                other = wire.encode(batches.batch(node=batch.claims.node, sequence=batch.sequence,
                                                  seed=9))  # fmt: skip
                answer = requests.post(
                    f"{receiver.url}/v1/batches", other, headers=HEADERS, timeout=10
                )
                assert answer.status_code == 409
                assert "same identity" in answer.json()["error"]
            receiver.stop()
            if restart == 1:
                # A lost database is made again from the indexes.
                for path in receiver.archive.glob("p*/seen.sqlite*"):
                    path.write_bytes(b"garbage" * 100)
            receiver.start()
        receiver.stop()
        assert receiving.check(receiver.archive, {batch.identity for batch in sent}) == 100
        kept = list((receiver.archive / "aside").glob("conflict-*"))
        assert len(kept) == 10
        assert b"same identity" in kept[0].read_bytes()


def test_gaps_are_filled_late_and_once(tmp_path: Path) -> None:
    with Receiver(tmp_path, segments={"frames": 10}).start() as receiver:
        order = [*range(0, 60, 2), *range(1, 60, 2), *range(60)]
        answers = [_post(receiver, batches.batch(sequence=n)).json()["status"] for n in order]
        assert answers == ["stored"] * 60 + ["duplicate"] * 60
        receiver.stop()
        assert len(receiving.stored(receiver.archive)) == 60
