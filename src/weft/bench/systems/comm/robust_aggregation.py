"""Robust rules from the n x n Gram matrix, against the same rules on whole vectors: processor seconds and selections.

Krum, Multi-Krum, the geometric median, nearest-neighbour mixing and Flag combine n = 15 (f = 3) and n = 50 (f = 10) float32
messages of 10^6 entries, in turns with ByzFL's rules (Flag: with its literal form by singular vectors), on one thread. NNM is
timed before a trimmed mean's usual partner, the mean: ByzFL makes all n mixed vectors and then averages them. What each rule
selects is compared with a computation in float64 on the same messages.
"""

from __future__ import annotations

from collections.abc import Iterator

from weft.bench.system import Claim, Measure, Results, Row, System, value

__all__ = ["SYSTEM", "run"]

SIZES = ((15, 3), (50, 10))
RULES = ("Krum", "MultiKrum", "geometric median", "NNM", "Flag")


def faster(rule: str, count: int) -> Measure:
    """Processor seconds, baseline / weft."""

    def measure(results: Results) -> float:
        return results[f"{rule}, n = {count}", "baseline_seconds"] / results[f"{rule}, n = {count}", "weft_seconds"]

    return measure


SYSTEM = System(
    name="robust-aggregation",
    title="Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
    paper="arXiv:2302.01772",
    cite="Allouah et al., 2023",
    minutes=2,
    solves="combine the gradients of workers of whom some are faulty, at little more than the price of a mean",
    keywords=("Byzantine", "robust aggregation", "Krum", "NNM", "geometric median", "gradient exchange"),
    use=("weft.comm.rules.Krum", "weft.comm.rules.NNM", "weft.comm.rules.GeometricMedian", "weft.comm.rules.Flag"),
    baselines=("ByzFL 0.0.11", "Flag by singular vectors"),
    tests=("tests/comm/rules/test_rules.py", "tests/comm/rules/test_textbook.py", "tests/comm/test_gram.py"),
    claims=(
        *(
            Claim(f"processor seconds, baseline / weft, {rule}, n = {count}", faster(rule, count), at_least=8)
            for rule in ("Krum", "NNM", "geometric median")
            for count, _ in SIZES
        ),
        *(
            Claim(f"processor seconds, singular vectors / weft, Flag, n = {count}", faster("Flag", count), at_least=25)
            for count, _ in SIZES
        ),
        *(
            Claim(
                f"the same selection as in float64, {rule}, n = {count}",
                value("same_selection", f"{rule}, n = {count}"),
                at_least=1,
            )
            for rule in RULES
            for count, _ in SIZES
        ),
    ),
)


def run(seed: int) -> Iterator[Row]:
    from weft.bench.robust_speed import compare

    for count, faulty in SIZES:
        yield from compare(count, faulty, 1_000_000, seed)
