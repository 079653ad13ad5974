"""One setting for all tensors: what layer-wise choices are measured against.

uniform_layers    the smallest single setting within an error budget, for `LayerwiseBudget(choose=uniform_layers)`
Uniform           a fixed setting for all
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from weft.comm.codec import Setting, Spec
from weft.comm.controller import Controller, Total, alone
from weft.comm.controllers.layerwise import BudgetTooSmall

__all__ = ["Uniform", "uniform_layers"]


def uniform_layers(err: Sequence[Sequence[float]], size: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The same setting for every layer: of those whose total error is at most `budget` the one of least total size.

    Raises:
        ValueError: the layers have different numbers of settings.
        BudgetTooSmall: no setting keeps the budget for all.

    >>> uniform_layers([[4.0, 1.0, 0.0], [40.0, 10.0, 0.0]], [[1, 2, 8], [1, 2, 8]], budget=14.0)
    [1, 1]
    """
    if not err:
        return []
    if len({len(row) for row in err}) != 1:
        raise ValueError("uniform_layers: all layers must have the same settings; got rows of different lengths")
    errors = [math.fsum(row[j] for row in err) for j in range(len(err[0]))]
    within = [j for j, error in enumerate(errors) if error <= budget]
    if not within:
        raise BudgetTooSmall(min(errors), budget)
    best = min(within, key=lambda j: (math.fsum(row[j] for row in size), errors[j], j))
    return [best] * len(err)


@final
@dataclass(frozen=True)
class Uniform(Controller):
    """`setting` for every tensor, from the first step on."""

    setting: Setting = None
    every: int = 1

    agreed = True
    needs_gradient = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Uniform: every must be >= 1 steps, got {self.every}")

    def initial(self, spec: Spec, default: Setting) -> Setting:
        return self.setting

    def observe(self, spec: Spec, gradient: Any, step: int) -> None:
        return None

    def decide(self, step: int, specs: Mapping[str, Spec], total: Total = alone) -> Mapping[str, Setting]:
        return dict.fromkeys(specs, self.setting)
