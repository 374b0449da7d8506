"""Months of the site's time zone, as integers: 202601 is January 2026."""

from __future__ import annotations

import bisect
import datetime as dt
import functools
import re
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from sams_ebpf.errors import UsageError

SECOND = 1_000_000_000
_FIRST, _LAST = 1970, 2261  # what nanoseconds in an int64 can say
_MONTH = re.compile(r"(\d{4})-(\d{2})")


class Months:
    """The beginnings of all months in one time zone, daylight saving included."""

    def __init__(self, zone: str) -> None:
        self.zone = zone
        info = ZoneInfo(zone)
        self.numbers = [
            year * 100 + month for year in range(_FIRST, _LAST + 1) for month in range(1, 13)
        ]
        self.starts_ns = [
            int(dt.datetime(number // 100, number % 100, 1, tzinfo=info).timestamp()) * SECOND
            for number in self.numbers
        ]

    def of(self, time_ns: int) -> int:
        """Month in which a moment lies (ns since the Unix epoch)."""
        return self.numbers[max(0, bisect.bisect_right(self.starts_ns, time_ns) - 1)]

    def of_all(self, times_ns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Months in which many moments lie."""
        at = np.searchsorted(np.array(self.starts_ns), times_ns, side="right") - 1
        found: np.ndarray[Any, Any] = np.array(self.numbers)[np.maximum(at, 0)]
        return found


@functools.lru_cache(maxsize=8)
def of_zone(zone: str) -> Months:
    """The months of a zone, worked out once."""
    return Months(zone)


def parse(text: str) -> int:
    """Read YYYY-MM. Raises UsageError."""
    match = _MONTH.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= 12:
        raise UsageError(f"'{text}' is no month: write it as 2026-01")
    return int(match[1]) * 100 + int(match[2])


def show(month: int) -> str:
    """202601 as 2026-01."""
    return f"{month // 100:04d}-{month % 100:02d}"
