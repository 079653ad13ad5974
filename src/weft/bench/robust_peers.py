"""Peers without a server on the digits, all rules and seeds side by side: what `monna` measures accuracy with.

Every honest peer has parameters, momentum and data of its own. A round, as in the authors' code: momentum, half step, every peer
gets all attackers' vectors and those of n - 2f - 1 random honest others (the first n - f with its own), combines, goes on.

    vectors   A (rule, seed, side, n, d): what is sent to receivers of even and of odd number (two-faced attackers)
    a rule    the received set as a mask (rule, seed, h, n), distances to the own vector -> weights W, result W @ A      `MIXES`
              or entry by entry on the gathered vectors: trimmed mean, median, Bulyan                              `ENTRYWISE`

The rules are those of weft.comm.rules for many receivers at once; `check_rules` holds them against ByzFL's own. Krum counts
neighbours as ByzFL's does (`spare = 1`). Bulyan needs 4f + 3 vectors: of the n - f = 12 that come at f = 3 it has too few.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.bench.byzfl_rules import load
from weft.bench.robust import LENGTH, Digits, accuracy, gradients, side_by_side, start
from weft.bench.system import Row
from weft.comm.attacks import Attack, DataAttack, InnerProduct, LabelFlip, LittleIsEnough, Mimic, SignFlip, TwoFaced
from weft.comm.rules import sorting

__all__ = ["ATTACKS", "ENTRYWISE", "MIXES", "Peers", "check_rules", "peer_rows", "rules_for", "trimmed"]

ATTACKS: dict[str, Attack | DataAttack] = {
    "sign flip x 10": SignFlip(10.0),
    "inner product": InnerProduct(0.1),
    "little is enough": LittleIsEnough(),
    "little is enough, z = 1.5": LittleIsEnough(1.5),
    "label flip": LabelFlip(),
    "mimic": Mimic(),
    "two-faced": TwoFaced(),
}
STEPS = 300
SEEDS = 3


def average(square: Tensor, got: Tensor, inner: Tensor, f: int) -> Tensor:
    """The mean of all that was received."""
    return got / got.sum(-1, keepdim=True)


def nearest_to_own(square: Tensor, got: Tensor, inner: Tensor, f: int) -> Tensor:
    """MoNNA: the received vectors nearest to the own one, f fewer than there are."""
    keep = int(got[..., 0, :].sum(-1).flatten()[0]) - f
    away = torch.where(got > 0, square, torch.inf)
    away.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    near = away.sort(dim=-1, stable=True).indices[..., :keep]
    return torch.zeros_like(got).scatter_(-1, near, 1.0 / keep)


def self_centred_clipping(square: Tensor, got: Tensor, inner: Tensor, f: int) -> Tensor:
    """own + mean of the differences, clipped to the distance of the farthest that MoNNA would keep."""
    count = got.sum(-1, keepdim=True)
    away = torch.where(got > 0, square, torch.inf).sqrt()
    radius = away.sort(-1).values[..., int(count.flatten()[0]) - f - 1 :][..., :1]
    share = got * torch.where(away <= radius, 1.0, radius / away) / count
    own = torch.eye(share.shape[-2], share.shape[-1], dtype=share.dtype)
    return share + own * (1.0 - share.sum(-1, keepdim=True))


def geometric_median(square: Tensor, got: Tensor, inner: Tensor, f: int) -> Tensor:
    """RFA: Weiszfeld from the mean, eight steps, as weights; `inner` are all inner products."""
    weight = got / got.sum(-1, keepdim=True)
    size = inner.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    for _ in range(8):
        image = weight @ inner
        away = (size - 2 * image + (weight * image).sum(-1, keepdim=True)).clamp(min=1e-12).sqrt()
        pull = got / away
        weight = pull / pull.sum(-1, keepdim=True)
    return weight


def _krum_order(inner: Tensor, got: Tensor, neighbours: int) -> Tensor:
    """Numbers (seed, h, n) from best to worst Krum score among what each peer has got; what it has not comes last."""
    size = inner.diagonal(dim1=-2, dim2=-1)
    square = (size[:, :, None] + size[:, None, :] - 2 * inner).clamp(min=0)[:, None]  # (seed, 1, n, n)
    here = got > 0
    away = torch.where(here[..., None, :], square, torch.inf)
    total = torch.where(here, torch.where(here[..., None, :], square, 0.0).sum(-1), torch.inf)
    away.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    score = torch.where(here, away.sort(-1).values[..., :neighbours].sum(-1), torch.inf)
    second = total.sort(dim=-1, stable=True).indices  # ties go to the one nearer to all, then to the first
    return second.gather(-1, score.gather(-1, second).sort(dim=-1, stable=True).indices)


def _received_count(got: Tensor) -> int:
    return int(got[..., 0, :].sum(-1).flatten()[0])


def krum(square: Tensor, got: Tensor, inner: Tensor, f: int) -> Tensor:
    """The one received vector with the most others close by."""
    best = _krum_order(inner, got, _received_count(got) - f - 1)[..., :1]
    return torch.zeros_like(got).scatter_(-1, best, 1.0)


def multi_krum(square: Tensor, got: Tensor, inner: Tensor, f: int) -> Tensor:
    """The mean of those of least Krum score, f fewer than there are."""
    count = _received_count(got)
    best = _krum_order(inner, got, count - f - 1)[..., : count - f]
    return torch.zeros_like(got).scatter_(-1, best, 1.0 / (count - f))


Mix = Callable[[Tensor, Tensor, Tensor, int], Tensor]
MIXES: dict[str, Mix] = {
    "averaging": average,
    "monna": nearest_to_own,
    "monna_beta_0": nearest_to_own,
    "self_centred_clipping": self_centred_clipping,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
}


def everybody(inner: Tensor, got: Tensor, f: int) -> Tensor:
    """Numbers (seed, h, q) of all that was received."""
    return got.sort(dim=-1, descending=True, stable=True).indices[..., : _received_count(got)]


def by_krum(inner: Tensor, got: Tensor, f: int) -> Tensor:
    """Bulyan's choice of 2f fewer, one by one by Krum with scores made anew each time."""
    left, count, picked = got.clone(), _received_count(got), []
    for taken in range(count - 2 * f):
        best = _krum_order(inner, left, max(count - taken - f - 2, 1))[..., :1]
        picked.append(best)
        left.scatter_(-1, best, 0.0)
    return torch.cat(picked, -1).sort(-1).values


