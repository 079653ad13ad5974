"""What nothing can make again is held exactly while something that is gone would be made from it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.errors import BudgetError
from weft.memory.core.blocks import Block, Step, rebuildable
from weft.memory.execute.backends import Hold
from weft.memory.execute.leaves import is_soft
from weft.memory.execute.limit import Limit, limit
from weft.memory.private import alone, storage_of

SIZE = 1 << 10  # elements
NBYTES = 8 * SIZE


def program(seed: int, length: int = 80) -> list[tuple[Any, ...]]:
    """Random instructions on numbered tensors: operators of one and two inputs, of two outputs, in place, ones that cannot be
    repeated (they read `whole`, which is lent), tensors that die, and blocks that are dropped at once."""
    draw, names, made, found = random.Random(seed), [0, 1], 2, []
    for _ in range(length):
        kind = draw.choices(("one", "two", "both", "write", "leaf", "del", "drop"), (3, 4, 2, 3, 3, 9, 4))[0]
        one, two = draw.choice(names), draw.choice(names)
        if kind in ("one", "two", "leaf"):
            found.append((kind, one, two, made))
            names.append(made)
            made += 1
        elif kind == "both":
            found.append((kind, one, made, made + 1))
            names += [made, made + 1]
            made += 2
        elif kind == "del" and len(names) > 2:
            names.remove(one)
            found.append((kind, one))
        elif kind in ("write", "drop"):
            found.append((kind, one, two))
    return found


def do(line: tuple[Any, ...], there: dict[int, Tensor], whole: Tensor) -> None:
    """One instruction."""
    match line:
        case ("one", a, _, out):
            there[out] = there[a].sin()
        case ("two", a, b, out):
            there[out] = there[a] - there[b]
        case ("leaf", a, _, out):
            there[out] = there[a] * whole
        case ("both", a, out, other):
            there[out], there[other] = torch.frexp(there[a])[0], there[a] + 1
        case ("write", a, b):
            there[a].add_(there[b])
        case ("del", a):
            del there[a]


def whole_and_inputs() -> tuple[Tensor, dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(SIZE, dtype=torch.float64, generator=generator)
    return draw(), {0: draw(), 1: draw()}


def drop(manager: Limit, tensor: Tensor) -> None:
    """What the policy may do at any time."""
    online: Any = manager._executor
    hold = online.hold_of(tensor)
    if hold is not None and hold.block.resident and hold.block.evictable and not hold.block.pins:
        online._at_work(lambda: online.core.evict(hold.block))


def check(manager: Limit) -> int:
    """The books against demand worked out from nothing; how many blocks are held."""
    online: Any = manager._executor
    leaves = online.leaves
    missed = {hold.block for hold in online.owner.holds.values() if not hold.block.resident}
    assert all(rebuildable(block, ()) for block in missed)
    wants: dict[Block, int] = {block: 1 for block in missed if is_soft(block)}
    due: set[Step] = set()
    there: set[Block] = set()
    stack = list(wants)
    while stack:
        block = stack.pop()
        if type(block.payload) is Hold and block.resident:
            there.add(block)
        elif block.step not in due:
            assert block.step is not None, "wanted, and gone for good"
            due.add(block.step)
            for read in filter(is_soft, block.step.reads):
                if read not in wants:
                    stack.append(read)
                wants[read] = wants.get(read, 0) + 1
    assert leaves.wants == wants
    assert set(leaves.due) == due
    assert set(leaves.held) == there
    assert all(storage is block.payload() for block, storage in leaves.held.items())
    assert not leaves.loose and not online._gone and not online.core._doomed
    for hold in online.owner.holds.values():  # nothing else lives longer than the program wants it
        assert not alone(hold()) or hold.block in there or hold.block in missed or hold.kind != "activation"
    return len(there)


@pytest.mark.parametrize("tensors", [22, 40])
def test_held_is_what_brute_force_says(tensors: int) -> None:
    held = repeats = refused = 0
    for seed in range(25):
        lines = program(seed)
        whole, want = whole_and_inputs()
        for line in lines:
            do(line, want, whole)
        whole, there = whole_and_inputs()
        manager = limit(tensors * NBYTES, replay=False)
        try:
            with manager:
                manager._executor.adopt(whole).fickle = True
                for line in lines:
                    if line[0] == "drop":
                        drop(manager, there[line[1]])
                    else:
                        do(line, there, whole)
                    held = max(held, check(manager))
                repeats += manager._executor.core.repeats
                manager._executor.rest()
                check(manager)
                assert not manager._executor.leaves.wants
        except BudgetError:
            refused += 1
            continue
        assert want.keys() == there.keys()
        assert all(torch.equal(there[name], want[name]) for name in want), seed
    assert held > 2 and repeats > 10 and refused < 15


def test_a_leaf_dies_with_its_last_user_unless_something_needs_it() -> None:
    whole, there = whole_and_inputs()
    with limit("1 MiB", replay=False) as manager:
        manager._executor.adopt(whole).fickle = True
        online: Any = manager._executor
        used = lambda: online.core.arena.used // NBYTES
        leaf = there[0] * whole
        first, second = leaf.sin(), leaf.cos()
        want = first.clone()
        before = used()
        drop(manager, first)
        assert used() == before - 1
        del leaf  # dropping `first` has saved nothing but what it would cost to keep both
        assert used() == before - 1 and check(manager) == 1
        assert torch.equal(first, want) and check(manager) == 0
        assert used() == before - 1, "the leaf is gone, since all that was made from it is there"
        for made in (first, second):
            drop(manager, made)
            assert storage_of(made).data_ptr(), "it could not come back"
        assert used() == before - 1


def test_a_chain_of_leaves_holds_nothing_of_its_past() -> None:
    """As backward under ZeRO-3: each gradient is made with a gathered weight from the one before it."""
    whole, there = whole_and_inputs()
    with limit("1 MiB", replay=False) as manager:
        manager._executor.adopt(whole).fickle = True
        online: Any = manager._executor
        gradient, most = there[0], 0
        for _ in range(20):
            gradient = (gradient * whole).sin()
            gradient = gradient + there[1]
            most = max(most, online.core.arena.used // NBYTES)
        assert most <= 4  # whole, two inputs and one gradient
