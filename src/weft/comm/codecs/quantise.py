"""Send each entry in 2 to 8 bits, scaled bucket by bucket.

Problem    d float32 entries in b bits each, with errors that average out (unbiased) or are as small as possible (nearest).
Method     entries in buckets of `bucket`; in each, base and step fix a grid of levels, an entry becomes its level's number,
           packed without gaps                                                            `bits.pack`
               "range"   levels min, min + step, ..., max: 2^b of them      8 bytes a bucket
               "max"     levels 0, +-step, ..., +-max|x|: 2^b - 1 of them   4 bytes a bucket
               "norm"    the same up to the 2-norm of the bucket            4 bytes a bucket
           stochastic: rounded up with the probability of what is cut off, so that the mean is right
Guarantee  with n entries a bucket, s = 2^(b-1) - 1, L = 2^b - 1, stochastic:             `Quantise.variance`
               norm   E|C(x) - x|^2 <= min(n / 4 s^2, sqrt(n) / s) |x|^2
               max    E|C(x) - x|^2 <= (n - 1) / 4 s^2 |x|^2      (the largest is exact)
               range  E|C(x) - x|^2 <= n / 2 L^2 |x|^2            ((max - min)^2 <= 2 (max^2 + min^2))
           nearest: |x - C(x)|^2 <= (1 - c) |x|^2                                         `Quantise.contraction`
Source     Alistarh et al., QSGD, arXiv:1610.02132 ("norm"); buckets by range: Markov et al., CGX, arXiv:2111.08617.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.codecs.bits import pack, packed_length, unpack
from weft.comm.codecs.draws import draw_seed, noise

__all__ = ["Quantise"]


def _bits(setting: Setting) -> int:
    if isinstance(setting, bool) or not isinstance(setting, int) or not 2 <= setting <= 8:
        raise ValueError(f"Quantise: bits must be an integer from 2 to 8, got {setting!r}; for 1 bit use Sign")
    return setting


@final
@dataclass(frozen=True)
class Quantise(Codec):
    """A grid of levels per bucket, b bits an entry. A setting is the number of bits, 2 to 8.

    Attributes:
        bits: bits an entry where no controller says otherwise.
        bucket: entries that share a scale, >= 1.
        scale: what the grid spans, see above.
        stochastic: round at random, without bias; else to the nearest level.
        unbiased: as `stochastic` says (probabilities to 2^-17).
    """

    bits: int = 4
    bucket: int = 512
    scale: Literal["range", "max", "norm"] = "range"
    stochastic: bool = True
    unbiased: bool = field(init=False, repr=False, default=True)

    def __post_init__(self) -> None:
        _bits(self.bits)
        if self.bucket < 1:
            raise ValueError(f"Quantise: bucket must be >= 1, got {self.bucket}; 512 is usual")
        if self.scale not in ("range", "max", "norm"):
            raise ValueError(f"Quantise: scale must be 'range', 'max' or 'norm', got {self.scale!r}")
        object.__setattr__(self, "unbiased", self.stochastic)

    def default(self, spec: Spec) -> Setting:
        return self.bits

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        buckets = -(-spec.numel // self._width(spec))
        scales = (buckets, 2) if self.scale == "range" else (buckets, 1)
        return ((packed_length(spec.numel, _bits(setting)),), torch.uint8), (scales, torch.float32)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        bits, width = _bits(setting), self._width(spec)
        rows = self._rows(x.to(torch.float32), width)
        if self.scale == "range":
            top = 2**bits - 1
            base, high = rows.aminmax(dim=1, keepdim=True)
            spacing = high / top - base / top  # not (high - base) / top, which may overflow
            scales = torch.cat((base, spacing), 1)
        else:
            levels = 2 ** (bits - 1) - 1
            top = 2 * levels
            reach = rows.abs().amax(1, keepdim=True)
            if self.scale == "norm":  # relative to the largest, so that no square over- or underflows
                reach = reach * (rows / torch.where(reach > 0, reach, 1)).square().sum(1, keepdim=True).sqrt()
            scales = spacing = reach / levels
            base = -levels * spacing
        level = (rows - base).div_(torch.where(spacing > 0, spacing, 1)).view(-1)[: spec.numel]
        level.add_(noise(draw_seed(state, step), spec.numel, x.device) if self.stochastic else 0.5)
        return pack(level.clamp_(0, top).to(torch.uint8), bits), scales

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        bits, (packed, scales) = _bits(setting), message
        rows = self._rows(unpack(packed, bits, spec.numel).to(torch.float32), self._width(spec))
        if self.scale == "range":
            rows = torch.addcmul(scales[:, :1], rows, scales[:, 1:])
        else:
            rows = rows.sub_(2 ** (bits - 1) - 1).mul_(scales)
        return rows.view(-1)[: spec.numel]

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """c of |x - C(x)|^2 <= (1 - c) |x|^2 for every x, rounding to nearest; 0: no promise.

        An entry errs by at most half a step. For "max" the largest errs by nothing, and the ratio is worst when all others
        lie half a step from 0: 1 - c = a / (1 + a) with a = (n - 1) / 4 s^2.
        """
        if self.stochastic or self.scale == "norm":
            return 0.0
        entries, bits = self._width(spec), _bits(setting)
        if self.scale == "max":
            return 1 / (1 + (entries - 1) / (4 * (2 ** (bits - 1) - 1) ** 2)) * (1 - 1e-6)
        return max(0.0, 1 - entries / (2 * (2**bits - 1) ** 2) - 1e-6)

    def variance(self, spec: Spec, setting: Setting) -> float:
        """omega of E|C(x) - x|^2 <= omega |x|^2, rounding at random; infinite to nearest."""
        entries, bits = self._width(spec), _bits(setting)
        if not self.stochastic:
            return math.inf
        if self.scale == "range":
            return entries / (2 * (2**bits - 1) ** 2)
        levels = 2 ** (bits - 1) - 1
        if self.scale == "max":
            return (entries - 1) / (4 * levels**2)
        return min(entries / (4 * levels**2), math.sqrt(entries) / levels)

    def shrinks(self, spec: Spec, setting: Setting, rate: float = 1.0) -> bool:
        """Whatever omega is with "range" and "max": no error is as large as the largest entry, which therefore shrinks.

        To the nearest level of a "norm" nothing at all is sent of n > 4 s^2 equal entries.
        """
        if self.scale != "norm":
            return True
        few = self._width(spec) < 4 * (2 ** (_bits(setting) - 1) - 1) ** 2
        return super().shrinks(spec, setting, rate) if self.stochastic else few

    def _width(self, spec: Spec) -> int:
        return max(1, min(self.bucket, spec.numel))

    def _rows(self, x: Tensor, width: int) -> Tensor:
        """x in rows of one bucket each; the last is filled up with its last entry, which changes no range, or with zeros."""
        x = x.contiguous()
        short = -len(x) % width
        if short:
            x = torch.cat((x, x[-1:].expand(short) if self.scale == "range" else x.new_zeros(short)))
        return x.view(-1, width)
