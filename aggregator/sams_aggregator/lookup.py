"""Few rows out of large Parquet files, by a number that they are sorted by.

A look-up of one job reads a row group of each of a handful of files. To start DuckDB and have
it plan a statement for each takes several times as long as that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sams_aggregator.accounts import damaged

_BYTES: Final = pa.binary()


def rows(
    path: Path,
    column: str,
    wanted: Collection[int],
    *,
    nulls: bool = False,
    epochs: Collection[bytes] | None = None,
) -> list[dict[str, Any]]:
    """Rows whose `column` is one of `wanted`, or also null; of these epochs alone.

    Raises SamsError for a file that is not there or is damaged.
    """
    found: list[dict[str, Any]] = []
    if not wanted and not nulls:
        return found
    numbers = pa.array(sorted(wanted), pa.int64())
    try:
        with pq.ParquetFile(path) as file:
            for group in _groups(file.metadata, column, wanted, nulls=nulls):
                # This column first: where sets overlap, many a group has nothing else.
                key = file.read_row_group(group, [column], use_threads=False).column(0)
                mask = pc.is_in(key, numbers)
                if nulls:
                    mask = pc.or_(mask, pc.is_null(key))
                places = pc.indices_nonzero(mask)
                if not len(places):
                    continue
                table = file.read_row_group(group, use_threads=False).take(places)
                if epochs is not None:
                    told = pa.array(list(epochs), _BYTES)
                    table = table.filter(pc.is_in(table["epoch"].cast(_BYTES), told))
                found += table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise damaged(f"{path}: {error}") from error
    return found


def _groups(
    metadata: pq.FileMetaData, column: str, wanted: Collection[int], *, nulls: bool
) -> Sequence[int]:
    """Row groups that may hold such rows, by their statistics."""
    schema = metadata.schema
    names = [schema.column(number).name for number in range(len(schema))]
    at = names.index(column)
    found = []
    for group in range(metadata.num_row_groups):
        said = metadata.row_group(group).column(at).statistics
        if (
            said is None
            or (nulls and not (said.has_null_count and not said.null_count))
            or not said.has_min_max
            or any(said.min <= number <= said.max for number in wanted)
        ):
            found.append(group)
    return found
