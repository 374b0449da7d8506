"""The node's part of the site's configuration file: every key, its bounds and its default.

`docs/configuration.md` explains each key; a test keeps the two the same. Times are
seconds, sizes bytes. The defaults work on a Slurm node without any file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sams_ebpf import settings

DEFAULT_FILE = Path("/etc/sams-ebpf/config.yaml")

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Seconds = Annotated[float, Meta(gt=0, le=10 * 365 * 86400)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
# A receiver's name stands in file names and log lines.
ReceiverName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


def _absolute(key: str, path: Path) -> None:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{key}: '{path}' has to be an absolute path")


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


class Site(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose node this is."""

    cluster: Name | None = None
    node: Name | None = None

    def __post_init__(self) -> None:
        """Refuse names with which every receiver would refuse every batch."""
        for key, name in (("cluster", self.cluster), ("node", self.node)):
            if name is not None and settings.PLAIN_NAME.fullmatch(name) is None:
                raise ValueError(f"{key}: {name!r}: only letters, digits, '.', '_', '-'")

    def node_name(self) -> str:
        """Name of this node: as configured, as slurmd calls it, or the short host name."""
        return self.node or os.environ.get("SLURMD_NODENAME") or os.uname().nodename.split(".")[0]


class SamsJson(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Upstream's JSON file at the end of a job, for a site that still collects those."""

    base_path: Path
    file_pattern: Name = "%(jobid)s.%(node)s.json"
    jobid_hash_size: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None
    write_as_uid: Annotated[int, Meta(ge=0, le=2**32 - 2)] | None = None

    def __post_init__(self) -> None:
        """Refuse a folder or a pattern that cannot give a file's name."""
        _absolute("base_path", self.base_path)
        try:
            name = self.file_pattern % {"jobid": "1", "node": "n"}
        except (KeyError, TypeError, ValueError):
            raise ValueError("file_pattern: only %(jobid)s and %(node)s are known") from None
        if "/" in name or "%(jobid)s" not in self.file_pattern:
            raise ValueError("file_pattern: has to hold %(jobid)s and no slash")


class Collector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a job is measured."""

    interval_s: Annotated[float, Meta(ge=1, le=86400)] = 60
    grace_period_s: Annotated[float, Meta(ge=0, le=30 * 86400)] = 600
    mode: Literal["auto", "bpf", "proc"] = "auto"
    loader: Literal["auto", "libbpf", "bcc"] = "auto"
    exact: bool = False
    full_every: Annotated[int, Meta(ge=1, le=1000)] = 10
    cgroup_tree: Name = "auto"
    executables_per_job: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    executables: Annotated[int, Meta(ge=16, le=1_000_000)] = 8192
    tasks: Annotated[int, Meta(ge=64, le=4_000_000)] = 32768
    cgroup_parents: Annotated[list[Name], Meta(max_length=8)] = msgspec.field(
        default_factory=lambda: [
            "/slurm",
            "/slurm_{node}",
            "/system.slice/slurmstepd.scope",
            "/system.slice/{node}_slurmstepd.scope",
        ]
    )
    unclaimed_after_s: Seconds = 600
    programs_limit_percent: Annotated[float, Meta(gt=0, le=100)] = 5
    state: Path = Path("/var/lib/sams-ebpf")
    sams_json: SamsJson | None = None

    def __post_init__(self) -> None:
        """Refuse relative places: the collector's working folder is nobody's business."""
        _absolute("state", self.state)
        for parent in self.cgroup_parents:
            _absolute("cgroup_parents", Path(parent))


class Spool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where batches wait on the node, and how much of the disk they may take."""

    folder: Path = Path("/var/spool/sams-ebpf")
    max_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 50)] = 256 << 20
    max_age_s: Seconds = 30 * 86400
    keep_free_bytes: Bytes = 256 << 20
    rejected_max_bytes: Bytes = 64 << 20

    def __post_init__(self) -> None:
        """Refuse a relative folder."""
        _absolute("folder", self.folder)


class Receiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place that batches are sent to."""

    url: Annotated[str, Meta(max_length=2048)]
    required: bool = True
    allow_plain: bool = False
    ca_file: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    token_file: Path | None = None
    basic_file: Path | None = None
    proxy: Annotated[str, Meta(max_length=2048)] | None = None

    def __post_init__(self) -> None:
        """Refuse what would send accounts in the clear or under two identities."""
        from urllib.parse import urlsplit  # noqa: PLC0415 (a collector has no receivers)

        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"url: {error}") from None
        if parts.scheme not in ("https", "http") or not host:
            raise ValueError("url: has to be https://HOST[:PORT][/PATH]")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("url: no user, query or fragment; use token_file or basic_file")
        plain = parts.scheme == "http"
        if plain and not self.allow_plain and not _loopback(host):
            raise ValueError("url: http:// is not encrypted; use https://, or set allow_plain")
        if self.token_file is not None and self.basic_file is not None:
            raise ValueError("token_file and basic_file exclude each other")
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("client_certificate and client_key go together")
        if self.proxy is not None:
            try:
                parts = urlsplit(self.proxy)
                good = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
            except ValueError as error:
                raise ValueError(f"proxy: {error}") from None
            if not good:
                raise ValueError("proxy: has to be http://HOST:PORT or https://HOST:PORT")


class Ship(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the spool is sent."""

    receivers: Annotated[dict[ReceiverName, Receiver], Meta(max_length=16)] = {}
    spread_s: Annotated[float, Meta(ge=0, le=3600)] = 30
    connect_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 10
    read_timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 60
    total_timeout_s: Annotated[float, Meta(gt=0, le=7200)] = 300
    backoff_s: Annotated[float, Meta(gt=0, le=3600)] = 1
    backoff_max_s: Annotated[float, Meta(gt=0, le=86400)] = 300
    zstd_level: Annotated[int, Meta(ge=1, le=19)] = 3

    def __post_init__(self) -> None:
        """Refuse a set-up in which nobody has to have a batch before it is deleted."""
        if self.receivers and not any(one.required for one in self.receivers.values()):
            raise ValueError("receivers: at least one has to be required")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sections that the programs of a node read."""

    site: Site = Site()
    collector: Collector = Collector()
    spool: Spool = Spool()
    ship: Ship = Ship()


def load(path: Path | None) -> Config:
    """Read the file, or give the defaults where none was named and none is installed.

    Raises UsageError with one line that names file, key and fix.
    """
    if path is None:
        if not DEFAULT_FILE.exists():
            return Config()
        path = DEFAULT_FILE
    return settings.load(path, Config)
