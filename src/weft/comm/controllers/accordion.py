"""Two settings by tensor, switched by how fast its gradient changes (Agarwal et al., Accordion, arXiv:2010.16248).

A tensor is in a critical regime while the norm of its gradient, summed between decisions, changes by more than `eta`:

    | |G_before| - |G_now| |  >=  eta |G_before|      ->  low compression,  else high compression
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from weft.comm.codec import Setting, Spec
from weft.comm.controller import Controller, Total, alone

__all__ = ["Accordion"]


@final
class Accordion(Controller):
    """Low compression where gradients change fast, and before there are two sums to compare; high compression elsewhere.

    Args:
        low: the setting of low compression (many bytes).
        high: the setting of high compression.
        eta: relative change of the norm that counts as fast, > 0; the paper's is 0.5.
        every: steps between decisions, >= 1.
    Raises:
        ValueError: a value is out of range.
    """

    options = ("low", "high", "eta", "every")
    additive = True  # squared norms

    def __init__(self, low: Setting, high: Setting, eta: float = 0.5, every: int = 1000):
        if not eta > 0 or every < 1:
            raise ValueError(f"Accordion: eta must be > 0 and every >= 1, got eta={eta}, every={every}")
        self.low, self.high, self.eta, self.every = low, high, eta, every
        self._sums: dict[str, Tensor] = {}
        self._norms: dict[str, float] = {}

    def initial(self, spec: Spec, default: Setting) -> Setting:
        return self.low

    def observe(self, spec: Spec, gradient: Tensor, step: int) -> None:
        """Add the gradient of one tensor to the sum whose norm the next decision compares."""
        if spec.name in self._sums:
            self._sums[spec.name] += gradient.detach().reshape(-1)
        else:
            self._sums[spec.name] = gradient.detach().reshape(-1).float().clone()

    def decide(self, step: int, specs: Mapping[str, Spec], total: Total = alone) -> Mapping[str, Setting]:
        found: dict[str, Setting] = {}
        square = lambda name: (float(self._sums[name].double().square().sum()),) if name in self._sums else None
        for name, (squared,) in total({name: square(name) for name in specs}).items():
            norm = math.sqrt(squared)
            before = self._norms.get(name)
            if not math.isfinite(norm):
                continue  # keep the setting and the norm to compare with
            critical = before is None or abs(before - norm) >= self.eta * before
            found[name] = self.low if critical else self.high
            self._norms[name] = norm
        self._sums.clear()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: total.clone() for name, total in self._sums.items()}, "norms": dict(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "norms" not in state:
            raise ValueError("Accordion: the checkpoint lacks 'norms'; it is from another controller")
        self._sums = {name: total.clone() for name, total in state["sums"].items()}
        self._norms = dict(state["norms"])
