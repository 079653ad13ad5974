"""Rows of grouped matrix products: rows of x, sorted by expert, times the weights of their expert.

    y[r] = x[r] W[e(r)],    e(r) the expert whose range of rows, given by the cumulative counts `offs`, holds r

Cut by columns of W, by the contracted dim (a sum is owed), by rows (the counts of a device's range are clipped to it), or by
experts: a device multiplies the rows of its experts, leaves zeros elsewhere, and a sum is owed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["EXPERTS"]


def grouped_product(call: Call) -> Row:
    """grouped_mm_fallback(x (s, k), weight (e, k, n), offs (e)) -> (s, n)."""
    rows, contracted = call.inputs[0].shape
    experts, _, columns = call.inputs[1].shape
    links = []
    if columns > 1:
        links.append(Link("n", (Position(1, 2),), (Position(0, 1),)))
    if contracted > 1:
        links.append(Link("k", (Position(0, 1), Position(1, 1)), reduce="sum"))
    if rows > 1:
        links.append(Link("row", (Position(0, 0),), (Position(0, 0),), contiguous=True))
    if experts > 1:
        links.append(Link("expert", (Position(1, 0),), reduce="sum", contiguous=True))

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        by_row, by_expert = here.axes_of_input(0, 0), here.axes_of_input(1, 0)
        if not by_row and not by_expert:
            return operate
        low, high = here.input_range(0, 0) if by_row else (0, rows)
        first, last = here.input_range(1, 0) if by_expert else (0, experts)
        return lambda x, weight, offs, *rest: _piece(operate, x, weight, offs, low, high, first, last, *rest)

    return Row(tuple(links), linear=((0,), (1,)), local=local)


def _piece(
    operate: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    low: int,
    high: int,
    first: int,
    last: int,
    *rest: Any,
) -> Tensor:
    """The product of the rows [low, high) that belong to the experts [first, last); zeros for the other rows."""
    ends = offs.clamp(low, high) - low
    if last <= first or high <= low:
        return x.narrow(1, 0, 0) @ weight.sum(0).narrow(0, 0, 0)  # no expert or no row here: zeros that autograd sees
    start = int(ends[first - 1]) if first else 0
    stop = int(ends[last - 1])
    mine = operate(x[start:stop], weight, (ends[first:last] - start).to(offs.dtype), *rest)
    return torch.nn.functional.pad(mine, (0, 0, start, len(x) - stop))


EXPERTS: dict[str, Callable[[Call], Row]] = {"grouped_mm_fallback": grouped_product}
