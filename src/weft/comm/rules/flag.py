"""Flag aggregation: project the gradients on a subspace in which most of them lie, then average.

Problem    gradients g_1..g_n in R^d, x_i = g_i/|g_i|. Find Y, orthonormal (d, m), of least
               F(Y) = sum_i sqrt(1 - |Y^T x_i|^2) + lam/(n(n-1)) sum_{i != j} sqrt(1 - |Y^T z_ij|^2),      `objective`
           z_ij = (x_i - x_j)/|x_i - x_j|: sines of angles, not their squares, so that a few that stand apart count for little.
Method     reweighted least squares: weight 1/sin of each angle, floored, then the top m eigenvectors; at most `iters` times, the
           first from equal weights; a step that does not lower F is not taken                            `subspace`
           Everything in n x n: H = V L^(1/2) for X^T X = V L V^T has the same inner products as X, so Y = X V L^(-1/2) U for
           U found from H, and Y Y^T X s is a combination of the gradients. No matrix of d rows is ever decomposed.
Result     (1/n) sum_i s_i Y Y^T x_i with s_i by `scale`:
               "norm"    the median of |g_j|: robust to norms too. The default.
               "paper"   |g_i|: the projected gradients' plain mean. One gradient of huge norm inside the subspace rules it.
               "public"  n/m: what the authors' code returns, norm about 1 whatever the gradients' is
Source     Almasi et al., Flag Aggregator, arXiv:2302.05865; the form in n x n is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from weft.comm.rules.by_gram import ByGram

__all__ = ["Flag"]

FLOOR = 1e-7  # added to sin^2, as in the authors' code: no weight above 3e3
RANK = 1e-10  # eigenvalues below this share of the largest are rounding


@final
@dataclass(frozen=True)
class Flag(ByGram):
    """Flag aggregation.

    Attributes:
        m: dimension of the subspace, 1 <= m < n. None: ceil((n + 1)/2). Small m fails on workers with unlike data.
        lam: weight of the pairwise differences, >= 0.
        iters: reweightings, >= 0.
        scale: "norm", "paper" or "public" (see the module).
        whole: allow m >= n, where the subspace holds everything and the result is a mean: no robustness.
    """

    m: int | None = None
    lam: float = 0.0
    iters: int = 5
    scale: str = "norm"
    whole: bool = False

    def __post_init__(self) -> None:
        if self.m is not None and self.m < 1:
            raise ValueError(f"Flag: m must be 1 or more, got {self.m}; None takes ceil((n + 1)/2)")
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise ValueError(f"Flag: lam must be 0 or more, got {self.lam}")
        if self.iters < 0:
            raise ValueError(f"Flag: iters must be 0 or more, got {self.iters}; 5 is enough")
        if self.scale not in ("norm", "paper", "public"):
            raise ValueError(f"Flag: scale must be 'norm', 'paper' or 'public', got {self.scale!r}")

    def check(self, count: int, faulty: int) -> None:
        if count < 3:
            raise ValueError(f"Flag: needs n >= 3 gradients, got {count}; a subspace for one or two tells nothing")
        if self.m is not None and self.m >= count and not self.whole:
            raise ValueError(
                f"Flag: m must be below the number of gradients {count}, got {self.m}: the subspace would hold all of them, "
                "faulty ones too; lower m, or say whole=True"
            )

    def among(self, count: int, broken: int) -> Flag:
        return self if self.m is None or self.whole else replace(self, m=max(1, min(self.m, count - 1)))

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        count = len(gram)
        norms = gram.diagonal().clamp(min=0.0).sqrt()
        member = norms > 0
        if not bool(member.any()):
            return torch.zeros(count, dtype=torch.float64)
        length = norms[member]
        cosines = gram[member][:, member] / (length[:, None] * length[None, :])
        size = self.m if self.m is not None else (count + 2) // 2  # ceil((n + 1)/2)
        wanted = {
            "norm": torch.full_like(length, float(length.quantile(0.5))),
            "paper": length,
            "public": torch.full_like(length, count / size),
        }[self.scale]
        row = torch.zeros(count, dtype=torch.float64)
        row[member] = self._projected(cosines, size, wanted) / length / count
        return row

    def _projected(self, cosines: Tensor, size: int, wanted: Tensor) -> Tensor:
        """Coefficients on x_1..x_n of Y Y^T sum_i wanted_i x_i."""
        values, vectors = torch.linalg.eigh((cosines + cosines.T) / 2)
        real = values > RANK * values[-1]
        values, vectors = values[real], vectors[:, real]
        if len(values) <= size:
            return wanted  # everything lies in the subspace
        like = vectors * values.sqrt()  # H: rows with the inner products of the x_i
        basis = subspace(like, size, self.lam, self.iters)[0]
        return (vectors / values.sqrt()) @ (basis @ (basis.T @ (like.T @ wanted)))


def objective(like: Tensor, basis: Tensor, lam: float) -> tuple[float, Tensor, Tensor | None]:
    """F(Y), sin^2 of each row's angle to Y (n,), and of each pair's difference (n, n; 0 for equal rows) if lam > 0."""
    count = len(like)
    image = like @ basis
    square = (1.0 - image.square().sum(1)).clamp(min=0.0)
    total, pairs = float(square.sqrt().sum()), None
    if lam > 0:
        length = _apart(like)
        pairs = torch.where(length > RANK, 1.0 - _apart(image) / length, 0.0).clamp(min=0.0)
        total += lam / (count * (count - 1)) * float(pairs.sqrt().sum())
    return total, square, pairs


def subspace(like: Tensor, size: int, lam: float, iters: int) -> tuple[Tensor, list[float]]:
    """Y, orthonormal (r, size), for unit rows (n, r), and F after each step that was taken, the first from equal weights."""
    count = len(like)
    basis = _top(like.T @ like + _differences(like, torch.ones(count, count, dtype=like.dtype), lam), size)
    value, square, pairs = objective(like, basis, lam)
    history = [value]
    for _ in range(iters):
        spread = like.T @ (like / (square + FLOOR).sqrt()[:, None])
        if pairs is not None:
            spread = spread + _differences(like, (pairs + FLOOR).rsqrt(), lam)
        proposed = _top(spread, size)
        found, *angles = objective(like, proposed, lam)
        if found > value:
            break
        fell = value - found
        basis, value, (square, pairs) = proposed, found, angles
        history.append(value)
        if fell < 1e-10:
            break
    return basis, history


def _differences(like: Tensor, weight: Tensor, lam: float) -> Tensor:
    """lam/(n(n-1)) sum over i != j of weight_ij z_ij z_ij^T, as H^T (Laplacian of weight_ij/|x_i - x_j|^2) H."""
    count = len(like)
    if lam == 0:
        return torch.zeros(like.shape[1], like.shape[1], dtype=like.dtype)
    length = _apart(like)
    edge = torch.where(length > RANK, weight / length.clamp(min=RANK), 0.0)
    edge.fill_diagonal_(0.0)
    laplacian = torch.diag(edge.sum(1)) - edge
    return 2 * lam / (count * (count - 1)) * (like.T @ laplacian @ like)


def _apart(rows: Tensor) -> Tensor:
    """Squared distances (n, n) of rows, 0 on the diagonal."""
    return (rows[:, None, :] - rows[None, :, :]).square().sum(2)


def _top(spread: Tensor, size: int) -> Tensor:
    return torch.linalg.eigh((spread + spread.T) / 2).eigenvectors[:, -size:]
