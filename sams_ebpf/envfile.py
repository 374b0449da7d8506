"""The job's identity as the Slurm Prolog wrote it down: a small file, read strictly.

`KEY=value`, each ended by NUL (as in `/proc/PID/environ`), so that no value a user chose
can look like another line. A file without any NUL, written by hand, is read line by line.
Only the keys below count; a value that is not what its key promises is left out with a
warning, since a wrong account or user name is worse than none. What is empty is not known.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from sams_ebpf import wire
from sams_ebpf.errors import UsageError

MAX_BYTES: Final = 64 << 10
ENDED: Final = "ended"
UPTIME: Final = b"SAMS_EBPF_UPTIME"

_log = logging.getLogger(__name__)

_UPTIME = re.compile(rb"([0-9]{1,10})\.([0-9]{2})")
_JOB = re.compile(r"(?P<job>[0-9]{1,10})(?:\.[0-9]{1,3})?")
_SLUID = re.compile(r"s[0-9A-HJKMNP-TV-Z]{13}")
_CPUS = re.compile(r"([0-9]{1,6})(?:\(x[0-9]{1,7}\))?")


def job_of(instance: str) -> int:
    """Give the job id of a unit's instance name, `JOBID` or `JOBID.RUN`.

    Raises UsageError for anything else.
    """
    match = _JOB.fullmatch(instance)
    if match is None:
        raise UsageError(f"--jobid '{instance}': has to be a job id, a number")
    return int(match["job"])


class Run(NamedTuple):
    """When a run of a job began and ended on this node, as far as it is known.

    CLOCK_BOOTTIME in ns. Runs of one job have cgroups of one path: this tells whose one is.
    """

    began_ns: int | None = None
    ended_ns: int | None = None

    def has(self, birth_ns: int) -> bool:
        """Tell whether a cgroup made then can be of this run."""
        began_ns, ended_ns = self.began_ns, self.ended_ns
        return (began_ns is None or birth_ns >= began_ns) and (
            ended_ns is None or birth_ns <= ended_ns
        )


UNKNOWN: Final = Run()


def ended(path: Path) -> bool:
    """Tell whether the Epilog has been there: a file `ended` beside the environment file."""
    return path.with_name(ENDED).exists()


def run_of(path: Path | None) -> Run:
    """Read when the run began and ended; what cannot be read is not known."""
    if path is None:
        return UNKNOWN
    began = ended_ns = None
    with contextlib.suppress(OSError):
        for line in path.read_bytes()[:MAX_BYTES].split(b"\0"):
            name, _, value = line.partition(b"=")
            if name == UPTIME:
                began = _uptime(value)
    with contextlib.suppress(OSError):
        ended_ns = _uptime(path.with_name(ENDED).read_bytes()[:64].strip())
    # /proc/uptime is rounded down: to the begin of that hundredth, and to the end of this.
    return Run(began, None if ended_ns is None else ended_ns + 10_000_000)


def _uptime(text: bytes) -> int | None:
    match = _UPTIME.fullmatch(text)
    return None if match is None else (int(match[1]) * 100 + int(match[2])) * 10_000_000


def read(path: Path) -> wire.Claims:
    """Read the file. Raises UsageError when there is none, or none that can be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES} bytes")
    return parse(data, str(path))


def parse(data: bytes, where: str) -> wire.Claims:
    """Turn the file's bytes into claims; what cannot be believed is left out and logged."""
    separator = b"\0" if b"\0" in data else b"\n"
    values: dict[str, Any] = {}
    for line in data.split(separator):
        key, equals, raw = line.partition(b"=")
        name = key.decode("ascii", "replace").strip()
        if not equals or not raw or name not in _KEYS:
            continue
        field, convert = _KEYS[name]
        try:
            values[field] = convert(raw.decode("utf-8", "strict"))
        except ValueError:
            _log.warning("%s: %s: %.80r is not a value to believe; left out", where, name, raw)
    if "start_ns" in values:
        # Slurm prints times in the node's zone; keep its digits beside the exact moment.
        local = time.localtime(values["start_ns"] // 1_000_000_000)
        values["start_text"] = time.strftime("%Y%m%d%H%M%S", local)
    return wire.Claims(**values)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(text)
    return int(text)


def _seconds(text: str) -> int:
    return _time(_number(text))


def _time(seconds: int) -> int:
    # Slurm has 0 for "no time yet"; beyond 2200 it is no time of a job.
    if not 0 < seconds < 7_258_118_400:
        raise ValueError(seconds)
    return seconds * 1_000_000_000


def _name(text: str) -> str:
    if len(text) > 256 or not text.isprintable():
        raise ValueError(text)
    return text


def _text(text: str) -> str:
    """Whatever the user chose, made fit for one line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:1024])


def _sluid(text: str) -> str:
    if _SLUID.fullmatch(text) is None:
        raise ValueError(text)
    return text


def _cpus(text: str) -> int | None:
    """CPUs on this node: `4` or `4(x2)`. `4,2` does not say which number is this node's."""
    match = _CPUS.fullmatch(text)
    if match is None and re.fullmatch(r"[0-9,()x]{1,4096}", text) is None:
        raise ValueError(text)
    return None if match is None else int(match[1])


_KEYS: Final[dict[str, tuple[str, Callable[[str], object]]]] = {
    "SLURM_JOB_ID": ("job_id", _number),
    "SLURM_JOB_SLUID": ("sluid", _sluid),
    "SLURM_JOB_RESTART_COUNT": ("restart_count", _number),
    "SLURM_RESTART_COUNT": ("restart_count", _number),
    "SLURM_JOB_START_TIME": ("start_ns", _seconds),
    "SLURM_JOB_UID": ("uid", _number),
    "SLURM_JOB_USER": ("user", _name),
    "SLURM_JOB_ACCOUNT": ("account", _name),
    "SLURM_JOB_PARTITION": ("partition", _name),
    "SLURM_JOB_NAME": ("job_name", _text),
    "SLURM_JOB_NUM_NODES": ("nodes", _number),
    "SLURM_JOB_CPUS_PER_NODE": ("cpus", _cpus),
    "SLURM_HET_JOB_ID": ("het_job_id", _number),
    "SLURM_CLUSTER_NAME": ("cluster", _name),
    "SLURMD_NODENAME": ("node", _name),
}
