# ruff: noqa: S608 - names of columns come from the schema, names of files are quoted
"""Many small sets become few large ones, sorted so that a look-up reads little of them.

Of rows with the same key only the one that counts is kept, so nothing changes for any
reader. `gc` deletes what no manifest names, once it is old enough that nobody can still
be reading it or be about to record it.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sams_aggregator import config as cfg
from sams_aggregator import manifest, tables
from sams_aggregator import state as st
from sams_aggregator.manifest import FileSet, Store
from sams_aggregator.tables import SetWriter
from sams_aggregator.work import Result

log = logging.getLogger(__name__)

# A merge takes sets of one level; FAN of them make one of the next, up to TARGET bytes.
FAN: Final = 8
TARGET_BYTES: Final = 256 << 20


def compact(store: Store, *, everything: bool = False) -> int:
    """Merge what is worth it; returns how many sets were made."""
    made = 0
    while True:
        sets = manifest.read(store).sets
        group = _choose(sets, everything=everything)
        if not group:
            return made
        new = merge(group, manifest.facts_folder(store.data))
        level = max(one.compacted for one in group) + 1
        if not manifest.replace(store.state, group, new, level=level):
            log.info("another process has changed the sets to be merged; left to it")
            return made
        made += 1


def _choose(sets: Sequence[FileSet], *, everything: bool) -> list[FileSet]:
    if everything:
        return list(sets) if len(sets) > 1 else []
    by_level: dict[int, list[FileSet]] = {}
    for one in sets:
        if one.bytes < TARGET_BYTES:
            by_level.setdefault(one.compacted, []).append(one)
    for level in sorted(by_level):
        found = sorted(by_level[level], key=lambda one: (one.begin_ns or 0, one.name))
        if len(found) >= FAN:
            group: list[FileSet] = []
            size = 0
            for one in found:
                if group and size + one.bytes > 2 * TARGET_BYTES:
                    break
                group.append(one)
                size += one.bytes
            return group if len(group) > 1 else []
    return []


def merge(sets: Sequence[FileSet], folder: Path) -> Result:
    """One set with the rows of several that count."""
    view = manifest.Manifest(folder, tuple(sets))
    with SetWriter(folder) as writer:
        connection = tables.connect(memory=tables.MEMORY)
        connection.execute(f"SET temp_directory = {tables.quoted(writer.spill())}")
        connection.execute("SET preserve_insertion_order = true")
        for table in tables.SCHEMA:
            if view.files(table):
                tables.copy(
                    connection,
                    f"SELECT * FROM {view.latest(table)} ORDER BY {tables.SORTED_BY[table]}",
                    writer.path(table),
                    level=3,
                )
        connection.close()
        size = writer.finish()
    begins = [one.begin_ns for one in sets if one.begin_ns is not None]
    ends = [one.end_ns for one in sets if one.end_ns is not None]
    lows = [one.low_job for one in sets if one.low_job is not None]
    highs = [one.high_job for one in sets if one.high_job is not None]
    known = len(lows) == len(highs) == len(sets)
    return Result(
        writer.name,
        tuple(writer.tables),
        size,
        min(begins, default=None),
        max(ends, default=None),
        0,
        0,
        (),
        (),
        min(lows, default=None) if known else None,
        max(highs, default=None) if known else None,
    )


def gc(store: Store, grace_s: int) -> tuple[int, int]:
    """Delete sets that no manifest names and that are older than grace_s; number and bytes."""
    folder = manifest.facts_folder(store.data)
    found = [path for path in folder.iterdir() if path.is_dir()]
    # Read after listing: a set recorded in between is named.
    named = {one.name for one in manifest.read(store).sets}
    number = size = 0
    oldest = time.time() - grace_s
    for path in found:
        try:
            if path.name in named or path.stat().st_mtime > oldest:
                continue
            size += sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        except FileNotFoundError:
            continue
        shutil.rmtree(path, ignore_errors=True)
        number += 1
    return number, size


def gc_command(arguments: argparse.Namespace) -> int:
    """`gc`."""
    config = cfg.load(arguments)
    state = st.open_existing(config.aggregator)
    try:
        number, size = gc(Store(state, config.aggregator.data), arguments.grace)
    finally:
        state.close()
    print(f"{number} sets deleted, {size} bytes")
    return 0
