"""Which batches and which records count, found on columns, for many epochs at once.

Batches are in the order that counts, the latest of their epoch first. In an interval (a
month, or a slot of some minutes) everything before its last whole batch is superseded, and
of the rest the first record of each executable counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from sams_aggregator.tables import Column

_WIDE: Final = 1 << 31


def starts(*keys: Column) -> Column:
    """Where in sorted keys the first of each different one is, as a mask."""
    new = np.ones(len(keys[0]), dtype=bool)
    if len(new):
        new[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return new


def needed(epoch: Column, interval: Column, whole: Column) -> Column:
    """Places of the batches that have to be read, by epoch, interval, the latest first."""
    if not len(epoch):
        return np.zeros(0, dtype=np.int64)
    order = ordered([epoch, interval])
    first = np.flatnonzero(starts(epoch[order], interval[order]))
    closed = np.cumsum(whole[order]) - whole[order]  # whole ones in front of it, of all
    since = np.repeat(closed[first], np.diff(np.append(first, len(order))))
    chosen: Column = order[closed == since]
    return chosen


def numbered(keys: Sequence[Column]) -> Column:
    """One integer for each row, in the order of its keys. Keys are integers from 0 on."""
    number = np.zeros(len(keys[0]), dtype=np.int64)
    room = 1
    for one in keys:
        key, width = one, int(one.max(initial=0)) + 1
        if width > _WIDE:
            key = np.unique(one, return_inverse=True)[1]
            width = int(key.max(initial=0)) + 1
        room *= width
        if room >= 2**63:  # More than fits side by side: number what there is so far.
            number = np.unique(number, return_inverse=True)[1]
            room = (int(number.max(initial=0)) + 1) * width
        number = number * width + key
    return number


def ordered(keys: Sequence[Column]) -> Column:
    """Order of the rows by their keys, the first key first; equal ones stay as they are."""
    return order_of(numbered(keys))


def order_of(number: Column) -> Column:
    """Order of integers; equal ones stay as they are."""
    room = len(number).bit_length()
    if int(number.min(initial=0)) < 0 or int(number.max(initial=0)).bit_length() + room > 63:
        return np.argsort(number, kind="stable")
    # With the place behind it each is another one, and any sort will do: ten times as fast.
    order = number << room
    order |= np.arange(len(number))
    order.sort()
    order &= (1 << room) - 1
    return order


def first_of_each(keys: Sequence[Column]) -> Column | None:
    """Mask of the rows that are the first with their keys; None for all of them.

    Keys are integers from 0 on.
    """
    number = numbered(keys)
    in_order = np.sort(number)
    if not (in_order[1:] == in_order[:-1]).any():
        return None
    order = order_of(number)
    mask = np.zeros(len(number), dtype=bool)
    mask[order[starts(number[order])]] = True
    return mask
