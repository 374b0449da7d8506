"""`sams-aggregator`: the aggregator's command line."""

from __future__ import annotations

import sys

from sams_aggregator import cli
from sams_ebpf import program


def main() -> int:
    """Console entry point."""
    return program.run(cli.build)


if __name__ == "__main__":
    sys.exit(main())
