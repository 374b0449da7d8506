r"""From the path of an executable to the software it is: regexp rules and rewrites.

The rules are those of SAMS (`sams.software.Regexp`), taken as they are: a list of rules
of which the first match wins, and a list of rewrites that then correct the result. All
regexps are Python's, anchored at the start only. What decides is always `re`; RE2 only
says beforehand, for plain paths, which rules are worth a try (see `regexps`).

Paths are bytes. They are matched as text, UTF-8 with `surrogateescape`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, NamedTuple

import re2
import yaml

from sams_aggregator import regexps
from sams_ebpf import settings
from sams_ebpf.errors import UsageError

SECTION: Final = "sams.software.Regexp"
FIELDS: Final = ("software", "version", "versionstr")
TIME_LIMIT_S: Final = 0.5  # CPU seconds for one path, where a regexp could take for ever

# Part of every version of rules: raise it when the same rules would map otherwise.
_SEMANTICS: Final = 1
_RULE_KEYS: Final = (*FIELDS, "match", "user_provided", "ignore")
_TOP_KEYS: Final = ("rules", "rewrite", "stop_on_rewrite_match")
_RE2_MEMORY: Final = 64 << 20  # bytes for the states of the automaton
_MOST_REMEMBERED: Final = 1 << 20
_MOST_LATE: Final = 10_000
_DEEPEST: Final = 64  # slashes; what is settled further down is settled by the whole path
_NEVER: Final = _DEEPEST + 1
_TRIALS: Final = 50_000
_HINT: Final = 6  # bytes that tell one tree of folders from another
_CONVERSION: Final = re.compile(r"%(?:%|\([^)]*\)[#0\- +]*[0-9]*(?:\.[0-9]+)?[sra])|(%)")

Groups = Mapping[str, str | None]


class Software(NamedTuple):
    """What a path was mapped to. `local_version` is the rules' `versionstr`."""

    software: str
    version: str
    local_version: str
    user_provided: bool = False
    ignore: bool = False


class Finding(NamedTuple):
    """Something about one rule that its author wants to know; `rule` counts from 1."""

    rule: int
    text: str


class RulesError(UsageError):
    """Rules that cannot be followed: one line with file, line, rule number and key."""


class _TimeLimitError(Exception):
    """A match used up the time of its path."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `rules`. `risky`: its time could grow out of bounds with the path."""

    number: int
    pattern: str
    regex: re.Pattern[str]
    templates: tuple[str, str, str]
    user_provided: bool
    ignore: bool
    risky: bool


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One entry of `rewrite`: all of `match` have to match for `update` to be applied."""

    number: int
    match: tuple[tuple[str, re.Pattern[str]], ...]
    update: tuple[tuple[str, str], ...]
    risky: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a path got its software: for people who write rules."""

    rule: int
    groups: dict[str, str | None]
    rewrites: tuple[int, ...]
    result: Software


