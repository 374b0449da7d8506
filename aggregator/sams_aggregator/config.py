"""The aggregator's part of the site's configuration file, and the command line's share of it.

`docs/aggregator.md` explains each key.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from sams_ebpf import settings
from sams_ebpf.errors import UsageError

DEFAULT_FILE: Final = Path("/etc/sams-ebpf/config.yaml")

Seconds = Annotated[int, Meta(ge=0, le=10 * 366 * 86400)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]


class Site(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose data this is. `node` belongs to the collector."""

    cluster: Name | None = None
    node: Name | None = None


class Sacct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How Slurm's accounting is asked; `days` is how far back each ingest asks again."""

    command: Annotated[list[str], Meta(min_length=1, max_length=64)] = msgspec.field(
        default_factory=lambda: ["sacct"]
    )
    days: Annotated[int, Meta(ge=1, le=3660)] = 7
    timeout_s: Annotated[int, Meta(ge=1, le=86400)] = 600


class Extract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How SAMS records are written.

    output: the folder that the site's SAMS client empties. jobs_per_file: records in a
        file. remove_less_then: share in per cent (upstream's spelling).
    """

    output: Path | None = None
    jobs_per_file: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    remove_less_then: Annotated[float, Meta(ge=0, lt=100)] = 1.0


class Aggregator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where things are, and what holds for every figure.

    data: facts, state and what is derived from them. state: an SQLAlchemy URL, empty for
        a SQLite file in `data`. timezone: the site's own, whose months are reported.
    points_every_s: seconds between two kept points of an executable, 0 for none.
    settle_s: seconds after a run's end at which what is still missing is given up.
    """

    data: Path = Path("/var/lib/sams-aggregator")
    archives: list[Path] = msgspec.field(
        default_factory=lambda: [Path("/var/lib/sams-receiver/archive")]
    )
    batches: list[Path] = []
    sams_json: list[Path] = []
    sacct: Sacct = Sacct()
    extract: Extract = Extract()
    state: str = ""
    state_password_file: Path | None = None
    timezone: str = "UTC"
    points_every_s: Seconds = 600
    settle_s: Seconds = 48 * 3600
    workers: Annotated[int, Meta(ge=0, le=4096)] = 0

    def __post_init__(self) -> None:
        """Refuse a time zone that this host does not know."""
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"timezone: '{self.timezone}' is no time zone of this host") from error

    @property
    def worker_count(self) -> int:
        """Processes that work at once: as configured, or one for each CPU."""
        return self.workers or len(os.sched_getaffinity(0))


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The sections that the aggregator uses; `software` is left to the rules."""

    site: Site = Site()
    aggregator: Aggregator = Aggregator()
    software: Any = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that every one of them has."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"the site's configuration; {DEFAULT_FILE} if it is there, else defaults",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="facts and state; instead of aggregator.data"
    )


def load(arguments: argparse.Namespace) -> Config:
    """Read the configuration as the options say. Raises UsageError."""
    path: Path | None = arguments.config
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    config = Config() if path is None else settings.load(path, Config)
    if arguments.data is not None:
        part = msgspec.structs.replace(config.aggregator, data=arguments.data)
        config = msgspec.structs.replace(config, aggregator=part)
    return config


def password(path: Path) -> str:
    """Read a secret from a file that nobody else may read. Raises UsageError."""
    try:
        if path.stat().st_mode & 0o077:
            raise UsageError(f"{path}: others may read this secret: chmod 600")
        return path.read_text().strip()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
