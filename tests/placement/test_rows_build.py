"""The tools rows are written with: the einsum-like line, and the common factors of two shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.placement.row_examples import i, r

from weft.placement.layout import Mesh
from weft.placement.rows import row_of
from weft.placement.rows.build import axes
from weft.placement.rows.views import common_factors
from weft.placement.signature import Position
from weft.placement.verify import call_of, signatures_of, verify


def linear_call(x, weight, bias):
    return call_of("aten.linear.default", (x, weight, bias))[0]


def test_line_gives_links_and_added_operands():
    call = linear_call(r(5, 3, 6), r(7, 6), r(7))
    row = axes("...k, nk, +n -> ...n", call, (0, 1, 2), linear=((0,), (1,)))
    found = {link.name: (link.inputs, link.outputs, link.reduce) for link in row.links}
    assert found == {
        "-2": ((Position(0, 0),), (Position(0, 0),), None),
        "-1": ((Position(0, 1),), (Position(0, 1),), None),
        "k": ((Position(0, 2), Position(1, 1)), (), "sum"),
        "n": ((Position(1, 0), Position(2, 0)), (Position(0, 2),), None),
    }
    assert row.added == (2,) and row.linear == ((0,), (1,))


def test_marked_letters_are_not_cut():
    row = axes("...k!, nk, +n -> ...n", linear_call(r(5, 6), r(7, 6), r(7)), (0, 1, 2))
    assert {link.name for link in row.links} == {"-1", "n"}


def test_a_line_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"row 'k, nk, \+n -> n': term 'k' does not fit a tensor of rank 2"):
        axes("k, nk, +n -> n", linear_call(r(5, 6), r(7, 6), r(7)), (0, 1, 2))


def test_fused_heads_factor_as_named_dims():
    assert common_factors((5, 3, 12), (5, 3, 4, 3)) == [
        (5, Position(0, 0), Position(0, 0)),
        (3, Position(0, 1), Position(0, 1)),
        (4, Position(0, 2, inner=3), Position(0, 2)),
        (3, Position(0, 2, outer=4), Position(0, 3)),
    ]


def test_shapes_without_common_factors_share_nothing_there():
    assert common_factors((2, 3), (3, 2)) == []
    assert common_factors((5, 2, 3, 7), (5, 3, 2, 7)) == [
        (5, Position(0, 0), Position(0, 0)),
        (7, Position(0, 3), Position(0, 3)),
    ]


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(source=shapes, data=st.data())
def test_factors_of_reshapes_are_the_same_elements(source, data):
    """Cutting a factor on one side cuts the same elements on the other."""
    total = math.prod(source)
    target, rest = [], total
    while rest > 1:
        size = data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
        target.append(size)
        rest //= size
    target.insert(0, 1)
    x = torch.arange(total)
    for size, there, here in common_factors(source, target):
        for index in range(size):
            ours = _entries(x.reshape(source), there, size, index)
            theirs = _entries(x.reshape(target), here, size, index)
            assert torch.equal(ours, theirs)


def _entries(x: torch.Tensor, at: Position, size: int, index: int) -> torch.Tensor:
    assert x.shape[at.dim] == at.outer * size * at.inner
    return x.unflatten(at.dim, (at.outer, size, at.inner)).select(at.dim + 1, index).flatten()


def test_partial_sums_are_only_of_numbers():
    """Integers may be counted, but no truth value or index is a term of a sum."""
    call, _ = call_of("aten.add.Tensor", (i(9, 5), i(9, 5)))
    assert row_of(call).linear == ()
    call, _ = call_of("aten.index_select.default", (r(5, 3) > 0, 0, i(5, 4)))
    assert all(link.reduce is None for link in row_of(call).links)


def test_half_precision_means_and_norms_do_not_overflow():
    """The sum over 70000 entries of 1.5 is beyond float16; the mean is not."""
    from weft.placement.verify import run_pieces

    x = torch.full((70000,), 1.5, dtype=torch.float16)
    call, _ = call_of("aten.mean.default", (x,))
    (signature, *_) = signatures_of(call, row_of(call), 2)
    _, (out,) = run_pieces("aten.mean.default", (x,), signatures=[signature], mesh=Mesh((2,)))
    assert sum(out.values()).item() == pytest.approx(1.5, rel=1e-2) and out[0,].dtype == torch.float16


@pytest.mark.parametrize("batch, classes", [(1, 2), (1, 7), (3, 2), (3, 7)])
def test_split_cross_entropy_of_few_rows_or_classes(batch, classes):
    args = (r(batch, classes), i(classes, batch))
    call, _ = call_of("aten.cross_entropy_loss.default", args)
    row = row_of(call)
    for signature in signatures_of(call, row, 2, coarse=False):
        verify("aten.cross_entropy_loss.default", args, signatures=[signature], mesh=Mesh((2,)), row=row)


def test_split_softmax_of_rows_masked_everywhere_in_one_piece():
    x = r(5, 8)
    x[:, :4] = -math.inf
    for target in ("aten.softmax.int", "aten.logsumexp.default"):
        args = (x, 1) if "softmax" in target else (x, [1])
        call, _ = call_of(target, args)
        row = row_of(call)
        for signature in signatures_of(call, row, 2, coarse=False):
            verify(target, args, signatures=[signature], mesh=Mesh((2,)), row=row)
