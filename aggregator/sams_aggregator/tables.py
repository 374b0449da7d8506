# ruff: noqa: S608 - names of columns come from the schema, names of files are quoted
"""The fact tables: their columns, and how rows of plain Python become Parquet files.

A set is a folder with one Parquet file per table that has rows. It is written under a
temporary name, synced and renamed, so a set is whole or absent. Integers only; bytes
stay bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sams_ebpf import durable, wire

NULL: Final = -(2**63)
SUFFIX: Final = ".parquet"
TEMPORARY: Final = ".tmp-"

_COUNTERS: Final = dict.fromkeys(wire.COUNTERS, "BIGINT")
_ORDER: Final = {"generation": "BIGINT", "sequence": "BIGINT", "tie": "BIGINT"}
_ROW: Final = {
    "end_ns": "BIGINT", "path": "BLOB", "flags": "BIGINT", "script": "BLOB", **_COUNTERS
}  # fmt: skip
CLAIMS: Final = {
    "cluster": "VARCHAR", "node": "VARCHAR", "job_id": "BIGINT", "restart_count": "BIGINT",
    "sluid": "VARCHAR", "submit_ns": "BIGINT", "start_ns": "BIGINT", "start_text": "VARCHAR",
    "boot_id": "VARCHAR", "cgroup": "BLOB", "cgroup_birth_ns": "BIGINT", "user": "VARCHAR",
    "uid": "BIGINT", "account": "VARCHAR", "partition": "VARCHAR", "job_name": "VARCHAR",
    "cpus": "BIGINT", "nodes": "BIGINT", "het_job_id": "BIGINT",
}  # fmt: skip

# epoch: 16 bytes of the epoch itself and 16 of the cluster and node that sent it.
# points: an executable's counters at the end of each interval of its epoch.
# totals: the same at the end of each month. Both: highest (generation, sequence) wins.
# epochs: the head of the last batch of an epoch in each month, with its ledger.
# claims: each different set of claims of an epoch, with the last batch that made them.
# dropped: what tombstones stand for. jobs: rows of sacct.
SCHEMA: Final[dict[str, dict[str, str]]] = {
    "points": {"epoch": "BLOB", "job_id": "BIGINT", "slot": "BIGINT", **_ORDER, **_ROW},
    "totals": {"epoch": "BLOB", "job_id": "BIGINT", "month": "BIGINT", **_ORDER, **_ROW},
    "epochs": {
        "epoch": "BLOB", "job_id": "BIGINT", "month": "BIGINT", **_ORDER, "begin_ns": "BIGINT",
        "end_ns": "BIGINT", "mode": "VARCHAR", "loader": "VARCHAR", "software": "VARCHAR",
        "unclaimed": "BIGINT", "final_reason": "VARCHAR", "final_live": "BIGINT",
        "cgroup_cpu_ns": "BIGINT", "attributed_cpu_ns": "BIGINT", "outside_cpu_ns": "BIGINT",
        "age_ns": "BIGINT", "unattributed_by": "VARCHAR", "lost": "VARCHAR",
        "processes": "VARCHAR", "executables": "BIGINT", "origin": "VARCHAR",
        "vouched": "BIGINT",
    },
    "claims": {"epoch": "BLOB", **_ORDER, **CLAIMS},
    "dropped": {
        "epoch": "BLOB", "job_id": "BIGINT", **_ORDER, "first_sequence": "BIGINT",
        "last_sequence": "BIGINT", "batches": "BIGINT", "bytes": "BIGINT", "reason": "VARCHAR",
    },
    "jobs": {
        "cluster": "VARCHAR", "job_id": "BIGINT", "submit_ns": "BIGINT", "start_ns": "BIGINT",
        "end_ns": "BIGINT", "elapsed_s": "BIGINT", "cpu_time_s": "BIGINT", "cpus": "BIGINT",
        "nodes": "BIGINT", "node_list": "VARCHAR", "state": "VARCHAR", "restarts": "BIGINT",
        "sluid": "VARCHAR", "user": "VARCHAR", "uid": "BIGINT", "account": "VARCHAR",
        "partition": "VARCHAR", "job_name": "VARCHAR", "read_ns": "BIGINT", "tie": "BIGINT",
    },
}  # fmt: skip

# What tells two rows of a table apart, and which of two with the same key stays.
KEYS: Final[dict[str, tuple[str, ...]]] = {
    "points": ("epoch", "slot", "path", "flags"),
    "totals": ("epoch", "month", "path", "flags"),
    "epochs": ("epoch", "month"),
    "claims": ("epoch", *CLAIMS),
    "dropped": ("epoch", "generation", "sequence", "tie"),
    "jobs": ("cluster", "job_id", "submit_ns", "start_ns"),
}
LATEST: Final[dict[str, str]] = dict.fromkeys(
    ("points", "totals", "epochs", "claims", "dropped"),
    "generation DESC, sequence DESC, tie DESC",
) | {"jobs": "read_ns DESC, tie DESC"}
# What a look-up asks for comes first, so that it reads few row groups.
SORTED_BY: Final[dict[str, str]] = {
    "points": "job_id, epoch, slot, path, flags",
    "totals": "job_id, epoch, month, path, flags",
    "epochs": "job_id, epoch, month",
    "claims": "job_id, epoch, generation, sequence",
    "dropped": "job_id, epoch, generation, sequence",
    "jobs": "job_id, cluster, submit_ns, start_ns",
}

ROW_GROUP: Final = 40_960
# Of files that look-ups read a row group of; still smaller ones are slower to go through.
LOOKED_UP_ROWS: Final = 16_384
# What DuckDB may take where it goes through everything; beyond, it uses the disk.
MEMORY: Final = "2GB"
_LINES: Final = 10_000
_MAX_LINE: Final = 64 << 20

Column = np.ndarray[Any, Any]  # of int64, with NULL for null


def quoted(path: Path | str) -> str:
    """A text as an SQL literal."""
    return "'" + str(path).replace("'", "''") + "'"


def connect(*, threads: int | None = None, memory: str | None = None) -> Any:  # noqa: ANN401
    """A DuckDB of its own in memory, that loads nothing and asks nobody."""
    options: dict[str, Any] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "preserve_insertion_order": True,
    }
    if threads is not None:
        options["threads"] = threads
    if memory is not None:
        options["memory_limit"] = memory
    return duckdb.connect(":memory:", config=options)


def integers(values: Sequence[int | None]) -> Column:
    """A column of int64; None becomes NULL."""
    plain = [NULL if value is None else value for value in values] if None in values else values
    return np.frombuffer(array("q", cast("Sequence[int]", plain)), dtype=np.int64)


@contextlib.contextmanager
def loaded(
    schema: Mapping[str, str], rows: Iterable[Sequence[Any]], folder: Path | None = None
) -> Iterator[str]:
    """SQL for rows of plain Python, in the order of the schema's columns, while it lasts.

    They go through a file of JSON lines: DuckDB takes Python's texts and bytes one by
    one, with a search for pandas at each, twenty times as slowly.
    """
    names = list(schema)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="rows-", suffix=".json") as file:
        encoder = msgspec.json.Encoder()
        waiting = []
        for row in rows:
            waiting.append(dict(zip(names, row, strict=True)))
            if len(waiting) >= _LINES:
                file.write(encoder.encode_lines(waiting))
                waiting = []
        file.write(encoder.encode_lines(waiting))
        file.flush()
        read = {name: "VARCHAR" if kind == "BLOB" else kind for name, kind in schema.items()}
        columns = ", ".join(f"{quoted(name)}: '{kind}'" for name, kind in read.items())
        select = ", ".join(
            f'from_base64("{name}") AS "{name}"' if kind == "BLOB" else f'"{name}"'
            for name, kind in schema.items()
        )
        yield (
            f"(SELECT {select} FROM read_json({quoted(file.name)},"
            f" format = 'newline_delimited', columns = {{{columns}}},"
            f" maximum_object_size = {_MAX_LINE}))"
        )


class SetWriter:
    """Writes one set; nothing of it can be seen before `finish`.

    As a context: what was not finished at its end is taken away.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self._folder = folder
        self.name = name or secrets.token_hex(12)
        self.temporary = folder / f"{TEMPORARY}{secrets.token_hex(12)}"
        self.temporary.mkdir(mode=0o750)
        self.tables: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abandon()

    def path(self, table: str) -> Path:
        """Where a table is to be written, for those who write it themselves."""
        self.tables.append(table)
        return self.temporary / f"{table}{SUFFIX}"

    def spill(self) -> Path:
        """A folder for what does not fit into memory; goes with the writing."""
        return self.temporary / "spill"

    def finish(self) -> int:
        """Sync and rename; returns the bytes written. Raises OSError."""
        total = 0
        shutil.rmtree(self.spill(), ignore_errors=True)
        for path in sorted(self.temporary.iterdir()):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                total += os.fstat(fd).st_size
            finally:
                os.close(fd)
        durable.sync_folder(self.temporary)
        try:
            self.temporary.rename(self._folder / self.name)
        except OSError as error:
            # Another process has made the same in the meantime.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self.abandon()
        durable.sync_folder(self._folder)
        return total

    def abandon(self) -> None:
        """Take everything away again."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def copy(
    connection: Any,  # noqa: ANN401
    query: str,
    path: Path,
    *,
    level: int = 1,
    row_group: int = LOOKED_UP_ROWS,
) -> None:
    """Write the rows of a query to a Parquet file."""
    connection.execute(
        f"COPY ({query}) TO {quoted(path)}"
        f" (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL {level}, ROW_GROUP_SIZE {row_group}"
        # DuckDB 1.5 writes filters for BLOB columns that deny values which are there.
        ", WRITE_BLOOM_FILTER false)"
    )


_ARROW: Final = {"BIGINT": pa.int64(), "BLOB": pa.binary(), "VARCHAR": pa.string()}


# Of epochs, which are random, least and greatest tell nothing.
_LOOKED_UP: Final = ("job_id", "month", "slot", "cluster", "end_ns")


def write(columns: Mapping[str, Any], path: Path) -> None:
    """Write columns of Arrow to a Parquet file."""
    table = pa.table(dict(columns))
    pq.write_table(
        table,
        path,
        # Twice as fast as zstd; what is merged later is made smaller then.
        compression="lz4",
        row_group_size=ROW_GROUP,
        write_statistics=[name for name in _LOOKED_UP if name in columns],
        # Counters hardly repeat; a dictionary of them is work for nothing.
        use_dictionary=[f.name for f in table.schema if not pa.types.is_integer(f.type)],
        store_schema=False,
    )


def columns(schema: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> dict[str, pa.Array]:
    """Columns of Arrow out of rows of plain Python, in the order of the schema's columns."""
    every = zip(*rows, strict=True) if rows else [()] * len(schema)
    return {
        name: column(kind, values)
        for (name, kind), values in zip(schema.items(), every, strict=True)
    }


