"""Rows and local programs of softmax and what is built on it, with the class dim cut.

Problem    y = softmax(x) and the log-sum-exp of x over classes that are spread over devices.
Method     with m the maximum over all devices (a constant shift), and S the all-reduced sum:
               s   = S(sum_c exp(x_c - m)),  lse = log s + m                                    `log_sum_exp`
               y_c = exp(x_c - lse),  dx_c = y_c (dy_c - S(sum_c y_c dy_c))                     `split_softmax`
               log y_c = x_c - lse,   dx_c = dy_c - y_c S(sum_c dy_c)                           `split_log_softmax`
Guarantee  each backward is the adjoint over all devices, whatever share of the cotangent each device holds; two numbers per row
           travel forward, one backward, in place of all classes.
Source     the sharded softmax of OneFlow (arXiv:2110.15032, section 6) and Megatron-LM (arXiv:1909.08053).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.build import normal
from weft.placement.rows.collectives import all_max, groups_along, plain_sum
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["SOFTMAX", "log_sum_exp", "plain_log_sum_exp", "split_log_softmax", "split_softmax", "wide_dtype", "widened"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for types half as wide, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is half as wide: sums need the digits, and autocast does the same."""
    return x.to(wide_dtype(x.dtype))


def plain_log_sum_exp(x: Tensor, dims: Sequence[int], groups: Sequence[Any]) -> Tensor:
    """log sum exp over `dims` and over the devices of all groups, dims kept, not recorded by autograd."""
    x = x.detach()
    empty = any(x.shape[dim] == 0 for dim in dims)
    kept = [1 if dim in dims else n for dim, n in enumerate(x.shape)]
    top = x.new_full(kept, -math.inf) if empty else x.amax(dims, keepdim=True)
    top = all_max(top, groups)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))  # a row that is masked everywhere
    return plain_sum((x - top).exp_().sum(dims, keepdim=True), groups).log_().add_(top)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: Sequence[int], groups: Sequence[Any]) -> Tensor:
        lse = plain_log_sum_exp(x, dims, groups)
        ctx.save_for_backward(x, lse)
        ctx.groups = groups
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lse = ctx.saved_tensors
        return (x - lse).exp_().mul_(plain_sum(grad, ctx.groups)), None, None


def log_sum_exp(x: Tensor, dims: Sequence[int], keepdim: bool, groups: Sequence[Any]) -> Tensor:
    """log sum exp over `dims`, which are cut over the devices of all groups; the result is the same on each."""
    lse = _LogSumExp.apply(x, tuple(dims), groups)
    return lse if keepdim else lse.reshape([n for dim, n in enumerate(lse.shape) if dim not in dims])


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, groups: Sequence[Any]) -> Tensor:
        y = (x - plain_log_sum_exp(x, (dim,), groups)).exp_()
        ctx.save_for_backward(y)
        ctx.dim, ctx.groups = dim, groups
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        weighted = y * grad
        return weighted - y * plain_sum(weighted.sum(ctx.dim, keepdim=True), ctx.groups), None, None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, groups: Sequence[Any]) -> Tensor:
        y = x - plain_log_sum_exp(x, (dim,), groups)
        ctx.save_for_backward(y)
        ctx.dim, ctx.groups = dim, groups
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return grad - y.exp() * plain_sum(grad.sum(ctx.dim, keepdim=True), ctx.groups), None, None


def split_softmax(x: Tensor, dim: int, groups: Sequence[Any]) -> Tensor:
    """The local piece of softmax(x, dim), with `dim` cut over the devices of all groups."""
    return _Softmax.apply(x, dim, groups)


def split_log_softmax(x: Tensor, dim: int, groups: Sequence[Any]) -> Tensor:
    """The local piece of log_softmax(x, dim), with `dim` cut over the devices of all groups."""
    return _LogSoftmax.apply(x, dim, groups)


def softmax(call: Call) -> Row:
    """softmax(x, dim), log_softmax(x, dim): every dim; a cut `dim` communicates."""
    shape = call.inputs[0].shape
    along = normal(call.arg(1, "dim"), len(shape))
    row_bytes = call.outputs[0].nbytes // max(shape[along], 1) if shape else 0
    links = tuple(
        Link(f"d{dim}", (Position(0, dim),), (Position(0, dim),), reduced=(row_bytes,) * 3 if dim == along else ())
        for dim, size in enumerate(shape)
        if size > 1
    )
    split = split_log_softmax if "log" in call.node.op else split_softmax
    dtype = call.arg(2, "dtype")
    dtype = dtype if isinstance(dtype, torch.dtype) else None

    def local(here: Local) -> Callable[..., Tensor]:
        groups = groups_along(here, here.axes_of_input(0, along))
        if not groups:
            return operator(call.node.target)

        def run(x: Tensor, *_: Any, **__: Any) -> Tensor:
            x = x if dtype is None else x.to(dtype)
            y = split(widened(x), along, groups)
            return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

        return run

    return Row(links, local=local)


SOFTMAX: dict[str, Callable[[Call], Row]] = dict.fromkeys(
    ("softmax", "_softmax", "log_softmax", "_log_softmax", "special_log_softmax", "special_softmax"), softmax
)
