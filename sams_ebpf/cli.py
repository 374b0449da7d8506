"""Commands and options of `sams-ebpf`; each command lives in a module of its own.

A command module is imported only when its command is chosen: a collector that runs
beside every job does not carry the shipper's HTTP client.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

CONFIG = "/etc/sams-ebpf/config.yaml"


def build() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sams-ebpf", description="Exact CPU accounting per executable for HPC jobs."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _collect(commands.add_parser("collect", help="measure one job on this node until it ends"))
    dump = commands.add_parser("dump", help="show batches as JSON lines")
    dump.add_argument("files", nargs="+", metavar="FILE", help="a batch file, or - for stdin")
    dump.set_defaults(handler=_later("sams_ebpf.dump"))
    check = commands.add_parser("check-config", help="check a configuration file and exit")
    _config(check)
    check.set_defaults(handler=_later("sams_ebpf.check_config"))
    ship = commands.add_parser(
        "ship",
        help="send the spool to the receivers",
        description="Send what waits in this node's spool to the configured receivers, and "
        "delete what all of them have. Runs until SIGTERM; needs no privileges but the spool.",
    )
    _config(ship)
    ship.add_argument("--once", action="store_true", help="try each batch once, then exit")
    ship.set_defaults(handler=_later("sams_ebpf.ship"))
    _units(commands.add_parser("install-units", help="put systemd units and Slurm hooks in place"))
    probe = commands.add_parser(
        "probe",
        help="show what this host can do",
        description="Try what this host can do, feature by feature, and show how a job would "
        "be measured here and why each better way would not be used. Loads the programs for "
        "a moment; leaves nothing behind.",
    )
    probe.add_argument("--json", action="store_true", help="one JSON object, for programs")
    probe.set_defaults(handler=_later("sams_ebpf.probe"))
    _status(commands.add_parser("status", help="show jobs, spool and programs of this node"))
    return parser


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
