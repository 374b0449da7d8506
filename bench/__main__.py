"""`python -m bench [NAME…]`: run the benchmarks and write `docs/benchmarks.md`.

Only the sections that were run are replaced; the others stay as they were.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from pathlib import Path
from typing import cast

from bench import section

# In the order in which they stand in the document. Each is a module of this folder with `run()`.
NAMES: tuple[str, ...] = (
    "kernel_cost",
    "switch_cost",
    "footprint",
    "rivals",
    "slurm_hooks",
    "archive_append",
    "archive_size",
    "receiver_speed",
    "receiver_memory",
    "rules",
    "facts",
)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `make bench`; each section says how it was measured. Compare figures within a run, as
ratios: the machine is a small, shared virtual one, and absolute times move by tens of per cent.
Nothing here is asserted by a test.
"""


def main() -> int:
    """Run the chosen benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("-o", "--output", type=Path, default=DOCUMENT, help="document to update")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(NAMES)}")
    document = arguments.output
    old = section.split(document.read_text()) if document.exists() else {}
    new: dict[str, str] = {}
    for name in arguments.names or NAMES:
        print(f"{name} …", file=sys.stderr, flush=True)
        began = time.monotonic()
        found = run(name)
        took = time.monotonic() - began
        new[name] = f"{found.render()}\n\n{_stamp(took)}"
        print(new[name] + "\n", flush=True)
        # After each one: what a long run has measured survives its interruption.
        merged = old | new
        document.parent.mkdir(exist_ok=True)
        document.write_text(section.join(HEAD, {n: merged[n] for n in NAMES if n in merged}))
    return 0


def run(name: str) -> section.Section:
    """Run one benchmark by the name of its module."""
    return cast("section.Benchmark", importlib.import_module(f"bench.{name}")).run()


def _stamp(took_s: float) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        f"*{day}, kernel {platform.release()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, {took_s:.0f} s, load {os.getloadavg()[1]:.1f}.*"
    )


if __name__ == "__main__":
    sys.exit(main())
