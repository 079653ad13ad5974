"""What a rebuild would cost: union-find against the exact neighbourhood on small graphs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.memory.core.blocks import Block, Gone, Step, found, lost, missing_steps, price, rebuildable


def graph(seed, length):
    """Random steps of one or two outputs; each reads up to three earlier blocks."""
    rng, blocks, steps = random.Random(seed), [], []
    for order in range(length):
        reads = rng.sample(blocks, min(len(blocks), rng.randint(0, 3)))
        step = Step(reads, 0, float(rng.randint(1, 9)), True, (), order)
        steps.append(step)
        blocks += [Block(8, step.seconds, step) for _ in range(rng.choice([1, 1, 2]))]
    return blocks, steps


def drop(block):
    block.resident = False
    lost(block.step)


def gone(step, blocks):
    return any(b.step is step and not b.resident for b in blocks)


def components(steps, blocks):
    """Sets of steps with outputs that are gone, joined where one reads what is gone of another."""
    left = [step for step in steps if gone(step, blocks)]
    edges = {(a, b.step) for a in left for b in a.reads if not b.resident}
    found_sets = []
    while left:
        new, border = set(), [left[0]]
        while border:
            step = border.pop()
            if step not in new:
                new.add(step)
                border += [b if a is step else a for a, b in edges if step in (a, b)]
        left = [step for step in left if step not in new]
        found_sets.append(new)
    return found_sets


def exact(block, steps, blocks):
    """Its own step and every component that its inputs or the other outputs of its step belong to."""
    beside = {block.step} | {read.step for read in block.step.reads if not read.resident}
    touched = {block.step}.union(*[c for c in components(steps, blocks) if c & beside])
    return sum(step.seconds for step in touched)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.floats(0, 1))
def test_price_is_exact_when_blocks_go_in_program_order(seed, length, share):
    blocks, steps = graph(seed, length)
    rng = random.Random(seed)
    for block in blocks:
        if rng.random() < share:
            drop(block)
    for block in blocks:
        if block.resident:
            assert price(block) == exact(block, steps, blocks)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.floats(0, 1))
def test_price_lies_between_the_own_cost_and_the_neighbourhood(seed, length, share):
    """In any order of drops: whoever goes after the block that was made from it is not joined to it."""
    blocks, steps = graph(seed, length)
    rng = random.Random(seed)
    for block in rng.sample(blocks, len(blocks)):
        if rng.random() < share:
            drop(block)
    for block in blocks:
        if block.resident:
            assert block.step.seconds <= price(block) <= exact(block, steps, blocks)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_prices_come_down_when_steps_run_again(seed, length):
    """Splits are approximate, but never below a step's own cost; with everything back each block costs its own step."""
    blocks, steps = graph(seed, length)
    rng = random.Random(seed)
    for _ in range(3):
        for block in rng.sample(blocks, len(blocks)):
            if rng.random() < 0.6 and block.resident:
                drop(block)
        missing = [block for block in blocks if not block.resident]
        for step in missing_steps(missing):
            assert all(read.resident for read in step.reads), "in the order of the program every input is there in time"
            for block in blocks:
                if block.step is step:
                    block.resident = True
            found(step)
            for block in blocks:
                if block.resident:
                    assert price(block) >= block.step.seconds * (1 - 1e-9)
        assert all(price(block) == block.step.seconds and block.resident for block in blocks)
        assert not any(gone(step, blocks) for step in steps)


def test_two_outputs_of_a_step_are_not_counted_twice():
    step = Step([], 0, 5.0, True, (), 0)
    y, stats = Block(8, 5.0, step), Block(8, 5.0, step)
    drop(stats)
    assert price(y) == 5.0
    drop(y)
    z = Step([y, stats], 0, 1.0, True, (), 1)
    assert price(Block(8, 1.0, z)) == 6.0


def test_a_step_that_has_run_again_leaves_its_component():
    blocks = []
    for order, seconds in enumerate((1.0, 2.0, 4.0)):
        blocks.append(Block(8, seconds, Step(blocks[-1:], 0, seconds, True, (), order)))
    a, b, c = blocks
    drop(a), drop(b)
    assert price(c) == 7.0
    a.resident = True
    found(a.step)
    assert price(c) == 6.0


def test_what_is_gone_for_good():
    leaf = Block(8)
    a = Block(8, 1.0, Step([leaf], 0, 1.0, True, (), 0))
    b = Block(8, 1.0, Step([a], 0, 1.0, True, (), 1))
    drop(a)
    assert rebuildable(b, ()) and not rebuildable(b, {leaf}) and not rebuildable(leaf, ())
    b.resident = False
    assert [step.order for step in missing_steps([b])] == [0, 1]
    leaf.resident = False
    assert not rebuildable(b, ())
    assert missing_steps([leaf, b][2:]) == []
    with pytest.raises(Gone) as caught:
        missing_steps([leaf])
    assert caught.value.args == (leaf,)
