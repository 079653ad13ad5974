"""Error feedback: what was not sent is added to the next gradient.

    y = x + e,   sent = C(y),   e <- y - sent          so that   sum of sent + e = sum of x   at every step

(`Cast` on a ring rounds the sum once more on the wire, which nobody owes: choose AllGather where that matters.)

With any contraction C it makes SGD converge as fast as without compression, up to higher-order terms. At the owner of a segment
(ScatterGather) the same memory stands over the mean that goes back down, with a state of its own.
Source: Seide et al., 1-bit SGD, Interspeech 2014; Karimireddy et al., arXiv:1901.09847; at both ends: Tang et al., DoubleSqueeze,
arXiv:1905.05957.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Spec, State
from weft.comm.memory import Memory

__all__ = ["ErrorFeedback", "forget"]


def forget(y: Tensor, sent: Tensor, where: Tensor | None) -> None:
    """y <- y - sent, where `sent` is the whole or lies at positions `where`; a position may be named twice."""
    if where is None:
        y.sub_(sent)
    else:
        y.index_add_(0, where, sent.to(y.dtype), alpha=-1)


@final
@dataclass(frozen=True)
class ErrorFeedback(Memory):
    """State: "error", float32 (numel,), what is still owed.

    Attributes:
        decay: the error is multiplied by it before it is added, in (0, 1]; below 1 forgets stale errors, and gives up the
            conservation above.
    """

    decay: float = 1.0

    additive = True

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"ErrorFeedback: decay must be in (0, 1], got {self.decay}; 1 forgets nothing")

    def before(self, x: Tensor, spec: Spec, state: State) -> Tensor:
        error = state.get("error")
        y = x.clone() if error is None else torch.add(x, error, alpha=self.decay)
        state["error"] = y
        return y

    def after(self, y: Tensor, sent: Tensor, where: Tensor | None, state: State) -> None:
        forget(state["error"], sent, where)
