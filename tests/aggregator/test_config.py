"""The aggregator's configuration: the pages have every key with its default, and no other."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from sams_aggregator import cli, config, rules, software
from sams_ebpf import settings

DOCS = Path(__file__).parents[2] / "docs"


def actual(part: Any, prefix: str = "") -> dict[str, Any]:
    """Key → default, of sections within sections by their path."""
    found: dict[str, Any] = {}
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if isinstance(value, msgspec.Struct):
            found |= actual(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.loads(json.dumps(value, default=str))
    return found


def test_the_page_has_every_key_with_its_default() -> None:
    documented: dict[str, Any] = {}
    for line in (DOCS / "aggregator.md").read_text().splitlines():
        if match := re.fullmatch(r"\| ((?:`[\w.]+`(?:, )?)+) \| `([^`]*)` \| .+ \|", line):
            for key in re.findall(r"`([\w.]+)`", match[1]):
                documented[key] = json.loads(match[2])
    assert documented == actual(config.Aggregator())


def test_the_page_of_rules_has_every_key() -> None:
    text = (DOCS / "rules.md").read_text()
    keys = {*software.Section.__struct_fields__, *rules._RULE_KEYS, "update", rules.SECTION}
    assert [key for key in sorted(keys) if f"`{key}" not in text and f"{key}:" not in text] == []


def test_the_page_s_example_is_valid(tmp_path: Path) -> None:
    page = (DOCS / "aggregator.md").read_text().partition("## Configuration")[2]
    lines = page.partition("| key of")[0].splitlines()
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(line[4:] for line in lines if line.startswith("    ")))
    found = settings.load(file, config.Config)
    assert found.aggregator.timezone == "Europe/Stockholm"
    assert software.load_rules(found, file).map(b"/usr/bin/gcc") is not None


def test_the_page_names_every_command() -> None:
    text = "".join(
        (DOCS / name).read_text() for name in ("aggregator.md", "rules.md", "sams-xml.md")
    )
    commands = subcommands(cli.build())
    assert len(commands) > 12
    assert [name for name in commands if name not in text] == []


def subcommands(parser: argparse.ArgumentParser, prefix: str = "sams-aggregator") -> list[str]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                deeper = subcommands(inner, f"{prefix} {name}")
                found += deeper or [f"{prefix} {name}"]
    return found
