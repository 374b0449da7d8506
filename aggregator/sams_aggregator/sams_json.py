"""The JSON files of SAMS' own collector: one job on one node. Read, written, and filed.

Reading and writing are pure; `Folders` moves files from the in-folder to the archive or
the error folder. What SAMS' aggregator accepts is accepted and what it refuses is
refused, with a few exceptions where it would stop or lose data: see `docs/sams-xml.md`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from sams_ebpf import durable
from sams_ebpf.errors import SamsError

MAX_BYTES: Final = 64 << 20
NS: Final = 10**9

_MOST_CPU_NS: Final = 2**62
_MOST_SECONDS: Final = 2**40
_CORE: Final = "sams.sampler.Core"
_SLURM: Final = "sams.sampler.SlurmInfo"
_SOFTWARE: Final = "sams.sampler.Software"


class SamsJsonError(SamsError):
    """A file that is no usable report of one job on one node; the message says why."""


@dataclass(frozen=True, slots=True, order=True)
class Exec:
    """CPU time of one executable, ns."""

    path: bytes
    user_ns: int
    system_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One job on one node, as one file tells it; None where it does not.

    begin_s, end_s: first and last sample, seconds since the Unix epoch. start_text: the
    digits of the job's start as Slurm printed them, in the site's own zone; start_ns:
    the same moment since the Unix epoch where the file has it too.
    """

    job_id: int
    node: str
    begin_s: int
    end_s: int
    execs: tuple[Exec, ...]
    start_text: str | None = None
    start_ns: int | None = None
    user: str | None = None
    uid: int | None = None
    account: str | None = None
    partition: str | None = None
    job_name: str | None = None
    cpus: int | None = None
    nodes: int | None = None


def parse(data: bytes) -> NodeReport:
    """Read one file. Raises SamsJsonError with a reason fit for a log line."""
    document = _load(data)
    core = _section(document, _CORE)
    job_id = _integer(_need(core, _CORE, "jobid"), f"{_CORE}: jobid")
    node = _text(_need(core, _CORE, "node"), f"{_CORE}: node")
    software = _section(document, _SOFTWARE)
    slurm = _section(document, _SLURM)
    execs = _need(software, _SOFTWARE, "execs")
    if not isinstance(execs, dict) or not execs:
        raise SamsJsonError(f"{_SOFTWARE}: no execs")
    start = _optional_text(slurm, "starttime")
    stamp = slurm.get("starttimestamp")
    return NodeReport(
        job_id=job_id,
        node=node,
        begin_s=_integer(_need(software, _SOFTWARE, "start_time"), "start_time"),
        end_s=_integer(_need(software, _SOFTWARE, "end_time"), "end_time"),
        execs=tuple(sorted(_exec(path, used) for path, used in execs.items())),
        start_text=re.sub("[-T:]", "", start) if start is not None else None,
        start_ns=_nanoseconds(stamp, "starttimestamp") if stamp is not None else None,
        user=_optional_text(slurm, "username"),
        uid=_optional_integer(slurm, "uid"),
        account=_optional_text(slurm, "account"),
        partition=_optional_text(slurm, "partition"),
        job_name=_optional_text(slurm, "jobname"),
        cpus=_optional_integer(slurm, "cpus"),
        nodes=_optional_integer(slurm, "nodes"),
    )


def render(report: NodeReport) -> bytes:
    r"""Write what SAMS' aggregator reads, and `parse` reads back to the nanosecond.

    Bytes of a path that are no UTF-8 are written as `\xHH`: SAMS cannot store them.
    """
    slurm = {
        "account": report.account,
        "username": report.user,
        "uid": _digits(report.uid),
        "cpus": _digits(report.cpus),
        "nodes": _digits(report.nodes),
        "partition": report.partition,
        "starttime": _slurm_time(report.start_text),
        "jobname": report.job_name,
    }
    known = {key: json.dumps(value) for key, value in slurm.items() if value is not None}
    if report.start_ns is not None:
        known["starttimestamp"] = _seconds(report.start_ns)
    used: dict[str, tuple[int, int]] = {}
    for one in report.execs:
        # Two paths may come to the same text.
        text = one.path.decode("utf-8", "backslashreplace")
        user_ns, system_ns = used.get(text, (0, 0))
        used[text] = (user_ns + one.user_ns, system_ns + one.system_ns)
    execs = {
        text: _object({"user": _seconds(user_ns), "system": _seconds(system_ns)})
        for text, (user_ns, system_ns) in used.items()
    }
    times = {"start_time": str(report.begin_s), "end_time": str(report.end_s)}
    document = {
        _CORE: _object({"jobid": str(report.job_id), "node": json.dumps(report.node)}),
        _SLURM: _object(known),
        _SOFTWARE: _object({"execs": _object(execs), **times}),
    }
    return _object(document).encode()


def _object(members: dict[str, str]) -> str:
    """Write an object of values that are JSON already: no double holds all of a long job's ns."""
    return "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in members.items()) + "}"


def _seconds(ns: int) -> str:
    text = f"{ns // NS}.{ns % NS:09d}".rstrip("0")
    return f"{text}0" if text.endswith(".") else text


