"""Pieces of a tensor: they partition it, in proportion to the weights, in whole units out of every block."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.placement.layout import (
    Mesh,
    Partial,
    Replicate,
    Shard,
    deal,
    dual,
    intervals,
    local_shape,
    parse,
    take,
)

weights = st.lists(st.floats(0.1, 10), min_size=1, max_size=5)


@given(count=st.integers(0, 200), weights=weights)
def test_deal_is_exact_and_proportional(count, weights):
    dealt = deal(count, len(weights), weights)
    assert sum(dealt) == count
    for got, weight in zip(dealt, weights, strict=True):
        assert abs(got - count * weight / sum(weights)) < 1


@given(count=st.integers(0, 200), parts=st.integers(1, 9))
def test_equal_deal_differs_by_at_most_one_and_the_first_get_more(count, parts):
    dealt = deal(count, parts)
    assert sum(dealt) == count and max(dealt) - min(dealt) <= 1 and list(dealt) == sorted(dealt, reverse=True)


@given(
    units=st.integers(1, 12),
    unit=st.integers(1, 4),
    blocks=st.integers(1, 3),
    outer=st.integers(1, 4),
    inner=st.integers(1, 3),
    nested=st.booleans(),
)
def test_pieces_partition_the_dim(units, unit, blocks, outer, inner, nested):
    size, mesh = units * unit * blocks, Mesh((outer, inner))
    cut = Shard(0, None, unit, blocks)
    placements = (cut, cut if nested else Replicate())
    seen: list[int] = []
    for position in mesh.positions():
        held = intervals(size, 0, placements, mesh, position)
        indices = list(itertools.chain(*(range(*ends) for ends in held)))
        assert (len(indices),) == local_shape((size,), placements, mesh, position)
        assert torch.equal(
            take(torch.arange(size), placements, mesh, position), torch.tensor(indices, dtype=torch.int64)
        )
        assert len(indices) % (unit * blocks) == 0
        if nested or position[1] == 0:
            seen += indices
    assert sorted(seen) == list(range(size))


def test_weights_are_the_meshs_unless_the_shard_has_its_own():
    mesh = Mesh((2,), weights=((3, 1),))
    assert local_shape((8,), (Shard(0),), mesh, (0,)) == (6,)
    assert local_shape((8,), (Shard(0, (1, 1)),), mesh, (0,)) == (4,)


def test_blocks_cut_each_of_a_fused_projection():
    # 3 blocks of 2 heads of 4: the second of two devices holds head 1 of q, of k and of v
    assert intervals(24, 0, (Shard(0, None, 4, 3),), Mesh((2,)), (1,)) == [(4, 8), (12, 16), (20, 24)]


@pytest.mark.parametrize("text", ["R", "P", "P(max)", "S(0)", "S(1,3/1,u8,x3)", "S(2,u4)"])
def test_placements_print_and_parse(text):
    assert str(parse(text)) == text


def test_dual_swaps_replicate_and_partial():
    assert dual(Replicate()) == Partial() and dual(Partial()) == Replicate() and dual(Shard(1)) == Shard(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Shard(-1), "dim must be >= 0, got -1"),
        (lambda: Shard(0, (0, 0)), "sum to more than 0"),
        (lambda: Shard(0, (1, -1)), "weights must be >= 0"),
        (lambda: Shard(0, unit=0), "unit and blocks must be >= 1"),
        (lambda: Partial("mean"), "must be sum, max, min or avg, got 'mean'"),
        (lambda: Mesh((0,)), "at least one device"),
        (lambda: Mesh((2,), weights=((1, 2, 3),)), "axis 'x0' has 2 devices and weights"),
        (lambda: Mesh((2,), ranks=(0, 0)), "2 different ranks"),
        (lambda: deal(4, 2, (1, 1, 1)), "for 3 devices, but the mesh axis has 2"),
        (lambda: parse("S"), "not a placement: 'S'"),
        (lambda: intervals(10, 0, (Shard(0, None, 3),), Mesh((2,)), (0,)), "must divide it"),
        (lambda: local_shape((4,), (Shard(1),), Mesh((2,)), (0,)), "shard a dim that shape (4,) lacks"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError) as raised:
        make()
    assert words in str(raised.value)


def test_mesh_knows_its_lines():
    mesh = Mesh((2, 3), ranks=(5, 4, 3, 2, 1, 0))
    assert mesh.coordinates(3) == (0, 2) and mesh.at((1, 0)) == 2
    assert mesh.group(0, 4) == (4, 1) and mesh.group(1, 4) == (5, 4, 3)
    assert mesh.lines((1,)) == [(5, 4, 3), (2, 1, 0)] and mesh.lines((0,)) == [(5, 2), (4, 1), (3, 0)]
    assert mesh.lines((0, 1)) == [mesh.ranks] and mesh.lines(()) == [(rank,) for rank in mesh.ranks]
