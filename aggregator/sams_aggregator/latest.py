"""Which batches and which records count, found on columns, for many epochs at once.

Batches are in the order that counts, the latest of their epoch first. In an interval (a
month, or a slot of some minutes) everything before its last whole batch is superseded, and
of the rest the first record of each executable counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sams_aggregator.tables import Column


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
    order = np.lexsort((np.arange(len(epoch)), interval, epoch))
    first = np.flatnonzero(starts(epoch[order], interval[order]))
    closed = np.cumsum(whole[order]) - whole[order]  # whole ones in front of it, of all
    since = np.repeat(closed[first], np.diff(np.append(first, len(order))))
    chosen: Column = order[closed == since]
    return chosen


def first_of_each(keys: Sequence[Column]) -> Column | None:
    """Mask of the rows that are the first with their keys; None for all of them.

    Keys are small integers from 0 on.
    """
    key = np.zeros(len(keys[0]), dtype=np.int64)
    room = 1
    for one in keys:
        width = int(one.max(initial=0)) + 1
        room *= width
        if room >= 2**63:  # More than fits side by side: number what there is so far.
            key = np.unique(key, return_inverse=True)[1]
            room = (int(key.max(initial=0)) + 1) * width
        key = key * width + one
    ordered = np.sort(key)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    order = np.argsort(key, kind="stable")
    mask = np.zeros(len(key), dtype=bool)
    mask[order[starts(key[order])]] = True
    return mask