class Rules:
    """A checked set of rules. Immutable but for what it remembers of results.

    own: how many of them, at the beginning, are the site's; the others are of this package.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        rewrites: Sequence[Rewrite],
        *,
        stop_on_rewrite_match: bool = False,
        warnings: Sequence[str] = (),
        own: int | None = None,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        self.rules = tuple(rules)
        self.own = len(self.rules) if own is None else own
        self.rewrites = tuple(rewrites)
        self.stop_on_rewrite_match = stop_on_rewrite_match
        self.warnings = tuple(warnings)
        self.version = _version(self.rules, self.rewrites, stop=stop_on_rewrite_match)
        self._limit_s = time_limit_s
        self._rewrites_risky = any(rewrite.risky for rewrite in self.rewrites)
        self._known: list[dict[object, Software]] = [{} for _ in self.rules]
        # Only what a template uses decides the result: what to take from a match.
        self._used = [_used(rule) for rule in self.rules]
        self._late: dict[bytes, int] = {}  # paths that took too long, not to be tried again
        self._everything = tuple(range(len(self.rules)))
        self._filter, self._unfiltered = _prefilter(self.rules)
        self._beginnings = _Beginnings(self.rules)

    @classmethod
    def from_config(
        cls,
        document: object,
        where: str,
        *,
        ready_made: Sequence[str] = (),
        line_of: Callable[[tuple[str | int, ...]], int | None] | None = None,
    ) -> Rules:
        """Check plain YAML data: `rules`, `rewrite`, `stop_on_rewrite_match`.

        They may stand under `sams.software.Regexp:`, as in upstream's file. `ready_made`
        names rules of this package that are tried after the site's own; they rewrite
        nothing. Raises RulesError, which starts with `where` and, if `line_of` knows it,
        the line.
        """
        reader = _Reader(where, line_of)
        rules, rewrites, stop = reader.read(document)
        own = len(rules)
        for name in ready_made:
            text, origin = ready_made_text(name)
            more = _Reader(origin, None)
            extra, _, _ = more.read(yaml.safe_load(text))
            rules += [_renumbered(rule, len(rules) + n) for n, rule in enumerate(extra, 1)]
        return cls(
            rules,
            rewrites,
            stop_on_rewrite_match=stop,
            warnings=tuple(reader.warnings),
            own=own,
        )

    @classmethod
    def from_file(cls, path: Path, *, ready_made: Sequence[str] = ()) -> Rules:
        """Read a YAML file of rules; errors name its line."""
        document = settings.read_yaml(path)
        return cls.from_config(
            document,
            str(path),
            ready_made=ready_made,
            line_of=lambda keys: line_of(path, keys),
        )

    def document(self) -> dict[str, Any]:
        """Plain data of which `from_config` makes the same rules; ready-made ones stand in it."""
        return {
            "rules": [
                {
                    "match": rule.pattern,
                    **dict(zip(FIELDS, rule.templates, strict=True)),
                    "user_provided": rule.user_provided,
                    "ignore": rule.ignore,
                }
                for rule in self.rules
            ],
            "rewrite": [
                {
                    "match": {name: regex.pattern for name, regex in rewrite.match},
                    "update": dict(rewrite.update),
                }
                for rewrite in self.rewrites
            ],
            "stop_on_rewrite_match": self.stop_on_rewrite_match,
        }

    def map(self, path: bytes) -> Software | None:
        """Give the software of one path; None if no rule matches."""
        return self.map_many([path])[0]

    def map_many(
        self,
        paths: Iterable[bytes],
        on_timeout: Callable[[bytes, int], None] | None = None,
    ) -> list[Software | None]:
        """Give the software of each path, in order.

        A path at which a rule uses up its time gets None, and `on_timeout` is told path
        and rule number: it is not passed on to later rules, which might misname it.
        """
        out: list[Software | None] = []
        add = out.append
        quick = self._quick
        beginnings = self._beginnings
        before = beginnings.paths
        hints, known, cuts = beginnings.hints, beginnings.known, beginnings.cuts
        with _time_limits(self._limit_s) as limit:
            for path in paths:
                # Most paths begin like an earlier one that is settled: nothing but two
                # look-ups for these. All else is left to `_quick`.
                cut = hints.get(path[:_HINT])
                found: Software | int | None = 0
                while cut is not None and (beginning := cut(path)) is not None:
                    found = known.get(beginning[0], 0)
                    if found.__class__ is not int:
                        break
                    cut = cuts[found] if found else None
                if found.__class__ is not int:
                    add(found)  # type: ignore[arg-type]
                    continue
                beginnings.paths = before + len(out)
                result = quick(path)
                if result is not False:
                    add(result)
                    continue
                text = _text(path)
                late = self._late.get(path)
                if late is None:
                    try:
                        add(self._first(text, self._candidates(text), limit))
                        continue
                    except _TimeLimitError as error:
                        late = int(str(error))
                        if len(self._late) < _MOST_LATE:
                            self._late[path] = late
                add(None)
                if on_timeout is not None:
                    on_timeout(path, late)
        beginnings.paths = before + len(out)
        return out

    def _quick(self, path: bytes) -> Software | Literal[False] | None:
        """Answer for the usual path; False where it takes a closer look."""
        if self._beginnings.useful:
            known = self._settled(path)
            if known is not False:
                return known
        if self._filter is None or not path.isascii():
            return False
        text = path.decode("ascii")
        if not text.isprintable():
            return False
        if self._unfiltered:
            return False
        hits = self._filter.Match(path)
        if not hits:
            return False
        if len(hits) == 1:
            return None
        index = min(hits)
        rule = self.rules[index]
        if rule.risky:
            return False
        found = rule.regex.match(text)
        if found is None:
            return False
        result: Software | Literal[False] = self._known[index].get(self._used[index](found), False)
        return result

    def _settled(self, path: bytes) -> Software | Literal[False] | None:
        """Look for a beginning of the path that settles it; False if there is none."""
        beginnings = self._beginnings
        way: list[tuple[bytes, int]] = []
        depth = 2
        while True:
            cut = beginnings.cuts[depth](path)
            if cut is None:
                beginnings.too_short(way, path.count(b"/"))
                return False
            beginning = cut[0]
            found = beginnings.known.get(beginning, False)
            new = found is False
            if found is False:
                found = self._settle(beginning, depth)
                beginnings.remember(beginning, found)
            if not isinstance(found, int):
                beginnings.arrived(path, way, depth, new=new)
                return found
            way.append((beginning, depth))
            depth = found

    def _settle(self, beginning: bytes, depth: int) -> Software | int | None:
        """What all paths are that begin so, with `depth` slashes; else the depth to try next."""
        text = _text(beginning)
        if not (text.isascii() and text.isprintable()):
            return _NEVER
        hits = None if self._filter is None else self._filter.Match(beginning)
        undecided = self._beginnings.undecided(beginning, depth)
        if self._rewrites_risky or not hits or undecided is None:
            return _NEVER
        for index in sorted(hits):
            if index >= undecided or index == len(self.rules):
                break
            if self.rules[index].risky:
                return _NEVER
            found = self.rules[index].regex.match(text)
            if found is not None:
                return self._result(index, found, _no_limit_here)
        return min(depth + 1, _NEVER) if undecided < len(self.rules) else None

    def explain(self, path: bytes) -> Explanation | None:
        """Tell which rule and rewrites make what of this path."""
        text = _text(path)
        with _time_limits(self._limit_s) as limit:
            try:
                for index in self._candidates(text):
                    found = self._match(index, text, limit)
                    if found is not None:
                        groups = found.groupdict()
                        result, applied = self._build(index, groups, limit)
                        return Explanation(index + 1, groups, applied, result)
            except _TimeLimitError as error:
                raise RulesError(
                    f"rule {error}: takes longer than {self._limit_s} s for this path;"
                    " write it without nested or adjacent repeats of the same characters"
                ) from None
        return None

    def audit(self, paths: Iterable[bytes]) -> list[Finding]:
        """Find the rules that match none of the paths, or only paths of earlier rules."""
        matched = [0] * len(self.rules)
        won = [0] * len(self.rules)
        winners: list[dict[int, int]] = [{} for _ in self.rules]
        with _time_limits(self._limit_s) as limit:
            for path in paths:
                if path in self._late:
                    continue
                text = _text(path)
                winner: int | None = None
                for index in self._candidates(text):
                    try:
                        if self._match(index, text, limit) is None:
                            continue
                    except _TimeLimitError:
                        continue
                    matched[index] += 1
                    if winner is None:
                        winner = index
                        won[index] += 1
                    else:
                        winners[index][winner] = winners[index].get(winner, 0) + 1
        return [
            finding
            for index, rule in enumerate(self.rules)
            if (finding := _finding(rule, matched[index], won[index], winners[index]))
        ]

    def _candidates(self, text: str) -> Sequence[int]:
        """Indices of the rules that may match, in order."""
        if self._filter is None or not (text.isascii() and text.isprintable()):
            return self._everything
        hits = self._filter.Match(text)
        if not hits:
            # Not even the one that always matches: RE2 gave up, its answer says nothing.
            return self._everything
        if len(hits) == 1 and not self._unfiltered:
            return ()
        return sorted({*hits, *self._unfiltered} - {len(self.rules)})

    def _first(self, text: str, numbers: Sequence[int], limit: _Limit) -> Software | None:
        for index in numbers:
            found = self._match(index, text, limit)
            if found is None:
                continue
            return self._result(index, found, limit)
        return None

    def _result(self, index: int, found: re.Match[str], limit: _Limit) -> Software:
        known = self._known[index]
        key = self._used[index](found)
        result = known.get(key)
        if result is None:
            result, _ = self._build(index, found.groupdict(), limit)
            if len(known) >= _MOST_REMEMBERED:
                known.clear()
            known[key] = result
        return result

    def _match(self, index: int, text: str, limit: _Limit) -> re.Match[str] | None:
        rule = self.rules[index]
        if not rule.risky:
            return rule.regex.match(text)
        with limit(rule.number):
            return rule.regex.match(text)

    def _build(self, index: int, groups: Groups, limit: _Limit) -> tuple[Software, tuple[int, ...]]:
        rule = self.rules[index]
        software, version, versionstr = rule.templates
        fields = {
            "software": software % groups,
            "version": version % groups,
            "versionstr": versionstr % groups,
        }
        applied: list[int] = []
        if self._rewrites_risky:
            with limit(rule.number):
                self._rewrite_all(rule, fields, applied)
        else:
            self._rewrite_all(rule, fields, applied)
        result = Software(
            _storable(fields["software"]),
            _storable(fields["version"]),
            _storable(fields["versionstr"]),
            rule.user_provided,
            rule.ignore,
        )
        return result, tuple(applied)

    def _rewrite_all(self, rule: Rule, fields: dict[str, str], applied: list[int]) -> None:
        for rewrite in self.rewrites:
            if _rewrite(rewrite, fields, rule):
                applied.append(rewrite.number)
                if self.stop_on_rewrite_match:
                    break


_Cut = Callable[[bytes], "re.Match[bytes] | None"]


class _Cuts(dict[int, _Cut]):
    """By a number of slashes: what cuts a path behind that many, if it has them."""

    def __missing__(self, slashes: int) -> _Cut:
        # Unrolled: a repeated group takes twice the time.
        found = _no_beginning if slashes > _DEEPEST else re.compile(rb"[^/]*+/" * slashes).match
        self[slashes] = found
        return found


def _no_beginning(_path: bytes) -> None:
    return None


class _Beginnings:
    """Beginnings of paths and what they settle: see `regexps.reach`.

    known: for a beginning, with a slash at its end, the software of all paths that have
    it, or the number of slashes at which to look next. hints: for the first bytes of a
    path, where it may be settled; nothing depends on their being right. paths: how many were
    mapped; misses: at how many of them something new was learned, or nothing at all.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.known: dict[bytes, Software | int | None] = {}
        self.hints: dict[bytes, _Cut] = {}
        self.cuts = _Cuts()
        self._depths: dict[bytes, int] = {}
        self.useful = True
        self._reach = [regexps.reach(rule.pattern) for rule in rules]
        self._sets: dict[int, tuple[re2.Set, list[int]] | None] = {}
        self.paths = self.misses = 0

    def undecided(self, beginning: bytes, depth: int) -> int | None:
        """Index of the first rule for which more of the path may matter, or their number.

        None: that could not be told.
        """
        if depth not in self._sets:
            self._sets[depth] = self._make(depth)
        made = self._sets[depth]
        if made is None:
            return None
        automaton, indices = made
        hits = automaton.Match(beginning)
        return indices[min(hits)] if hits else None

    def _make(self, depth: int) -> tuple[re2.Set, list[int]] | None:
        automaton = _new_set()
        indices = []
        try:
            for index, reach in enumerate(self._reach):
                if reach.needs is not None and reach.needs <= depth:
                    continue
                fixed = reach.fixed[:depth]
                automaton.Add(fixed[-1] if fixed else "(?:)")
                indices.append(index)
            automaton.Add("(?:)")
            automaton.Compile()
        except re2.error:
            return None
        return automaton, [*indices, len(self._reach)]

    def remember(self, beginning: bytes, found: Software | int | None) -> None:
        """Keep what was found, within bounds."""
        if len(self.known) >= _MOST_REMEMBERED:
            self.known.clear()
            self.hints.clear()
        self.known[beginning] = found

    def arrived(self, path: bytes, way: list[tuple[bytes, int]], depth: int, *, new: bool) -> None:
        """Shorten the way for those that come after, and count what it was good for."""
        head = path[:_HINT]
        shortest = min(depth, self._depths.get(head, depth))
        self._depths[head] = shortest
        self.hints[head] = self.cuts[shortest]
        for beginning, at in way:
            if self.known.get(beginning) == at + 1:
                self.known[beginning] = depth
        if new:
            self._missed()

    def too_short(self, way: list[tuple[bytes, int]], slashes: int) -> None:
        """Where the way leads on too far for a path it shall be shorter."""
        if way and way[-1][1] < slashes:
            self.known[way[-1][0]] = slashes
        self._missed()

    def _missed(self) -> None:
        """Give up where hardly any path begins like an earlier one."""
        self.misses += 1
        if self.misses > _TRIALS and self.paths < 2 * self.misses:
            self.useful = False
            self.hints.clear()


