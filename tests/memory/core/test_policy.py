"""The greedy policies drop exactly what their published form drops: score every block before every drop."""

from __future__ import annotations

import random

import pytest
from tests.memory.core.synthetic import scramble, transformer

from weft.bench import step_traces
from weft.errors import BudgetError
from weft.memory.core import POLICIES, QUICK, Greedy, Window, price, simulate
from weft.memory.core import policy as policies
from weft.memory.core.arena import MOMENT


def plain(core, gaps, done, spare):
    """DTR and DTE as published."""
    assert not spare
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


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35, 0.3])
def test_dropping_ahead_searches_less_and_fits_the_same(share):
    """Thousands of small tensors. At 0.3 of the peak the step takes more than four times as long: no byte may be left unused."""
    trace = step_traces.load("BiLSTM")
    budget = trace.fixed + int(share * (trace.peak - trace.fixed))
    exact, quick = (simulate(trace, budget, policy, moves=False, log=False) for policy in ("pager", QUICK))
    assert quick.overhead <= 1.1 * exact.overhead and quick.peak <= budget
    assert quick.searches <= (0.2 if share >= 0.5 else 1.0) * exact.searches


def test_large_blocks_do_not_go_ahead():
    trace = step_traces.load("ResNet")
    budget = trace.fixed + (trace.peak - trace.fixed) // 2
    exact, quick = (simulate(trace, budget, policy, moves=False) for policy in ("pager", QUICK))
    assert quick.schedule == exact.schedule and quick.evictions == exact.evictions > 10


def test_table():
    assert [name for name, policy in POLICIES.items() if policy.partition] == [
        "coop-partition",
        "dtr-partition",
        "dte-partition",
    ]
    assert [name for name, policy in POLICIES.items() if policy.paged] == ["pager"]
    with pytest.raises(ValueError, match="a window needs addresses"):
        Window(paged=True)
