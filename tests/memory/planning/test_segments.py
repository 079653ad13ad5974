from __future__ import annotations

import pytest
from tests.memory.planning.test_retention import judged
from tests.memory.planning.traces import chain, random_step, training

from weft.memory.planning.retention import Retention
from weft.memory.planning.segments import checkpoint
from weft.memory.planning.shape import Shape


@pytest.mark.parametrize("layers", [64, 256])
def test_a_chain_needs_about_the_root_of_its_length_and_one_more_forward_pass(layers):
    trace = chain(layers, nbytes=100)
    plan = Retention(Shape(trace))
    checkpoint(plan, 0, 1)
    assert plan.peaks().max() <= 100 * (2 * layers**0.5 + 6) < trace.peak / 2
    assert 0.5 * layers <= plan.seconds <= layers  # each layer once more at most
    judged(trace, plan)


def test_as_few_checkpoints_as_the_budget_needs_are_cheapest():
    trace = chain(64, nbytes=100)
    plan = Retention(Shape(trace))
    checkpoint(plan, int(0.7 * trace.peak), 1)
    assert plan.peaks().max() <= 0.7 * trace.peak and plan.seconds < 40


@pytest.mark.parametrize("seed", range(15))
def test_any_step_gets_a_valid_plan(seed):
    for trace in (random_step(seed, ops=30), training(seed)):
        plan = Retention(Shape(trace))
        checkpoint(plan, int(0.5 * trace.peak), 1)
        judged(trace, plan)
