"""Who speaks: settled from the connection and the headers, before any body is read.

Four ways, tried in this order: the name a trusted proxy gives, the client certificate,
a bearer token, a user name and password. The name found is then turned into the node
(and maybe the cluster) as which that client may write.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from sams_ebpf import settings
from sams_ebpf.errors import UsageError
from sams_receiver.config import NameRule, Receiver

PROXY_HEADER: Final = "X-Sams-Proxy-Secret"
MAX_FILE: Final = 4 << 20
MAX_PASSWORD: Final = 1024
_SCRYPT: Final = {"n": 1 << 14, "r": 8, "p": 1}
_CACHE: Final = 4_096
_CACHE_SECONDS: Final = 300.0
_RELOAD_SECONDS: Final = 2.0


class Client(NamedTuple):
    """Who was let in, how, and as which node it may write; None: as any."""

    name: str
    method: str
    node: str | None
    cluster: str | None


class Credential(NamedTuple):
    """A line of a tokens or passwords file. expires: seconds since the epoch, or None."""

    name: str
    secret: str
    expires: float | None

    @property
    def expired(self) -> bool:
        """Whether it was good once."""
        return self.expires is not None and time.time() >= self.expires


class Pass(NamedTuple):
    """By what a connection was let in: its next request may show the same once more."""

    header: bytes
    credential: Credential
    client: Client


class DeniedError(Exception):
    """Not let in: status 401 (who are you?) or 403 (not you), and a reason for the log."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def _read_list(path: Path) -> str:
    """Text of a file of credentials. Raises UsageError if others could read or set it."""
    settings.check_secret(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text") from error
    if len(data) > MAX_FILE:
        raise UsageError(f"{path}: larger than {MAX_FILE} bytes")
    return text


def read_proxy_secret(path: Path) -> bytes:
    """The one line of the proxy's secret file. Raises UsageError for one short enough to guess."""
    text = settings.read_secret(path)
    if len(text) < 32:
        raise UsageError(f"{path}: fewer than 32 characters: make one with 'openssl rand -hex 32'")
    return text.encode()


def read_credentials(path: Path, secret: re.Pattern[str]) -> list[Credential]:
    """Lines `NAME SECRET [EXPIRES]`; # starts a comment. Raises UsageError with the line."""
    found = []
    for number, line in enumerate(_read_list(path).splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in (2, 3) or secret.fullmatch(words[1]) is None:
            raise UsageError(
                f"{path}:{number}: not NAME SECRET [EXPIRES]; 'sams-receiver credential' makes one"
            )
        expires = _expiry(f"{path}:{number}", words[2]) if len(words) == 3 else None
        found.append(Credential(words[0], words[1], expires))
    return found


def _expiry(where: str, text: str) -> float:
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{where}: {text!r} is not a time like 2027-01-31T00:00Z") from error
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


TOKEN: Final = re.compile(r"[0-9a-f]{64}")
PASSWORD: Final = re.compile(r"scrypt:[0-9a-f]{32}:[0-9a-f]{64}")


def hash_token(token: str) -> str:
    """What stands in the file for a token, which is random and long enough not to be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


def hash_password(password: str, salt: bytes | None = None) -> str:
    """What stands in the file for a password, slow to guess (scrypt, 16 MiB)."""
    salt = salt or secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, dklen=32, maxmem=64 << 20, **_SCRYPT)
    return f"scrypt:{salt.hex()}:{digest.hex()}"


class _Watched:
    """Credentials of a file, read again when it changes; what was read last stays on error."""

    def __init__(self, path: Path, pattern: re.Pattern[str], warn: Callable[[str], None]) -> None:
        self._path = path
        self._pattern = pattern
        self._warn = warn
        self._stamp: tuple[int, ...] = ()
        self._next = 0.0
        self.by_name: dict[str, list[Credential]] = {}
        self.by_secret: dict[str, Credential] = {}
        self._read()

    def refresh(self) -> bool:
        """Look at the file if it is time to; whether it was read again."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _RELOAD_SECONDS
        try:
            if self._stamp == self._now():
                return False
            self._read()
        except UsageError as error:
            self._warn(f"{error}; what was read before stays in force")
            return False
        return True

    def _now(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()  # reading it tells why
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size

    def _read(self) -> None:
        # Before it is read: what replaces it meanwhile is then seen as a change.
        stamp = self._now()
        found = read_credentials(self._path, self._pattern)
        if not found:
            self._warn(f"{self._path}: holds no credential: nobody gets in by it")
        self.by_secret = {credential.secret: credential for credential in found}
        self.by_name = {}
        for credential in found:
            self.by_name.setdefault(credential.name, []).append(credential)
        self._stamp = stamp
        self._next = time.monotonic() + _RELOAD_SECONDS


class Names:
    """From a client's name to the node and cluster as which it may write."""

    def __init__(self, rules: Sequence[NameRule], *, binding: bool) -> None:
        self._rules = [(re.compile(rule.match), rule.cluster) for rule in rules]
        self._binding = binding

    def client(self, names: Sequence[str], method: str) -> Client:
        """First rule that fits one of the names; without rules the name is the node's."""
        if not self._binding:
            return Client(names[0], method, None, None)
        if not self._rules:
            return Client(names[0], method, names[0], None)
        for name in names:
            for pattern, cluster in self._rules:
                found = pattern.fullmatch(name)
                if found is not None:
                    groups = found.groupdict()
                    return Client(name, method, groups["node"], groups.get("cluster") or cluster)
        raise DeniedError(403, f"{names[0][:80]!r} fits none of receiver.names")


class Door:
    """Decides who is let in. `admit` never blocks; a password may need `check_password` first."""

    def __init__(self, config: Receiver, warn: Callable[[str], None]) -> None:
        self._names = Names(config.names, binding=config.node_binding)
        self._tokens = config.tokens_file and _Watched(config.tokens_file, TOKEN, warn)
        self._passwords = config.passwords_file and _Watched(config.passwords_file, PASSWORD, warn)
        self._good: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._pepper = secrets.token_bytes(32)

    def by_proxy(
        self, headers: Mapping[str, str], header: str, secret: bytes | None
    ) -> Client | None:
        """Believe the proxy. None if it names nobody."""
        given = _bytes(headers.get(PROXY_HEADER, ""))
        if secret is not None and not hmac.compare_digest(given, secret):
            raise DeniedError(403, "the proxy's secret is missing or wrong")
        name = headers.get(header, "")
        return self._names.client([name], "proxy") if name else None

    def by_certificate(self, certificate: Mapping[str, Any] | None) -> Client | None:
        """Names of the certificate that TLS has verified: DNS names, then common name."""
        if not certificate:
            return None
        # Looked at in the handshake, but a connection may last for long.
        if time.time() >= _expires(certificate["notAfter"]):
            raise DeniedError(401, "the certificate has expired")
        names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
        for part in certificate.get("subject", ()):
            names.extend(value for kind, value in part if kind == "commonName")
        if not names:
            raise DeniedError(403, "the certificate has neither a DNS name nor a common name")
        return self._names.client(names, "certificate")

    def by_token(self, header: str) -> Pass:
        """A bearer token, as the whole header has it."""
        if not self._tokens:
            raise DeniedError(401, "tokens are not accepted here")
        self._tokens.refresh()
        credential = self._tokens.by_secret.get(hash_token(header.partition(" ")[2].strip()))
        if credential is None:
            raise DeniedError(401, "unknown token")
        _check_expiry(credential)
        client = self._names.client([credential.name], "token")
        return Pass(_bytes(header), credential, client)

    def again(self, held: Pass, header: str) -> bool:
        """Whether a connection shows again what it was let in by, and that still holds."""
        # Behind a proxy several clients may share a connection: no time may tell what they show.
        if not self._tokens or not hmac.compare_digest(held.header, _bytes(header)):
            return False
        self._tokens.refresh()
        credential = held.credential
        known = self._tokens.by_secret.get(credential.secret) is credential
        return known and not credential.expired

    def by_known_password(self, user: str, password: str) -> Client | None:
        """A user whose password was found good a moment ago; None if it has to be checked."""
        if not self._passwords:
            raise DeniedError(401, "passwords are not accepted here")
        if self._passwords.refresh():
            self._good.clear()
        key = self._key(user, password)
        known = self._good.get(key)
        if known is None or known[1] < time.monotonic():
            return None
        for credential in self._passwords.by_name.get(user, ()):
            if credential.secret == known[0]:
                _check_expiry(credential)
                return self._names.client([user], "password")
        return None

    def check_password(self, user: str, password: str) -> Client:
        """Compare with every hash of the user: 50 ms each, so not in the event loop."""
        candidates = self._passwords.by_name.get(user, ()) if self._passwords else ()
        expired: Credential | None = None
        for credential in candidates:
            salt = bytes.fromhex(credential.secret.split(":")[1])
            if hmac.compare_digest(hash_password(password, salt), credential.secret):
                if credential.expired:
                    expired = credential
                    continue
                expires = time.monotonic() + _CACHE_SECONDS
                self._good[self._key(user, password)] = (credential.secret, expires)
                while len(self._good) > _CACHE:
                    self._good.popitem(last=False)
                return self._names.client([user], "password")
        if expired is not None:
            _check_expiry(expired)
        if not candidates:
            # As long as for a user who exists, so that time does not tell who does.
            hash_password(password, bytes(16))
        raise DeniedError(401, "unknown user or wrong password")

    def _key(self, user: str, password: str) -> bytes:
        return hmac.digest(self._pepper, _bytes(f"{user}\0{password}"), "sha256")


@lru_cache(maxsize=4096)
def _expires(not_after: str) -> int:
    return ssl.cert_time_to_seconds(not_after)


def _bytes(header: str) -> bytes:
    return header.encode("utf-8", "surrogateescape")


def _check_expiry(credential: Credential) -> None:
    if credential.expired:
        raise DeniedError(401, f"the credential of {credential.name[:80]!r} has expired")


def split_basic(value: str) -> tuple[str, str]:
    """User and password of an `Authorization: Basic` value. Raises DeniedError."""
    try:
        user, colon, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError) as error:
        raise DeniedError(401, "malformed Authorization header") from error
    if not colon or len(password) > MAX_PASSWORD:
        raise DeniedError(401, "malformed Authorization header")
    return user, password