def _new_set() -> re2.Set:
    options = re2.Options()
    options.max_mem = _RE2_MEMORY
    options.log_errors = False
    return re2.Set.MatchSet(options)


def _used(rule: Rule) -> Callable[[re.Match[str]], object]:
    names = [
        name
        for name in rule.regex.groupindex
        if any(f"%({name})" in template for template in rule.templates)
    ]
    return operator.itemgetter(*names) if names else _nothing


def _nothing(_found: object) -> object:
    return None


def _rewrite(rewrite: Rewrite, fields: dict[str, str], rule: Rule) -> bool:
    """Apply a rewrite to the fields, in place, if all its keys match."""
    matches = []
    for name, regex in rewrite.match:
        found = regex.match(fields[name])
        if found is None:
            return False
        matches.append(found)
    seen: dict[str, object] = {
        **fields,
        "user_provided": rule.user_provided,
        "ignore": rule.ignore,
    }
    for found in matches:
        seen.update(found.groupdict())
    for name, template in rewrite.update:
        fields[name] = template % seen
    return True


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _storable(text: str) -> str:
    r"""Text that any database takes: bytes that are no UTF-8, and NUL, as `\xHH`."""
    if text.isascii() and "\0" not in text:
        return text
    raw = text.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace").replace("\0", r"\x00")