def file_name(job_id: int, node: str, *, hash_size: int = 0) -> PurePosixPath:
    """Name the file as SAMS' receiver does: `[jobid div hash_size/]jobid.node.json`."""
    name = f"{job_id}.{node.replace('/', '_')}.json"
    return PurePosixPath(str(job_id // hash_size), name) if hash_size else PurePosixPath(name)


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise SamsJsonError(f"{len(data)} bytes: more than {MAX_BYTES}")
    try:
        document = json.loads(
            data.decode("utf-8"), parse_float=Decimal, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError, InvalidOperation) as error:
        raise SamsJsonError(f"not JSON: {error!s:.200}") from error
    if not isinstance(document, dict):
        raise SamsJsonError("not a JSON object")
    return document


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number")


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    section = document.get(name)
    if not isinstance(section, dict):
        raise SamsJsonError(f"no {name}")
    return section


def _need(section: dict[str, Any], where: str, key: str) -> object:
    if key not in section:
        raise SamsJsonError(f"{where}: no {key}")
    return section[key]


def _exec(path: str, used: object) -> Exec:
    if not isinstance(used, dict):
        raise SamsJsonError(f"execs: {path!r:.200}: no CPU times")
    where = f"execs: {path!r:.200}"
    try:
        name = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        name = path.encode("utf-8", "surrogatepass")
    return Exec(
        path=name,
        user_ns=_nanoseconds(_need(used, where, "user"), f"{where}: user"),
        system_ns=_nanoseconds(_need(used, where, "system"), f"{where}: system"),
    )


def _nanoseconds(value: object, where: str) -> int:
    seconds = _number(value, where)
    if not 0 <= seconds <= _MOST_CPU_NS // NS:
        raise SamsJsonError(f"{where}: {value} is no time in seconds")
    return int((seconds * NS).to_integral_value())


def _number(value: object, where: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        raise SamsJsonError(f"{where}: not a number")
    try:
        number = Decimal(value)
    except InvalidOperation as error:
        raise SamsJsonError(f"{where}: {value!r:.40} is not a number") from error
    # Beyond this even the digits would be too many to write down.
    if not number.is_finite() or number.adjusted() > 30 or len(number.as_tuple().digits) > 100:
        raise SamsJsonError(f"{where}: {number!s:.40} is out of bounds")
    return number


def _integer(value: object, where: str) -> int:
    number = int(_number(value, where))
    if not 0 <= number <= _MOST_SECONDS:
        raise SamsJsonError(f"{where}: {number} is out of bounds")
    return number


def _text(value: object, where: str) -> str:
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or len(value) > 1024:
        raise SamsJsonError(f"{where}: not a text of at most 1024 characters")
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")


def _optional_text(section: dict[str, Any], key: str) -> str | None:
    return _text(section[key], f"{_SLURM}: {key}") if key in section else None


def _optional_integer(section: dict[str, Any], key: str) -> int | None:
    """SAMS keeps these as they come; what is no number tells us nothing."""
    try:
        return _integer(section.get(key), key)
    except SamsJsonError:
        return None


def _digits(value: int | None) -> str | None:
    return None if value is None else str(value)


def _slurm_time(text: str | None) -> str | None:
    digits = re.fullmatch(r"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)", text or "", re.ASCII)
    if digits is None:
        return text
    return "{}-{}-{}T{}:{}:{}".format(*digits.groups())


# ------------------------------------------------------------------ files


class Found(NamedTuple):
    """One file of the in-folder as it was when it was read."""

    name: PurePosixPath
    data: bytes
    state: tuple[int, int, int, int]


class Folders:
    """In-folder, archive and error folder, as SAMS' aggregator has them.

    A file is moved only after what it holds was taken over; a kill in between has it
    read again, which changes nothing. Nothing is ever overwritten: another file of the
    same name gets a number. Several processes may work on the same folders.
    """

    def __init__(
        self, in_path: Path, archive_path: Path, error_path: Path, pattern: str = r"^.*\.json$"
    ) -> None:
        self._in = in_path
        self._archive = archive_path
        self._error = error_path
        self._pattern = re.compile(pattern)

    def names(self) -> Iterator[PurePosixPath]:
        """Files that wait, in order of name; those still being written start with a dot."""
        for root, folders, files in os.walk(self._in):
            folders.sort()
            for name in sorted(files):
                if not name.startswith(".") and self._pattern.match(name):
                    yield PurePosixPath(os.path.relpath(Path(root, name), self._in))

    def read(self, name: PurePosixPath) -> Found | None:
        """Read a file; None if it has gone or is no regular file. Raises OSError.

        Of a file that is larger than any that `parse` takes only the beginning is read.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self._in / name, flags)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return None
            return Found(name, file.read(MAX_BYTES + 1), _state(status))

    def archive(self, found: Found) -> None:
        """File what was taken over. Raises OSError."""
        self._move(found, self._archive)

    def reject(self, found: Found) -> None:
        """File what could not be used. Raises OSError."""
        self._move(found, self._error)

    def _move(self, found: Found, folder: Path) -> None:
        source = self._in / found.name
        try:
            if _state(source.lstat()) != found.state:
                return  # another file has taken the name: it will be read in its turn
            target = folder / found.name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)
            durable.sync_folder(target.parent)
            source.unlink()
        except FileNotFoundError:
            if source.exists():
                raise
            return  # another process has filed it


def _link(source: Path, target: Path) -> None:
    """Give the file a name at target, or at target with a number, on any file system."""
    number = 0
    name = target
    while True:
        try:
            os.link(source, name)
        except FileExistsError:
            if _same(source, name):
                return
            number += 1
            name = target.with_name(f"{target.name}.{number}")
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP):
                raise
            if not name.exists():
                durable.write(name, source.read_bytes())
                return
            if _same(source, name):
                return
            number += 1
            name = target.with_name(f"{target.name}.{number}")
        else:
            return


def _same(one: Path, other: Path) -> bool:
    a, b = one.stat(), other.stat()
    if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino):
        return True
    return a.st_size == b.st_size and one.read_bytes() == other.read_bytes()


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
