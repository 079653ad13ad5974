"""Send k entries at random positions, which the receiver draws again from a seed of 8 bytes.

    C(x) = x at k = ceil(ratio d) positions, 0 elsewhere;   times d/k where `unbiased`
    E|C(x) - x|^2 = (d/k - 1) |x|^2  (unbiased),   E|x - C(x)|^2 = (1 - k/d) |x|^2  (else)

`RandK` messages carry their seed, so every rank may draw its own positions. `SharedRandK` draws the same positions on all ranks:
then the values can be averaged on the wire, and an all-reduce of k values moves less than an all-gather from 3 ranks on.
Source: Stich et al., arXiv:1809.07599; variance: Beznosikov et al., arXiv:2110.03313. 4 bytes an entry, half of Top-k's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Codec, LinearCodec, Setting, Spec, State
from weft.comm.codecs.draws import draw_seed, positions
from weft.comm.codecs.top_k import density, kept

__all__ = ["RandK", "SharedRandK"]


@final
@dataclass(frozen=True)
class RandK(Codec):
    """k random entries, 4 bytes each and 8 for the seed. A setting is a ratio in (0, 1]; at 1 the tensor goes dense.

    Attributes:
        ratio: fraction of entries sent where no controller says otherwise.
        unbiased: multiply what is sent by d/k; leave it off under an error feedback, which wants a contraction.
        shared: all ranks send the same positions (they still travel as separate messages).
    """

    ratio: float = 0.01
    unbiased: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        density(self.ratio, "RandK")

    def default(self, spec: Spec) -> Setting:
        return self.ratio

    def bypass(self, spec: Spec, setting: Setting) -> bool:
        """At ratio 1 the tensor goes dense, by all-reduce."""
        return density(setting, "RandK") >= 1

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return ((kept(density(setting, "RandK"), spec.numel),), torch.float32), ((1,), torch.int64)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        count, seed = kept(density(setting, "RandK"), spec.numel), draw_seed(state, step, self.shared)
        values = x[positions(seed, count, spec.numel, x.device)]
        if self.unbiased:
            values = values * (spec.numel / count)
        return values.to(torch.float32), torch.tensor([seed], device=x.device)

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        out = torch.zeros(spec.numel, dtype=torch.float32, device=message[0].device)
        self.add_to(out, message, spec, setting)
        return out

    def sent(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> tuple[Tensor, Tensor]:
        """Values float32 (k,) and positions int64 (k,), all different."""
        return message[0], positions(int(message[1]), len(message[0]), spec.numel, message[0].device)

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """c of E|x - C(x)|^2 = (1 - c) |x|^2 without the factor d/k; 0 with it."""
        return 0.0 if self.unbiased else kept(density(setting, "RandK"), spec.numel) / spec.numel

    def variance(self, spec: Spec, setting: Setting) -> float:
        """omega of E|C(x) - x|^2 = omega |x|^2, with the factor d/k."""
        return spec.numel / kept(density(setting, "RandK"), spec.numel) - 1

    def error(self, x: Tensor, spec: Spec, settings: Sequence[Setting]) -> list[float]:
        """The expected squared error, which is a multiple of |x|^2: nothing is drawn."""
        norm = float(x.double().square().sum())
        return [norm * (self.variance(spec, s) if self.unbiased else 1 - self.contraction(spec, s)) for s in settings]


@final
@dataclass(frozen=True)
class SharedRandK(LinearCodec):
    """k random entries at positions that all ranks share, averaged on the wire: 4 bytes each, nothing else.

    State: "drawn", the seed of the last positions.

    Attributes:
        ratio: fraction of entries sent where no controller says otherwise.
        unbiased: multiply what is sent by d/k.
    """

    ratio: float = 0.01
    unbiased: bool = False

    def __post_init__(self) -> None:
        density(self.ratio, "SharedRandK")

    def _local(self) -> RandK:
        return RandK(self.ratio, self.unbiased, shared=True)

    def default(self, spec: Spec) -> Setting:
        return self.ratio

    def bypass(self, spec: Spec, setting: Setting) -> bool:
        """At ratio 1 the tensor goes dense."""
        return density(setting, "SharedRandK") >= 1

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return self._local().message(spec, setting)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        return self._local().encode(x, spec, state, setting, step)

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        return self._local().decode(message, spec, setting)

    def sent(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> tuple[Tensor, Tensor]:
        """Values float32 (k,) and positions int64 (k,)."""
        return self._local().sent(message, spec, setting)

    def nbytes(self, spec: Spec, setting: Setting) -> int:
        """On the wire only the values travel: all ranks know the seed."""
        return 4 * kept(density(setting, "SharedRandK"), spec.numel)

    def rounds(
        self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int
    ) -> Generator[Tensor, Tensor, Tensor]:
        values, seed = self.encode(x, spec, state, setting, step)
        state["drawn"] = int(seed)
        mean = yield values
        return self.decode((mean, seed), spec, setting)

    def own(self, x: Tensor, mean: Tensor, spec: Spec, state: State, setting: Setting) -> tuple[Tensor, Tensor | None]:
        """This rank's values at the positions drawn last."""
        count = kept(density(setting, "SharedRandK"), spec.numel)
        where = positions(state["drawn"], count, spec.numel, x.device)
        return x[where].to(torch.float32) * (spec.numel / count if self.unbiased else 1), where

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """As `RandK`'s."""
        return self._local().contraction(spec, setting)

    def variance(self, spec: Spec, setting: Setting) -> float:
        """As `RandK`'s."""
        return self._local().variance(spec, setting)

    def error(self, x: Tensor, spec: Spec, settings: Sequence[Setting]) -> list[float]:
        return self._local().error(x, spec, settings)
