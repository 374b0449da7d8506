"""The small mutable state: what was ingested, which path is which software, what was sent.

SQLite by default, PostgreSQL for a state that several hosts share; SQLAlchemy Core is
the only door. Everything large is in Parquet files that this state names. A change of
the schema is a migration, recorded in the transaction that applies it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from sams_aggregator import config as cfg
from sams_ebpf.errors import SamsError, UsageError

BUSY_TIMEOUT_S: Final = 120
_LOCK_KEY: Final = 0x53414D53  # PostgreSQL: one writing transaction at a time

metadata = sa.MetaData()

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")

migrations = sa.Table(
    "migrations",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("applied_ns", sa.BigInteger, nullable=False),
)
# What holds for all facts of this state: time zone, distance of points.
settings = sa.Table(
    "settings",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
# Sets of Parquet files; `tables` names the files in the set's folder, blank-separated.
files = sa.Table(
    "files",
    metadata,
    sa.Column("id", Big, primary_key=True, autoincrement=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("tables", sa.Text, nullable=False),
    sa.Column("compacted", sa.Integer, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("begin_ns", sa.BigInteger),
    sa.Column("end_ns", sa.BigInteger),
    # Lowest and highest job id in it; null: not known, or some rows name none.
    sa.Column("low_job", sa.BigInteger),
    sa.Column("high_job", sa.BigInteger),
)
# The manifest: each unit of input, up to where it was read, and the set that holds it.
units = sa.Table(
    "units",
    metadata,
    sa.Column("unit", sa.Text, primary_key=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("extent", sa.BigInteger, nullable=False),
    sa.Column("file_id", Big, sa.ForeignKey("files.id"), nullable=False),
    sa.Column("frames", sa.BigInteger, nullable=False),
    sa.Column("problems", sa.Text, nullable=False),
    sa.Column("read_ns", sa.BigInteger, nullable=False),
)
sa.Index("units_file", units.c.file_id)
paths = sa.Table(
    "paths",
    metadata,
    sa.Column("path", sa.LargeBinary, primary_key=True),
)
# Software of a path under one version of the rules; software is NULL where no rule matched.
mapping = sa.Table(
    "mapping",
    metadata,
    sa.Column("rules", sa.Text, primary_key=True),
    sa.Column("path", sa.LargeBinary, primary_key=True),
    sa.Column("software", sa.Text),
    sa.Column("version", sa.Text),
    sa.Column("local_version", sa.Text),
    sa.Column("user_provided", sa.Boolean, nullable=False),
    sa.Column("ignored", sa.Boolean, nullable=False),
)
rules = sa.Table(
    "rules",
    metadata,
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("used_ns", sa.BigInteger, nullable=False),
)
# SAMS records: the files to be written, byte for byte, with what is to be remembered of
# each of their records once they are written; and what was sent for each record.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("records", sa.Text, nullable=False),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("written_ns", sa.BigInteger),
)
sent = sa.Table(
    "sent",
    metadata,
    sa.Column("record_id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("sent_ns", sa.BigInteger, nullable=False),
    sa.Column("partial", sa.Boolean, nullable=False),
)


class StateError(SamsError):
    """A state that cannot be used."""


def _first(connection: sa.Connection) -> None:
    made = [table for table in metadata.sorted_tables if table is not migrations]
    metadata.create_all(connection, tables=made)


def _job_ids_of_sets(connection: sa.Connection) -> None:
    there = {column["name"] for column in sa.inspect(connection).get_columns(files.name)}
    for name in ("low_job", "high_job"):
        if name not in there:  # as it is in a state of before
            connection.execute(sa.text(f"ALTER TABLE {files.name} ADD COLUMN {name} BIGINT"))


# In order; never changed once released. Each runs in the transaction that records it.
MIGRATIONS: Final[list[tuple[int, str, Callable[[sa.Connection], None]]]] = [
    (1, "first tables", _first),
    (2, "job ids of sets", _job_ids_of_sets),
]


class State:
    """An open state database."""

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self.engine = engine
        self.where = where
        # Paths that are known to be in `paths`, from which none is ever taken.
        self.seen_paths: set[bytes] = set()
        self._readers = (
            engine.execution_options(readonly=True)
            if self.sqlite
            else engine.execution_options(isolation_level="REPEATABLE READ")
        )

    @property
    def sqlite(self) -> bool:
        """Whether it is the embedded database."""
        return self.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """One transaction; writers wait for each other from its start, on every database.

        Raises StateError for what the database reports.
        """
        try:
            with self.engine.begin() as connection:
                if not self.sqlite:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise StateError(f"{self.where}: {_reason(error)}") from error

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view."""
        try:
            with self._readers.connect() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise StateError(f"{self.where}: {_reason(error)}") from error

    def insert_new(self, connection: sa.Connection, table: sa.Table, rows: list[Any]) -> None:
        """Insert rows (dicts); those whose key is there already are left alone."""
        if not rows:
            return
        insert = self.insert(table).values(dict.fromkeys(rows[0])).on_conflict_do_nothing()
        if not self.sqlite:
            connection.execute(insert, rows)
            return
        # To convert each value, which SQLite takes as it is, would take longer than to insert it.
        plain = insert.compile(dialect=connection.dialect)
        names = plain.positiontup
        connection.exec_driver_sql(str(plain), [tuple(row[name] for name in names) for row in rows])

    def insert(self, table: sa.Table) -> Any:  # noqa: ANN401 - differs with the dialect
        """An insert statement that knows `on_conflict_…`."""
        return sqlite.insert(table) if self.sqlite else postgresql.insert(table)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_state(part: cfg.Aggregator) -> State:
    """Open the configured state, made and migrated if need be.

    Raises UsageError for a bad URL and StateError for what the database says.
    """
    if part.state:
        engine, where = _server(part)
    else:
        part.data.mkdir(mode=0o750, parents=True, exist_ok=True)
        file = part.data / "state.sqlite"
        engine, where = _sqlite(file), str(file)
    state = State(engine, where)
    try:
        migrate(state)
    except SamsError:
        state.close()
        raise
    return state


