"""The largest number within each of many ranges of one array, by a sparse table: O(n log n) once, O(1) a range.

Source     Bender and Farach-Colton, "The LCA problem revisited", LATIN 2000.
"""

from __future__ import annotations

import numpy as np

__all__ = ["most_between"]


def most_between(levels: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """For each pair, the largest of levels[first:end]; 0 where there are none."""
    table = [levels]  # table[k][t] = the largest of levels[t : t + 2^k]
    while 2 ** len(table) <= len(levels):
        half = 2 ** (len(table) - 1)
        table.append(np.maximum(table[-1][:-half], table[-1][half:]))
    power = np.frexp(np.maximum(end - first, 1))[1] - 1  # of the largest power of two in the range
    result = np.zeros(len(first), levels.dtype)
    for k in np.unique(power).tolist():
        some = (power == k) & (end > first)
        result[some] = np.maximum(table[k][first[some]], table[k][end[some] - 2**k])
    return result
