"""Every row is true: whole operators against their pieces, forward and backward."""

from __future__ import annotations

import pytest
from tests.placement.row_examples import ELEMENTWISE, EXAMPLES, Example

from weft.placement.layout import Mesh
from weft.placement.rows import ROWS, row_of
from weft.placement.verify import call_of, signatures_of, verify

MESHES = (Mesh((2,)), Mesh((3,)), Mesh((2,), weights=((3, 1),)))


def row_and_call(example: Example):
    call, _ = call_of(example.target, example.args, example.kwargs)
    row = row_of(call)
    assert row is not None, f"{example.target} has no row"
    return row, call


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e.random], ids=str)
def test_row_is_true(example):
    row, call = row_and_call(example)
    for mesh in MESHES:
        for signature in signatures_of(call, row, mesh.shape[0], mesh.weights[0], coarse=mesh is MESHES[0]):
            verify(example.target, example.args, example.kwargs, signatures=[signature], mesh=mesh, row=row)


@pytest.mark.parametrize("example", ELEMENTWISE, ids=str)
def test_elementwise_row_is_true(example):
    row, call = row_and_call(example)
    for signature in signatures_of(call, row, 3, coarse=False):
        verify(example.target, example.args, example.kwargs, signatures=[signature], mesh=MESHES[1], row=row)


def test_every_row_has_an_example():
    shown = {example.op for example in (*EXAMPLES, *ELEMENTWISE)}
    names = {name if "." not in name else name.split(".")[1] for name in ROWS}
    assert names - shown <= {"grouped_mm_fallback"}, "add an example call of these to row_examples.py"
