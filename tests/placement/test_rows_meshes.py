"""Rows on meshes of two axes, on devices that hold nothing, and on axes cut by unequal weights."""

from __future__ import annotations

import itertools
import random

import pytest
from tests.placement.row_examples import EXAMPLES, Example

from weft.placement.layout import Mesh, Shard, local_shape
from weft.placement.rows import row_of
from weft.placement.signature import Call, Row, Signature, link_signature
from weft.placement.verify import call_of, signatures_of, verify

_COMPARABLE = [example for example in EXAMPLES if not example.random]


def row_and_call(example: Example) -> tuple[Row, Call]:
    call, _ = call_of(example.target, example.args, example.kwargs)
    row = row_of(call)
    assert row is not None
    return row, call


def _agree(a: Signature, b: Signature) -> bool:
    """Whether dims cut by both have one unit and blocks."""
    pairs = zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=True)
    both = [(x, y) for x, y in pairs if isinstance(x, Shard) and isinstance(y, Shard) and x.dim == y.dim]
    return all((x.unit, x.blocks) == (y.unit, y.blocks) for x, y in both)


def _full(call: Call, pair: tuple[Signature, Signature], mesh: Mesh) -> bool:
    """Whether every device holds something, but for leading dims: torch's operators refuse channels that are not there."""
    for i, spec in enumerate(call.inputs):
        placements = tuple(s.inputs[i] for s in pair)
        if any(0 in local_shape(spec.shape, placements, mesh, at)[1:] for at in mesh.positions()):
            return False
        if placements[0] == placements[1] and isinstance(placements[0], Shard) and spec.shape and spec.shape[0] < 4:
            return False
    return True


@pytest.mark.parametrize("mesh", [Mesh((2, 2)), Mesh((2, 2), weights=((3, 1), None))], ids=["equal", "weighted"])
@pytest.mark.parametrize("example", _COMPARABLE, ids=str)
def test_signatures_combine_on_two_axes(example, mesh):
    row, call = row_and_call(example)
    claimed = list(signatures_of(call, row, 2))
    pairs = [pair for pair in itertools.product(claimed, claimed) if _agree(*pair) and _full(call, pair, mesh)]
    chosen = random.Random(str(example)).sample(pairs, min(2, len(pairs)))
    for pair in chosen:
        verify(example.target, example.args, example.kwargs, signatures=pair, mesh=mesh, row=row)


_EXHAUSTIVE = (
    "cross_entropy_loss",
    "softmax",
    "embedding",
    "batch_norm",
    "logsumexp",
    "mean",
    "scaled_dot_product_attention",
)


@pytest.mark.slow
@pytest.mark.parametrize("example", [e for e in _COMPARABLE if e.op in _EXHAUSTIVE], ids=str)
def test_all_pairs_of_signatures_of_rows_that_communicate(example):
    row, call = row_and_call(example)
    claimed = list(signatures_of(call, row, 2))
    for mesh in (Mesh((2, 2)), Mesh((2, 3)), Mesh((2, 2), weights=(None, (1, 3)))):
        for pair in itertools.product(claimed, claimed):
            if _agree(*pair) and _full(call, pair, mesh):
                verify(example.target, example.args, example.kwargs, signatures=pair, mesh=mesh, row=row)


@pytest.mark.parametrize("example", _COMPARABLE, ids=str)
def test_devices_without_any_row(example):
    """A last batch smaller than the devices: the leading dim of the first operand over 6 of them."""
    row, call = row_and_call(example)
    mesh = Mesh((6,))
    for link in row.links:
        leading = [p for p in link.inputs if p.operand == 0 and p.dim == 0 and p.outer == 1]
        unbatched = example.op.startswith("conv") and len(call.inputs[0].shape) < len(call.inputs[1].shape)
        if leading and not unbatched and all(p.outer == 1 for p in link.outputs):
            verify(
                example.target,
                example.args,
                example.kwargs,
                signatures=[link_signature(call, row, link)],
                mesh=mesh,
                row=row,
            )
