"""The table of supported kernels, `kernels.yaml`, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from sams_ebpf import settings
from sams_ebpf.errors import UsageError

PATH = Path(__file__).with_name("kernels.yaml")
# Of the ledger and split tests, what runs in one machine (see guest.py), named by the last. BCC
# compiles for minutes in these machines: what the same set can serve follows one another.
STAGES = {
    "libbpf": (("split", "default"), ("exact",), ("small",)),
    "bcc": (("default", "split"), ("exact",)),
}


class Expect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has to come out on a row; the first loader is what `auto` chooses."""

    mode: Literal["bpf", "proc"]
    loaders: list[Literal["libbpf", "bcc"]]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How vm.py gets the kernel, or why it cannot."""

    suite: str | None = None
    uml: bool = False
    absent: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One supported kernel."""

    id: str
    system: str
    kernel: str
    cgroup: Literal["v1", "v2"]
    btf: bool
    headers: bool
    lockdown: Literal["confidentiality"] | None = None
    expect: Expect
    reason: str | None = None
    box: str | None
    vm: Source

    @property
    def command_line(self) -> str:
        """What the row adds to the kernel's command line."""
        words = []
        if self.cgroup == "v1":
            words += [
                "systemd.unified_cgroup_hierarchy=0",
                "systemd.legacy_systemd_cgroup_controller=1",
            ]
        if self.lockdown:
            words.append(f"lockdown={self.lockdown}")
        return " ".join(words)

    @property
    def parts(self) -> dict[str, list[str]]:
        """What is run on the row: the steps of guest.py that go together in one machine."""
        works = ["work-libbpf", "work-proc"] if self.expect.loaders else ["work-proc"]
        found = {"site": ["install", "probe", "unit", *works]}
        if not self.expect.loaders:
            found["proc"] = ["unpack", "tests-proc"]
        for loader in self.expect.loaders:
            for stages in STAGES[loader]:
                steps = [f"tests-{loader}-{stage}" for stage in stages]
                found[f"{loader}-{stages[-1]}"] = ["unpack", *steps]
        return found


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rows, old to new."""

    rows: list[Row]


def boxes() -> dict[str, Any]:
    """By row: what check.sh printed in a box that Vagrant brought up, and how. Kept by hand."""
    found: dict[str, Any] = json.loads(PATH.with_name("boxes.json").read_text())
    return found


def read(path: Path = PATH) -> list[Row]:
    """Read the table. Raises UsageError for an unknown key, or a row that is there twice."""
    rows = settings.convert(settings.read_yaml(path), Table, str(path)).rows
    names = [row.id for row in rows]
    for row in rows:
        if names.count(row.id) > 1:
            raise UsageError(f"{path}: {row.id}: more than one row of this name")
        if [bool(row.vm.suite), row.vm.uml, bool(row.vm.absent)].count(True) != 1:
            raise UsageError(f"{path}: {row.id}: vm needs one of suite, uml, absent")
    return rows
