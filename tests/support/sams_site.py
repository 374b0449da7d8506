"""A site in a folder: its configuration, and the aggregator's commands run on it."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden_sams
import yaml
from lxml import etree

from sams_aggregator import cli, sams_xml
from sams_ebpf import program

_SCHEMA = etree.XMLSchema(etree.parse(sams_xml.SCHEMA))


@dataclass
class Ran:
    status: int
    out: str
    err: str


class Site:
    """One configuration, and what its commands do."""

    def __init__(self, folder: Path, software: Any, **aggregator: Any) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.out = folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        self.document: dict[str, Any] = {
            "site": {"cluster": golden_sams.CLUSTER},
            "aggregator": {
                "data": str(folder / "data"),
                "archives": [],
                "extract": {"output": str(self.out)},
                **aggregator,
            },
            "software": software,
        }
        self.save()

    def save(self) -> None:
        self.config.write_text(yaml.safe_dump(self.document))

    def command(self, *arguments: str | Path) -> list[str]:
        words = [str(argument) for argument in arguments]
        at = 2 if words[0] == "software" else 1
        return [
            sys.executable, "-m", "sams_aggregator", *words[:at], "--config", str(self.config),
            *words[at:],
        ]  # fmt: skip

    def run(self, *arguments: str | Path, status: int = 0) -> Ran:
        """Run a command in this process: starting one takes longer than most of them."""
        out, err = io.StringIO(), io.StringIO()
        root = logging.getLogger()
        before = root.handlers[:], root.level
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                found = program.run(cli.build, self.command(*arguments)[3:])
        finally:
            root.handlers[:], root.level = before
        assert found == status, (found, out.getvalue(), err.getvalue())
        return Ran(found, out.getvalue(), err.getvalue())

    def records(self) -> dict[str, list[golden_sams.Entry]]:
        """Records of all files, the youngest of each id; every file keeps to the schema."""
        found: dict[str, list[golden_sams.Entry]] = {}
        for path in sorted(self.out.glob("*.xml"), key=lambda path: path.stat().st_mtime_ns):
            body = path.read_bytes()
            _SCHEMA.assertValid(etree.fromstring(body))
            found |= golden_sams.records(body)
        return found

    def lines(self) -> list[str]:
        """All lines of the one file that was written, without its time."""
        (path,) = self.out.glob("*.xml")
        return re.sub(r'createTime="[^"]*"', 'createTime="T"', path.read_text()).splitlines()
