"""An ingest that is killed at any moment, two at once: nothing lost, nothing doubled."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import dask_cluster
import facts
import pytest
import synthetic
from crashes import BEGIN, SITE, archive, config, finish, ingest_with_kills, start, whole

from sams_aggregator import manifest
from sams_receiver.archive import Appender, Archive, Item, Kind


def test_killed_ingests_two_at_once(tmp_path: Path) -> None:
    ingest_with_kills(tmp_path, 5, 60, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_thirty_killed_ingests_two_at_once(tmp_path: Path) -> None:
    ingest_with_kills(tmp_path, 30, 400, seed=2)


def test_a_live_segment_is_read_up_to_its_last_whole_frame(tmp_path: Path) -> None:
    batches = archive(tmp_path / "archive", 6, seal=False)
    segment = Archive.open(tmp_path / "archive").segments()[-1]
    with segment.raw_path.open("ab") as file:
        file.write(b"half a frame")
    made = config(tmp_path, tmp_path / "archive")
    finish(made, "ingest")
    with facts.opened(tmp_path / "data") as store:
        assert facts.everything(store, SITE) == whole(tmp_path / "whole", batches)


def test_an_ingest_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    made = config(tmp_path, tmp_path / "archive")
    batches = []
    for round_ in range(3):
        chance = random.Random(round_)
        row = synthetic.Row(round_ + 1, BEGIN, None, 0, 4, "n1", 1)
        one = synthetic.epoch(chance, synthetic.claims(row, "n1"), BEGIN,
                              synthetic.harvests(BEGIN, BEGIN + 900))  # fmt: skip
        with Appender.open(tmp_path / "archive", partitions=1) as appender:
            for data in one.encoded():
                appender.append([Item(Kind.COUNTERS, data)])
                batches.append(data)
        finish(made, "ingest")
    with facts.opened(tmp_path / "data") as store:
        assert len(manifest.read(store).sets) == 1
        assert facts.everything(store, SITE) == whole(tmp_path / "whole", batches)


def test_a_rebuild_that_is_killed_goes_on_and_equals_the_increment(tmp_path: Path) -> None:
    batches = archive(tmp_path / "archive", 40)
    expected = whole(tmp_path / "whole", batches)
    file = config(tmp_path, tmp_path / "archive")
    finish(file, "ingest")
    chance = random.Random(3)
    for _ in range(3):
        process = start(file, "reprocess", "--replace", "--workers", "2")
        try:
            process.wait(timeout=chance.uniform(0.5, 2.5))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        with facts.opened(tmp_path / "data") as store:
            assert facts.everything(store, SITE) == expected
    finish(file, "reprocess", "--replace", "--workers", "2")
    with facts.opened(tmp_path / "data") as store:
        assert facts.everything(store, SITE) == expected
    assert not (tmp_path / "data" / "rebuild").exists()


@pytest.mark.timeout(240)
def test_dask_rebuilds_the_same_though_a_worker_is_killed(tmp_path: Path) -> None:
    batches = archive(tmp_path / "archive", 40)
    expected = whole(tmp_path / "whole", batches)
    file = config(tmp_path, tmp_path / "archive")
    with dask_cluster.started(tmp_path) as cluster:
        workers = [cluster.worker() for _ in range(2)]
        rebuild = start(file, "reprocess", "--dask-file", str(cluster.file))
        database = tmp_path / "data" / "rebuild" / "state.sqlite"
        deadline = time.monotonic() + 60
        while not database.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        workers[0].kill()
        _, said = rebuild.communicate(timeout=120)
        assert rebuild.returncode == 0, said.decode()
    with facts.opened(tmp_path / "data") as store:
        assert facts.everything(store, SITE) == expected