def trimmed(stack: Tensor, drop: int) -> Tensor:
    """Entry by entry the mean of (q, ...) without the `drop` smallest and largest."""
    return sorting.trimmed_mean(stack.flatten(1), drop).view_as(stack[0])


def median(stack: Tensor, f: int) -> Tensor:
    """Entry by entry the median of (q, ...)."""
    return sorting.median(stack.flatten(1)).view_as(stack[0])


def near_median(stack: Tensor, f: int) -> Tensor:
    """Entry by entry the mean of (q, ...) without the 2f farthest from the median."""
    return sorting.mean_near_median(stack.flatten(1), 2 * f).view_as(stack[0])


Choice = Callable[[Tensor, Tensor, int], Tensor]
ENTRYWISE: dict[str, tuple[Choice, Callable[[Tensor, int], Tensor]]] = {  # which of the received, what is made of them
    "trimmed_mean": (everybody, trimmed),
    "median": (everybody, median),
    "bulyan": (by_krum, near_median),
}


def rules_for(f: int, workers: int = 15) -> list[str]:
    """The rules that n - f received vectors are enough for."""
    return [rule for rule in (*MIXES, *ENTRYWISE) if rule != "bulyan" or workers - f >= 4 * f + 3]


@dataclass(frozen=True)
class Peers:
    """Training among peers; attributes as in `weft.bench.robust.Server`, beta as in MoNNA."""

    workers: int = 15
    steps: int = STEPS
    batch: int = 16
    rate: float = 1.0
    beta: float = 0.99
    alpha: float = 1.0
    seeds: Sequence[int] = (0, 1, 2)

    def run(
        self, rules: Sequence[str], f: int, attack: Attack | DataAttack | None
    ) -> dict[str, list[tuple[float, float]]]:
        """(mean, worst) test accuracy over the honest peers, by rule, for each seed."""
        n, count = self.workers, len(rules)
        worlds = [Digits.shared_out(n, self.alpha, seed) for seed in self.seeds]
        batches = torch.stack([w.batches(self.steps, self.batch, s) for w, s in zip(worlds, self.seeds, strict=True)])
        generator = torch.Generator().manual_seed(17)
        active = n - f if isinstance(attack, Attack) else n  # those that train: all, if the fault is in the data
        honest = n - f
        theta = torch.stack([start(s) for s in self.seeds])[None, :, None].repeat(count, 1, active, 1)
        momentum = torch.zeros_like(theta)
        beta = torch.tensor([0.0 if rule == "monna_beta_0" else self.beta for rule in rules]).view(count, 1, 1, 1)
        for step in range(self.steps):
            picked = batches[:, step, :active]
            x = torch.stack([w.x[i] for w, i in zip(worlds, picked, strict=True)])
            y = torch.stack([w.y[i] for w, i in zip(worlds, picked, strict=True)])
            if isinstance(attack, DataAttack):
                x[:, honest:], y[:, honest:] = attack.corrupt(x[:, honest:], y[:, honest:], 10, generator)
            x = x.expand(count, *x.shape).reshape(-1, 1, self.batch, 64)
            y = y.expand(count, *y.shape).reshape(-1, 1, self.batch)
            found = gradients(theta.view(-1, LENGTH), x, y).view_as(theta)
            momentum = beta * momentum + (1 - beta) * found
            half = theta - self.rate / (1 + step / self.steps) * momentum
            theta = self._exchange(half, rules, f, attack, generator)
        return {
            rule: [
                (float(right.mean()), float(right.min()))
                for right in (accuracy(theta[r, s, :honest], world) for s, world in enumerate(worlds))
            ]
            for r, rule in enumerate(rules)
        }

    def _exchange(
        self, half: Tensor, rules: Sequence[str], f: int, attack: Attack | DataAttack | None, generator: torch.Generator
    ) -> Tensor:
        active = half.shape[2]
        got = self._received(len(self.seeds), active, f, generator)
        result = torch.empty_like(half)
        for r, rule in enumerate(rules):
            # a rival whose vectors overflow is lost for good: it goes on with what can be represented
            sent = torch.nan_to_num(half[r], 0.0, 1e15, -1e15).clamp_(-1e15, 1e15)
            sides, two = [sent], isinstance(attack, TwoFaced)
            if isinstance(attack, Attack):
                sides = [
                    torch.stack([torch.cat([v, attack.messages(v, f, generator, side)]) for v in sent])
                    for side in ((0, 1) if two else (0,))
                ]
            for side in (0, 1) if two else (0,):
                receivers = slice(side, None, 2) if two else slice(None)
                result[r, :, receivers] = self._combine(rule, sides[side], got, f, receivers)
        return result

    def _combine(self, rule: str, vectors: Tensor, got: Tensor, f: int, receivers: slice = slice(None)) -> Tensor:
        """(seed, receivers, d) from what all were sent, (seed, n, d), and who got what, (seed, active, n)."""
        active = got.shape[1]
        centred = vectors - vectors[:, :1]  # inner products about one of them: distances lose no digits
        inner = (centred @ centred.transpose(-1, -2)).double()
        if rule in ENTRYWISE:
            choose, combine = ENTRYWISE[rule]
            members = choose(inner, got, f)[:, receivers]
            return torch.stack([combine(v[m.T], f) for v, m in zip(vectors, members, strict=True)])
        size = inner.diagonal(dim1=-2, dim2=-1)
        square = (size[:, :, None] + size[:, None, :] - 2 * inner).clamp(min=0)
        weights = MIXES[rule](square[:, :active], got, inner, f)[:, receivers]
        return weights.float() @ vectors

    def _received(self, repeat: int, active: int, f: int, generator: torch.Generator) -> Tensor:
        """Masks (seed, active, n), float64: own, all faulty ones, random honest others, n - f in all."""
        n = self.workers
        draw = torch.rand(repeat, active, n, generator=generator)
        draw[..., n - f :] = -1.0
        draw.diagonal(dim1=1, dim2=2).fill_(-2.0)
        first = draw.sort(dim=-1).indices[..., : n - f]
        return torch.zeros(repeat, active, n, dtype=torch.float64).scatter_(-1, first, 1.0)


