"""Grouped products of a mixture of experts: rows, columns, the contracted dim, and experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.placement.row_examples import r

from weft.placement.layout import Mesh
from weft.placement.rows import row_of
from weft.placement.verify import call_of, signatures_of, verify

TARGET = "transformers.grouped_mm_fallback.default"


@pytest.fixture(autouse=True)
def _operator():
    pytest.importorskip("transformers.integrations.moe", reason="registers the operator")


@pytest.mark.parametrize("ends", [[3, 3, 7, 11], [0, 11, 11, 11], [2, 5, 8, 11], [0, 0, 0, 11]])
def test_grouped_product_is_true(ends):
    args = (r(11, 6), r(4, 6, 5), torch.tensor(ends, dtype=torch.int32))
    call, _ = call_of(TARGET, args)
    row = row_of(call)
    assert {link.name for link in row.links} == {"n", "k", "row", "expert"}
    for mesh in (Mesh((2,)), Mesh((3,)), Mesh((2,), weights=((3, 1),)), Mesh((6,))):
        for signature in signatures_of(call, row, 1, coarse=False):
            verify(TARGET, args, signatures=[signature], mesh=mesh, row=row)
    pairs = itertools.product(signatures_of(call, row, 2, coarse=False), repeat=2)
    for pair in pairs:
        verify(TARGET, args, signatures=pair, mesh=Mesh((2, 2)), row=row)
