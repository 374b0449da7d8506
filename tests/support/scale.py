"""Tests on a machine that is slow: every case, with fewer repetitions.

`SAMS_TEST_SCALE=10` is for one that is ten times slower, such as one without KVM. How often
a thing is done, and how long a known piece of work is, follow the scale. Bounds on what is
measured stay as they are, but for two that stand for an amount of time: what a task may
run between its move and the event that tells of it, and between two reads of the
collector.
"""

from __future__ import annotations

import os
from typing import Final

SCALE: Final = int(os.environ.get("SAMS_TEST_SCALE", "1"))


def times(count: int, least: int = 1) -> int:
    """How often to do what is done `count` times on a machine of full speed."""
    return max(count // SCALE, least)
