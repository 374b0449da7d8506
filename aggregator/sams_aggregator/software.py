"""Which path is which software: the rules of a site, what they say of its paths, and commands.

A mapping belongs to the version of the rules that made it, so that a change of the rules
touches no fact, and going back to earlier rules finds their mapping still there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import sqlalchemy as sa
import yaml

from sams_aggregator import config as cfg
from sams_aggregator import own_archive, show, usage
from sams_aggregator import rules as rules_module
from sams_aggregator import state as st
from sams_aggregator.globs import compile_glob
from sams_aggregator.manifest import Store
from sams_aggregator.rules import Rules, Software
from sams_ebpf import paths, settings
from sams_ebpf.errors import PartialError, UsageError
from sams_receiver.archive import Item, Kind

KEPT_VERSIONS: Final = 5
_CHUNK: Final = 20_000
_SHOWN_CHANGES: Final = 20


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `software`: rules in place, or in SAMS' own file, or ready-made ones.

    ready_made: names of sets of this package, tried after the site's own rules.
    """

    file: Path | None = None
    ready_made: list[str] = []
    rules: Any = None
    rewrite: Any = None
    stop_on_rewrite_match: Any = None


class Change(NamedTuple):
    """A path whose software is another than before; None: undetermined."""

    path: bytes
    before: Software | None
    after: Software | None


class Outcome(NamedTuple):
    """What an update did. `late`: paths at which a rule ran out of time, with its number."""

    mapped: int
    undetermined: int
    late: list[tuple[bytes, int]]


# ------------------------------------------------------------------ the site's rules


def config_file(arguments: argparse.Namespace) -> Path | None:
    """Name the configuration file that `config.load` reads, None if there is none."""
    named: Path | None = arguments.config
    if named is None and cfg.DEFAULT_FILE.exists():
        return cfg.DEFAULT_FILE
    return named


def load_rules(config: cfg.Config, where: Path | None, file: Path | None = None) -> Rules:
    """Read the rules of the configuration file `where`, or of `file` in their place.

    Raises UsageError with file, line, rule number and key.
    """
    document = config.software
    if document is None:
        document = {}
    origin = str(where or "configuration")
    if not isinstance(document, dict):
        raise UsageError(f"{origin}: software: has to be a mapping")
    root: tuple[str | int, ...] = ("software",)
    if rules_module.SECTION in document:
        inner = document[rules_module.SECTION]
        if not isinstance(inner, dict):
            raise UsageError(f"{origin}: software.{rules_module.SECTION}: has to be a mapping")
        document = {k: v for k, v in document.items() if k != rules_module.SECTION} | inner
        root = ("software", rules_module.SECTION)
    section = settings.convert(document, Section, f"{origin}: software")
    file = file or section.file
    if file is not None:
        if section.rules is not None and file is section.file:
            raise UsageError(f"{origin}: software: either file or rules, not both")
        return Rules.from_file(file, ready_made=section.ready_made)
    own = {
        key: value
        for key in ("rules", "rewrite", "stop_on_rewrite_match")
        if (value := getattr(section, key)) is not None
    }
    return Rules.from_config(
        own,
        origin,
        ready_made=section.ready_made,
        line_of=None if where is None else lambda keys: rules_module.line_of(where, (*root, *keys)),
    )


# ------------------------------------------------------------------ the mapping in the state


def put_in_force(store: Store, rules: Rules) -> Outcome:
    """Update the mapping; rules that are others than those in force so far are archived first."""
    if current(store.state) != rules.version:
        entry = json.dumps({"version": rules.version, **rules.document()}, sort_keys=True)
        own_archive.append(store.data, [Item(Kind.RULES, entry.encode())])
    return update(store.state, rules)


class Version(NamedTuple):
    """Rules that were put in force at a moment (ns since 1970)."""

    since_ns: int
    version: str
    document: dict[str, Any]


def history(data: Path) -> Iterator[Version]:
    """Which rules were in force since when, oldest first, as archived."""
    for frame in own_archive.frames(data, Kind.RULES):
        document = json.loads(frame.data)
        yield Version(frame.received_ns, document.pop("version"), document)


