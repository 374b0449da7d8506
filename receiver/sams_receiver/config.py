"""The `receiver` section of the site's configuration, with its defaults."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from sams_ebpf import settings, wire
from sams_ebpf.errors import UsageError
from sams_receiver.archive import Limits as SegmentLimits

Positive = Annotated[int, Meta(ge=1, le=wire.INT64_MAX)]
NotNegative = Annotated[int, Meta(ge=0, le=wire.INT64_MAX)]

# sockaddr_un holds 108 bytes with a zero at their end.
_MAX_UNIX: Final = 107


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Server certificate and key; client_ca: who signs clients, crl: whom not to trust."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    crl: Path | None = None


class Proxy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A proxy in front that says who the client is, in the header `header`.

    It is believed over a unix socket, or if it sends what secret_file holds in
    `X-Sams-Proxy-Secret`.
    """

    header: str = "X-Sams-Client"
    secret_file: Path | None = None


class Listener(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to listen: `host:port`, `[ipv6]:port` or `unix:/path` (with its mode, octal)."""

    address: str
    tls: Tls | None = None
    proxy: Proxy | None = None
    mode: str = "0660"

    @property
    def unix(self) -> Path | None:
        """Path of the unix socket, None for TCP."""
        kind, _, rest = self.address.partition(":")
        return Path(rest) if kind == "unix" else None

    @property
    def tcp(self) -> tuple[str, int]:
        """Host and port. Raises UsageError."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UsageError(
                f"receiver.listen: {self.address!r}: write host:port, [ipv6]:port or unix:/path"
            )
        return host.strip("[]"), int(port)

    @property
    def local(self) -> bool:
        """Whether nobody off this machine can connect."""
        if self.unix is not None:
            return True
        host = self.tcp[0]
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


class NameRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which node a client's name stands for: regexp with the group `node`, maybe `cluster`."""

    match: str
    cluster: wire.Name | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what any client can make the receiver do at one time."""

    body_bytes: Positive = 32 << 20
    batch_bytes: Annotated[int, Meta(ge=1, le=wire.MAX_BYTES)] = 32 << 20
    records: Annotated[int, Meta(ge=1, le=wire.MAX_RECORDS)] = 250_000
    in_flight_bytes: Positive = 256 << 20
    body_seconds: Positive = 60
    idle_seconds: Positive = 75
    connections: Positive = 4_096
    requests_per_second: Positive = 100
    burst: Positive = 1_000
    failures_per_minute: Positive = 30
    clients: Positive = 20_000


class Quotas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what one node can have kept in one day (UTC); aside_bytes: of all, for ever."""

    bytes_per_day: Positive = 4 << 30
    writers_per_day: Positive = 20_000
    aside_bytes_per_day: Positive = 64 << 20
    aside_bytes: Positive = 1 << 30


class Segments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a live segment is closed and sealed."""

    bytes: Positive = 64 << 20
    frames: Annotated[int, Meta(ge=1, le=1_000_000)] = 32_768
    seconds: Positive = 3_600

    def limits(self) -> SegmentLimits:
        """The same in the archive's terms."""
        return SegmentLimits(
            segment_bytes=self.bytes, segment_frames=self.frames, segment_seconds=self.seconds
        )


class Receiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `receiver`."""

    archive: Path
    listen: Annotated[list[Listener], Meta(min_length=1)]
    partitions: Annotated[int, Meta(ge=1, le=256)] = 4
    tokens_file: Path | None = None
    passwords_file: Path | None = None
    names: list[NameRule] = []
    node_binding: bool = True
    cluster: wire.Name | None = None
    upstream_json: bool = True
    limits: Limits = Limits()
    quotas: Quotas = Quotas()
    segments: Segments = Segments()
    duplicates_days: Positive = 90
    min_free_bytes: NotNegative = 256 << 20
    shutdown_seconds: Positive = 20


class Site(msgspec.Struct, frozen=True):
    """The sections that the receiver reads."""

    receiver: Receiver | None = None


def load(path: Path) -> Receiver:
    """Read and check. Raises UsageError with one line that names the key and the fix."""
    section = settings.load(path, Site).receiver
    if section is None:
        raise UsageError(f"{path}: there is no section 'receiver'; it needs archive and listen")
    if not section.archive.is_absolute():
        raise UsageError(f"{path}: receiver.archive: {section.archive}: has to start with a slash")
    _check_cluster(f"{path}: receiver.cluster", section.cluster)
    for at, listener in enumerate(section.listen):
        _check_listener(f"{path}: receiver.listen[{at}]", listener, section)
    for at, rule in enumerate(section.names):
        _check_rule(f"{path}: receiver.names[{at}].match", rule)
        _check_cluster(f"{path}: receiver.names[{at}].cluster", rule.cluster)
    return section


def _check_cluster(where: str, name: str | None) -> None:
    """With another name every batch would be refused."""
    if name is not None and settings.PLAIN_NAME.fullmatch(name) is None:
        raise UsageError(f"{where}: {name!r}: only letters, digits, '.', '_', '-'")


def _check_listener(where: str, listener: Listener, section: Receiver) -> None:
    if listener.unix is None:
        _ = listener.tcp
    elif not listener.unix.is_absolute() or len(bytes(listener.unix)) > _MAX_UNIX:
        raise UsageError(
            f"{where}: {listener.address}: has to be unix:/path, of at most {_MAX_UNIX} bytes"
        )
    elif not re.fullmatch(r"0?[0-7]{3}", listener.mode):
        raise UsageError(f"{where}.mode: {listener.mode!r}: write it as '0660'")
    if listener.tls is None and not listener.local:
        raise UsageError(
            f"{where}: {listener.address} without tls: tokens, passwords and batches would"
            " travel in the clear; add tls, or listen on 127.0.0.1 or a unix socket behind a proxy"
        )
    if listener.tls is not None and listener.tls.crl and not listener.tls.client_ca:
        raise UsageError(f"{where}.tls.crl: without client_ca no certificate is looked at")
    if listener.proxy is not None and listener.unix is None and listener.proxy.secret_file is None:
        raise UsageError(
            f"{where}.proxy: any local user could pass for the proxy: listen on a unix socket"
            " or give secret_file"
        )
    certificates = listener.tls is not None and listener.tls.client_ca is not None
    credentials = section.tokens_file is not None or section.passwords_file is not None
    if listener.proxy is None and not certificates and not credentials:
        raise UsageError(
            f"{where}: nobody could get in: give tls.client_ca, proxy, tokens_file or"
            " passwords_file"
        )


def _check_rule(where: str, rule: NameRule) -> None:
    try:
        pattern = re.compile(rule.match)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{where}: not a regular expression: {error}") from error
    if "node" not in pattern.groupindex:
        raise UsageError(f"{where}: has no group (?P<node>…) that gives the node's name")
