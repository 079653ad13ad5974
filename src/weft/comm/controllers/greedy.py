"""The obvious rival of the dynamic programme: give up accuracy where it costs least error per byte saved, step by step.

It looks the same on two layers and on smooth tables; on lumpy ones (ranks, bit widths) it stops beside the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from weft.comm.controllers.layerwise import BudgetTooSmall

__all__ = ["greedy_layers"]


def greedy_layers(err: Sequence[Sequence[float]], size: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One setting per layer within `budget`, from the most accurate ones by the best exchange of error for size at a time.

    From each layer's least error, take again and again the change of one layer that adds least error per unit of size saved and
    still fits, until none does.

    Raises:
        BudgetTooSmall: even the least errors add up to more than `budget`.

    >>> greedy_layers([[4.0, 1.0, 0.0], [40.0, 10.0, 0.0]], [[1, 2, 8], [1, 2, 8]], budget=14.0)
    [0, 1]
    """
    choice = [min(range(len(e)), key=lambda j: (e[j], s[j], j)) for e, s in zip(err, size, strict=True)]

    def total(changed: int = -1, to: int = 0) -> float:
        return math.fsum(row[to if i == changed else choice[i]] for i, row in enumerate(err))

    if total() > budget:
        raise BudgetTooSmall(total(), budget)
    while True:
        spare = budget - total()
        changes = [
            ((err[i][j] - err[i][now]) / (size[i][now] - size[i][j]), i, j)
            for i, now in enumerate(choice)
            for j in range(len(size[i]))
            if size[i][j] < size[i][now] and err[i][j] - err[i][now] <= spare
        ]
        for _, i, j in sorted(changes):
            if total(i, j) <= budget:  # `spare` is rounded; this is not
                choice[i] = j
                break
        else:
            return choice
