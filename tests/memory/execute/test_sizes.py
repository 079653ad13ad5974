"""Signatures: calls that take other bytes are told apart, calls that differ by an optimizer's numbers are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weft.memory import native
from weft.memory.execute.calls import take_apart
from weft.memory.execute.facts import facts_of
from weft.memory.execute.limit import limit
from weft.memory.execute.sizes import signature
from weft.memory.meters import meter

aten = torch.ops.aten


def of(func, *args, **kwargs):
    with limit("1 MiB", replay=False) as limited:
        online = limited._executor
        return signature(facts_of(func), *take_apart(args, kwargs, online.owner, online.adopt))


def test_types_and_the_default_dtype_count():
    x = torch.ones(8, dtype=torch.bool)
    found = [of(aten.add.Tensor, x, scalar) for scalar in (True, 1, 1.0)]
    assert len(set(found)) == 3 and found[1] == of(aten.add.Tensor, x, 1) != of(aten.add.Tensor, x, 2)
    torch.set_default_dtype(torch.float64)
    try:
        assert of(aten.add.Tensor, x, 1.0) != found[2]
    finally:
        torch.set_default_dtype(torch.float32)


def test_floats_of_what_writes_in_place_do_not():
    x = torch.ones(8)
    assert of(aten.mul_.Tensor, x, 0.25) == of(aten.mul_.Tensor, x, 0.75) != of(aten.mul_.Tensor, x, 1)
    few = [torch.ones(3)] * 2
    one, other = (of(aten._foreach_mul_.ScalarList, few, list(scalars)) for scalars in ((0.1, 0.2), (0.3, 0.4)))
    assert one == other


def test_integer_loops_keep_the_budget():
    if native.problem():
        pytest.skip(native.problem())
    x = torch.ones(2**14, dtype=torch.bool)
    budget = x.nbytes + 3 * 8 * x.numel()
    with limit(budget, replay=False) as limited, meter() as seen:
        seen.count(x, "input")
        limited.count(x)
        for _ in range(3):
            made = [x + True, x + 1, x + 1.0, x + True, x * 1, x * 1.0]
        assert limited._executor.core.evictions
    assert seen.peak <= budget and [t.dtype for t in made[:3]] == [torch.bool, torch.int64, torch.float32]


def test_embeddings_that_renormalise_keep_the_budget_in_their_first_step():
    if native.problem():
        pytest.skip(native.problem())
    torch.manual_seed(0)
    table, x = nn.Embedding(100, 16, max_norm=1.0), torch.randint(100, (4000,))
    expected = table.weight.detach().clone()
    torch.embedding_renorm_(expected, x, 1.0, 2.0)
    budget = table.weight.nbytes + x.nbytes + 4000 * 64 + 40_000  # and room to sort the tokens, not twice
    with limit(budget, model=table, replay=False) as limited, meter(table) as seen:
        seen.count(x, "input")
        limited.count(x)
        before = [torch.zeros(2000) + n for n in range(33)]  # must give way
        with torch.no_grad():
            y = table(x)
    assert seen.peak <= budget, f"{seen.peak - budget:,} bytes too many"
    assert torch.equal(table.weight, expected) and torch.equal(y, expected[x])
    assert all(torch.equal(one, torch.zeros(2000) + n) for n, one in enumerate(before))
