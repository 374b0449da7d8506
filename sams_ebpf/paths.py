r"""Paths are bytes; this is the one reversible way they are shown to people.

Valid UTF-8 that can be printed stays as it is. Every other byte, and the backslash
itself, becomes `\xHH` (two lower-case hex digits).
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def show(path: bytes) -> str:
    """Printable text from which `parse` gives the same bytes back."""
    shown = []
    for character in path.decode("utf-8", "surrogateescape"):
        if character != "\\" and character.isprintable():
            shown.append(character)
        else:
            raw = character.encode("utf-8", "surrogateescape")
            shown.append("".join(f"\\x{byte:02x}" for byte in raw))
    return "".join(shown)


def parse(text: str) -> bytes:
    """Give back the bytes that `show` was given. Raises ValueError for a stray backslash."""
    parts = []
    end = 0
    for match in _ESCAPE.finditer(text):
        parts.append(_plain(text[end : match.start()]))
        parts.append(bytes.fromhex(match.group(1)))
        end = match.end()
    parts.append(_plain(text[end:]))
    return b"".join(parts)


def _plain(text: str) -> bytes:
    if "\\" in text:
        raise ValueError(f"a backslash that is no \\xHH escape in {text!r}")
    return text.encode()
