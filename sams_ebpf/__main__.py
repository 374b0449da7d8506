"""`sams-ebpf`: the command line of a node."""

from __future__ import annotations

import functools
import signal
import sys


def main() -> int:
    """Console entry point."""
    if sys.argv[1:2] == ["collect"]:
        # A job may end while its collector still starts: the signal that says so waits
        # until somebody can hear it (see `daemon.Signals`), instead of ending Python.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGTERM, signal.SIGINT))
    from sams_ebpf import cli, program  # noqa: PLC0415 - after the line above

    return program.run(functools.partial(cli.build, sys.argv[1] if sys.argv[1:] else ""))


if __name__ == "__main__":
    sys.exit(main())
