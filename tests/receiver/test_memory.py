"""Memory stays flat, whoever sends how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import stampede

from sams_receiver.archive import Archive


def _check(folder: Path, count: int) -> None:
    found = stampede.run(folder, count)
    assert found.statuses.keys() <= {b"200", b"429"}
    hostile = count // stampede.HOSTILE
    assert found.kept == count - hostile + min(hostile, stampede.WRITERS_PER_DAY)
    frames = sum(
        segment.index().frames if segment.sealed else sum(1 for _ in segment.frames())
        for segment in Archive.open(folder / "archive").segments()
    )
    assert frames == found.kept
    # By a third of the way every partition has sealed a segment: from there on it is flat.
    early = max(point.rss for point in found.points[: len(found.points) // 3 + 1])
    late = max(point.rss for point in found.points[len(found.points) // 3 + 1 :])
    assert late < early * 1.25
    assert late < 400 << 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_over_a_million_batches(tmp_path: Path) -> None:
    _check(tmp_path, 1_200_000)
