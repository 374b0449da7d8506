"""`sams-receiver archive`: what people look at an archive with. Changes nothing."""

from __future__ import annotations

import argparse
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import msgspec

from sams_ebpf import paths, wire
from sams_ebpf.errors import PartialError, UsageError
from sams_receiver.archive import Archive, ArchiveError, FormatError, Frame, Kind, Problem, Segment
from sams_receiver.archive import format as fmt

log = logging.getLogger(__name__)


def verify(arguments: argparse.Namespace) -> int:
    """Read every frame. Raises PartialError if anything is damaged or stored twice."""
    archive = Archive.open(arguments.folder)
    problems: list[Problem] = []
    lost: list[str] = []
    frames = size = doubled = unreadable = 0
    partition, places = -1, _Places()
    for segment in archive.segments():
        if segment.partition != partition:
            doubled += places.doubled()
            partition, places = segment.partition, _Places()
        try:
            for frame in segment.frames(on_damage=problems.append):
                frames += 1
                size += len(frame.data)
                tag = fmt.tag_of_frame(frame)
                if tag is None:
                    unreadable += 1
                # What the aggregator keeps, rows of sacct say, may well be read twice.
                elif frame.kind in (Kind.COUNTERS, Kind.UPSTREAM_JSON):
                    places.add(tag)
            if segment.sealed:
                segment.check_ending()
        except (ArchiveError, FormatError, OSError) as error:
            lost.append(_said(segment, error))
    doubled += places.doubled()
    for line in (*map(str, problems), *lost):
        print(line)
    print(
        f"{frames} frames, {size} bytes of payload, {len(problems)} damaged ranges,"
        f" {len(lost)} segments with damage to themselves, {doubled} stored twice,"
        f" {unreadable} not readable by this version"
    )
    if problems or lost or doubled:
        raise PartialError(f"{arguments.folder}: not everything is good; see the lines above")
    return 0


class _Places:
    """Counts what is there twice; takes 8 bytes a frame, as there may be hundreds of millions."""

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(256)]

    def add(self, tag: fmt.Tag) -> None:
        digest = blake2b(tag.key + tag.sequence.to_bytes(8, "big"), digest_size=8).digest()
        self._buckets[digest[0]].append(int.from_bytes(digest, "big"))

    def doubled(self) -> int:
        return sum(a == b for one in self._buckets for a, b in pairwise(sorted(one)))


def list_(arguments: argparse.Namespace) -> int:
    """One line per segment."""
    archive = Archive.open(arguments.folder)
    print(f"{'segment':<17} {'state':<6} {'bytes':>12} {'raw':>12} {'frames':>8}  last received")
    lost = _Lost(arguments.folder)
    for segment in archive.segments():
        try:
            line = _line(segment)
        except (ArchiveError, FormatError, OSError) as error:
            lost.add(_said(segment, error))
        else:
            print(line)
    return lost.close()


def _line(segment: Segment) -> str:
    state = "sealed" if segment.sealed else "live"
    frames, last_ns = _count(segment)
    last = _time(last_ns) if last_ns else "-"
    return (
        f"{segment.id!s:<17} {state:<6} {segment.stored_bytes():>12} {segment.end():>12}"
        f" {frames:>8}  {last}"
    )


def cat(arguments: argparse.Namespace) -> int:
    """Frames as JSON lines."""
    archive = Archive.open(arguments.folder)
    names = {str(segment.id) for segment in archive.segments()}
    if arguments.segment is not None and arguments.segment not in names:
        raise UsageError(f"--segment {arguments.segment}: no such segment; see 'archive list'")
    lost = _Lost(arguments.folder)
    for segment in archive.segments():
        if arguments.segment not in (None, str(segment.id)):
            continue
        for frame in _frames(segment, lost):
            shown = _show(frame, arguments)
            if shown is not None:
                print(json.dumps({"segment": str(segment.id), **shown}, default=_plain))
    return lost.close()


def _frames(segment: Segment, lost: _Lost) -> Iterator[Frame]:
    try:
        yield from segment.frames(on_damage=lambda problem: lost.add(str(problem)))
    except (ArchiveError, FormatError, OSError) as error:
        lost.add(_said(segment, error))


def _said(segment: Segment, error: Exception) -> str:
    text, head = str(error), f"segment {segment.id}: "
    return text if text.startswith(head) else head + text


class _Lost:
    """What could not be shown: named at once, and counted for the exit status."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._any = False

    def add(self, text: str) -> None:
        log.error("%s", text)
        self._any = True

    def close(self) -> int:
        if self._any:
            raise PartialError(f"{self._folder}: not everything is good; see the lines above")
        return 0


def _count(segment: Segment) -> tuple[int, int]:
    if segment.sealed:
        index = segment.index()
        return index.frames, index.last_ns
    counts: Counter[str] = Counter()
    last = 0
    for frame in segment.frames():
        counts["frames"] += 1
        last = max(last, frame.received_ns)
    return counts["frames"], last


def _show(frame: Frame, arguments: argparse.Namespace) -> dict[str, object] | None:
    try:
        kind = Kind(frame.kind).name.lower().replace("_", "-")
    except ValueError:
        kind = f"kind-{frame.kind}"
    shown: dict[str, object] = {
        "offset": frame.offset,
        "kind": kind,
        "received": _time(frame.received_ns),
        "vouched": frame.vouched,
    }
    node: object = None
    job: object = None
    if frame.kind == Kind.COUNTERS:
        try:
            header = wire.decode_header(frame.data)
            document = wire.to_plain(frame.data)
        except wire.WireError as error:
            return {**shown, "error": str(error)}
        node, job = header.claims.node, header.claims.job_id
        if not arguments.records:
            document.pop("records", None)
        shown["batch"] = document
    elif frame.kind == Kind.UPSTREAM_JSON:
        try:
            held = fmt.unpack_upstream(frame.data)
            node, job = held.node, int(held.job)
        except (FormatError, ValueError) as error:
            return {**shown, "error": str(error)}
        shown["upstream"] = msgspec.structs.asdict(held)
    else:
        shown["bytes"] = len(frame.data)
    if arguments.node not in (None, node) or arguments.job not in (None, job):
        return None
    return shown


def _time(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds")


def _plain(value: object) -> str:
    """JSON has no bytes: text where it is text, ids as hex."""
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} in a batch")
    if len(value) in (8, 16, 32) and not value.isascii():
        return value.hex()
    return paths.show(value)


__all__ = ["cat", "list_", "verify"]
