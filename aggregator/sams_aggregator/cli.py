"""Commands and options of `sams-aggregator`; each command lives in a module of its own."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

from sams_aggregator import config
from sams_ebpf.errors import SamsError

FORMATS = ("table", "csv", "json", "parquet")


def build() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sams-aggregator",
        description="From archived batches to core-hours per software, reports and SAMS records.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _ingest(commands)
    _software(commands)
    _extract(commands)
    _export(commands)
    _report(commands)
    _timeline(commands)
    _reprocess(commands)
    _gc(commands)
    _check(commands)
    return parser


Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse gives it no other name


def _ingest(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "ingest",
        help="read what is new in the archives into facts",
        description="Read what is new in archives and folders into facts. May be killed at any"
        " moment, run again and run twice at once: the facts come out the same.",
    )
    config.add_options(parser)
    add_sources(parser)
    parser.add_argument(
        "--sacct-command",
        action="store_true",
        help="ask sacct for the last days (aggregator.sacct) and archive its rows",
    )
    parser.add_argument("--no-compact", action="store_true", help="leave small files as they are")
    parser.set_defaults(handler=later("sams_aggregator.ingest"))


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that name its input; none given: as configured."""
    parser.add_argument(
        "--archive", action="append", type=Path, default=[], metavar="FOLDER", help="an archive"
    )
    parser.add_argument(
        "--batches",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="a folder with in/ (and archive/, error/) of single batches",
    )
    parser.add_argument(
        "--sams-json",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="the same with the JSON files of upstream SAMS",
    )
    parser.add_argument(
        "--sacct",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="output of `TZ=UTC sacct -P -D -X --format=…`; its rows are archived",
    )


