"""Bytes of blocks: where they lie, that they move whole, and that nobody is overwritten."""

from __future__ import annotations

import pytest
import torch

from weft.memory import native
from weft.memory.core import Block
from weft.memory.execute.backends import Copy, Count, Native, Owner, shown, tie
from weft.memory.meters import meter
from weft.memory.private import storage_of

CPU = torch.device("cpu")


def made(backend, offset, value, n=64):
    """A tensor of n floats that lies at an address, as an operator would have made it."""
    block = Block(4 * n)
    block.offset = offset
    tensor = backend.run([(4 * n, offset)], (-1, 0), torch.full, ((n,), float(value)), {})
    tie(OWNER, storage_of(tensor), block, "activation")
    backend.born(block, storage_of(tensor))
    backend.bound()
    return tensor, block


OWNER = Owner()


@pytest.fixture(params=["copy", "native"])
def backend(request):
    if request.param == "native" and native.problem():
        pytest.skip(native.problem())
    OWNER.executor = type("Nobody", (), {"died": lambda self, hold: None})()
    return Copy(4096, CPU) if request.param == "copy" else Native(4096)


def base(backend):
    return backend.base if isinstance(backend, Copy) else backend.arena.address


def test_outputs_lie_where_they_belong(backend):
    a, _ = made(backend, 1024, 1)
    b, _ = made(backend, 0, 2)
    assert a.data_ptr() - base(backend) == 1024 and b.data_ptr() == base(backend)
    assert a.tolist() == [1.0] * 64 and b.tolist() == [2.0] * 64


def test_dropped_and_brought_back_elsewhere(backend):
    a, block = made(backend, 1024, 1)
    view = a[10:20]
    backend.drop(block)
    assert a[5:].shape == (59,)  # views of it can still be taken
    other, _ = made(backend, 1024, 5)  # the place is free again
    block.offset = 2048
    again = backend.run([(256, 2048)], (-1, 0), torch.full, ((64,), 1.0), {})
    backend.back(block, storage_of(again))
    backend.bound()
    assert a.data_ptr() - base(backend) == 2048 and view.tolist() == [1.0] * 10 and other.tolist() == [5.0] * 64


@pytest.mark.parametrize("target", [1088, 960, 2048])  # overlapping to both sides, and not
def test_moves_are_whole(backend, target):
    a, block = made(backend, 1024, 0)
    a.copy_(torch.arange(64.0))
    block.offset = target
    backend.move(block)
    assert a.data_ptr() - base(backend) == target and a.tolist() == list(range(64))


def test_nobody_is_overwritten(backend):
    a, _ = made(backend, 1024, 1)
    b, _ = made(backend, 1088, 2)  # against the plan: a is still there
    assert a.tolist() == [1.0] * 64 and b.tolist() == [2.0] * 64


def test_a_move_overwrites_nobody(backend):
    a, _ = made(backend, 1024, 1)
    b, block = made(backend, 2048, 2)
    block.offset = 960  # against the plan: a is still there, the user's loss perhaps
    backend.move(block)
    c, _ = made(backend, 2048, 3)  # b is still there, too
    assert a.tolist() == [1.0] * 64 and b.tolist() == [2.0] * 64 and c.tolist() == [3.0] * 64
    assert b.data_ptr() - base(backend) == 2048
    block.offset = 0
    backend.move(block)
    assert b.data_ptr() == base(backend) and b.tolist() == [2.0] * 64


def test_nothing_lies_twice_where_blocks_come_back_or_move():
    """A budget is bytes alive: whoever puts bytes where they belong must not take as many again."""
    if native.problem():
        pytest.skip(native.problem())
    OWNER.executor = type("Nobody", (), {"died": lambda self, hold: None})()
    backend = Native(4096)
    a, block = made(backend, 1024, 1)
    b, other = made(backend, 2048, 2)
    backend.drop(block)
    with meter() as counter:
        counter.count(b, "input")
        again = backend.run(
            [(256, 512)], (-1, 0), torch.full, ((64,), 1.0), {}
        )  # there, where it comes to lie elsewhere
        block.offset = 1024
        backend.back(block, storage_of(again))
        backend.bound()
        other.offset = 1024  # against the plan: a is there
        backend.move(other)
        assert not backend.leave(storage_of(b), room=255)
        assert counter.peak == counter.live == 512
    assert a.data_ptr() - base(backend) == 1024 and a.tolist() == [1.0] * 64 and b.tolist() == [2.0] * 64


def test_what_leaves_outlives_the_arena(backend):
    a, _ = made(backend, 1024, 1)
    backend.leave(storage_of(a))
    assert not base(backend) <= a.data_ptr() < base(backend) + 4096
    backend.close()
    assert a.tolist() == [1.0] * 64


def test_counting_needs_no_place():
    backend, block = Count(), Block(256)
    block.payload = storage_of(torch.ones(64))
    assert shown(block).nbytes() == 256
    backend.drop(block)
    assert block.payload is None


def test_outputs_allocated_in_another_order_are_put_right():
    if native.problem():
        pytest.skip(native.problem())
    OWNER.executor = type("Nobody", (), {"died": lambda self, hold: None})()
    backend = Native(4096)

    def three():
        made = [torch.full((64,), value) for value in (3.0, 1.0, 2.0)]
        return made[1], made[2], made[0]

    outputs = backend.run([(256, 0), (256, 512), (256, 1024)], (-1, 0), three, (), {})
    for tensor, offset in zip(outputs, (0, 512, 1024), strict=True):
        block = Block(256)
        block.offset = offset
        tie(OWNER, storage_of(tensor), block, "activation")
        backend.born(block, storage_of(tensor))
    with meter() as counter:
        backend.bound()
        assert counter.peak == 0
    assert [t.data_ptr() - backend.arena.address for t in outputs] == [0, 512, 1024]
    assert [t.tolist() for t in outputs] == [[value] * 64 for value in (1.0, 2.0, 3.0)]
