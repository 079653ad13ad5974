"""Row of scaled dot-product attention: split by batch, heads (grouped queries too), or query.

A device with rows [lo, hi) of the queries needs all keys; under a causal mask it needs those before hi, and row i of its piece
may see the keys up to lo + i. Keys are never cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.chance import seeded
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["ATTENTION"]


def attention(call: Call) -> Row:
    """sdpa(q (..., h, l, e), k (..., g, s, e), v (..., g, s, f), attn_mask, dropout_p, is_causal, scale, enable_gqa)."""
    q, k = call.inputs[0].shape, call.inputs[1].shape
    mask = call.operand(3, "attn_mask")
    grouped = bool(call.node.kwargs.get("enable_gqa", False))
    links = []
    for dim in range(len(q) - 2):
        head = grouped and dim == len(q) - 3
        size = k[dim] if head else q[dim]
        if size <= 1 or (not head and q[dim] != k[dim]):
            continue
        inner = q[dim] // k[dim] if head else 1
        inside = [Position(0, dim, inner=inner), Position(1, dim), Position(2, dim)]
        links.append(Link(f"d{dim}", (*inside, *_of_mask(call, mask, dim, q, inner)), (Position(0, dim, inner=inner),)))
    if q[-2] > 1:
        dim = len(q) - 2
        inside = [Position(0, dim), *_of_mask(call, mask, dim, q, 1)]
        causal = bool(call.arg(5, "is_causal", False))
        links.append(Link("query", tuple(inside), (Position(0, dim),), contiguous=causal))
    dropout = float(call.arg(4, "dropout_p", 0.0))

    def local(here: Local) -> Callable[..., Tensor]:
        run: Callable[..., Tensor] = operator(call.node.target)
        if bool(call.arg(5, "is_causal", False)) and here.axes_of_input(0, len(q) - 2):
            run = _causal_rows(run, *here.input_range(0, len(q) - 2))
        if dropout > 0:
            run = seeded(run, here.random_stream())
        return run

    return Row(tuple(links), linear=((2,),), local=local)


def _of_mask(call: Call, mask: int | None, dim: int, q: tuple[int, ...], inner: int) -> tuple[Position, ...]:
    """Where the mask has this dim of the queries; nowhere if it is broadcast there."""
    if mask is None:
        return ()
    shape = call.inputs[mask].shape
    theirs = dim - len(q) + len(shape)
    return (Position(mask, theirs, inner=inner),) if theirs >= 0 and shape[theirs] == q[dim] else ()


def _causal_rows(operate: Callable[..., Tensor], low: int, high: int) -> Callable[..., Tensor]:
    """Causal attention of the query rows [low, high) to the keys before `high`."""
    kept: dict[tuple[int, torch.device], Tensor] = {}

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        is_causal: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        keys = min(high, k.shape[-2])
        key = (keys, q.device)
        if key not in kept:
            kept[key] = torch.ones(q.shape[-2], keys, dtype=torch.bool, device=q.device).tril_(low)
        return operate(q, k[..., :keys, :], v[..., :keys, :], kept[key], dropout, False, **kwargs)

    return run


ATTENTION: dict[str, Callable[[Call], Row]] = {"scaled_dot_product_attention": attention}
