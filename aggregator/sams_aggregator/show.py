# ruff: noqa: S608 - names of columns are those of the report itself
"""Rows of a report as a table for people, CSV, JSON or Parquet, each in its own safe form."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import duckdb
import msgspec

from sams_aggregator import tables
from sams_ebpf import durable, paths
from sams_ebpf.errors import SamsError, UsageError

# What a spreadsheet would take for a formula.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


class Column(NamedTuple):
    """A column of a report. `right`: numbers stand on the right in a table."""

    name: str
    title: str
    right: bool = False


class Report(NamedTuple):
    """Rows with their columns; `head` and `foot` are lines for people, `facts` for programs."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    head: Sequence[str] = ()
    foot: Sequence[str] = ()
    facts: Mapping[str, Any] | None = None


def text(value: object) -> str:
    """A cell as text: bytes by their escape, nothing for None, no control characters."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return paths.show(value)
    if isinstance(value, list):
        return ",".join(map(text, value))
    if isinstance(value, str):
        return (
            value if value.isprintable() else paths.show(value.encode("utf-8", "surrogateescape"))
        )
    return str(value)


def table(report: Report) -> str:
    """Aligned columns."""
    grid = [[column.title for column in report.columns]]
    grid += [[text(row.get(column.name)) for column in report.columns] for row in report.rows]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [*report.head]
    for cells in grid:
        line = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(cells, widths, report.columns, strict=True)
        ]
        lines.append("  ".join(line).rstrip())
    return "\n".join([*lines, *report.foot]) + "\n"


def as_csv(report: Report) -> str:
    """CSV that no spreadsheet runs: texts that look like formulas get an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in report.columns])
    for row in report.rows:
        cells = []
        for column in report.columns:
            value = row.get(column.name)
            cell = text(value)
            if isinstance(value, str | bytes) and cell.startswith(_FORMULA):
                cell = f"'{cell}"
            cells.append(cell)
        writer.writerow(cells)
    return out.getvalue()


def as_json(report: Report) -> str:
    """One object: the facts, and `rows`."""
    rows = [
        {
            name: paths.show(value) if isinstance(value, bytes) else value
            for name, value in row.items()
        }
        for row in report.rows
    ]
    return dump({**(report.facts or {}), "rows": rows})


def dump(value: Any) -> str:  # noqa: ANN401
    """JSON with a newline at its end; integers of any size stay integers."""
    data = msgspec.json.encode(value)
    return msgspec.json.format(data, indent=1).decode() + "\n"


def as_parquet(report: Report, path: Path) -> None:
    """Write a Parquet file with the rows."""
    connection = tables.connect()
    names = [column.name for column in report.columns]
    select = []
    for name in names:
        values = [row.get(name) for row in report.rows]
        number = bool(values) and all(isinstance(value, int) or value is None for value in values)
        # Sums may be beyond 64 bits.
        kind = "DECIMAL(38, 0)" if number else "VARCHAR"
        select.append(f'CAST("{name}" AS {kind}) AS "{name}"')
    rows = (
        [None if row.get(name) is None else text(row.get(name)) for name in names]
        for row in report.rows
    )
    with tables.loaded(dict.fromkeys(names, "VARCHAR"), rows) as source:
        tables.copy(connection, f"SELECT {', '.join(select)} FROM {source}", path)
    connection.close()


def check(form: str, output: Path | None) -> None:
    """Raise UsageError for a form that cannot go where it shall."""
    if form == "parquet" and (output is None or durable.stands_for_itself(output)):
        raise UsageError("parquet goes to a file: name it with --output")


def write(report: Report, form: str, output: Path | None) -> None:
    """Give a report in the form asked for, to a file or stdout. Raises SamsError."""
    check(form, output)
    if output is not None and form == "parquet":
        # Not the link: what it points to.
        target = output.resolve()
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            as_parquet(report, temporary)
            temporary.rename(target)
        except (OSError, duckdb.Error) as error:
            temporary.unlink(missing_ok=True)
            raise SamsError(f"{output}: cannot be written: {error}") from error
        return
    put({"table": table, "csv": as_csv, "json": as_json}[form](report), output)


def put(content: str, output: Path | None) -> None:
    """Write text to a file or stdout. Raises SamsError."""
    if output is None:
        sys.stdout.write(content)
        return
    try:
        durable.write_output(output, content.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise SamsError(f"{output}: cannot be written: {error.strerror}") from error


def hours(amount: int, per_hour: int) -> str:
    """Whole amount as hours with three decimals, rounded half up: 3600e9 ns are 1.000."""
    thousandths = (2 * amount * 1000 + per_hour) // (2 * per_hour)
    sign, size = ("-", -thousandths) if thousandths < 0 else ("", thousandths)
    return f"{sign}{size // 1000}.{size % 1000:03d}"
