"""Rules by Gram matrix and on whole vectors, in turns: what `robust-aggregation` measures.

Messages are gradients of workers with unlike data, in size and angle: a common part, a part of each worker's own, and f of them
far off. The selections are judged by distances in float64 of the same float32 messages; `flag_by_svd` is the literal form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from weft.bench.byzfl_rules import load
from weft.bench.system import Row
from weft.bench.turns import least
from weft.comm.combine import Combine, Info
from weft.comm.gram import gram
from weft.comm.rules import NNM, Flag, GeometricMedian, Krum, Meamed, Mean, Median, MultiKrum, NearestToOwn, TrimmedMean

__all__ = ["combine_rows", "compare", "flag_by_svd", "messages"]

ENOUGH = 4.0  # CPU seconds of a round, of both: what takes longer is measured once


def messages(count: int, faulty: int, length: int, seed: int) -> Tensor:
    """(n, d) float32: a common gradient, workers' own parts of 0.5 to 1.5 times its size, the last f ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(length, generator=generator)
    found = torch.randn(count, length, generator=generator)
    found *= torch.linspace(0.5, 1.5, count)[torch.randperm(count, generator=generator)][:, None]
    found += common
    found[count - faulty :] *= -10
    return found


def flag_by_svd(stack: Tensor, size: int, iters: int = 5) -> Tensor:
    """Flag with scale "norm" as its paper writes it: singular vectors of d x n matrices."""
    norms = stack.norm(dim=1)
    unit = (stack / norms[:, None]).T.contiguous()

    def top(weight: Tensor) -> tuple[Tensor, Tensor]:
        basis = torch.linalg.svd(unit * weight.sqrt(), full_matrices=False).U[:, :size]
        return basis, (1 - (basis.T @ unit).square().sum(0)).clamp(min=0)

    basis, square = top(torch.ones_like(norms))
    for _ in range(iters):
        new, found = top((square + 1e-7).rsqrt())
        gain = float(square.sqrt().sum() - found.sqrt().sum())
        if gain < 0:
            break
        basis, square = new, found
        if gain < 1e-10:
            break
    return basis @ (basis.T @ unit.mean(1)) * norms.quantile(0.5)


def compare(count: int, faulty: int, length: int, seed: int) -> Iterator[Row]:
    """One row a rule: seconds of both, and whether weft's float32 weights are those of float64."""
    byzfl = load()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _rows(byzfl, count, faulty, messages(count, faulty, length, seed))
    finally:
        torch.set_num_threads(before)


def combine_rows(seed: int) -> Iterator[Row]:
    """MoNNA's combination of n vectors of 10^6 entries at one peer, and ByzFL's."""
    byzfl = load()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count, faulty in ((15, 3), (50, 10)):
            stack = messages(count, faulty, 1_000_000, seed)
            rule, theirs = NearestToOwn(faulty), byzfl.MoNNA(faulty, idx=0)
            rule(stack, 0)
            rivals: dict[str, Any] = {"weft": lambda r=rule, s=stack: r(s, 0), "byzfl": lambda r=theirs, s=stack: r(s)}
            best, _ = least(rivals, 5, ENOUGH)
            yield Row(f"combine, n = {count}", weft_seconds=best["weft"], byzfl_seconds=best["byzfl"])
    finally:
        torch.set_num_threads(before)


def _rows(byzfl: Any, count: int, faulty: int, stack: Tensor) -> Iterator[Row]:
    size = (count + 2) // 2
    nnm, mean = byzfl.NNM(faulty), byzfl.Average()
    exact = torch.zeros(count, count, dtype=torch.float64)
    for part in stack.split(65536, 1):  # the definition, in float64
        exact += part.double() @ part.double().T
    fast = gram(stack)
    by_weights: dict[str, tuple[Combine, Callable[[], Any]]] = {
        "Krum": (Krum(faulty, spare=1), lambda: byzfl.Krum(faulty)(stack)),
        "MultiKrum": (MultiKrum(faulty, spare=1), lambda: byzfl.MultiKrum(faulty)(stack)),
        "geometric median": (
            GeometricMedian(3, 0.1, "zero"),
            lambda: byzfl.GeometricMedian()(stack),
        ),
        "NNM": (NNM(faulty, Mean()), lambda: mean(nnm(stack))),
        "Flag": (Flag(), lambda: flag_by_svd(stack, size)),
    }
    for name, (rule, baseline) in by_weights.items():
        print(f"{name}, n = {count}", file=sys.stderr)
        ours = rule.weights(Info(count, fast))
        truth = rule.weights(Info(count, exact))
        picks = name in ("Krum", "MultiKrum", "NNM")  # weights that are counts of selections: equal or not
        same = torch.equal(ours, truth) if picks else torch.allclose(ours, truth, rtol=1e-3, atol=1e-6)
        if isinstance(rule, NNM):
            same = torch.equal(rule.mix(fast, faulty), rule.mix(exact, faulty))
        rule(stack)
        found, made = least({"weft": lambda r=rule: r(stack), "baseline": baseline}, 3, ENOUGH)
        gap = float((made["weft"] - made["baseline"]).norm() / made["baseline"].norm())
        yield Row(
            f"{name}, n = {count}",
            weft_seconds=found["weft"],
            baseline_seconds=found["baseline"],
            ratio=found["baseline"] / found["weft"],
            same_selection=float(same),
            relative_gap=gap,
        )
    entries: dict[str, tuple[Combine, Callable[[], Any]]] = {
        "median": (Median(), lambda: byzfl.Median()(stack)),
        "trimmed mean": (TrimmedMean(faulty), lambda: byzfl.TrMean(faulty)(stack)),
        "Meamed": (Meamed(faulty), lambda: byzfl.Meamed(faulty)(stack)),
        "mean": (Mean(), lambda: mean(stack)),
    }
    for name, (rule, baseline) in entries.items():
        print(f"{name}, n = {count}", file=sys.stderr)
        found, _ = least({"weft": lambda r=rule: r(stack), "baseline": baseline}, 2, ENOUGH)
        yield Row(
            f"{name}, n = {count}",
            weft_seconds=found["weft"],
            baseline_seconds=found["baseline"],
            ratio=found["baseline"] / found["weft"],
        )