def _finding(rule: Rule, matched: int, won: int, winners: dict[int, int]) -> Finding | None:
    if not matched:
        return Finding(rule.number, f"rule {rule.number} matches no path: {rule.pattern}")
    if won:
        return None
    by = min(winners, key=lambda index: (-winners[index], index))
    return Finding(
        rule.number,
        f"rule {rule.number} is shadowed: all {matched} paths it matches go to earlier"
        f" rules, most to rule {by + 1}: {rule.pattern}",
    )


def _prefilter(rules: Sequence[Rule]) -> tuple[re2.Set | None, tuple[int, ...]]:
    """An RE2 set over the rules, and the indices of rules it can say nothing about.

    Its last pattern always matches, so that an automaton out of memory, which reports no
    match at all, cannot pass for the answer "no rule".
    """
    automaton = _new_set()
    unfiltered = []
    never = r"[^\x{0}-\x{10ffff}]"
    try:
        for index, rule in enumerate(rules):
            pattern = regexps.to_re2(rule.pattern)
            if pattern is None or not _accepts(pattern):
                unfiltered.append(index)
            automaton.Add(never if index in unfiltered[-1:] else pattern)
        automaton.Add("(?:)")
        automaton.Compile()
    except re2.error:
        return None, ()
    return automaton, tuple(unfiltered)


