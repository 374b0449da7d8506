"""Commands and options of `sams-ebpf`; each command lives in a module of its own.

A command module is imported only when its command is chosen, and only that command's
parser is made: a collector that runs beside every job does not carry the shipper's HTTP
client, nor wait for the options of a dozen other commands.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

PROGRAM = "sams-ebpf"
CONFIG = "/etc/sams-ebpf/config.yaml"


def build(chosen: str = "") -> argparse.ArgumentParser:
    """Make the parser of one command, if that is what was chosen, or of all."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Exact CPU accounting per executable for HPC jobs."
    )
    commands = parser.add_subparsers(
        prog=PROGRAM, title="commands", metavar="COMMAND", required=True
    )
    for name in [chosen] if chosen in _COMMANDS else _COMMANDS:
        describe, summary = _COMMANDS[name]
        text = f"{summary[0].upper()}{summary[1:]}."
        describe(commands.add_parser(name, help=summary, description=text))
    return parser


def _dump(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a batch file, or - for stdin")
    parser.set_defaults(handler=_later("sams_ebpf.dump"))


def _check_config(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    parser.set_defaults(handler=_later("sams_ebpf.check_config"))


def _ship(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send what waits in this node's spool to the configured receivers, and delete what "
        "all of them have. Runs until SIGTERM; needs no privileges but the spool."
    )
    _config(parser)
    parser.add_argument("--once", action="store_true", help="try each batch once, then exit")
    parser.set_defaults(handler=_later("sams_ebpf.ship"))


def _probe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Try what this host can do, feature by feature, and show how a job would be measured "
        "here and why each better way would not be used. Loads the programs for a moment; "
        "leaves nothing behind."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.set_defaults(handler=_later("sams_ebpf.probe"))


def _load(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Load the accounting programs at a node's boot: every job is then counted from its "
        "first process on. Closes the accounts that the last boot left open."
    )
    _config(parser)
    parser.set_defaults(handler=_later("sams_ebpf.node", "load"))


def _unload(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(handler=_later("sams_ebpf.node", "unload"))


def _gc(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Remove what was left behind: programs and jobs' counts that nobody needs any more "
        "(jobs that no collector claimed are spooled first), and the cgroup of a `run` that "
        "was killed."
    )
    _config(parser)
    parser.set_defaults(handler=_later("sams_ebpf.node", "gc"))


def _run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run any command in a cgroup of its own and report its CPU time per executable. The "
        "exit status is the command's, its input and output are untouched; the report goes "
        "to stderr. Needs root, no configuration and no Slurm."
    )
    parser.usage = "sams-ebpf run [options] -- COMMAND [ARGUMENT ...]"
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the report to FILE"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--interval",
        type=_seconds,
        metavar="S",
        help="seconds between batches or samples (default: 60, in mode proc 1)",
    )
    parser.add_argument(
        "--mode", choices=("auto", "bpf", "proc"), default="auto", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--loader", choices=("auto", "libbpf", "bcc"), default="auto", help="of mode bpf"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="take final values at the last context switch and look where every charge goes: "
        "nothing is ever missed, each context switch of the node costs 0.2 to 0.4 us",
    )
    parser.add_argument(
        "--cgroup-tree", metavar="NAME", help="v2 or a v1 controller (default: v2 if mounted)"
    )
    parser.add_argument(
        "--spool", type=Path, metavar="DIR", help="also write batches to DIR, as collect does"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(handler=_later("sams_ebpf.run"))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: has to be 0.05 to 86400 seconds")
    return value


def _collect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobid",
        required=True,
        metavar="N",
        help="job id, or N.R as the instance of a unit for a later run of the job",
    )
    _config(parser)
    parser.add_argument(
        "--cgroup",
        metavar="PATH",
        help="the job's cgroup, a folder, path or systemd unit (default: the Slurm job's)",
    )
    parser.add_argument("--node", metavar="NAME", help="name of this node (default: Slurm's)")
    parser.add_argument(
        "--env-file", type=Path, metavar="FILE", help="the job's identity as the Prolog wrote it"
    )
    parser.add_argument(
        "--finish", action="store_true", help="take up what was counted, close the job, end"
    )
    parser.set_defaults(handler=_later("sams_ebpf.collect"))


def _units(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefix",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="root of the file system to write to, for an image or a package (default: /)",
    )
    parser.add_argument(
        "--program",
        type=Path,
        metavar="FILE",
        help="the sams-ebpf that the units run (default: the one running now)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(CONFIG),
        metavar="FILE",
        help="the configuration file that the units name (default: %(default)s)",
    )
    parser.set_defaults(handler=_later("sams_ebpf.install_units"))


def _status(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.set_defaults(handler=_later("sams_ebpf.status"))


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the site's configuration (default: " + CONFIG + ", if there)",
    )


def _later(module: str, function: str = "command") -> Callable[[argparse.Namespace], int]:
    def handler(arguments: argparse.Namespace) -> int:
        command: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(module), function
        )
        return command(arguments)

    return handler


# In the order in which help shows them.
_COMMANDS: Final[dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]]] = {
    "run": (_run, "run a command and show where its CPU time went"),
    "collect": (_collect, "measure one job on this node until it ends"),
    "dump": (_dump, "show batches as JSON lines"),
    "check-config": (_check_config, "check a configuration file and exit"),
    "ship": (_ship, "send the spool to the receivers"),
    "install-units": (_units, "put systemd units and Slurm hooks in place"),
    "probe": (_probe, "show what this host can do"),
    "status": (_status, "show jobs, spool and programs of this node"),
    "load": (_load, "load the node's programs, to stay until unload"),
    "unload": (_unload, "kill switch: take all accounting programs out of the kernel now"),
    "gc": (_gc, "remove programs, counts and cgroups that nobody needs any more"),
}
