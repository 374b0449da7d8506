"""GLOB patterns as SQLite has them, which is what sites that know SAMS write. Pure.

`*` any characters, `/` included; `?` one; `[abc]`, `[a-z]`, `[^…]` sets. A `]` right at
the start of a set is a member. Case matters, and the whole text has to match.
"""

from __future__ import annotations

import re


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Give a regexp whose `fullmatch` says what SQLite's GLOB says."""
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == "*":
            if parts[-1:] != [_MANY]:
                parts.append(_MANY)
        elif character == "?":
            parts.append(".")
        elif character == "[":
            found, at = _set(pattern, at)
            parts.append(found)
        else:
            parts.append(re.escape(character))
    return re.compile(_joined(parts), re.DOTALL)


_MANY = "\0"  # stands for `*`; no part of a pattern is this character alone
_NEVER = "(?!)"


def _joined(parts: list[str]) -> str:
    """Between two stars the first place that fits is as good as any later one: no way back."""
    pieces: list[list[str]] = [[]]
    for part in parts:
        if part == _MANY:
            pieces.append([])
        else:
            pieces[-1].append(part)
    texts = ["".join(piece) for piece in pieces]
    if len(texts) == 1:
        return texts[0]
    middle = "".join(f"(?>.*?{text})" for text in texts[1:-1])
    return f"{texts[0]}{middle}.*{texts[-1]}"


def _set(pattern: str, at: int) -> tuple[str, int]:
    """A set whose `[` stands before `at`, as a regexp, and where it ends."""
    negated = pattern[at : at + 1] == "^"
    if negated:
        at += 1
    members: list[str] = []
    before: str | None = None  # what a range may start from
    if pattern[at : at + 1] == "]":
        members.append(re.escape("]"))
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        after = pattern[at + 1 : at + 2]
        if pattern[at] == "-" and before is not None and after not in ("", "]"):
            if before <= after:
                members.append(f"{re.escape(before)}-{re.escape(after)}")
            before = None
            at += 2
        else:
            before = pattern[at]
            members.append(re.escape(before))
            at += 1
    if at >= len(pattern):
        return _NEVER, at  # without its end it matches nothing
    at += 1
    if not members:
        return (".", at) if negated else (_NEVER, at)
    return f"[{'^' if negated else ''}{''.join(members)}]", at
