"""Deep Gradient Compression's memory: momentum is built up before the compression, not after it.

Problem    with top-k and momentum in the optimizer, an entry that waits 1,000 steps arrives in one lump and is then carried on
           by the momentum as if it were fresh: at small ratios training loses a point or fails.
Method     worker by worker, with u and v zero at the start (momentum m):                 `MomentumCorrection.before`
               g <- g min(1, clip N^(-1/2) / |g|)       local clipping, N ranks, each tensor by itself
               u <- m u + g;      v <- v + u            Nesterov: u <- m (u + g);  v <- v + u + g
               send C(v); the optimizer applies no momentum
               at the positions sent, v <- v - sent and, masking, u <- 0                  `MomentumCorrection.after`
           tensors that always go dense: u alone, over the averaged gradient              `MomentumCorrection.dense`
Guarantee  sent so far + v = sum of all u, to rounding, without masking;  with everything sent (v = 0 after each step, nothing
           masked) it is momentum SGD, as the mean of the workers' u is the momentum of the mean gradient
Source     Lin et al., Deep Gradient Compression, arXiv:1712.01887.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Spec, State
from weft.comm.memories.error_feedback import forget
from weft.comm.memory import VelocityMemory

__all__ = ["MomentumCorrection"]


@final
@dataclass(frozen=True)
class MomentumCorrection(VelocityMemory):
    """State: "momentum" u and "velocity" v, float32 (numel,); tensors that always go dense have u only.

    Attributes:
        momentum: m in [0, 1); taken out of the optimizer.
        nesterov: the Nesterov form.
        masking: also clear u where v was sent, which stops stale momentum.
        clip: norm at which a tensor's gradient, summed over ranks, would be clipped; None: not clipped.
        ranks: N, how many ranks there are, for the clipping; None: as many as exchange. A checkpoint fits any number.
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    clip: float | None = None
    ranks: int | None = field(default=None, repr=False)

    additive = True
    buffer = "momentum"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"MomentumCorrection: momentum must be in [0, 1), got {self.momentum}; 0.9 is usual")
        if self.nesterov and self.momentum == 0:
            raise ValueError("MomentumCorrection: nesterov needs momentum > 0, got momentum 0")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"MomentumCorrection: clip must be > 0 and finite, or None, got {self.clip}")
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"MomentumCorrection: ranks must be >= 1, got {self.ranks}")

    def sized(self, ranks: int) -> MomentumCorrection:
        return replace(self, ranks=ranks) if self.ranks is None else self

    def before(self, x: Tensor, spec: Spec, state: State) -> Tensor:
        if self.clip is not None:
            limit = self.clip / math.sqrt(self.ranks or 1)
            x = x * (limit / torch.linalg.vector_norm(x).clamp(min=limit))
        step = self._push(x, state)
        velocity = state.get("velocity")
        state["velocity"] = step.clone() if velocity is None else velocity + step
        return state["velocity"]

    def after(self, y: Tensor, sent: Tensor, where: Tensor | None, state: State) -> None:
        velocity = state["velocity"]
        if where is None:
            forget(velocity, sent, None)
        elif self.masking:
            state["momentum"].index_fill_(0, where, 0.0)
            velocity.index_fill_(0, where, 0.0)  # also what half-precision values have cut off
        else:
            forget(velocity, sent, where)

    def dense(self, mean: Tensor, spec: Spec, state: State) -> Tensor:
        return self._push(mean, state).clone()

    def _push(self, x: Tensor, state: State) -> Tensor:
        """u <- m u + x; this step's velocity: u itself, or u + x for Nesterov."""
        last = state.get("momentum")
        if last is None:
            last = torch.zeros_like(x)
        if self.nesterov:
            state["momentum"] = (last + x).mul_(self.momentum)
            return state["momentum"] + x
        state["momentum"] = torch.add(x, last, alpha=self.momentum)
        return state["momentum"]