def update(state: st.State, rules: Rules) -> Outcome:
    """Map every path that this version of the rules has not seen; then it is the current one.

    Safe beside others that do the same: what one has mapped the other leaves alone.
    """
    late: list[tuple[bytes, int]] = []
    mapped = undetermined = 0
    todo = _unmapped(state, rules.version)
    for start in range(0, len(todo), _CHUNK):
        chunk = todo[start : start + _CHUNK]
        results = map_paths(rules, chunk, lambda path, rule: late.append((path, rule)))
        rows = [
            _row(rules.version, path, software)
            for path, software in zip(chunk, results, strict=True)
        ]
        with state.begin() as connection:
            state.insert_new(connection, st.mapping, rows)
        undetermined += results.count(None)
        mapped += len(chunk)
    _make_current(state, rules.version)
    return Outcome(mapped, undetermined, late)


def map_paths(
    rules: Rules, every: Sequence[bytes], on_timeout: Callable[[bytes, int], None] | None = None
) -> list[Software | None]:
    """As `Rules.map_many`, but no rule names what has no path: the overflow row, say."""
    found = rules.map_many(every, on_timeout)
    return [one if path else None for path, one in zip(every, found, strict=True)]


def current(state: st.State) -> str | None:
    """Version of the rules that was in force last, None before the first update."""
    with state.read() as connection:
        return connection.scalar(
            sa.select(st.rules.c.version).order_by(st.rules.c.used_ns.desc()).limit(1)
        )


def mapping(state: st.State, version: str | None) -> Iterator[tuple[bytes, Software | None]]:
    """Each path and its software under a version of the rules, in order of the path."""
    table = st.mapping.c
    columns = (
        table.path,
        table.software,
        table.version,
        table.local_version,
        table.user_provided,
        table.ignored,
    )
    query = sa.select(*columns).where(table.rules == version).order_by(table.path)
    with state.read() as connection:
        for path, name, number, local, provided, ignored in connection.execute(query):
            software = (
                None
                if name is None
                else Software(name, number, local, bool(provided), bool(ignored))
            )
            yield bytes(path), software


def changes(state: st.State, rules: Rules) -> list[Change]:
    """What an update with these rules would change against the current mapping."""
    before = dict(mapping(state, current(state)))
    every = list(_all_paths(state))
    after = map_paths(rules, every)
    return [
        Change(path, before.get(path), software)
        for path, software in zip(every, after, strict=True)
        if before.get(path) != software
    ]


def forget(state: st.State, version: str, chosen: Sequence[bytes]) -> None:
    """Take paths out of the mapping, so that the next update maps them anew."""
    table = st.mapping
    with state.begin() as connection:
        for start in range(0, len(chosen), 500):
            connection.execute(
                table.delete().where(
                    table.c.rules == version, table.c.path.in_(chosen[start : start + 500])
                )
            )


def _unmapped(state: st.State, version: str) -> list[bytes]:
    known = (
        sa.select(st.mapping.c.path)
        .where(st.mapping.c.rules == version, st.mapping.c.path == st.paths.c.path)
        .exists()
    )
    query = sa.select(st.paths.c.path).where(~known).order_by(st.paths.c.path)
    with state.read() as connection:
        return [bytes(path) for path in connection.scalars(query)]


def _all_paths(state: st.State) -> Iterator[bytes]:
    with state.read() as connection:
        for path in connection.scalars(sa.select(st.paths.c.path).order_by(st.paths.c.path)):
            yield bytes(path)


def _row(version: str, path: bytes, software: Software | None) -> dict[str, object]:
    return {
        "rules": version,
        "path": path,
        "software": None if software is None else software.software,
        "version": None if software is None else software.version,
        "local_version": None if software is None else software.local_version,
        "user_provided": software is not None and software.user_provided,
        "ignored": software is not None and software.ignore,
    }


def _make_current(state: st.State, version: str) -> None:
    """Remember when a version was used; mappings of long unused ones can be made again."""
    with state.begin() as connection:
        newest = connection.scalar(sa.select(sa.func.max(st.rules.c.used_ns))) or 0
        # Later than all others even when the clock was set back.
        used = max(time.time_ns(), newest + 1)
        connection.execute(
            state.insert(st.rules)
            .values(version=version, used_ns=used)
            .on_conflict_do_update(index_elements=["version"], set_={"used_ns": used})
        )
        versions = list(
            connection.scalars(sa.select(st.rules.c.version).order_by(st.rules.c.used_ns.desc()))
        )
        for old in versions[KEPT_VERSIONS:]:
            connection.execute(st.mapping.delete().where(st.mapping.c.rules == old))
            connection.execute(st.rules.delete().where(st.rules.c.version == old))


