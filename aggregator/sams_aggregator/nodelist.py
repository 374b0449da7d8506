"""Slurm's node lists, `n[1-3,07],gpu-[1-2]-[0-1]`, as names of nodes."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Final

from sams_ebpf.errors import SamsError

MAX_NODES: Final = 100_000
_PIECE = re.compile(r"\[([0-9,\-]+)\]|([^\[\],\s]+)")
_NONE: Final = frozenset({"", "None assigned", "None", "(null)"})


class NodeListError(SamsError):
    """Text that is no node list, or too long a one."""


@functools.lru_cache(maxsize=65536)
def expand(text: str) -> tuple[str, ...]:
    """Names of the nodes in their order, without repetition. Raises NodeListError."""
    if text in _NONE:
        return ()
    names: dict[str, None] = {}
    for part in _parts(text):
        pieces = _pieces(part)
        count = 1
        for piece in pieces:
            count *= len(piece)
        if len(names) + count > MAX_NODES:
            raise NodeListError(f"node list of more than {MAX_NODES} nodes: '{text:.80}'")
        names.update(dict.fromkeys(map("".join, itertools.product(*pieces))))
    return tuple(names)


def _parts(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
        if depth not in (0, 1):
            raise NodeListError(f"brackets of a node list do not match: '{text:.80}'")
    if depth:
        raise NodeListError(f"brackets of a node list do not match: '{text:.80}'")
    return [*parts, text[start:]]


def _pieces(part: str) -> list[list[str]]:
    pieces: list[list[str]] = []
    end = 0
    for match in _PIECE.finditer(part):
        if match.start() != end:
            break
        end = match.end()
        pieces.append(_numbers(match[1]) if match[1] is not None else [match[2]])
    if end != len(part) or not part:
        raise NodeListError(f"not a node list: '{part:.80}'")
    return pieces


def _numbers(text: str) -> list[str]:
    numbers: list[str] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        low, high = first, last if dash else first
        if not (low.isdecimal() and high.isdecimal()) or int(high) < int(low):
            raise NodeListError(f"not a range of nodes: '{item:.40}'")
        if int(high) - int(low) >= MAX_NODES or len(high) > 12:
            raise NodeListError(f"node list of more than {MAX_NODES} nodes: '{item:.40}'")
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return numbers