def joined(
    schema: Mapping[str, str], parts: Sequence[Mapping[str, pa.Array]]
) -> dict[str, pa.ChunkedArray]:
    """Parts of a table one after the other."""
    return {
        name: pa.chunked_array([part[name].cast(_ARROW[kind]) for part in parts])
        for name, kind in schema.items()
    }


def column(kind: str, values: Sequence[Any]) -> pa.Array:
    """A column of Arrow out of plain Python."""
    # Many columns say the same in all rows, or nothing: quicker to see than to take over.
    if len(values) > 1 and values.count(values[0]) == len(values):
        if values[0] is None:
            return pa.nulls(len(values), _ARROW[kind])
        zeros = pa.array(np.zeros(len(values), dtype=np.int32))
        one = pa.array(values[:1], _ARROW[kind])
        return pa.DictionaryArray.from_arrays(zeros, one) if kind != "BIGINT" else one.take(zeros)
    return pa.array(values, _ARROW[kind])


def whole_numbers(values: Column) -> pa.Array:
    """A column of Arrow; NULL becomes null."""
    absent = values == NULL
    return pa.array(values, mask=absent if absent.any() else None)


def scan(table: str, files: Iterable[Path]) -> str:
    """SQL for the rows of a table in these files; an empty table if there are none."""
    names = ", ".join(quoted(path) for path in files)
    if names:
        return f"(SELECT * FROM read_parquet([{names}]))"
    empty = ", ".join(f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in SCHEMA[table].items())
    return f"(SELECT {empty} WHERE false)"


def latest(table: str, source: str) -> str:
    """SQL for the rows that count among all rows of a table: one for each key."""
    keys = ", ".join(f'"{name}"' for name in KEYS[table])
    return (
        f"(SELECT * FROM {source} QUALIFY row_number() OVER"
        f" (PARTITION BY {keys} ORDER BY {LATEST[table]}) = 1)"
    )
