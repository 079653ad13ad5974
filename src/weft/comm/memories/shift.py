"""Shifted compression: code the difference to a reference that every rank can follow, and add the reference back.

    y_r = x_r - h_r,   sent_r = C(y_r),   h_r <- h_r + rate sent_r
    delivered = h + mean sent,   h <- h + rate mean sent,     h = mean of all h_r, known on every rank

What is coded vanishes as x_r settles at a value of its own, although the x_r differ: the error of the code vanishes with it.

    unbiased C with variance omega, rate 1/(1 + omega)      DIANA   Mishchenko et al., arXiv:1901.09269
    contraction C, rate 1                                   EF21    Richtarik et al., arXiv:2106.05203

MASHA (weft.comm.masha) uses F_m at a snapshot as its reference, refreshed exactly, and subtracts it itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.memory import Memory

__all__ = ["Shift"]


@final
@dataclass(frozen=True)
class Shift(Memory):
    """State: "reference" h_r and "common" h, both (numel,), zero at first.

    Attributes:
        rate: how fast references follow, in (0, 1]; 1/(1 + omega) for an unbiased codec, 1 for a contraction.
    """

    rate: float = 1.0

    additive = True

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(
                f"Shift: rate must be in (0, 1], got {self.rate}; 1/(1 + omega) for an unbiased codec, else 1"
            )

    def suits(self, codec: Codec, spec: Spec, setting: Setting) -> bool:
        return codec.shrinks(spec, setting, self.rate)

    def before(self, x: Tensor, spec: Spec, state: State) -> Tensor:
        reference = state.get("reference")
        return x.clone() if reference is None else x - reference

    def after(self, y: Tensor, sent: Tensor, where: Tensor | None, state: State) -> None:
        reference = state.get("reference")
        reference = torch.zeros_like(y) if reference is None else reference.clone()
        if where is None:
            reference.add_(sent.to(y.dtype), alpha=self.rate)
        else:
            reference.index_add_(0, where, sent.to(y.dtype), alpha=self.rate)
        state["reference"] = reference

    def delivered(self, mean: Tensor, spec: Spec, state: State) -> Tensor:
        common = state.get("common")
        if common is None:
            common = torch.zeros_like(mean)
        state["common"] = torch.add(common, mean, alpha=self.rate)
        return common + mean
