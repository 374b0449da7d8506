"""`sams-ebpf dump`: batches as people read them, one JSON object per line."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path

from sams_ebpf import paths, wire
from sams_ebpf.errors import PartialError

log = logging.getLogger(__name__)


def command(arguments: argparse.Namespace) -> int:
    """Print every readable batch; a file that is none costs a line on stderr and exit 4."""
    failed = 0
    for name in arguments.files:
        try:
            line = json.dumps(plain(_read(name)))
        except OSError as error:
            log.error("%s: cannot be read: %s", name, error.strerror)
            failed += 1
        except wire.WireError as error:
            log.error("%s: %s", name, error)
            failed += 1
        else:
            print(line)
    sys.stdout.flush()
    if failed:
        raise PartialError(f"{failed} of {len(arguments.files)} files could not be shown")
    return 0


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read(wire.MAX_BYTES + 1)
    with Path(name).open("rb") as file:
        return file.read(wire.MAX_BYTES + 1)


def plain(data: bytes) -> dict[str, object]:
    """Give a batch as JSON data: every key it holds, known to this version or not.

    Identities are hex, paths go through `paths.show`, flags stand by name, records and
    sums are objects by column. Raises WireError for what is not a batch.
    """
    batch = wire.decode(data)
    document = wire.to_plain(data)
    columns = [paths.show(name.encode()) for name in batch.fields]
    try:
        shown = _object(document)
        shown["records"] = [_by_column(columns, row) for row in _list(document, "records")]
    except RecursionError as error:
        raise wire.WireError("not a batch: nested too deeply to be shown") from error
    shown |= {"epoch": batch.epoch.hex(), "writer": batch.writer.hex()}
    if batch.dropped is not None:
        shown["dropped"] = _object(document["dropped"]) | {"writer": batch.dropped.writer.hex()}
    shown["sums"] = _by_column(columns[wire.KEY_COLUMNS :], _list(document, "sums"))
    return shown


def flag_names(flags: int) -> list[str]:
    """Names of the bits; a bit without a name shows its number."""
    return [
        wire.FLAG_NAMES.get(1 << bit, f"bit-{bit}")
        for bit in range(flags.bit_length())
        if flags >> bit & 1
    ]


def _list(document: dict[str, object], key: str) -> list[object]:
    value = document.get(key)
    return value if isinstance(value, list) else []


def _by_column(columns: list[str], row: object) -> dict[str, object]:
    values = row if isinstance(row, list) else []
    shown = {name: _show(value) for name, value in zip(columns, values, strict=False)}
    flags = shown.get("flags")
    if isinstance(flags, int):
        shown["flags"] = flag_names(flags)
    return shown


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        return {}
    return {_text(key): _show(item) for key, item in value.items()}


def _show(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, bytes):
        return paths.show(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [_show(item) for item in value]
    if isinstance(value, dict):
        return _object(value)
    return str(value)


def _text(key: object) -> str:
    return paths.show(key) if isinstance(key, bytes) else str(key)
