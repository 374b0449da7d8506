"""A plain `/proc` poller, written to compare with: what sampling sees of a job.

It does what pollers of this kind do: every interval it lists the job's cgroup, reads each
process's clock ticks from `/proc/PID/stat` (dead children that were waited for are not in
them), and books them under the executable that the process had when it was first seen. What
starts and ends between two samples is not seen; what a process does after its last sample is
not either.

    python -m bench.poller CGROUP [--interval 30]

runs until SIGTERM, SIGHUP or SIGINT, takes a last sample then, and prints a JSON object:
nanoseconds of CPU by executable.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
END = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Poller:
    """Samples one cgroup; the latest clock of every process seen so far."""

    def __init__(self, cgroup: Path) -> None:
        self.cgroup = cgroup
        self.seen: dict[tuple[int, str], tuple[str, int]] = {}
        self.samples = 0

    def sample(self) -> None:
        """Look once at every process that is there."""
        self.samples += 1
        for folder, _, _ in os.walk(self.cgroup):
            try:
                pids = (Path(folder) / "cgroup.procs").read_text().split()
            except OSError:
                continue
            for pid in pids:
                self._look_at(int(pid))

    def _look_at(self, pid: int) -> None:
        try:
            # The name stands in parentheses and may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            executable = str(Path(f"/proc/{pid}/exe").readlink())
        except (FileNotFoundError, ProcessLookupError):
            return
        key = pid, fields[19]  # the start time tells a PID used again
        first, _ = self.seen.get(key, (executable, 0))
        self.seen[key] = first, (int(fields[11]) + int(fields[12])) * TICK_NS

    def totals(self) -> dict[str, int]:
        """CPU in ns by executable, most first."""
        found: dict[str, int] = {}
        for executable, cpu_ns in self.seen.values():
            found[executable] = found.get(executable, 0) + cpu_ns
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> int:
    """Poll until told to end."""
    parser = argparse.ArgumentParser(prog="bench.poller", description=__doc__)
    parser.add_argument("cgroup", type=Path)
    parser.add_argument("--interval", type=float, default=30.0, help="seconds; 30")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, END)
    poller = Poller(arguments.cgroup)
    poller.sample()
    while signal.sigtimedwait(END, arguments.interval) is None:
        poller.sample()
    poller.sample()
    print(json.dumps({"samples": poller.samples, "executables": poller.totals()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
