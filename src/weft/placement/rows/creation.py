"""Rows of operators that make tensors from nothing, or from another's shape: any dim may be cut, with the local sizes put in.

`zeros_like(x)` follows x. `new_zeros(x, sizes)` and the like use x for its dtype only: x may be placed anyhow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.layout import Partial, Replicate
from weft.placement.rows.build import broadcast
from weft.placement.signature import Call, Link, Local, Position, Row, Signature

__all__ = ["CREATION"]


def sized(call: Call) -> Row:
    """zeros, ones, empty, full (size, ...), and eye's kin: the size is the first list among the arguments."""
    links = _free(call)

    def local(here: Local) -> Callable[..., Tensor]:
        operate, shape = operator(call.node.target), list(here.output_shape())
        return lambda size, *args, **kwargs: operate(shape, *args, **kwargs)

    return Row(links, local=local)


def _free(call: Call) -> tuple[Link, ...]:
    """Every dim of the result, tied to nothing."""
    shape = call.outputs[0].shape
    return tuple(Link(f"d{dim}", (), (Position(0, dim),)) for dim, size in enumerate(shape) if size > 1)


def new(call: Call) -> Row:
    """new_zeros(x, size), new_ones, new_empty, new_full(x, size, value)."""
    ignored = tuple(Link(f"x{dim}", (Position(0, dim),)) for dim, size in enumerate(call.inputs[0].shape) if size > 1)
    owed = Signature((Partial(), *(Replicate() for _ in call.inputs[1:])), (Replicate(),))

    def local(here: Local) -> Callable[..., Tensor]:
        operate, shape = operator(call.node.target), list(here.output_shape())
        return lambda x, size, *args, **kwargs: operate(x, shape, *args, **kwargs)

    floating = call.inputs[0].dtype.is_floating_point
    return Row((*_free(call), *ignored), extra=(owed,) if floating else (), local=local)


def like(call: Call) -> Row:
    """zeros_like, ones_like, empty_like, full_like."""
    owed = Signature((Partial(), *(Replicate() for _ in call.inputs[1:])), (Replicate(),))
    floating = call.inputs[0].dtype.is_floating_point
    return Row(broadcast(call, (0,)), extra=(owed,) if floating else ())


def in_order(call: Call) -> Row:
    """arange, linspace, eye, hann_window ...: a device makes the whole and keeps its range (vectors, rows)."""

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        cut = [dim for dim in range(len(call.outputs[0].shape)) if here.axes_of_output(0, dim)]
        if not cut:
            return operate
        ranges = {dim: here.output_range(0, dim) for dim in cut}

        def run(*args: Any, **kwargs: Any) -> Tensor:
            made = operate(*args, **kwargs)
            for dim, (low, high) in ranges.items():
                made = made.narrow(dim, low, high - low)
            return made

        return run

    links = (Link(link.name, (), link.outputs, contiguous=True) for link in _free(call))
    return Row(tuple(links), local=local)


def constant(call: Call) -> Row:
    """scalar_tensor, lift of a number: nothing to cut."""
    del call
    return Row()


CREATION: dict[str, Callable[[Call], Row]] = {
    **dict.fromkeys(("zeros", "ones", "empty", "full"), sized),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), new),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), like),
    **dict.fromkeys(("arange", "linspace", "logspace", "eye", "hann_window", "tril_indices", "triu_indices"), in_order),
    "scalar_tensor": constant,
}  # fmt: skip
