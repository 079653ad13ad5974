"""The operators' rows: what may be cut, where sums are owed, and what to run on the pieces.

    products     linear, matmul, einsum ...            views       reshape, split, cat, expand, slice ...
    pointwise    add, gelu, where, to ...              reductions  sum, mean, amax, norm, sort, cumsum ...
    attention    scaled_dot_product_attention          norms       layer_norm, batch_norm (also synchronised) ...
    softmax      softmax with its dim cut              losses      cross-entropy with batch or classes cut ...
    convolution  conv, pools, resampling               indexing    embedding, gather, scatter, index_put ...
    creation     zeros, arange ...                     chance      dropout, rand ...
    recurrent    lstm, gru                             experts     grouped products

`ROWS` is the one table: operator name (`linear`) or full target (`transformers.grouped_mm_fallback.default`) -> a function from a
`Call` to its `Row`. A new operator is one function and one entry; `weft.placement.verify` proves it, and
`tests/placement/test_rows.py` has a line of example calls for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from weft.placement.rows.attention import ATTENTION
from weft.placement.rows.chance import CHANCE
from weft.placement.rows.convolution import CONVOLUTION
from weft.placement.rows.creation import CREATION
from weft.placement.rows.experts import EXPERTS
from weft.placement.rows.indexing import INDEXING
from weft.placement.rows.losses import LOSSES
from weft.placement.rows.norms import NORMS
from weft.placement.rows.pointwise import POINTWISE, pointwise
from weft.placement.rows.products import PRODUCTS
from weft.placement.rows.recurrent import RECURRENT
from weft.placement.rows.reductions import REDUCTIONS
from weft.placement.rows.softmax import SOFTMAX
from weft.placement.rows.views import VIEWS
from weft.placement.signature import Call, Row

__all__ = ["ROWS", "row_of"]

ROWS: dict[str, Callable[[Call], Row]] = {
    **POINTWISE, **PRODUCTS, **VIEWS, **REDUCTIONS, **SOFTMAX, **NORMS, **LOSSES, **ATTENTION, **CONVOLUTION, **INDEXING,
    **CREATION, **CHANCE, **RECURRENT, **EXPERTS,
}  # fmt: skip


def row_of(call: Call) -> Row | None:
    """The row of a call, or None for an operator that has none.

    In-place operators on buffers (`add_`) have the row of their kind element by element, and nothing may be Partial. A
    row's Partial signatures are left out where an operand or a result is not of floating point.
    """
    target, name = call.node.target, call.node.op
    rule = ROWS.get(target) or ROWS.get(name)
    if rule is None and name.endswith("_") and (name[:-1] in POINTWISE or name in ("copy_", "fill_", "zero_")):
        return pointwise(call)
    if rule is None:
        return None
    return _floating(rule(call), call)


def _floating(row: Row, call: Call) -> Row:
    """The row without sums of values that are not numbers one can differentiate or add up."""

    def adds(dtype: torch.dtype) -> bool:
        return dtype.is_floating_point or dtype.is_complex

    results = all(adds(out.dtype) for out in call.outputs)
    groups = tuple(group for group in row.linear if results and all(adds(call.inputs[op].dtype) for op in group))
    no_truth = all(out.dtype != torch.bool for out in call.outputs)
    links = tuple(link for link in row.links if link.reduce is None or no_truth)
    return row if groups == row.linear and links == row.links else replace(row, links=links, linear=groups)
