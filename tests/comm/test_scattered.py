"""The rule on segments is the rule on whole vectors, on every rank to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from weft.comm.rules import NNM, Bulyan, Flag, GeometricMedian, Krum, Mean, Median, NearestToOwn, TrimmedMean
from weft.comm.scattered import scattered

RULES = {
    2: (Mean(), GeometricMedian(), Median()),
    4: (Mean(), Krum(0), TrimmedMean(1), NNM(1, TrimmedMean(1)), Flag(), Bulyan(0), GeometricMedian()),
}


def vectors(ranks, length, broken):
    x = torch.randn(ranks, length, generator=torch.Generator().manual_seed(0)) + 1
    if broken:
        x[1, length // 2] = torch.nan
    return x


def both(length, broken):
    warnings.simplefilter("ignore")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    stack = vectors(ranks, length, broken)
    rules = [r for r in RULES[ranks] if not (broken and isinstance(r, (Mean, Flag)))]
    for rule in rules:
        torch.testing.assert_close(scattered(stack[rank], rule), rule(stack), rtol=1e-4, atol=1e-5)
    return [scattered(stack[rank], rule) for rule in rules]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("length, broken", [(1, False), (1001, False), (1000, True)])
def test_equals_the_rule_in_one_place(pool, ranks, length, broken):
    if length == 1 and ranks == 4:
        length = 3  # fewer entries than ranks
    found = pool(ranks).run(both, length, broken)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def refused():
    with pytest.raises(ValueError, match="flat"):
        scattered(torch.zeros(2, 2), Mean())
    with pytest.raises(ValueError, match="own"):
        scattered(torch.zeros(4), NearestToOwn(0))
    with pytest.raises(ValueError, match="none of the 2"):
        scattered(torch.full((4,), torch.nan), GeometricMedian())
    with pytest.raises(ValueError, match="none of the 2"):
        scattered(torch.full((4,), torch.nan), Median())


def test_refusals_on_every_rank(pool):
    pool(2).run(refused)
