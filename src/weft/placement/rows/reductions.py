"""Rows of reductions: sums and means, extrema, norms, scans.

A dim that is summed may be cut: a sum is owed. A mean is a sum over the whole count, whatever the sizes of the pieces. Extrema
owe a maximum. A log-sum-exp or a norm over a cut dim communicates inside its local program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.build import dims_of, normal
from weft.placement.rows.collectives import all_reduce, groups_along
from weft.placement.rows.softmax import log_sum_exp, wide_dtype, widened
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["REDUCTIONS", "reduction_links"]


def reduction_links(
    call: Call,
    reduced: Sequence[int],
    keepdim: bool,
    reduce: str | None,
    outputs: Sequence[int] = (0,),
    linear: bool = False,
) -> Row:
    """Kept dims are links; reduced dims may be cut if the pieces combine by `reduce`."""
    links = []
    for dim, size in enumerate(call.inputs[0].shape):
        if size <= 1:
            continue
        if dim in reduced:
            if reduce is not None:
                links.append(Link(f"d{dim}", (Position(0, dim),), reduce=reduce))
        else:
            target = dim if keepdim else dim - sum(r < dim for r in reduced)
            links.append(Link(f"d{dim}", (Position(0, dim),), tuple(Position(o, target) for o in outputs)))
    return Row(tuple(links), linear=((0,),) if linear else ())


def _dims(call: Call, index: int = 1, name: str = "dim") -> tuple[int, ...]:
    return dims_of(call.arg(index, name), len(call.inputs[0].shape))


def _keepdim(call: Call, index: int = 2) -> bool:
    return bool(call.arg(index, "keepdim", False)) and len(call.outputs[0].shape) == len(call.inputs[0].shape)


def sum_(call: Call) -> Row:
    """sum(x), sum(x, dim, keepdim)."""
    return reduction_links(call, _dims(call), _keepdim(call), "sum", linear=True)


def mean(call: Call) -> Row:
    """mean(x), mean(x, dim, keepdim): over a cut dim, the local sum divided by the whole count."""
    shape = call.inputs[0].shape
    reduced = _dims(call)
    keepdim = _keepdim(call)
    row = reduction_links(call, reduced, keepdim, "sum", linear=True)
    count = math.prod(shape[dim] for dim in reduced)
    dtype = call.node.kwargs.get("dtype")

    def local(here: Local) -> Callable[..., Tensor]:
        if not any(here.axes_of_input(0, dim) for dim in reduced):
            return operator(call.node.target)

        def run(x: Tensor, *_: Any, **__: Any) -> Tensor:
            made = dtype or x.dtype
            return (x.sum(reduced, keepdim, dtype=wide_dtype(made)) / count).to(made)  # sums of halves overflow

        return run

    return Row(row.links, row.linear, local=local)


def extremum(call: Call) -> Row:
    """amax, amin, and max, min over everything: a cut dim owes a maximum; max, min over a dim (with indices): other dims.

    `max(a, b)` of two tensors works element by element.
    """
    from weft.placement.rows.pointwise import pointwise

    if len(call.inputs) == 2:
        return pointwise(call)
    shape, name = call.inputs[0].shape, call.node.op
    reduce = "max" if name in ("amax", "max") else "min"
    if len(call.outputs) == 2:
        return reduction_links(
            call, (normal(call.arg(1, "dim"), len(shape)),), bool(call.arg(2, "keepdim", False)), None, (0, 1)
        )
    reduced = _dims(call)
    keepdim = _keepdim(call)
    row = reduction_links(call, reduced, keepdim, reduce)

    def local(_: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        worst = -math.inf if reduce == "max" else math.inf

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.numel() or not x.is_floating_point():
                return operate(x, *args, **kwargs)
            return x.sum(reduced, keepdim) + worst  # an empty piece never wins

        return run

    return Row(row.links, local=local)


def kept_dims(call: Call) -> Row:
    """prod, var, std, any, all, argmax, ...: every dim that is not reduced; nothing where all are."""
    dims = call.arg(1, "dim")
    if dims is None or isinstance(dims, bool):  # `var(x, unbiased)`
        return Row()
    keepdim = len(call.outputs[0].shape) == len(call.inputs[0].shape)
    return reduction_links(call, _dims(call), keepdim, None, tuple(range(len(call.outputs))))


def log_sum_exp_row(call: Call) -> Row:
    """logsumexp(x, dim, keepdim): over a cut dim, the maximum and the sum of exponentials are all-reduced."""
    reduced, keepdim = _dims(call), _keepdim(call)
    row = reduction_links(call, reduced, keepdim, None)
    small = call.outputs[0].nbytes
    inner = tuple(
        Link(f"d{dim}", (Position(0, dim),), reduced=(small, small, small))
        for dim in reduced
        if call.inputs[0].shape[dim] > 1
    )

    def local(here: Local) -> Callable[..., Tensor]:
        groups = groups_along(here, [axis for dim in reduced for axis in here.axes_of_input(0, dim)])
        if not groups:
            return operator(call.node.target)
        return lambda x, *_, **__: log_sum_exp(widened(x), reduced, keepdim, groups).to(x.dtype)

    return Row((*row.links, *inner), local=local)


def norm(call: Call) -> Row:
    """Vector norms of order p, 0 < p < inf: over a cut dim, the sums of |x|^p are all-reduced."""
    shape = call.inputs[0].shape
    order = call.arg(1, "ord" if call.node.op == "linalg_vector_norm" else "p", 2)
    order = 2 if order is None else order
    reduced = dims_of(call.arg(2, "dim"), len(shape))
    keepdim = _keepdim(call, 3)
    row = reduction_links(call, reduced, keepdim, None)
    if not isinstance(order, (int, float)) or not 0 < order < math.inf:
        return row
    small = call.outputs[0].nbytes
    inner = tuple(Link(f"d{d}", (Position(0, d),), reduced=(small, small)) for d in reduced if shape[d] > 1)

    def local(here: Local) -> Callable[..., Tensor]:
        groups = groups_along(here, [axis for dim in reduced for axis in here.axes_of_input(0, dim)])
        if not groups:
            return operator(call.node.target)
        return lambda x, *_, **__: all_reduce(x.abs().pow(order).sum(reduced, keepdim), groups).pow(1 / order)

    return Row((*row.links, *inner), local=local)


def scan(call: Call) -> Row:
    """cumsum, cumprod, cummax, sort, topk, ...: every dim but the one gone along; a cumulative sum is linear."""
    shape = call.inputs[0].shape
    index, default = {"topk": (2, -1), "kthvalue": (2, -1), "sort": (1, -1), "argsort": (1, -1), "msort": (9, 0)}.get(
        call.node.op, (1, -1)
    )
    if call.node.target.endswith(".stable"):
        index = 2
    along = call.arg(index, "dim", default)
    row = reduction_links(call, (normal(along, len(shape)),), True, None, tuple(range(len(call.outputs))))
    if call.node.op in ("kthvalue", "mode", "median") and len(call.outputs[0].shape) < len(shape):
        row = reduction_links(call, (normal(along, len(shape)),), False, None, tuple(range(len(call.outputs))))
    return Row(row.links, linear=((0,),) if call.node.op == "cumsum" else ())


def trace(call: Call) -> Row:
    """trace(x): linear; the diagonal runs through both dims, so that neither is cut."""
    return Row(linear=((0,),))


def distance(call: Call) -> Row:
    """cosine_similarity(a, b, dim), pairwise_distance(a, b): every other dim, sizes equal."""
    rank = len(call.inputs[0].shape)
    if call.inputs[0].shape != call.inputs[1].shape:
        return Row()
    reduced = (normal(call.arg(2, "dim", 1) if call.node.op == "cosine_similarity" else -1, rank),)
    keepdim = len(call.outputs[0].shape) == rank
    row = reduction_links(call, reduced, keepdim, None)
    return Row(tuple(Link(k.name, (*k.inputs, Position(1, k.inputs[0].dim)), k.outputs) for k in row.links))


REDUCTIONS: dict[str, Callable[[Call], Row]] = {
    "sum": sum_, "nansum": lambda call: Row(sum_(call).links), "mean": mean, "logsumexp": log_sum_exp_row,
    **dict.fromkeys(("amax", "amin", "max", "min"), extremum),
    **dict.fromkeys(["prod", "any", "all", "argmax", "argmin", "count_nonzero", "var", "std", "var_mean", "std_mean"], kept_dims),
    **dict.fromkeys(("norm", "linalg_vector_norm"), norm),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "kthvalue", "median", "mode"), scan
    ),
    "trace": trace, "cosine_similarity": distance, "pairwise_distance": distance,
}  # fmt: skip
