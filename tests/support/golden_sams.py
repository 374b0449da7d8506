"""The cases of `tests/aggregator/golden_sams`: what SAMS' own programs made of given files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

FOLDER = Path(__file__).parent.parent / "aggregator" / "golden_sams"
CLUSTER = "cl.example.org"
_SA = "{http://sams.snic.se/namespaces/2019/01/softwareaccountingrecords}"

# (name, version, local version, user provided, usage)
Entry = tuple[str, str, str, str, str]
Mapped = tuple[str, str, str, bool, bool]


@dataclass(frozen=True)
class Case:
    folder: Path

    @property
    def incoming(self) -> Path:
        return self.folder / "in"

    @property
    def rules(self) -> Path:
        return self.folder / "rules.yaml"

    def software(self) -> dict[bytes, Mapped | None]:
        """Path → (software, version, local version, user provided, ignore)."""
        return {
            row["path"].encode(): None
            if row["software"] is None
            else (
                row["software"],
                row["version"],
                row["versionstr"],
                bool(row["user_provided"]),
                bool(row["ignore"]),
            )
            for row in json.loads((self.folder / "expected-software.json").read_text())
        }

    def files(self, kind: str) -> list[str]:
        """Names below the in-folder that are `archived` or go to `error`."""
        names: list[str] = json.loads((self.folder / "expected-files.json").read_text())[kind]
        return names

    def records(self) -> dict[str, list[Entry]]:
        return records((self.folder / "expected.xml").read_bytes())


def cases() -> list[Case]:
    found = [Case(path) for path in sorted(FOLDER.glob("case*"))]
    assert len(found) >= 3
    return found


def records(document: bytes) -> dict[str, list[Entry]]:
    """Entries by record id, in an order of their own; ids have to agree with each other."""
    found: dict[str, list[Entry]] = {}
    for record in etree.fromstring(document):
        identity = record.findtext(f"{_SA}JobRecordID")
        head = record.find(f"{_SA}RecordIdentity")
        assert identity is not None
        assert head is not None
        assert head.get(f"{_SA}recordId") == identity
        assert identity not in found
        found[identity] = sorted(_entry(one) for one in record.findall(f"{_SA}Software"))
    return found


def _entry(element: etree._Element) -> Entry:
    names = ("Name", "Version", "LocalVersion", "UserProvided", "Usage")
    assert [child.tag for child in element] == [f"{_SA}{name}" for name in names]
    name, version, local, provided, usage = (child.text or "" for child in element)
    return name, version, local, provided, usage
