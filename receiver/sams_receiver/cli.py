"""Commands and options of `sams-receiver`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

DEFAULT_CONFIG = Path("/etc/sams-ebpf/config.yaml")


def build() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sams-receiver", description="Receives batches from nodes and archives them durably."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="receive batches until SIGTERM",
        description="Receives batches, acknowledges each once it is on disk, and seals what has"
        " come in. SIGHUP reads certificates and the proxy's secret again; tokens and passwords"
        " are read again when their file changes.",
    )
    serve.set_defaults(handler=_later("sams_receiver.serve", "command"))
    check = commands.add_parser(
        "check-config",
        help="check configuration and secrets, and stop",
        description="Reads all that `serve` reads and changes nothing. Exit status 2, and one line"
        " that says what is wrong and where, if it is not good.",
    )
    check.set_defaults(handler=_later("sams_receiver.serve", "check_command"))
    for command in (serve, check):
        command.add_argument(
            "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE",
            help=f"the site's configuration ({DEFAULT_CONFIG})",
        )  # fmt: skip
    credential = commands.add_parser(
        "credential",
        help="make a token, or the line of a password",
        description="Prints the line for tokens_file or passwords_file on stdout. A new token"
        " itself goes to stderr, once; a password is read from stdin.",
    )
    credential.add_argument("kind", choices=("token", "password"))
    credential.add_argument("name", metavar="NAME", help="name of the client: the node's, mostly")
    credential.add_argument(
        "--expires", metavar="TIME", help="when it ends, like 2027-01-31T00:00Z"
    )
    credential.set_defaults(handler=_later("sams_receiver.credential", "command"))
    _archive(
        commands.add_parser(
            "archive",
            help="look at an archive",
            description="Looks at an archive, live or not; changes nothing.",
        )
    )
    return parser


def _archive(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verify = commands.add_parser(
        "verify",
        help="read everything and report what is damaged",
        description="Reads every frame of every segment. Exit status 4 if anything is damaged"
        " or stored twice.",
    )
    listing = commands.add_parser(
        "list",
        help="list the segments",
        description="Lists the segments: their frames, sizes and times, and whether they are"
        " sealed.",
    )
    cat = commands.add_parser(
        "cat",
        help="show what is stored as JSON lines",
        description="Shows what is stored, segment by segment, a JSON object a line.",
    )
    for name, command in (("verify", verify), ("list_", listing), ("cat", cat)):
        command.add_argument("folder", type=Path, metavar="FOLDER", help="the archive's folder")
        command.set_defaults(handler=_later("sams_receiver.inspect", name))
    cat.add_argument("--segment", metavar="ID", help="only this one, as `list` names it")
    cat.add_argument("--node", help="only batches of this node")
    cat.add_argument("--job", type=int, metavar="ID", help="only batches of this job")
    cat.add_argument("--records", action="store_true", help="with all records")


def _later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def handler(arguments: argparse.Namespace) -> int:
        command: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(module), function
        )
        return command(arguments)

    return handler
