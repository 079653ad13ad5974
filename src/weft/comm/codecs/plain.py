"""The codes that change little: the tensor itself, and the tensor in 16 bits. Both may be added on the wire."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import LinearCodec, Setting, Spec, State

__all__ = ["Cast", "Identity"]

WIDTHS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@final
@dataclass(frozen=True)
class Identity(LinearCodec):
    """The tensor itself, in float64 if it is that, else in float32."""

    unbiased = True
    elementwise = True
    narrows = False

    def default(self, spec: Spec) -> Setting:
        return 8 * self.precision(spec).itemsize

    def precision(self, spec: Spec) -> torch.dtype:
        return torch.float64 if spec.dtype == torch.float64 else torch.float32

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return (((spec.numel,), self.precision(spec)),)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        return message[0]

    def rounds(
        self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int
    ) -> Generator[Tensor, Tensor, Tensor]:
        mean = yield x
        return mean

    def own(self, x: Tensor, mean: Tensor, spec: Spec, state: State, setting: Setting) -> tuple[Tensor, Tensor | None]:
        return x, None

    def contraction(self, spec: Spec, setting: Setting) -> float:
        return 1.0

    def variance(self, spec: Spec, setting: Setting) -> float:
        return 0.0


@final
@dataclass(frozen=True)
class Cast(LinearCodec):
    """Round to 16 bits: half the bytes.

    float16 keeps 11 bits for 6e-5 <= |x| <= 65504 (above it is infinite, and the step is skipped); bfloat16 keeps 8 bits over
    float32's whole range. Relative rounding error at most 2^-11 and 2^-8 of an entry in range. Sums are made in that type too.

    Attributes:
        dtype: "float16" or "bfloat16", by name or as torch's; kept by name.
    """

    dtype: str | torch.dtype = "float16"

    elementwise = True

    def __post_init__(self) -> None:
        name = str(self.dtype).removeprefix("torch.")
        if name not in WIDTHS:
            raise ValueError(f"Cast: dtype must be one of {sorted(WIDTHS)}, got {self.dtype!r}")
        object.__setattr__(self, "dtype", name)

    @property
    def _type(self) -> torch.dtype:
        return WIDTHS[str(self.dtype)]

    def default(self, spec: Spec) -> Setting:
        return 16

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return (((spec.numel,), self._type),)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        return (x.to(self._type),)

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        return message[0].float()

    def rounds(
        self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int
    ) -> Generator[Tensor, Tensor, Tensor]:
        mean = yield x.to(self._type)
        return mean.float()

    def own(self, x: Tensor, mean: Tensor, spec: Spec, state: State, setting: Setting) -> tuple[Tensor, Tensor | None]:
        return x.to(self._type).float(), None
