"""pool.py WORKERS TASKS: fork without exec, as a multiprocessing pool does it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

forks = 0


def _count() -> None:
    global forks  # noqa: PLW0603  (the hook takes no argument)
    forks += 1


def _work(rounds: int) -> int:
    return sum(i * i for i in range(rounds))


def main() -> None:
    os.register_at_fork(after_in_parent=_count)
    workers, tasks = int(sys.argv[1]), int(sys.argv[2])
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, maxtasksperchild=5) as pool:
        pool.map(_work, [20_000] * tasks, chunksize=1)
        pool.close()
        pool.join()
    with Path(os.environ["TRUTH"]).open("a") as file:
        file.write(f"forks {forks}\nexits {forks}\n")


if __name__ == "__main__":
    main()