def _accepts(pattern: str) -> bool:
    try:
        re2.compile(pattern)
    except re2.error:
        return False
    return True


def _version(rules: Sequence[Rule], rewrites: Sequence[Rewrite], *, stop: bool) -> str:
    content = {
        "semantics": _SEMANTICS,
        "rules": [[r.pattern, *r.templates, r.user_provided, r.ignore] for r in rules],
        "rewrite": [
            [[[name, regex.pattern] for name, regex in w.match], [list(u) for u in w.update]]
            for w in rewrites
        ],
        "stop_on_rewrite_match": stop,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _renumbered(rule: Rule, number: int) -> Rule:
    return Rule(
        number,
        rule.pattern,
        rule.regex,
        rule.templates,
        rule.user_provided,
        rule.ignore,
        rule.risky,
    )


# ------------------------------------------------------------------ limits of time


_Limit = Callable[[int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _time_limits(seconds: float) -> Iterator[_Limit]:
    """Give a context that stops the match inside it after `seconds` of CPU time.

    `re` looks for signals while it matches, so that a timer that raises ends even a match
    that would never end, and its results are `re`'s own. Signals reach the main thread
    only; elsewhere a risky rule is refused rather than run without a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _no_limit_here
        return
    armed: list[int] = []

    def on_signal(_signal: int, _frame: FrameType | None) -> None:
        if armed:
            raise _TimeLimitError(armed.pop())

    @contextlib.contextmanager
    def limit(rule: int) -> Iterator[None]:
        armed[:] = [rule]
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            armed.clear()
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    before = signal.signal(signal.SIGVTALRM, on_signal)
    try:
        yield limit
    finally:
        signal.signal(signal.SIGVTALRM, before)


def _no_limit_here(rule: int) -> contextlib.AbstractContextManager[None]:
    raise RuntimeError(f"rule {rule} needs a time limit, which only the main thread has")


# ------------------------------------------------------------------ reading and checking


class _Reader:
    """Checks one document; every error names file, line, entry and key."""

    def __init__(
        self, where: str, line_of: Callable[[tuple[str | int, ...]], int | None] | None
    ) -> None:
        self._where = where
        self._line_of = line_of
        self._root: tuple[str | int, ...] = ()
        self.warnings: list[str] = []

    def read(self, document: object) -> tuple[list[Rule], list[Rewrite], bool]:
        if isinstance(document, dict) and SECTION in document:
            document = document[SECTION]
            self._root = (SECTION,)
        if document is None:
            document = {}
        if not isinstance(document, dict):
            raise self._error((), f"has to be a mapping with {', '.join(_TOP_KEYS)}")
        self._known_keys(document, _TOP_KEYS, (), "")
        rules = [
            self._rule(entry, number)
            for number, entry in enumerate(self._list(document, "rules"), 1)
        ]
        rewrites = []
        for number, entry in enumerate(self._list(document, "rewrite"), 1):
            rewrite = self._rewrite(entry, number)
            if rewrite is not None:
                rewrites.append(rewrite)
        stop = self._flag(document, "stop_on_rewrite_match", (), "")
        return rules, rewrites, stop

    def _rule(self, entry: object, number: int) -> Rule:
        keys: tuple[str | int, ...] = ("rules", number - 1)
        label = f"rule {number}: "
        if not isinstance(entry, dict):
            raise self._error(keys, f"{label}has to be a mapping with {', '.join(_RULE_KEYS)}")
        self._known_keys(entry, _RULE_KEYS, keys, label)
        pattern = self._string(entry, "match", keys, label)
        regex = self._regex(pattern, (*keys, "match"), f"{label}match: ")
        names = dict.fromkeys(regex.groupindex, "")
        templates = []
        for name in FIELDS:
            template = self._string(entry, name, keys, label)
            self._template(template, names, (*keys, name), f"{label}{name}: ")
            templates.append(template)
        return Rule(
            number=number,
            pattern=pattern,
            regex=regex,
            templates=(templates[0], templates[1], templates[2]),
            user_provided=self._flag(entry, "user_provided", keys, label),
            ignore=self._flag(entry, "ignore", keys, label),
            risky=not regexps.is_linear(pattern),
        )

    def _rewrite(self, entry: object, number: int) -> Rewrite | None:
        keys: tuple[str | int, ...] = ("rewrite", number - 1)
        label = f"rewrite {number}: "
        if not isinstance(entry, dict):
            raise self._error(keys, f"{label}has to be a mapping with match, update")
        self._known_keys(entry, ("match", "update"), keys, label)
        parts = {}
        for part in ("match", "update"):
            value = entry.get(part)
            if value is None:
                value = {}
            if not isinstance(value, dict):
                raise self._error(
                    (*keys, part), f"{label}{part}: has to be a mapping of {', '.join(FIELDS)}"
                )
            self._known_keys(value, FIELDS, (*keys, part), f"{label}{part}: ")
            if not value:
                # SAMS passes over such an entry, and so the same results ask of us.
                self.warnings.append(f"{self._at(keys)}{label}no {part}: it does nothing")
                return None
            parts[part] = value
        match = []
        names: dict[str, object] = dict.fromkeys((*FIELDS, "user_provided", "ignore"), "")
        for name in FIELDS:
            if name in parts["match"]:
                at, text = (*keys, "match", name), f"{label}match: {name}: "
                pattern = self._string(parts["match"], name, (*keys, "match"), f"{label}match: ")
                match.append((name, self._regex(pattern, at, text)))
                names |= dict.fromkeys(match[-1][1].groupindex, "")
        update = []
        for name in FIELDS:
            if name in parts["update"]:
                at, text = (*keys, "update", name), f"{label}update: {name}: "
                template = self._string(
                    parts["update"], name, (*keys, "update"), f"{label}update: "
                )
                self._template(template, names, at, text)
                update.append((name, template))
        return Rewrite(
            number=number,
            match=tuple(match),
            update=tuple(update),
            risky=not all(regexps.is_linear(regex.pattern) for _, regex in match),
        )

    def _list(self, document: dict[Any, Any], key: str) -> list[Any]:
        value = document.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._error((key,), f"{key}: has to be a list")
        return value

    def _string(
        self, entry: dict[Any, Any], key: str, keys: tuple[str | int, ...], label: str
    ) -> str:
        if key not in entry:
            raise self._error(keys, f"{label}has no '{key}'")
        value = entry[key]
        if not isinstance(value, str):
            raise self._error(
                (*keys, key),
                f"{label}{key}: has to be text; put {_shown(value)} in quotes",
            )
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise self._error((*keys, key), f"{label}{key}: {value!r:.80} is no text") from None
        return value

    def _flag(
        self, entry: dict[Any, Any], key: str, keys: tuple[str | int, ...], label: str
    ) -> bool:
        value = entry.get(key)
        if value is None:
            return False
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise self._error((*keys, key), f"{label}{key}: has to be true or false")

    def _regex(self, pattern: str, keys: tuple[str | int, ...], label: str) -> re.Pattern[str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of spellings that may change one day
                return re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._error(keys, f"{label}broken regexp {pattern!r}: {error}") from error

    def _template(
        self, template: str, names: Mapping[str, object], keys: tuple[str | int, ...], label: str
    ) -> None:
        if any(bare for bare in _CONVERSION.findall(template)):
            raise self._error(keys, f"{label}a '%' in {template!r} is no %(group)s; write it as %%")
        try:
            template % names
        except KeyError as error:
            known = ", ".join(names) or "none"
            raise self._error(
                keys, f"{label}no group {error} in the regexp; there are: {known}"
            ) from error
        except (ValueError, TypeError) as error:
            raise self._error(keys, f"{label}{template!r}: {error}") from error

    def _known_keys(
        self,
        entry: dict[Any, Any],
        known: Sequence[str],
        keys: tuple[str | int, ...],
        label: str,
    ) -> None:
        for key in entry:
            if key not in known:
                raise self._error(
                    (*keys, key), f"{label}{key}: unknown key; known: {', '.join(known)}"
                )

    def _at(self, keys: tuple[str | int, ...]) -> str:
        line = self._line_of((*self._root, *keys)) if self._line_of is not None else None
        return f"{self._where}:{line}: " if line is not None else f"{self._where}: "

    def _error(self, keys: tuple[str | int, ...], text: str) -> RulesError:
        return RulesError(" ".join(f"{self._at(keys)}{text}".splitlines()))


def _shown(value: object) -> str:
    return f"{value!r:.40}" if value is not None else "nothing"


def line_of(path: Path, keys: tuple[str | int, ...]) -> int | None:
    """Find the line (from 1) at which the value under `keys` stands in a YAML file."""
    try:
        node = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(key)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            found = [(v, v) for v in node.value[key : key + 1]]
        else:
            found = []
        if not found:
            break
        line = found[0][0].start_mark.line + 1
        node = found[0][1]
    return line


# ------------------------------------------------------------------ rules of this package

_READY_MADE: Final = Path(__file__).parent / "ready_made"


def ready_made_names() -> list[str]:
    """Name the sets of rules that come with this package."""
    return sorted(path.stem for path in _READY_MADE.glob("*.yaml"))


def ready_made_text(name: str) -> tuple[bytes, str]:
    """Give a set's YAML and a name for it in messages. Raises RulesError."""
    if name not in ready_made_names():
        raise RulesError(
            f"ready-made rules '{name}': there are none of that name;"
            f" known: {', '.join(ready_made_names())}"
        )
    path = _READY_MADE / f"{name}.yaml"
    return path.read_bytes(), f"ready-made rules {name}"
