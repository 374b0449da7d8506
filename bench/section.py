"""What a benchmark hands back, and how it stands in `docs/benchmarks.md`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

_MARK = re.compile(r"^<!-- section: (?P<name>[a-z_]+) -->\n", re.MULTILINE)

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under a head; None is shown as a dash: not measured is not zero."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def render(self) -> str:
        """Give the table in Markdown."""
        lines = ["| " + " | ".join(self.head) + " |", "|" + "---|" * len(self.head)]
        lines += ["| " + " | ".join(_show(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class Section:
    """One benchmark's result. `method` says what was run, how often, and which figure was taken."""

    title: str
    method: str
    tables: Sequence[Table]
    remarks: Sequence[str] = field(default_factory=tuple)

    def render(self) -> str:
        """Give the section in Markdown."""
        parts = [
            f"## {self.title}",
            self.method.strip(),
            *(table.render() for table in self.tables),
        ]
        if self.remarks:
            parts.append("\n".join(f"- {remark}" for remark in self.remarks))
        return "\n\n".join(parts)


class Benchmark(Protocol):
    """A module of `bench/` that is listed in `bench.__main__`."""

    def run(self) -> Section:
        """Measure, clean up, and say what was found."""
        ...


def split(document: str) -> dict[str, str]:
    """Give the sections of an earlier document by name."""
    pieces = _MARK.split(document)[1:]
    return {name: text.strip() for name, text in zip(pieces[::2], pieces[1::2], strict=True)}


def join(head: str, sections: dict[str, str]) -> str:
    """Make a document that `split` takes apart again."""
    marked = (f"<!-- section: {name} -->\n{text}" for name, text in sections.items())
    return "\n\n".join([head.strip(), *marked]) + "\n"


def _show(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return cell.replace("|", "\\|").replace("\n", " ")
