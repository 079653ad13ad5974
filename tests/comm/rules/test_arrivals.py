"""Weights of results that come when they come."""

from __future__ import annotations

import pytest
import torch

from weft.comm.combine import Arrival, Info
from weft.comm.rules.arrivals import Equal, Polynomial, Unbiased

FAST, SLOW = Arrival(0, weight=0.25, share=1.0), Arrival(1, staleness=3, weight=0.75, share=0.2)


def info(*arrivals: Arrival) -> Info:
    return Info(len(arrivals), arrivals=arrivals)


def test_the_formulas():
    assert Unbiased().weights(info(FAST, SLOW)).tolist() == [0.25, 0.75 / 0.2]
    assert Equal(0.1).weights(info(FAST, SLOW)).tolist() == [0.1, 0.1]
    assert Polynomial(0.6, 0.5).weights(info(FAST, SLOW)).tolist() == pytest.approx([0.6, 0.3])


@pytest.mark.parametrize("rule", [Unbiased(), Equal(0.1), Polynomial()])
def test_a_weight_does_not_depend_on_who_else_has_come(rule):
    """Weights that add up to one in each round are biased."""
    together = rule.weights(info(FAST, SLOW))
    alone = torch.cat([rule.weights(info(FAST)), rule.weights(info(SLOW))])
    assert together.dtype == torch.float64
    assert torch.equal(together, alone)


@pytest.mark.parametrize("rule", [Unbiased(), Equal(), Polynomial()])
def test_messages_without_arrivals_are_refused(rule):
    with pytest.raises(ValueError, match="one arrival per message"):
        rule.weights(Info(2))
    with pytest.raises(ValueError, match="one arrival per message"):
        rule.weights(Info(0))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Unbiased().weights(info(Arrival(4, share=0.0))), "share of worker 4 must be in"),
        (lambda: Equal(0), "each must be > 0"),
        (lambda: Polynomial(alpha=1.5), "alpha must be in"),
        (lambda: Polynomial(exponent=-1), "exponent must be >= 0"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ValueError, match=says):
        make()
