"""Which sets of files count: the one place that says so, in the state's transactions.

A set is recorded after it is whole on disk; what is not recorded does not exist for any
reader. Two processes may read the same unit at once: the one that read further stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple

import sqlalchemy as sa

from sams_aggregator import state as st
from sams_aggregator import tables
from sams_aggregator.work import Options, Result
from sams_ebpf.errors import SamsError

FACTS: Final = "facts"
_PROBLEMS_KEPT: Final = 100
_PATHS_KEPT: Final = 500_000
_SETTINGS: Final = ("zone", "points_every_s")


class Store(NamedTuple):
    """A state and the folder with the facts it names."""

    state: st.State
    data: Path


class FileSet(NamedTuple):
    """One set of Parquet files that counts."""

    id: int
    name: str
    tables: tuple[str, ...]
    compacted: int
    bytes: int
    begin_ns: int | None
    end_ns: int | None
    low_job: int | None = None
    high_job: int | None = None


class Manifest(NamedTuple):
    """The sets that count at one moment, by name."""

    folder: Path
    sets: tuple[FileSet, ...]

    @property
    def fingerprint(self) -> str:
        """Changes when the sets do."""
        names = ",".join(one.name for one in self.sets)
        return blake2b(names.encode(), digest_size=12).hexdigest()

    def of_jobs(self, job_ids: Sequence[int]) -> Manifest:
        """The sets that may say something of these job ids."""
        return self._replace(
            sets=tuple(
                one
                for one in self.sets
                if one.low_job is None
                or one.high_job is None
                or any(one.low_job <= job_id <= one.high_job for job_id in job_ids)
            )
        )

    def files(self, table: str) -> list[Path]:
        """The Parquet files of a table."""
        return [
            self.folder / one.name / f"{table}{tables.SUFFIX}"
            for one in self.sets
            if table in one.tables
        ]

    def source(self, table: str) -> str:
        """SQL for all rows of a table, the superseded ones included."""
        return tables.scan(table, self.files(table))

    def latest(self, table: str) -> str:
        """SQL for the rows of a table that count."""
        return tables.latest(table, self.source(table))


def facts_folder(data: Path) -> Path:
    """Where the sets are."""
    folder = data / FACTS
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    return folder


def read(store: Store) -> Manifest:
    """Give the manifest as it is now."""
    state, data = store
    columns = [st.files.c[name] for name in FileSet._fields]
    with state.read() as connection:
        rows = connection.execute(sa.select(*columns).order_by(st.files.c.name)).all()
    return Manifest(
        facts_folder(data),
        tuple(FileSet(r[0], r[1], tuple(r[2].split()), *r[3:]) for r in rows),
    )


def extents(state: st.State) -> dict[str, int]:
    """How far each unit was read."""
    with state.read() as connection:
        rows = connection.execute(sa.select(st.units.c.unit, st.units.c.extent)).all()
    return {row[0]: row[1] for row in rows}


def fix_options(state: st.State, options: Options) -> None:
    """Record what the facts depend on, or refuse to mix facts of two kinds. Raises SamsError."""
    wanted = {name: str(getattr(options, name)) for name in _SETTINGS}
    with state.begin() as connection:
        rows = connection.execute(sa.select(st.settings.c.key, st.settings.c.value)).all()
        known = {row[0]: row[1] for row in rows}
        for key, value in wanted.items():
            if key not in known:
                connection.execute(st.settings.insert().values(key=key, value=value))
            elif known[key] != value:
                name = "timezone" if key == "zone" else key
                raise SamsError(
                    f"aggregator.{name}: the facts were made with '{known[key]}', now it is"
                    f" '{value}': set it back, or `reprocess --replace`"
                )


def record(store: Store, unit: str, source: str, extent: int, result: Result) -> bool:
    """Make a set count for a unit, in one transaction. False if another reader read further.

    Raises SamsError if the set is not there (it was left lying until `gc` took it).
    """
    state, data = store
    with state.begin() as connection:
        known = connection.execute(
            sa.select(st.units.c.extent, st.units.c.file_id, st.files.c.compacted)
            .join(st.files, st.files.c.id == st.units.c.file_id)
            .where(st.units.c.unit == unit)
        ).first()
        if known is not None and known.extent >= extent:
            return False
        if result.name is not None and not (facts_folder(data) / result.name).is_dir():
            raise SamsError(f"{facts_folder(data) / result.name}: has gone before it was recorded")
        name = result.name or f"empty-{unit}-{extent}"
        file_id = _insert_set(connection, result._replace(name=name), level=0)
        row = {
            "unit": unit,
            "source": source,
            "extent": extent,
            "file_id": file_id,
            "frames": result.frames,
            "problems": json.dumps(result.bad[:_PROBLEMS_KEPT]),
            "read_ns": time.time_ns(),
        }
        insert = state.insert(st.units).values(row)
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["unit"],
                set_={name: insert.excluded[name] for name in row if name != "unit"},
            )
        )
        if known is not None:
            _drop_unused(connection, [known.file_id])
        new = [path for path in result.paths if path not in state.seen_paths]
        state.insert_new(connection, st.paths, [{"path": path} for path in new])
    if len(state.seen_paths) > _PATHS_KEPT:
        state.seen_paths.clear()
    state.seen_paths.update(new)
    return True


def replace(state: st.State, old: Iterable[FileSet], new: Result, *, level: int) -> bool:
    """Put one set in the place of several. False if any of them counts no more."""
    ids = [one.id for one in old]
    with state.begin() as connection:
        there = set(connection.scalars(sa.select(st.files.c.id).where(st.files.c.id.in_(ids))))
        if there != set(ids):
            return False
        file_id = _insert_set(connection, new, level=level)
        connection.execute(
            st.units.update().where(st.units.c.file_id.in_(ids)).values(file_id=file_id)
        )
        connection.execute(st.files.delete().where(st.files.c.id.in_(ids)))
    return True


def _insert_set(connection: sa.Connection, new: Result, *, level: int) -> int:
    row = st.files.insert().values(
        name=new.name,
        tables=" ".join(new.tables),
        compacted=level,
        bytes=new.size,
        begin_ns=new.begin_ns,
        end_ns=new.end_ns,
        low_job=new.low_job,
        high_job=new.high_job,
    )
    file_id: int = connection.execute(row.returning(st.files.c.id)).scalar_one()
    return file_id


def _drop_unused(connection: sa.Connection, ids: list[int]) -> None:
    used = sa.select(st.units.c.file_id).where(st.units.c.file_id == st.files.c.id).exists()
    connection.execute(st.files.delete().where(st.files.c.id.in_(ids), ~used))
