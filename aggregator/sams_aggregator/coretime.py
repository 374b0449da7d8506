"""How a whole is shared out in integers so that the parts add up to it: pure functions.

`accounts` does the same in SQL for all runs at once; a test holds the two together.
Core-time is counted in microseconds: a month of a million cores fits into 64 bits. Its
product with CPU time in nanoseconds mostly fits into the database's 128; what does not is
shared out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K", bound=tuple[object, ...] | bytes | int | str)


def share(whole: int, weights: Mapping[K, int]) -> dict[K, int]:
    """Share a whole in proportion to weights, by largest remainder.

    Each part is rounded down; what is left goes, one by one, to the largest remainders,
    of equal ones to the lower key. A weight below zero counts as zero. Where all are
    zero nothing is given: an empty dictionary.
    """
    positive = {key: max(0, weight) for key, weight in weights.items()}
    total = sum(positive.values())
    if total == 0:
        return {}
    parts = {key: whole * weight // total for key, weight in positive.items()}
    left = whole - sum(parts.values())
    order = sorted(positive, key=lambda key: (-(whole * positive[key] % total), key))
    for key in order[:left]:
        parts[key] += 1
    return parts


def by_month(whole: int, begin_ns: int, end_ns: int, starts: Mapping[int, int]) -> dict[int, int]:
    """Share a whole over months by the time that [begin_ns, end_ns) has in each.

    starts: begin of each month by its number. An interval without length is its begin's.
    """
    months = sorted(starts)
    weights: dict[int, int] = {}
    for month, after in zip(months, [*months[1:], None], strict=True):
        low = max(begin_ns, starts[month])
        high = end_ns if after is None else min(end_ns, starts[after])
        if high > low:
            weights[month] = high - low
    if weights:
        return share(whole, weights)
    before = [month for month in months if starts[month] <= begin_ns]
    return {before[-1] if before else months[0]: whole}


def upstream(cpus: int, begin_ns: int, end_ns: int) -> int:
    """Core-time in microseconds as upstream SAMS has it: CPUs x (last - first sample)."""
    return cpus * max(0, end_ns - begin_ns) // 1000
