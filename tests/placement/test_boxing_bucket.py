"""Bucketed boxings: the values and gradients of single ones, the same bytes, one collective instead of many."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.placement.whole import random_pieces

from weft.placement.boxing import compile_boxing
from weft.placement.boxing_bucket import box_together
from weft.placement.comms import Comms, run_threads
from weft.placement.layout import Mesh, Partial, Replicate, Shard

R, P, AVG = Replicate(), Partial(), Partial("avg")
KINDS = (Shard(0), Shard(1), Shard(1, unit=2, blocks=3), R, P, AVG)
SHAPES = ((7, 6), (1, 12), (5, 6, 3))


@pytest.mark.parametrize("together", [False, True], ids=["singly", "together"])
def test_buckets_give_what_single_boxings_give(together):
    mesh = Mesh((3,), weights=((1, 2, 3),))
    cases = [((a,), (b,), shape) for a, b in itertools.product(KINDS, KINDS) for shape in SHAPES]

    def program(comms: Comms):
        xs = [random_pieces(src, mesh, shape, seed=7)[comms.rank].requires_grad_() for src, _, shape in cases]
        boxings = [compile_boxing(src, dst, shape, comms) for src, dst, shape in cases]
        expected = [boxing(x) for x, boxing in zip(xs, boxings, strict=True)]
        (sum((y.sin() * (comms.rank + 1)).sum() for y in expected)).backward()
        gradients = [x.grad.clone() for x in xs]
        alone = comms.sent.total()
        for x in xs:
            x.grad = None
        calls = comms.group(0)._tag
        ys = box_together(xs, boxings) if together else [boxing(x) for x, boxing in zip(xs, boxings, strict=True)]
        calls = comms.group(0)._tag - calls
        (sum((y.sin() * (comms.rank + 1)).sum() for y in ys)).backward()
        torch.testing.assert_close(ys, expected)
        torch.testing.assert_close([x.grad for x in xs], gradients)
        assert comms.sent.total() == 2 * alone
        return calls

    (calls, *_) = run_threads(mesh, program)
    assert calls < 30 if together else calls > 50  # all-to-alls stay single


def test_an_unused_output_has_a_zero_gradient():
    def program(comms: Comms) -> bool:
        boxings = [compile_boxing((P,), (R,), (4,), comms)] * 2
        x, y = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
        box_together([x, y], boxings)[1].sum().backward()
        return bool((x.grad == 0).all() and (y.grad == 2).all())

    assert all(run_threads(2, program))