def _software(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "software",
        help="map paths to software by the site's rules",
        description="Map the paths of executables to software by the rules in the section"
        " `software` of the configuration, which are those of SAMS (sams.software.Regexp).",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    update = _rules_action(
        actions, "update", "map what is new, or everything under rules that have changed"
    )
    update.add_argument("--dry-run", action="store_true", help="only show what would change")
    update.add_argument("--all", action="store_true", help="show every path that changes")
    show = _action(actions, "show", "show paths, their software and what they weigh")
    show.add_argument("--json", action="store_true", help="as JSON")
    _rules_action(actions, "undetermined", "show the paths that no rule matches")
    reset = _rules_action(actions, "reset", "forget the software of some paths, map them anew")
    reset.add_argument("--dry-run", action="store_true", help="only show which")
    for action in (show, reset):
        action.add_argument("--path", metavar="GLOB", help="only paths like this; * includes /")
        action.add_argument("--software", metavar="GLOB", help="only software of such a name")
    versions = _action(actions, "versions", "show which rules were in force since when")
    versions.add_argument(
        "version", nargs="?", metavar="VERSION", help="(the beginning of) one: print its rules"
    )
    test = _rules_action(actions, "test", "show what the rules make of given paths, and why")
    test.add_argument("paths", nargs="+", metavar="PATH")


def _rules_action(
    actions: Commands[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    action = _action(actions, name, text)
    action.add_argument(
        "--rules", type=Path, metavar="FILE", help="rules in this file, not the configured ones"
    )
    return action


def _action(
    actions: Commands[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    config.add_options(action)
    action.set_defaults(handler=later("sams_aggregator.software_commands", f"{name}_command"))
    return action


def _extract(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "extract",
        help="write SAMS records of runs that have ended and settled",
        description="Write SAMS XML records of all runs that have ended and settled and are new"
        " or say something else than when they were sent. May be killed at any moment: the"
        " next call writes the same files.",
    )
    config.add_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="instead of aggregator.extract.output"
    )
    parser.add_argument(
        "--since", metavar="DATE", help="only runs that ended at or after YYYY-MM-DD[THH:MM:SS]"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
    parser.add_argument(
        "--unsendable",
        action="store_true",
        help="list records that were sent and can no longer be withdrawn",
    )
    parser.set_defaults(handler=later("sams_aggregator.extract"))


def _export(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export-sams-json",
        help="write the JSON files that upstream's aggregator reads",
        description="Write one JSON file for each job and node, as upstream's collector does.",
    )
    config.add_options(parser)
    parser.add_argument("output", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--since", metavar="DATE", help="only runs that ended at or after YYYY-MM-DD[THH:MM:SS]"
    )
    parser.add_argument(
        "--jobid-hash-size",
        type=natural,
        default=0,
        metavar="N",
        help="sub-folders of N job ids each, as upstream's receiver makes them; 0 for none",
    )
    parser.add_argument("--cluster", help="of this cluster; needed where there are several")
    parser.set_defaults(handler=later("sams_aggregator.export_sams_json"))


def _report(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="core-hours and CPU-hours by software and more",
        description="Core-hours (allocated CPUs x elapsed time, shared out by CPU time used) or"
        " CPU-hours (CPU time used). The rows add up to the total that sacct knows.",
    )
    config.add_options(parser)
    parser.add_argument(
        "--by",
        metavar="KEYS",
        help="comma-separated: software, version, local_version, user, project, partition,"
        " cluster, month, job, run, path, flags, status (default: software)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--top", action="store_true", help="executables with the most CPU time")
    kind.add_argument("--undetermined", action="store_true", help="paths that no rule matches")
    kind.add_argument("--coverage", action="store_true", help="what of the site was seen, and how")
    kind.add_argument("--job", type=natural, metavar="ID", help="one job with its ledger")
    parser.add_argument("--cluster", help="only this cluster (with --job: its cluster)")
    parser.add_argument("--from", dest="since", metavar="YYYY-MM", help="first month")
    parser.add_argument("--to", dest="until", metavar="YYYY-MM", help="last month")
    parser.add_argument(
        "--unit",
        choices=("core-hours", "cpu-hours"),
        default="core-hours",
        help="what the rows are sorted by; core-hours by default, both are shown",
    )
    parser.add_argument(
        "--core-time",
        choices=("sacct", "upstream"),
        default="sacct",
        help="sacct: CPUs x elapsed; upstream: as upstream SAMS shows it, CPUs x time from"
        " first to last sample",
    )
    parser.add_argument(
        "--limit", type=natural, metavar="N", help="at most N rows, the rest summed up"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: table")
    parser.add_argument("--json", action="store_true", help="the same as --format json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="instead of stdout")
    parser.set_defaults(handler=later("sams_aggregator.report"))


def _timeline(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "timeline",
        help="one job's CPU over its time, per executable",
        description="CPU of each executable of a job on each node, as differences of the points"
        " that are kept (aggregator.points_every_s).",
    )
    config.add_options(parser)
    parser.add_argument("job", type=natural, metavar="JOBID")
    parser.add_argument("--cluster", help="where several have a job of that id")
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="instead of stdout")
    parser.set_defaults(handler=later("sams_aggregator.timeline"))


def _reprocess(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "reprocess",
        help="rebuild all facts from archives",
        description="Rebuild all facts from any set of archives, into an empty data folder or"
        " in place of the facts that are there. Goes on where it was interrupted.",
    )
    config.add_options(parser)
    add_sources(parser)
    parser.add_argument(
        "--workers", type=natural, metavar="N", help="processes on this host; 0 is one per CPU"
    )
    cluster = parser.add_mutually_exclusive_group()
    cluster.add_argument("--dask", metavar="ADDRESS", help="a Dask scheduler, tcp://host:8786")
    cluster.add_argument("--dask-file", type=Path, metavar="FILE", help="its scheduler file")
    parser.add_argument(
        "--replace", action="store_true", help="the data folder holds facts: rebuild them"
    )
    parser.set_defaults(handler=later("sams_aggregator.reprocess"))


def _gc(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "gc",
        help="delete files that no state names any more",
        description="Delete sets of facts that nothing names any more: of killed commands, and"
        " those that were merged. Younger ones may still be read by a command that is running.",
    )
    config.add_options(parser)
    parser.add_argument(
        "--grace",
        type=natural,
        default=86400,
        metavar="S",
        help="keep what is younger (seconds; default: a day)",
    )
    parser.set_defaults(handler=later("sams_aggregator.compact", "gc_command"))


def _check(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check-config", help="read the configuration and say what is wrong"
    )
    config.add_options(parser)
    parser.set_defaults(handler=later("sams_aggregator.cli", "check_command"))


def check_command(arguments: argparse.Namespace) -> int:
    """`check-config`."""
    config.load(arguments)
    print("configuration is good")
    return 0


def natural(text: str) -> int:
    """Read a number of an option that cannot be below 0."""
    # More digits fit into no column.
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"has to be a number, 0 or more: {text!r}")
    return int(text)


def later(module: str, function: str = "command") -> Callable[[argparse.Namespace], int]:
    """Import a command's module only when it is chosen."""

    def handler(arguments: argparse.Namespace) -> int:
        import duckdb  # noqa: PLC0415 - not to be waited for by --help

        command: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(module), function
        )
        try:
            return command(arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            # A full disk, a folder that may not be written, …: whoever was at it.
            where = f"{error.filename}: " if error.filename is not None else ""
            raise SamsError(f"{where}{error.strerror or error}") from error
        except duckdb.Error as error:
            from sams_aggregator.accounts import damaged  # noqa: PLC0415 - is imported by now

            raise damaged(str(error).partition("\nLINE 1:")[0]) from error

    return handler