# ------------------------------------------------------------------ commands


def update_command(arguments: argparse.Namespace) -> int:
    """`software update`."""
    config = cfg.load(arguments)
    rules = load_rules(config, config_file(arguments), arguments.rules)
    state = st.open_state(config.aggregator)
    try:
        for text in rules.warnings:
            print(f"note: {text}", file=sys.stderr)
        found = changes(state, rules)
        _print_changes(found, everything=arguments.all)
        every = [path for path in _all_paths(state) if path]
        for finding in rules.audit(every) if every else ():
            # Of those that come with the package most match nothing at any one site.
            if finding.rule <= rules.own:
                print(f"note: {finding.text}")
        if arguments.dry_run:
            print(f"{len(found)} paths would change; nothing was written (--dry-run)")
            return 0
        outcome = put_in_force(Store(state, config.aggregator.data), rules)
    finally:
        state.close()
    print(
        f"rules {rules.version[:12]}: {outcome.mapped} paths mapped,"
        f" {outcome.undetermined} of them undetermined"
    )
    return _complain(outcome.late)


def show_command(arguments: argparse.Namespace) -> int:
    """`software show`: the mapping in force, the heaviest paths first."""
    chosen = _Chosen(arguments)
    try:
        rows = chosen.rows()
        weights = usage.weights(chosen.store, chosen.config)
        version = load_rules(chosen.config, config_file(arguments)).version
        late = len(_unmapped(chosen.state, version))
    finally:
        chosen.close()
    if late:
        print(f"note: {late} paths are not mapped by today's rules: `software update` maps them",
              file=sys.stderr)  # fmt: skip
    rows.sort(key=lambda row: (*[-n for n in weights.get(row[0], usage.NOTHING)], row[0]))
    if arguments.json:
        print(json.dumps([_plain(*row, weights.get(row[0], usage.NOTHING)) for row in rows],
                         indent=1))  # fmt: skip
        return 0
    for path, software in rows:
        _print_row(path, software)
        for name, value in _amounts(weights.get(path, usage.NOTHING)):
            print(f"\t{name:<13}: {value}")
    return 0


def versions_command(arguments: argparse.Namespace) -> int:
    """`software versions`: which rules were in force since when, or one version as YAML."""
    config = cfg.load(arguments)
    found = list(history(config.aggregator.data))
    if arguments.version is None:
        for one in found:
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.since_ns // 10**9))
            print(f"{since}  {one.version}  {len(one.document['rules'])} rules")
        return 0
    named = {one.version: one for one in found if one.version.startswith(arguments.version)}
    if len(named) != 1:
        what = "several versions begin so" if named else "no such version was in force"
        raise UsageError(f"software versions {arguments.version}: {what}; see `software versions`")
    (one,) = named.values()
    print(yaml.safe_dump(one.document, sort_keys=False, allow_unicode=True), end="")
    return 0


def undetermined_command(arguments: argparse.Namespace) -> int:
    """`software undetermined`."""
    config = cfg.load(arguments)
    rules = load_rules(config, config_file(arguments), arguments.rules)
    state = st.open_state(config.aggregator)
    try:
        every = [path for path in _all_paths(state) if path]
        for path, software in zip(every, rules.map_many(every), strict=True):
            if software is None:
                print(paths.show(path))
    finally:
        state.close()
    return 0


def reset_command(arguments: argparse.Namespace) -> int:
    """`software reset`: forget the mapping of some paths and map them again."""
    if arguments.path is None and arguments.software is None:
        raise UsageError("software reset: give --path GLOB or --software GLOB; '*' is everything")
    chosen = _Chosen(arguments)
    try:
        rows = chosen.rows()
        for row in rows:
            _print_row(*row)
        if arguments.dry_run:
            print(f"{len(rows)} paths would be mapped anew; nothing was written (--dry-run)")
            return 0
        rules = load_rules(chosen.config, config_file(arguments), arguments.rules)
        forget(chosen.state, rules.version, [path for path, _ in rows])
        outcome = put_in_force(chosen.store, rules)
    finally:
        chosen.close()
    print(f"{outcome.mapped} paths mapped, {outcome.undetermined} of them undetermined")
    return _complain(outcome.late)


