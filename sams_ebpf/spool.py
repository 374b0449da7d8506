"""The node's spool: one file per batch, whole and on disk before anyone counts on it.

`<folder>/<epoch>-<generation>-<sequence>-<writer>-<kind>.msgpack`, where kind is
`delta`, `full`, `final` or `tombstone`: all that is needed to choose what to send or
to drop without opening a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sams_ebpf import durable, wire

_NAME = re.compile(
    r"(?P<epoch>[0-9a-f]{32})-(?P<generation>\d{8,19})-(?P<sequence>\d{10,19})"
    r"-(?P<writer>[0-9a-f]{16})-(?P<kind>delta|full|final|tombstone)\.msgpack"
)


class Entry(NamedTuple):
    """A batch in the spool, told from its file name alone."""

    identity: wire.Identity
    kind: str

    @property
    def name(self) -> str:
        """File name; sorts by epoch, generation, sequence."""
        epoch, generation, writer, sequence = self.identity
        return f"{epoch.hex()}-{generation:08d}-{sequence:010d}-{writer.hex()}-{self.kind}.msgpack"


def entry_of(header: wire.Header) -> Entry:
    """Name the place of a batch."""
    if header.kind == "tombstone":
        kind = "tombstone"
    elif header.final is not None:
        kind = "final"
    else:
        kind = "full" if header.full else "delta"
    return Entry(header.identity, kind)


def parse(name: str) -> Entry | None:
    """Read a file name; None for what is not a batch (a temporary file, say)."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    identity = wire.Identity(
        bytes.fromhex(match["epoch"]),
        int(match["generation"]),
        bytes.fromhex(match["writer"]),
        int(match["sequence"]),
    )
    return Entry(identity, match["kind"])


def put(folder: Path, batch: wire.Batch) -> Path:
    """Write a batch durably. Raises OSError, and then the spool is as it was before."""
    path = folder / entry_of(batch).name
    durable.write(path, wire.encode(batch))
    return path
