"""Weights of results that come when they come: d_i for each message, out of its `Arrival` alone.

Worker i takes part in a share P_i of the rounds and then gets weight d_i, so that on average it pulls with E[w_i] = P_i d_i.
The scheme converges to the optimum of sum_i q_i F_i with q_i proportional to P_i d_i (Fraboni et al., theorem 1):

    Unbiased       d_i = p_i / P_i            q = p: the optimum that was asked for
    Equal          d_i = the same for all     q_i proportional to P_i: fast workers dominate
    Polynomial     d_i = alpha (1 + staleness_i)^-a    FedAsync: stale work counts less, and so do slow workers, twice

No rule here looks at who else has come. Weights that are made to add up to one within a round are no longer p_i on average, which
is the very bias that d_i removes.

Source: Fraboni et al., arXiv:2206.10189 (condition, table); Xie et al., Asynchronous Federated Optimization, arXiv:1903.03934.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Combine, Info

__all__ = ["Equal", "Polynomial", "Unbiased"]


@final
@dataclass(frozen=True)
class Unbiased(Combine):
    """d_i = p_i / P_i. With `Clock(dt)` it is FedFix, with `All` FedAvg, with `Any` the corrected asynchronous FedAvg."""

    needs = "arrivals"

    def weights(self, info: Info) -> Tensor:
        _all_there("Unbiased", info)
        for arrival in info.arrivals:
            if not 0 < arrival.share <= 1:
                raise ValueError(
                    f"Unbiased: the share of worker {arrival.source} must be in (0, 1], got {arrival.share}; "
                    "it is how often it takes part in a round, declared or counted"
                )
        return torch.tensor([arrival.weight / arrival.share for arrival in info.arrivals], dtype=torch.float64)


@final
@dataclass(frozen=True)
class Equal(Combine):
    """The same weight `each` for every message, as asynchronous FedAvg and FedBuff (1/c) have it: biased unless all are alike."""

    each: float = 1.0
    needs = "arrivals"

    def __post_init__(self) -> None:
        if not 0 < self.each < math.inf:
            raise ValueError(f"Equal: each must be > 0, got {self.each}; 1/c for rounds of c messages is usual")

    def weights(self, info: Info) -> Tensor:
        _all_there("Equal", info)
        return torch.full((info.count,), self.each, dtype=torch.float64)


@final
@dataclass(frozen=True)
class Polynomial(Combine):
    """d_i = alpha (1 + staleness_i)^-exponent, FedAsync's weights on changes.

    FedAsync mixes models, (1 - d) theta + d theta_i; here d multiplies the change of the model that was sent, so that the work of
    others since then is kept. The two agree where nothing is stale.
    """

    alpha: float = 0.6
    exponent: float = 0.5
    needs = "arrivals"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"Polynomial: alpha must be in (0, 1], got {self.alpha}; the paper takes 0.6")
        if not 0 <= self.exponent < math.inf:
            raise ValueError(
                f"Polynomial: exponent must be >= 0, got {self.exponent}; 0.5 is the paper's, 0 ignores staleness"
            )

    def weights(self, info: Info) -> Tensor:
        _all_there("Polynomial", info)
        row = [self.alpha * (1 + arrival.staleness) ** -self.exponent for arrival in info.arrivals]
        return torch.tensor(row, dtype=torch.float64)


def _all_there(name: str, info: Info) -> None:
    if info.count < 1 or len(info.arrivals) != info.count:
        raise ValueError(
            f"{name}: there must be one arrival per message, at least one, got {len(info.arrivals)} for {info.count} messages; "
            "this rule is made from who has come, not from how many"
        )