def check_rules(f: int = 2, count: int = 13) -> float:
    """The largest relative difference between the rules here and ByzFL's (float64) on random vectors."""
    import numpy as np

    byzfl = load()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, count, 50, generator=generator)
    got = torch.ones(1, count, count, dtype=torch.float64)
    peers = Peers(workers=count, seeds=(0,))
    worst = 0.0
    for own in (0, 5):
        for rule, theirs in (
            ("averaging", byzfl.Average()),
            ("monna", byzfl.MoNNA(f, idx=own)),
            ("trimmed_mean", byzfl.TrMean(f)),
            ("geometric_median", byzfl.GeometricMedian(nu=1e-6, T=200)),
            ("krum", byzfl.Krum(f)),
            ("multi_krum", byzfl.MultiKrum(f)),
            ("median", byzfl.Median()),
        ):
            ours = peers._combine(rule, x, got, f)[0, own]
            expected = torch.from_numpy(np.asarray(theirs(x[0].double().numpy()))).float()
            tolerance = 0.02 if rule == "geometric_median" else 1.0  # eight steps against convergence
            worst = max(worst, tolerance * float((ours - expected).norm() / expected.norm()))
    return worst


def peer_rows(seed: int, steps: int = STEPS) -> Iterator[Row]:
    """One row a setting: mean accuracy over peers and seeds, its standard error, and the worst honest peer's, by rule."""
    print(f"peer rules against ByzFL's: relative difference {check_rules():.1e}", file=sys.stderr)
    settings = []
    for alpha, counts in ((1.0, (0, 1, 2, 3)), (5.0, (0, 2))):
        for f in counts:
            chosen: dict[str, Any] = ATTACKS if f else {"no attack": None}
            for name, attack in chosen.items():
                if "z = " in name and f != 2:
                    continue  # a stronger attack than the numbers of workers hide: once is enough
                settings.append((seed, steps, alpha, f, name, attack))
    for row in side_by_side(_measured, settings):
        print(row.method, {k: round(v, 3) for k, v in row.values.items() if "_" not in k[-6:]}, file=sys.stderr)
        yield row


def _measured(seed: int, steps: int, alpha: float, f: int, name: str, attack: Attack | DataAttack | None) -> Row:
    seeds = tuple(range(SEEDS * seed, SEEDS * (seed + 1)))
    found = Peers(alpha=alpha, steps=steps, seeds=seeds).run(rules_for(f), f, attack)
    return _row(f"{name}, f = {f}, alpha = {alpha:g}", found)


def _row(setting: str, found: dict[str, list[tuple[float, float]]]) -> Row:
    values = {}
    for rule, runs in found.items():
        means = [mean for mean, _ in runs]
        values[rule] = statistics.mean(means)
        values[f"{rule}_error"] = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        values[f"{rule}_worst_peer"] = min(worst for _, worst in runs)
    return Row(setting, **values)
