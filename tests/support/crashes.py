"""Ingests that are killed at random moments, for SQLite and PostgreSQL alike."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import facts
import synthetic

from sams_aggregator import accounts, manifest
from sams_aggregator import config as cfg
from sams_aggregator import state as st
from sams_aggregator.work import Options
from sams_receiver.archive import Appender, Archive, Item, Kind, Limits

SITE = accounts.Site("UTC", "c1")
OPTIONS = Options("UTC", 600, "c1", "UTC")
BEGIN = 1_760_000_000


def archive(folder: Path, jobs: int, *, seal: bool = True) -> list[bytes]:
    """An archive in many segments, the last of them live; the batches in it."""
    chance = random.Random(jobs)
    batches = []
    for job in range(jobs):
        row = synthetic.Row(job + 1, BEGIN + job * 60, None, 0, 4, "n1", 1)
        made = synthetic.epoch(chance, synthetic.claims(row, f"n{job % 5}"), row.start,
                               synthetic.harvests(row.start, row.start + 1800, 120))  # fmt: skip
        batches += made.encoded()
    chance.shuffle(batches)
    limits = Limits(segment_frames=40)
    with Appender.open(folder, partitions=2, limits=limits) as appender:
        for at, data in enumerate(batches):
            appender.append([Item(Kind.COUNTERS, data)], cluster="c1", node=f"n{at % 7}")
        if seal:
            appender.seal()
    return batches


def config(folder: Path, source: Path, state: str = "") -> Path:
    file = folder / "config.yaml"
    file.write_text(json.dumps({
        "site": {"cluster": "c1"},
        "aggregator": {"data": str(folder / "data"), "archives": [str(source)], "workers": 1,
                       "state": state},
    }))  # fmt: skip
    return file


def start(file: Path, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sams_aggregator", *command, "--config", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(file: Path, *command: str) -> None:
    process = start(file, *command)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()


def kill_at_random(chance: random.Random, file: Path, kills: int, *command: str) -> int:
    """Keep two processes at work, and kill one or the other; how many were hit at work."""
    running = [start(file, *command) for _ in range(2)]
    hit = 0
    try:
        while hit < kills:
            time.sleep(chance.uniform(0.2, 1.6))
            at = chance.randrange(2)
            if running[at].poll() is None:
                running[at].send_signal(signal.SIGKILL)
                hit += 1
            running[at].communicate()
            running[at] = start(file, *command)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return hit


def whole(folder: Path, batches: list[bytes]) -> dict[str, Any]:
    with facts.opened(folder) as store:
        facts.add(store, "all", facts.payloads(batches), OPTIONS)
        return facts.everything(store, SITE)


def ingest_with_kills(tmp_path: Path, kills: int, jobs: int, seed: int, state: str = "") -> None:
    batches = archive(tmp_path / "archive", jobs)
    expected = whole(tmp_path / "whole", batches)
    file = config(tmp_path, tmp_path / "archive", state)
    kill_at_random(random.Random(seed), file, kills, "ingest")
    finish(file, "ingest")
    opened = st.open_state(cfg.Aggregator(data=tmp_path / "data", state=state))
    try:
        store = manifest.Store(opened, tmp_path / "data")
        assert facts.everything(store, SITE) == expected
        assert len(manifest.extents(opened)) == len(Archive.open(tmp_path / "archive").segments())
    finally:
        opened.close()
