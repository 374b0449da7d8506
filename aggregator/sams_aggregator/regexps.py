r"""What can be known of a Python regular expression without running it. Pure.

Two questions are asked of each rule's pattern. Which RE2 pattern says yes to every plain
path that `re` says yes to? And can backtracking on a name that some user has chosen take
long? Both are answered from the parse tree of `re` itself, so that no difference in
spelling between the two languages matters (`{,3}`, `[[:alpha:]]`, `\Z`, `$`): whatever
is not on the short list below is answered with "not known", which is always safe.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from re import _constants as c  # type: ignore[attr-defined]  # the tree has no public name
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final, NamedTuple

# Flags that change nothing on one line of printable ASCII; IGNORECASE is translated.
_HARMLESS: Final = re.UNICODE | re.ASCII | re.MULTILINE | re.DOTALL | re.VERBOSE
_MOST_REPEATS: Final = 1000  # RE2 takes no more
# Bounded choices of a linear pattern multiply; this many ways through it are still quick.
_MOST_WAYS: Final = 64

_CATEGORIES: Final = {
    c.CATEGORY_DIGIT: r"\d",
    c.CATEGORY_NOT_DIGIT: r"\D",
    c.CATEGORY_SPACE: r"\s",
    c.CATEGORY_NOT_SPACE: r"\S",
    c.CATEGORY_WORD: r"\w",
    c.CATEGORY_NOT_WORD: r"\W",
}
_ANCHORS: Final = {
    c.AT_BEGINNING: "^",
    c.AT_BEGINNING_STRING: "^",
    c.AT_END: "$",  # RE2's is the very end; on one line so is that of `re`
    c.AT_END_STRING: "$",
    c.AT_BOUNDARY: r"\b",
}


class _Unknown(Exception):  # noqa: N818 - an answer, not an error
    """Not on the list of what is sure."""


def to_re2(pattern: str) -> str | None:
    """Give RE2 syntax that matches all plain paths that `pattern` matches, or None.

    Plain: characters from blank to tilde only. Both are taken as anchored at the start.
    The answer may match more than `pattern` does, never less.
    """
    try:
        tree = _parse(pattern)
        flags = tree.state.flags
        if flags & ~(_HARMLESS | re.IGNORECASE):
            return None
        body = _sequence(tree)
    except (_Unknown, RecursionError):
        return None
    return f"(?i:{body})" if flags & re.IGNORECASE else f"(?:{body})"


def _parse(pattern: str) -> Any:  # noqa: ANN401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of spellings that may mean something else one day
        return parser.parse(pattern)


def _sequence(tree: Any) -> str:  # noqa: ANN401 - nodes of the tree are plain tuples
    return "".join(_node(op, value) for op, value in tree)


def _node(op: Any, value: Any) -> str:  # noqa: ANN401
    if op is c.LITERAL:
        return _character(value)
    if op is c.NOT_LITERAL:
        return f"[^{_character(value)}]"
    if op is c.ANY:
        return "."
    if op is c.IN:
        return f"[{''.join(_member(*item) for item in value)}]"
    if op is c.BRANCH:
        return f"(?:{'|'.join(_sequence(branch) for branch in value[1])})"
    if op is c.SUBPATTERN:
        _, added, removed, body = value
        if (added | removed) & ~(_HARMLESS | re.IGNORECASE):
            raise _Unknown
        fold = "i" if added & re.IGNORECASE else "-i" if removed & re.IGNORECASE else ""
        return f"(?{fold}:{_sequence(body)})"
    if op in (c.MAX_REPEAT, c.MIN_REPEAT):
        low, high, body = value
        return f"(?:{_sequence(body)}){_count(low, high)}"
    if op is c.AT and value in _ANCHORS:
        return _ANCHORS[value]
    raise _Unknown


def _character(code: int) -> str:
    if not 0x20 <= code <= 0x7E:
        raise _Unknown  # folding of case may relate it to ASCII in one engine only
    return rf"\x{{{code:x}}}"


def _member(op: Any, value: Any) -> str:  # noqa: ANN401
    if op is c.NEGATE:
        return "^"
    if op is c.LITERAL:
        return _character(value)
    if op is c.RANGE:
        return f"{_character(value[0])}-{_character(value[1])}"
    if op is c.CATEGORY and value in _CATEGORIES:
        return _CATEGORIES[value]
    raise _Unknown


def _count(low: int, high: int) -> str:
    if low > _MOST_REPEATS or (high is not c.MAXREPEAT and high > _MOST_REPEATS):
        raise _Unknown
    return f"{{{low},}}" if high is c.MAXREPEAT else f"{{{low},{high}}}"


class Reach(NamedTuple):
    """How far into a path a pattern can see, counted in slashes.

    needs: what a match is, and its groups, does not depend on anything behind this many
        slashes, whatever it is, if what is before is plain; None: not known.
    fixed: RE2 patterns of the first one, two, … parts of the path, each with the slash
        at its end. Where one of them does not match, nothing that begins so can.
    """

    needs: int | None
    fixed: tuple[str, ...]


def reach(pattern: str) -> Reach:
    """Tell how far a pattern sees; sure where that part of the path is plain."""
    if to_re2(pattern) is None:
        return Reach(None, ())
    tree = _parse(pattern)
    fold = "i" if tree.state.flags & re.IGNORECASE else ""
    nodes = list(tree)
    if nodes and _takes_any(nodes[-1]):
        nodes.pop()  # outside of a group it takes what it likes, and matches in any case
    flat = _flat(nodes)
    counts = [_slashes(op, value) for op, value in flat]
    fixed = []
    for at, (node, count) in enumerate(zip(flat, counts, strict=True)):
        if node == _SLASH:
            fixed.append(f"(?{fold}:{_sequence(flat[: at + 1])})")
        elif count != 0:
            break
    if None in counts:
        return Reach(None, tuple(fixed))
    total = sum(count for count in counts if count is not None)
    # A match that always ends in a slash needs nothing behind it; any other has to see
    # that a slash it cannot take follows.
    return Reach(total if flat[-1:] == [_SLASH] else total + 1, tuple(fixed))


_SLASH: Final = (c.LITERAL, ord("/"))


def _takes_any(node: Any) -> bool:  # noqa: ANN401
    op, value = node
    if op not in (c.MAX_REPEAT, c.MIN_REPEAT):
        return False
    low, high, body = value
    return bool(low == 0 and high == c.MAXREPEAT and list(body) == [(c.ANY, None)])


def _flat(nodes: Iterable[Any]) -> list[Any]:
    """Nodes in order, those of groups without the brackets."""
    flat: list[Any] = []
    for op, value in nodes:
        if op is c.SUBPATTERN and not (value[1] | value[2]) & re.IGNORECASE:
            flat += _flat(value[3])
        else:
            flat.append((op, value))
    return flat


def _slashes(op: Any, value: Any) -> int | None:  # noqa: ANN401
    """The most slashes that a node can take; None: any number."""
    if op in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN):
        return 1 if _characters(op, value, folded=False) & 1 << ord("/") else 0
    if op is c.AT:
        return 0
    if op is c.SUBPATTERN:
        return _all_slashes(value[3])
    if op is c.BRANCH:
        counts = [_all_slashes(branch) for branch in value[1]]
        return None if None in counts else max(count for count in counts if count is not None)
    _, high, body = value
    count = _all_slashes(body)
    if not count:
        return count
    return None if high == c.MAXREPEAT else int(high) * count


def _all_slashes(tree: Any) -> int | None:  # noqa: ANN401
    total = 0
    for op, value in tree:
        count = _slashes(op, value)
        if count is None:
            return None
        total += count
    return total


# Sets of characters as bits: one each for ASCII; of all others, the digits, the rest of
# what makes words, the blanks, and what is left.
_DIGITS, _LETTERS, _BLANKS, _LEFT = (1 << bit for bit in range(128, 132))
_OTHERS: Final = _DIGITS | _LETTERS | _BLANKS | _LEFT
_ALL: Final = (1 << 132) - 1
_BEYOND_ASCII: Final = {
    c.CATEGORY_DIGIT: _DIGITS,
    c.CATEGORY_NOT_DIGIT: _LETTERS | _BLANKS | _LEFT,
    c.CATEGORY_SPACE: _BLANKS,
    c.CATEGORY_NOT_SPACE: _DIGITS | _LETTERS | _LEFT,
    c.CATEGORY_WORD: _DIGITS | _LETTERS,
    c.CATEGORY_NOT_WORD: _BLANKS | _LEFT,
}


def is_linear(pattern: str) -> bool:
    """Whether `re` needs time in proportion to the text's length for it, and no more.

    True is sure: at every repeat one look at the next character tells whether to go on,
    so there is nothing to come back to. False means only that this is not known.
    """
    try:
        tree = _parse(pattern)
        folded = bool(tree.state.flags & re.IGNORECASE)
        _, _, ways = _walk(tree, 0, folded=folded)
    except (_Unknown, RecursionError):
        return False
    return ways <= _MOST_WAYS


def _walk(tree: Any, after: int, *, folded: bool) -> tuple[int, bool, int]:  # noqa: ANN401
    """First characters, whether it may be empty, and ways through, of a sequence.

    after: characters that may come next once the sequence is done; 0 at the very end,
    where a match is simply over and nothing is tried again.
    """
    first, empty, ways = after, True, 1
    for op, value in reversed(list(tree)):
        item_first, item_empty, item_ways = _item(op, value, first, folded=folded)
        first = item_first | first if item_empty else item_first
        empty = empty and item_empty
        ways *= item_ways
    return first, empty, ways


def _item(op: Any, value: Any, after: int, *, folded: bool) -> tuple[int, bool, int]:  # noqa: ANN401
    if op in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN):
        return _characters(op, value, folded=folded), False, 1
    if op is c.AT:
        return 0, True, 1
    if op is c.SUBPATTERN:
        _, added, removed, body = value
        if (added | removed) & re.IGNORECASE:
            raise _Unknown
        return _walk(body, after, folded=folded)
    if op is c.BRANCH:
        parts = [_walk(branch, after, folded=folded) for branch in value[1]]
        ways = sum(part[2] for part in parts)
        seen = 0
        overlap = False
        for first, _, _ in parts:
            overlap = overlap or bool(seen & first)
            seen |= first
        if not overlap:
            ways = max(part[2] for part in parts)
        return seen, any(part[1] for part in parts), ways
    if op in (c.MAX_REPEAT, c.MIN_REPEAT):
        return _repeat(value, after, folded=folded)
    raise _Unknown


def _repeat(value: Any, after: int, *, folded: bool) -> tuple[int, bool, int]:  # noqa: ANN401
    low, high, body = value
    own, _, _ = _walk(body, 0, folded=folded)
    again = own | after if high == c.MAXREPEAT or high > 1 else after
    first, empty, ways = _walk(body, again, folded=folded)
    choice = low != high and bool(own & after)
    if high == c.MAXREPEAT or high > _MOST_WAYS:
        if empty or choice or ways > 1:
            raise _Unknown
        return own, low == 0, 1
    if empty and high > 1:
        raise _Unknown
    ways = max(ways, 1) ** high if high else 1
    if choice:
        ways *= high - low + 1
    if ways > _MOST_WAYS:
        raise _Unknown
    return first if empty else own, low == 0 or empty, ways


def _characters(op: Any, value: Any, *, folded: bool) -> int:  # noqa: ANN401
    """Bits of all characters that one such node may match; rather too many than too few."""
    if op is c.ANY:
        return _ALL
    members = [(c.LITERAL, value)] if op in (c.LITERAL, c.NOT_LITERAL) else list(value)
    negated = op is c.NOT_LITERAL or members[0][0] is c.NEGATE
    whole = 0  # bits of which every character is a member
    some = 0  # bits of which some are
    for kind, item in members:
        if kind is not c.NEGATE:
            all_of, any_of = _class(kind, item)
            whole |= all_of
            some |= any_of
    if negated:
        # What folding of case adds to a negated set is only taken away from its opposite.
        return _ALL & ~whole
    return _fold(some) if folded else some


def _class(kind: Any, item: Any) -> tuple[int, int]:  # noqa: ANN401
    """Bits of which all, and of which at least one, character is meant."""
    if kind is c.CATEGORY:
        test = re.compile(_CATEGORIES[item])
        mask = _BEYOND_ASCII[item]
        for code in range(128):
            if test.match(chr(code)):
                mask |= 1 << code
        return mask, mask
    low, high = (item, item) if kind is c.LITERAL else item
    mask = 0
    for code in range(low, min(high, 127) + 1):
        mask |= 1 << code
    return mask, mask | (_OTHERS if high > 127 else 0)


def _fold(mask: int) -> int:
    folded = mask | _OTHERS  # a few letters beyond ASCII fold into it
    for code in range(128):
        if mask & (1 << code):
            folded |= 1 << ord(chr(code).lower()) | 1 << ord(chr(code).upper())
    return folded
