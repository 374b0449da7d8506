"""What every program of the product shares: its log, its version, its one exception boundary."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from sams_ebpf import __version__
from sams_ebpf.errors import SamsError

# sd-daemon(3): the journal reads a priority from the start of a line.
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}

# How a write to standard output fails: a full disk, a device with an error, a closed stream.
_OUTPUT_LOST = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)


class _Formatter(logging.Formatter):
    def __init__(self, program: str, context: str, *, journal: bool) -> None:
        super().__init__()
        self._head = f"{program}{f' {context}' if context else ''}: "
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split("\n"))
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        priority = f"<{_PRIORITY.get(record.levelno, 5)}>" if self._journal else ""
        return f"{priority}{self._head}{text}"


def start_log(program: str, context: str = "", *, verbose: bool = False) -> None:
    """Send log lines to stderr, headed by program and context ("job=1 node=n1")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(program, context, journal="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)


def notify(state: str) -> None:
    """Tell systemd how this service is doing (sd_notify(3)): "READY=1", "STATUS=…".

    Does nothing outside a unit of Type=notify. A manager that cannot be told is no
    reason to stop working.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    import socket  # noqa: PLC0415 (2 ms, where nobody may want to be told)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        try:
            to.sendto(state.encode(), address)
        except OSError as error:
            logging.getLogger(__name__).warning("systemd cannot be notified: %s", error)


def run(
    build: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, call the parser's `handler(arguments) -> int`, and turn errors into one line.

    The only place of a program that catches what nobody else did. Every subcommand
    sets `handler` with `set_defaults`.
    """
    _open_what_is_closed()
    parser = build()
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    arguments = parser.parse_args(argv)
    start_log(parser.prog)
    handler: Callable[[argparse.Namespace], int] = arguments.handler
    try:
        status = handler(arguments)
        sys.stdout.flush()
    except SamsError as error:
        logging.getLogger(parser.prog).error("%s", error)
        return error.exit_status
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`); so may we.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno in _OUTPUT_LOST:
            logging.getLogger(parser.prog).error("standard output: %s", error.strerror)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise
    except KeyboardInterrupt:
        return 130
    return status


def _open_what_is_closed() -> None:
    """Give what was started with a closed stream (`>&-`) one of its own.

    Else the next file that is opened would stand in its place. Children inherit none of it.
    Standard output cannot be written to: who asked for it is told.
    """
    for stream, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, flags | os.O_CLOEXEC)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
