"""The largest number within each of many ranges of one array.

One pass of numpy over the ranges, one after the other: O(their lengths together). A sparse table would be O(n log n), but takes
longer for the few hundred ranges at a time that planning asks for.
"""

from __future__ import annotations

import numpy as np

__all__ = ["most_between"]


def most_between(levels: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """For each pair, the largest of levels[first:end]; 0 where there are none."""
    if not len(first):
        return np.zeros(0, levels.dtype)
    bounds = np.empty(2 * len(first), np.int64)
    bounds[::2], bounds[1::2] = first, end
    most = np.maximum.reduceat(np.append(levels, 0), bounds)[::2]  # one more, so that `end` may be the length
    return np.where(end > first, most, 0)
