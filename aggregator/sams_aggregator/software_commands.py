"""The commands `software …`: what the mapping is, what the rules make of it, and to change it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import yaml

from sams_aggregator import config as cfg
from sams_aggregator import show, usage
from sams_aggregator import state as st
from sams_aggregator.globs import compile_glob
from sams_aggregator.manifest import Store
from sams_aggregator.rules import Software
from sams_aggregator.software import (
    Change,
    all_paths,
    changes,
    config_file,
    current,
    forget,
    history,
    load_rules,
    mapping,
    put_in_force,
    unmapped,
)
from sams_ebpf import paths
from sams_ebpf.errors import PartialError, UsageError

_SHOWN_CHANGES: Final = 20


def update_command(arguments: argparse.Namespace) -> int:
    """`software update`."""
    config = cfg.load(arguments)
    rules = load_rules(config, config_file(arguments), arguments.rules)
    state = st.open_existing(config.aggregator)
    try:
        for text in rules.warnings:
            print(f"note: {text}", file=sys.stderr)
        found = changes(state, rules)
        _print_changes(found, everything=arguments.all)
        every = [path for path in all_paths(state) if path]
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
        late = len(unmapped(chosen.state, version))
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
    state = st.open_existing(config.aggregator)
    try:
        every = [path for path in all_paths(state) if path]
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
        self.state = st.open_existing(self.config.aggregator)
        self.store = Store(self.state, self.config.aggregator.data)

    def rows(self) -> list[tuple[bytes, Software | None]]:
        version = current(self.state)
        found = [row for row in mapping(self.state, version) if self._wants(*row)]
        if not found:
            print("note: none of the paths that are mapped is like this", file=sys.stderr)
        return found

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
