"""The greedy policies drop exactly what their published form drops: score every block before every drop."""

from __future__ import annotations

import random

import pytest
from tests.memory.core.synthetic import scramble, transformer

from weft.errors import BudgetError
from weft.memory.core import POLICIES, Greedy, Window, price, simulate
from weft.memory.core import policy as policies
from weft.memory.core.arena import MOMENT


def plain(core, gaps, done):
    """DTR and DTE as published."""
    while True:
        scored = []
        for number, block in enumerate(core.arena.blocks()):
            if block.evictable and not block.pins:
                size = block.room + (core.arena.beside(block) if gaps else 0)
                scored.append((price(block) / (((core.clock - block.last) or MOMENT) * size), number, block))
        if not scored:
            return False
        core.candidates += len(scored)
        if core.evict(min(scored)[2]) and done():
            return True


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if isinstance(policy, Greedy)])
def test_greedy_is_the_published_method(name, monkeypatch):
    """Costs are drawn at random, so that no two scores are equal: the same schedules, and as many candidates."""
    compared = 0
    for seed in range(18):
        trace = transformer(2 + seed % 4, 1 << 13, seed % 2 == 0) if seed < 14 else scramble(seed, 40)
        rng = random.Random(seed)
        ops = tuple(
            type(op)(**{**{f: getattr(op, f) for f in op.__slots__}, "seconds": rng.random() + 0.01})
            for op in trace.ops
        )
        trace = type(trace)(ops, trace.values)
        for share in (0.95, 0.85, 0.7, 0.55):
            results = []
            for drop in (policies.drop_greedily, plain):
                with monkeypatch.context() as patch:
                    patch.setattr(policies, "drop_greedily", drop)
                    try:
                        results.append(
                            simulate(
                                trace, trace.fixed + int((trace.peak - trace.fixed) * share), name, moves=False, small=0
                            )
                        )
                    except BudgetError:
                        results.append(None)
            ours, theirs = results
            assert (ours is None) == (theirs is None)
            if ours is not None:
                compared += ours.evictions
                assert ours.schedule == theirs.schedule
                assert ours.candidates == theirs.candidates
                assert ours.scored <= ours.candidates + 1
    assert compared > 200


def test_table():
    assert [name for name, policy in POLICIES.items() if policy.partition] == [
        "coop-partition",
        "dtr-partition",
        "dte-partition",
    ]
    assert [name for name, policy in POLICIES.items() if policy.paged] == ["pager"]
    with pytest.raises(ValueError, match="a window needs addresses"):
        Window(paged=True)