def open_existing(part: cfg.Aggregator) -> State:
    """The same for all that reads what an ingest has made: makes no folder of a mistyped name."""
    if not part.data.is_dir():
        raise UsageError(f"{part.data}: no such folder; `ingest` and `reprocess` make it")
    return open_state(part)


def migrate(state: State) -> None:
    """Bring the schema up to date. A newer schema than this program's is refused."""
    latest = MIGRATIONS[-1][0]
    with state.begin() as connection:
        migrations.create(connection, checkfirst=True)
        done = set(connection.scalars(sa.select(migrations.c.version)))
        if done and max(done) > latest:
            raise StateError(
                f"{state.where}: made by a newer version of this program (schema {max(done)},"
                f" this one knows {latest}): upgrade, or rebuild with `reprocess` in another folder"
            )
        for version, name, apply in MIGRATIONS:
            if version not in done:
                apply(connection)
                connection.execute(
                    migrations.insert().values(
                        version=version, name=name, applied_ns=time.time_ns()
                    )
                )


def _sqlite(file: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(file)), connect_args={"timeout": BUSY_TIMEOUT_S}
    )

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:  # noqa: ANN401
        # The driver's own transactions would leave DDL outside of them.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        # With NORMAL a power cut takes back what was recorded; the file it names stays.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes then would fail beside another writer.
        readonly = connection.get_execution_options().get("readonly", False)
        connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")

    return engine


def _server(part: cfg.Aggregator) -> tuple[sa.Engine, str]:
    try:
        url = sa.make_url(part.state)
    except sa.exc.ArgumentError as error:
        raise UsageError(f"aggregator.state: no database URL: {error}") from error
    if url.get_backend_name() not in ("postgresql", "sqlite"):
        raise UsageError("aggregator.state: postgresql://… or nothing (for SQLite) is possible")
    if url.password is not None:
        raise UsageError("aggregator.state: no password here; name aggregator.state_password_file")
    if url.get_backend_name() == "sqlite":
        return _sqlite(Path(url.database or "")), str(url.database)
    if part.state_password_file is not None:
        url = url.set(password=cfg.password(part.state_password_file))
    url = url.set(drivername="postgresql+psycopg")
    return sa.create_engine(url), url.render_as_string(hide_password=True)


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    said = getattr(error, "orig", None) or error
    text = " ".join(str(said).split())[:300]
    code = getattr(said, "sqlite_errorcode", None)
    if code is not None and code & 0xFF == sqlite3.SQLITE_READONLY:
        text += ": run this as who runs `ingest`"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        text += ": move it away and `reprocess`, all in it comes from the archives"
    return text
