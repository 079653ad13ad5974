"""One number in place of a tensor: its projection on a random direction that the receiver draws again from a seed.

    s_j = <x, z_j>,   z_j in {-1, +1}^d by hash of (seed, j),   C(x) = scale sum_j s_j z_j        j = 1 .. m
    scale = 1/m          unbiased: E z z^T = I, and E|C(x) - x|^2 = (d - 1)/m |x|^2
    scale = 1/(d + m - 1)   a contraction in the mean: E|x - C(x)|^2 = (1 - m/(d + m - 1)) |x|^2

4 m + 8 bytes whatever d is. The price is the variance: it pays where the update lives in few directions (fine-tuning), or where
nothing larger would arrive at all. Source: Nesterov and Spokoiny, "Random gradient-free minimization", 2017; shared seeds as in
Malladi et al., MeZO, arXiv:2305.17333.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.codecs.draws import draw_seed
from weft.comm.zeroth.directions import WORD, mix, signs

__all__ = ["ScalarSeed"]


@final
@dataclass(frozen=True)
class ScalarSeed(Codec):
    """Projections on seeded directions. A setting is the number of directions m, >= 1.

    Attributes:
        directions: m where no controller says otherwise.
        unbiased: which of the two scales.
        shared: all ranks project on the same directions.
    """

    directions: int = 1
    unbiased: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        self._check(self.directions)

    def default(self, spec: Spec) -> Setting:
        return self.directions

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return ((self._check(setting),), torch.float32), ((1,), torch.int64)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        count, seed = self._check(setting), draw_seed(state, step, self.shared)
        x = x.to(torch.float32)
        # Not a dot product: its bits depend on where in a bucket x begins.
        projections = [self.direction(seed, number, spec, x.device).mul_(x).sum() for number in range(count)]
        return torch.stack(projections), torch.tensor([seed], device=x.device)

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        projections, seed = message[0] * self._scale(spec, setting), int(message[1])
        out = torch.zeros(spec.numel, dtype=torch.float32, device=projections.device)
        for number in range(self._check(setting)):
            out.addcmul_(self.direction(seed, number, spec, out.device), projections[number])
        return out

    def direction(self, seed: int, number: int, spec: Spec, device: torch.device) -> Tensor:
        """z_j of a message's seed, float32 (d,) of +1 and -1."""
        return signs(mix(seed + number), 0, -(-spec.numel // WORD), device)[: spec.numel]

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """c of E|x - C(x)|^2 = (1 - c) |x|^2 with the smaller scale; 0 with the unbiased one."""
        count = self._check(setting)
        return 0.0 if self.unbiased else count / (spec.numel + count - 1)

    def variance(self, spec: Spec, setting: Setting) -> float:
        """omega of E|C(x) - x|^2 = omega |x|^2 with the unbiased scale."""
        return (spec.numel - 1) / self._check(setting)

    def error(self, x: Tensor, spec: Spec, settings: Sequence[Setting]) -> list[float]:
        """The expected squared error, a multiple of |x|^2: nothing is drawn."""
        norm = float(x.double().square().sum())
        return [norm * (self.variance(spec, s) if self.unbiased else 1 - self.contraction(spec, s)) for s in settings]

    def _scale(self, spec: Spec, setting: Setting) -> float:
        count = self._check(setting)
        return 1 / count if self.unbiased else 1 / (spec.numel + count - 1)

    @staticmethod
    def _check(setting: Setting) -> int:
        if isinstance(setting, bool) or not isinstance(setting, int) or setting < 1:
            raise ValueError(f"ScalarSeed: directions must be an integer >= 1, got {setting!r}")
        return setting
