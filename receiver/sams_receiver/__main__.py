"""`sams-receiver`: the receiver's command line."""

from __future__ import annotations

import sys

from sams_ebpf import program
from sams_receiver import cli


def main() -> int:
    """Console entry point."""
    return program.run(cli.build)


if __name__ == "__main__":
    sys.exit(main())