def test_command(arguments: argparse.Namespace) -> int:
    """`software test`: what the rules make of paths that need not be known."""
    rules = load_rules(cfg.load(arguments), config_file(arguments), arguments.rules)
    for text in rules.warnings:
        print(f"note: {text}", file=sys.stderr)
    for text in arguments.paths:
        path = _typed(text)
        print(f"Path: {paths.show(path)}")
        found = rules.explain(path)
        if found is None:
            print("\tno rule matches")
            continue
        rule = rules.rules[found.rule - 1]
        print(f"\tRule         : {found.rule}: {rule.pattern}")
        for name, value in found.groups.items():
            print(f"\t  {name:<11}: {_safe(str(value))}")
        if found.rewrites:
            print(f"\tRewrites     : {', '.join(map(str, found.rewrites))}")
        for name, value in _fields(found.result):
            print(f"\t{name:<13}: {_safe(value)}")
    return 0


class _Chosen:
    """Paths of the current mapping that the GLOBs of a command line name."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._path = compile_glob(arguments.path if arguments.path is not None else "*")
        self._software = None
        if arguments.software is not None:
            self._software = compile_glob(arguments.software)
        self.config = cfg.load(arguments)
        self.state = st.open_state(self.config.aggregator)
        self.store = Store(self.state, self.config.aggregator.data)

    def rows(self) -> list[tuple[bytes, Software | None]]:
        version = current(self.state)
        return [row for row in mapping(self.state, version) if self._wants(*row)]

    def close(self) -> None:
        self.state.close()

    def _wants(self, path: bytes, software: Software | None) -> bool:
        if self._software is not None and (
            software is None or not self._software.fullmatch(software.software)
        ):
            return False
        return self._path.fullmatch(path.decode("utf-8", "surrogateescape")) is not None


def _typed(text: str) -> bytes:
    r"""A path from the command line, as it is or as it was shown (`\xHH`)."""
    try:
        return paths.parse(text)
    except (ValueError, UnicodeEncodeError):
        return os.fsencode(text)


def _safe(text: str) -> str:
    return paths.show(text.encode("utf-8", "surrogateescape"))


def _fields(software: Software) -> list[tuple[str, str]]:
    return [
        ("Software", software.software),
        ("Version", software.version),
        ("Local Version", software.local_version),
        ("User Provided", str(software.user_provided).lower()),
        ("Ignore", str(software.ignore).lower()),
    ]


def _label(software: Software | None) -> str:
    if software is None:
        return "undetermined"
    text = " ".join(part for part in software[:3] if part)
    marks = [
        name
        for name, set_ in (("user", software.user_provided), ("ignored", software.ignore))
        if set_
    ]
    return _safe(f"{text} ({', '.join(marks)})" if marks else text)


def _plain(path: bytes, software: Software | None, weight: usage.Weight) -> dict[str, Any]:
    named = {"software": None} if software is None else software._asdict()
    return {"path": paths.show(path), **named, **weight._asdict()}


def _amounts(weight: usage.Weight) -> list[tuple[str, str]]:
    return [
        ("Core-hours", show.hours(weight.core_us, 3600 * 10**6)),
        ("CPU-hours", show.hours(weight.cpu_ns, 3600 * 10**9)),
        ("Job runs", str(weight.runs)),
    ]


def _print_row(path: bytes, software: Software | None) -> None:
    print(f"Path: {paths.show(path)}")
    if software is None:
        print("\tSoftware is not determined")
        return
    for name, value in _fields(software):
        print(f"\t{name:<13}: {_safe(value)}")


def _print_changes(found: Sequence[Change], *, everything: bool) -> None:
    kinds = Counter((_label(change.before), _label(change.after)) for change in found)
    for (before, after), count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count} paths: {before} -> {after}")
    for change in found if everything else found[:_SHOWN_CHANGES]:
        print(f"  {paths.show(change.path)}: {_label(change.before)} -> {_label(change.after)}")
    if not everything and len(found) > _SHOWN_CHANGES:
        print(f"  … and {len(found) - _SHOWN_CHANGES} more; --all shows them")


def _complain(late: Sequence[tuple[bytes, int]]) -> int:
    if not late:
        return 0
    path, rule = late[0]
    raise PartialError(
        f"{len(late)} paths stay undetermined: a regexp took too long, the first time rule {rule}"
        f" at {paths.show(path)}"
    )
