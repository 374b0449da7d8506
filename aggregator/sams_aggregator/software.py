"""Which path is which software: the rules of a site, and what they say of its paths.

A mapping belongs to the version of the rules that made it, so that a change of the rules
touches no fact, and going back to earlier rules finds their mapping still there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import sqlalchemy as sa

from sams_aggregator import config as cfg
from sams_aggregator import own_archive
from sams_aggregator import rules as rules_module
from sams_aggregator import state as st
from sams_aggregator.manifest import Store
from sams_aggregator.rules import Rules, Software
from sams_ebpf import settings
from sams_ebpf.errors import UsageError
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
    before = None
    for frame in own_archive.frames(data, Kind.RULES):
        document = json.loads(frame.data)
        version = document.pop("version")
        # A new state, or two commands at once, may have told it again.
        if version != before:
            yield Version(frame.received_ns, version, document)
        before = version


def update(state: st.State, rules: Rules) -> Outcome:
    """Map every path that this version of the rules has not seen; then it is the current one.

    Safe beside others that do the same: what one has mapped the other leaves alone.
    """
    late: list[tuple[bytes, int]] = []
    mapped = undetermined = 0
    todo = unmapped(state, rules.version)
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
    every = list(all_paths(state))
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


def unmapped(state: st.State, version: str) -> list[bytes]:
    """Paths that this version of the rules has not seen."""
    known = (
        sa.select(st.mapping.c.path)
        .where(st.mapping.c.rules == version, st.mapping.c.path == st.paths.c.path)
        .exists()
    )
    query = sa.select(st.paths.c.path).where(~known).order_by(st.paths.c.path)
    with state.read() as connection:
        return [bytes(path) for path in connection.scalars(query)]


def all_paths(state: st.State) -> Iterator[bytes]:
    """Every path of the facts, in the order of its bytes."""
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
