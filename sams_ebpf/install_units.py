"""`sams-ebpf install-units`: puts systemd units, tmpfiles, user and Slurm hooks in place.

Writes files and nothing else: what to run afterwards it prints, since starting services
is the site's decision. Files are written again on an upgrade; a site changes units by
drop-ins, hooks by its own Prolog that calls them.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from sams_ebpf import durable
from sams_ebpf.errors import SamsError, UsageError

_NEXT: Final = """\
Next, as root:
  systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload
  systemctl enable --now sams-ebpf-load.service sams-ebpf-ship.service
and let Slurm run {hooks}/prolog.sh and epilog.sh (Prolog=, Epilog= in slurm.conf)."""


class InstallError(SamsError):
    """A file could not be put in place."""


class Target(NamedTuple):
    """One file of the package and where it goes below the prefix."""

    source: str
    folder: str
    name: str
    mode: int = 0o644


HOOKS: Final = "usr/libexec/sams-ebpf"
TARGETS: Final = (
    Target("sams-ebpf@.service", "etc/systemd/system", "sams-ebpf@.service"),
    Target("sams-ebpf-load.service", "etc/systemd/system", "sams-ebpf-load.service"),
    Target("sams-ebpf-ship.service", "etc/systemd/system", "sams-ebpf-ship.service"),
    Target("sams-ebpf.tmpfiles.conf", "etc/tmpfiles.d", "sams-ebpf.conf"),
    Target("sams-ebpf.sysusers.conf", "etc/sysusers.d", "sams-ebpf.conf"),
    Target("prolog.sh", HOOKS, "prolog.sh", 0o755),
    Target("epilog.sh", HOOKS, "epilog.sh", 0o755),
)
# Units hold the values as words of a command line.
_PLAIN: Final = re.compile(r"/[A-Za-z0-9_./+-]*")


def command(arguments: argparse.Namespace) -> int:
    """Write the files and say what is left to do."""
    program = arguments.program or _running()
    for path in install(arguments.prefix, program, arguments.config):
        print(path)
    print(_NEXT.format(hooks=f"/{HOOKS}"))
    return 0


def _running() -> Path:
    """Give the script this process was started by, also under `python -m`."""
    script = Path(sys.argv[0]).absolute()
    return script if script.suffix != ".py" else Path(sysconfig.get_path("scripts"), "sams-ebpf")


def install(prefix: Path, program: Path, configuration: Path) -> list[Path]:
    """Write all files below `prefix`; gives them. Raises SamsError."""
    for option, value in (("--program", program), ("--config", configuration)):
        if _PLAIN.fullmatch(str(value)) is None:
            raise UsageError(
                f"{option} '{value}': has to be an absolute path of letters, digits and _./+-"
            )
    return [_put(target, prefix, program, configuration) for target in TARGETS]


def text_of(source: str, program: Path, configuration: Path) -> str:
    """Give a file of the package with its places filled in."""
    text = resources.files("sams_ebpf.units").joinpath(source).read_text(encoding="utf-8")
    return text.replace("@SAMS_EBPF@", str(program)).replace("@CONFIG@", str(configuration))


def _put(target: Target, prefix: Path, program: Path, configuration: Path) -> Path:
    path = prefix / target.folder / target.name
    data = text_of(target.source, program, configuration).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, data, mode=target.mode)
        path.chmod(target.mode)  # whatever the umask
    except OSError as error:
        raise InstallError(f"{path}: cannot be written: {error.strerror}") from error
    return path
