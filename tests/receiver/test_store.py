"""Group commit by itself: who waits for what, and what happens when writing fails."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import batches
import pytest

from sams_receiver import store as module
from sams_receiver.archive import Appender, Archive, Item, Kind, SyncFailedError
from sams_receiver.archive import format as fmt
from sams_receiver.archive.seen import Verdict
from sams_receiver.store import NotStoredError, Observer, Store


class Counting(Observer):
    def __init__(self) -> None:
        self.groups: list[int] = []

    def committed(self, frames: int, size: int, seconds: float) -> None:  # noqa: ARG002
        self.groups.append(frames)


def make(folder: Path, **changes: Any) -> tuple[Store, Counting, list[SyncFailedError]]:
    observer = Counting()
    fatal: list[SyncFailedError] = []
    settings: dict[str, Any] = {"window_ns": 1 << 62, "min_free_bytes": 0} | changes
    made = Store(
        Appender.open(folder, partitions=1), observer=observer, on_fatal=fatal.append, **settings
    )
    made.start()
    return made, observer, fatal


async def put(store: Store, sequence: int = 0, seed: int = 0) -> Verdict:
    data = batches.encoded(sequence=sequence, seed=seed)
    return await store.put("c1", "n1", Item(Kind.COUNTERS, data), fmt.tag_of(Kind.COUNTERS, data))


async def test_many_share_one_commit(tmp_path: Path) -> None:
    store, observer, _ = make(tmp_path)
    verdicts = await asyncio.gather(*(put(store, n) for n in range(100)))
    assert verdicts == [Verdict.NEW] * 100
    assert sum(observer.groups) == 100
    assert len(observer.groups) < 10
    await store.close()
    assert sum(1 for s in Archive.open(tmp_path).segments() for _ in s.frames()) == 100


async def test_the_same_one_many_times_at_once_is_stored_once(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path)
    first = asyncio.create_task(put(store))
    await asyncio.sleep(0)
    others = [asyncio.create_task(put(store)) for _ in range(10)]
    different = asyncio.create_task(put(store, seed=1))
    assert await different is Verdict.CONFLICT
    assert await first is Verdict.NEW
    assert await asyncio.gather(*others) == [Verdict.DUPLICATE] * 10
    await store.close()
    assert sum(1 for s in Archive.open(tmp_path).segments() for _ in s.frames()) == 1


async def test_who_gives_up_waiting_takes_nobody_along(tmp_path: Path) -> None:
    store, _, fatal = make(tmp_path)
    first = asyncio.create_task(put(store))
    await asyncio.sleep(0)
    first.cancel()
    assert await put(store, 1) is Verdict.NEW
    assert await put(store) is Verdict.DUPLICATE
    assert not fatal
    await store.close()


async def test_a_write_that_fails_fails_for_all_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, _, fatal = make(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sams_receiver.archive.writer.PartitionWriter.commit", full)
        found = await asyncio.gather(put(store), put(store), put(store, 1), return_exceptions=True)
        assert all(isinstance(error, NotStoredError) and error.full for error in found)
        assert store.trouble is not None
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1, "not at each group"
    assert await put(store) is Verdict.NEW
    assert "can be written again" in caplog.records[-1].getMessage()
    assert store.trouble is None
    assert not fatal
    await store.close()


async def test_too_little_free_space_takes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, _, _ = make(tmp_path, min_free_bytes=1 << 60)
    for _ in range(2):
        with pytest.raises(NotStoredError, match="min_free_bytes"):
            await put(store)
    said = [r.getMessage() for r in caplog.records if "min_free_bytes" in r.getMessage()]
    assert len(said) == 1, "once, not at each batch"
    assert "make room" in said[0]
    await store.close()


async def test_an_error_nobody_foresaw_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, fatal = make(tmp_path)

    def strange(*_: object) -> None:
        raise RuntimeError("strange")

    monkeypatch.setattr(module, "_commit", strange)
    waiting = asyncio.create_task(put(store))
    while not fatal:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert "strange" in str(fatal[0])
    waiting.cancel()
