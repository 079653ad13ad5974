"""PowerSGD: a gradient matrix M (m, n) as P Q^T with r columns, by one step of power iteration that starts where the last ended.

Method     per step and tensor, in two averages over the ranks:                           `LowRank.rounds`
               P = mean over ranks of M Q,   P <- an orthonormal basis of P
               Q = mean over ranks of M^T P,   result P Q^T = P P^T mean(M)
           Q is kept for the next step: successive gradients have nearly the same leading directions
Guarantee  a projection, |x - C(x)| <= |x|; for a matrix that stays the same it converges to the best of rank r, as power
           iteration does. r (m + n) floats travel; where that is not less than m n the tensor goes dense   `LowRank.bypass`
Source     Vogels et al., PowerSGD, arXiv:1905.13727.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import LinearCodec, Setting, Spec, State
from weft.comm.codecs.draws import draw_seed, noise

__all__ = ["LowRank", "matrix_shape"]

ALIGNED = 64  # bytes


def matrix_shape(spec: Spec) -> tuple[int, int]:
    """A tensor as a matrix: its first dim against all others."""
    rows = spec.shape[0] if spec.shape else 1
    return rows, spec.numel // max(rows, 1)


def _rank(setting: Setting) -> int:
    if isinstance(setting, bool) or not isinstance(setting, int) or setting < 1:
        raise ValueError(f"LowRank: rank must be an integer >= 1, got {setting!r}; 4 is usual")
    return setting


@final
@dataclass(frozen=True)
class LowRank(LinearCodec):
    """Rank-r approximation averaged on the wire. A setting is the rank, >= 1.

    Factors are kept as rows, P^T (r, m) and Q^T (r, n): a product of r long rows reads M once, one of r columns several times.
    State: "q", Q^T of the last step, rows scaled to 1. It is the same on all ranks.

    Attributes:
        rank: columns where no controller says otherwise.
        warm: start from the last step's factor; else from a new draw each step.
    """

    rank: int = 4
    warm: bool = True

    num_rounds = 2

    def __post_init__(self) -> None:
        _rank(self.rank)

    def default(self, spec: Spec) -> Setting:
        return self.rank

    def bypass(self, spec: Spec, setting: Setting) -> bool:
        """Whether the two factors are no smaller than the matrix; vectors always."""
        rows, columns = matrix_shape(spec)
        return len(spec.shape) < 2 or _rank(setting) * (rows + columns) >= rows * columns

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        if self.bypass(spec, setting):
            return (((spec.numel,), torch.float32),)
        rows, columns = matrix_shape(spec)
        rank = _rank(setting)
        return ((rank, rows), torch.float32), ((rank, columns), torch.float32)

    def rounds(
        self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int
    ) -> Generator[Tensor, Tensor, Tensor]:
        if self.bypass(spec, setting):
            return (yield x.to(torch.float32))
        left, right = yield from self._factors(x, spec, state, setting, step)
        return (left.T @ right).view(-1)

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        """The factors (P^T, Q^T) of this rank's tensor alone."""
        if self.bypass(spec, setting):
            return (x.to(torch.float32),)
        factors = self._factors(x, spec, state, setting, step)
        sent = next(factors)
        while True:
            try:
                sent = factors.send(sent)
            except StopIteration as end:
                left, right = end.value
                return left.contiguous(), right.contiguous()

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        if self.bypass(spec, setting):
            return message[0].to(torch.float32)
        left, right = message
        return (left.T @ right).view(-1)

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """1 where the tensor goes dense; else 0: the start may miss every leading direction."""
        return 1.0 if self.bypass(spec, setting) else 0.0

    def error(self, x: Tensor, spec: Spec, settings: Sequence[Setting]) -> list[float]:
        """The best rank's squared error for every setting, by one SVD: what warm-started power iteration tends to."""
        wanted = [0 if self.bypass(spec, setting) else _rank(setting) for setting in settings]
        if not any(wanted):
            return [0.0] * len(wanted)
        squares = torch.linalg.svdvals(x.to(torch.float32).view(matrix_shape(spec))).double().square()
        return [float(squares[rank:].sum()) if rank else 0.0 for rank in wanted]

    def _factors(
        self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int
    ) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
        x, rank = x.to(torch.float32), _rank(setting)
        if x.data_ptr() % ALIGNED:  # a matrix product's bits depend on where in a bucket x begins
            x = x.clone()
        matrix = x.reshape(matrix_shape(spec))
        start = self._start(spec, state, rank, step, x.device)
        mean = yield (start @ matrix.T).view(-1)
        left = torch.linalg.qr(mean.view(rank, -1).T).Q.T
        mean = yield (left @ matrix).view(-1)
        right = mean.view(rank, -1)
        if self.warm:
            # Scaled to 1: the next P is M Q, and products of two gradients would leave the range of float32.
            state["q"] = right / right.abs().amax(1, keepdim=True)
        return left, right

    def _start(self, spec: Spec, state: State, rank: int, step: int, device: torch.device) -> Tensor:
        """The right factor to begin with (rank, n): the last one where there is one, new draws for what is missing."""
        columns = matrix_shape(spec)[1]
        last = state.get("q") if self.warm else None
        if last is not None and len(last) >= rank and bool(last.isfinite().all()):
            return last[:rank].to(device)
        # Drawn on the CPU: a generator gives other numbers on another kind of device, and all ranks must agree.
        drawn = noise(draw_seed(state, step, shared=True), columns * rank).sub_(0.5).view(rank, columns).to(device)
        if last is not None:
            shared = min(rank, len(last))
            last = last[:shared].to(device)
            drawn[:shared] = torch.where(last.isfinite().all(1, keepdim=True), last, drawn[:shared])  # 0/0 of zeros
        return drawn
