"""One bit an entry: its sign, and one or two sizes for each bucket.

    "mean"   C(x) = mean|x| sign(x)                                   |x - C(x)|^2 = |x|^2 - |x|_1^2 / n     4 bytes a bucket
    "sides"  C(x) = mean of the entries >= 0, or of those below 0     |x - C(x)|^2 <= that of "mean"         8 bytes a bucket

Biased: to be used under an error feedback, where |x|_1^2 >= |x|^2 makes it a contraction with c >= 1/n (n entries a bucket).
Source: Seide et al., 1-bit SGD, Interspeech 2014 ("sides"); Karimireddy et al., arXiv:1901.09847 ("mean").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.codecs.bits import pack, packed_length, unpack

__all__ = ["Sign"]


@final
@dataclass(frozen=True)
class Sign(Codec):
    """Signs and sizes. A setting is the number of entries that share a size; 0: the whole tensor.

    Attributes:
        bucket: entries that share a size where no controller says otherwise, >= 0.
        scale: "mean", one size, or "sides", one for each sign.
    """

    bucket: int = 0
    scale: Literal["mean", "sides"] = "mean"

    def __post_init__(self) -> None:
        self._check(self.bucket)
        if self.scale not in ("mean", "sides"):
            raise ValueError(f"Sign: scale must be 'mean' or 'sides', got {self.scale!r}")

    def default(self, spec: Spec) -> Setting:
        return self.bucket

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        buckets = -(-spec.numel // self._width(spec, setting))
        sizes = (buckets, 1 if self.scale == "mean" else 2)
        return ((packed_length(spec.numel, 1),), torch.uint8), (sizes, torch.float32)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        x, width = x.to(torch.float32).contiguous(), self._width(spec, setting)
        positive = (x >= 0).to(torch.uint8)
        if self.scale == "mean":
            counts = x.new_full((-(-len(x) // width), 1), width)
            counts[-1] = len(x) - width * (len(counts) - 1)
            sizes = _rows(x.abs(), width).sum(1, keepdim=True) / counts
        else:
            above = _rows(positive.to(torch.float32), width).sum(1, keepdim=True)
            below = _rows(1 - positive.to(torch.float32), width).sum(1, keepdim=True)
            high, low = (_rows(side, width).sum(1, keepdim=True) for side in (x.clamp(min=0), x.clamp(max=0)))
            sizes = torch.cat((high / above.clamp(min=1), low / below.clamp(min=1)), 1)
        return pack(positive, 1), sizes

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        packed, sizes = message
        bits = _rows(unpack(packed, 1, spec.numel).to(torch.float32), self._width(spec, setting))
        low, high = (-sizes, sizes) if self.scale == "mean" else (sizes[:, 1:], sizes[:, :1])
        return torch.addcmul(low, bits, high - low).view(-1)[: spec.numel]

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """c = 1/n: one entry that holds everything is the worst case."""
        return 1 / self._width(spec, setting) * (1 - 1e-5)

    def _width(self, spec: Spec, setting: Setting) -> int:
        bucket = self._check(setting)
        return max(1, min(bucket or spec.numel, spec.numel))

    @staticmethod
    def _check(setting: Setting) -> int:
        if isinstance(setting, bool) or not isinstance(setting, int) or setting < 0:
            raise ValueError(f"Sign: bucket must be an integer >= 0 (0: the whole tensor), got {setting!r}")
        return setting


def _rows(x: Tensor, width: int) -> Tensor:
    short = -len(x) % width
    return (torch.cat((x, x.new_zeros(short))) if short else x).view(-1, width)
