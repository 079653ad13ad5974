"""Random draws of codecs, each from a seed of its own: the same after a resume, and on every rank where the seed is shared.

The exchange puts two seeds into each tensor's state, made from the run's seed and the tensor's name: `state["seed"]`, another
one on each rank, and `state["shared_seed"]`, equal on all. No global generator is touched.

    seed of one draw            the tensor's seed and the step, mixed          `draw_seed`
    rounding noise              16 random bits an entry                        `noise`
    k distinct positions        an affine walk i -> a i + b modulo d           `positions`
    directions of +1 and -1     hashed bits                                    `weft.comm.zeroth.directions.signs`
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.comm.codec import State
from weft.comm.zeroth.directions import GOLDEN, mix

__all__ = ["draw_seed", "noise", "positions"]


def draw_seed(state: State, step: int, shared: bool = False) -> int:
    """The seed of a tensor's draw at `step`, 0 <= seed < 2^63 (it fits an int64 tensor); `shared`: equal on all ranks."""
    return mix(mix(int(state["shared_seed" if shared else "seed"]) + GOLDEN) + (step + 1) * GOLDEN) >> 1


def noise(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), float32 (count,): 65,536 equally spaced values, so that a mean is exact to 2^-17.

    Four entries share a draw of 64 bits, which takes half the time of `torch.rand`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[:count].to(torch.float32).add_(32768.5).mul_(2.0**-16)


def positions(seed: int, count: int, total: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` distinct positions below `total` < 2^31, int64 (count,), in time proportional to `count`.

    The walk i -> (a i + b) mod total with `a` coprime to `total` visits every position once. As b is uniform, each position is
    drawn with probability count/total exactly, which is all that unbiasedness and the variance of Rand-k rest on.
    """
    start, stride = mix(seed) % total, mix(seed + GOLDEN) % total
    while math.gcd(stride, total) != 1:
        stride += 1
    return torch.arange(count, dtype=torch.int64, device=device).mul_(stride).add_(start).remainder_(total)
