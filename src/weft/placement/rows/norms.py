"""Rows of normalisations.

layer_norm, rms_norm     every dim but the normalised ones
group_norm               batch, and whole groups of channels
batch_norm (training)    channels; batch and pixels only synchronised: their sums are all-reduced inside the local program
batch_norm (evaluation)  everything: a fixed scale and shift per channel
weight_norm              the dim that keeps its own length: v (.., k, ..) and g (1, .., k, .., 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.collectives import all_reduce, groups_along
from weft.placement.rows.softmax import widened
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["NORMS"]


def layer_norm(call: Call) -> Row:
    """layer_norm(x, normalized_shape, weight, bias, eps), rms_norm(x, normalized_shape, weight, eps)."""
    shape = call.inputs[0].shape
    leading = len(shape) - len(call.arg(1, "normalized_shape"))
    return Row(tuple(Link(f"d{d}", (Position(0, d),), (Position(0, d),)) for d in range(leading) if shape[d] > 1))


def native_layer_norm(call: Call) -> Row:
    """The same with mean and reciprocal deviation as further outputs, which keep the leading dims."""
    row = layer_norm(call)
    outputs = [k for k, out in enumerate(call.outputs) if len(out.shape) == len(call.inputs[0].shape)]
    return Row(tuple(Link(k.name, k.inputs, tuple(Position(o, k.inputs[0].dim) for o in outputs)) for k in row.links))


def group_norm(call: Call) -> Row:
    """group_norm(x (n, c, ...), num_groups, weight (c), bias (c)): a device with some of the groups runs on those."""
    shape = call.inputs[0].shape
    groups = call.arg(1, "num_groups")
    size = shape[1] // groups
    per_channel = tuple(Position(op, 0, inner=size) for op in range(1, len(call.inputs)))
    links = []
    if shape[0] > 1:
        links.append(Link("n", (Position(0, 0),), (Position(0, 0),)))
    if groups > 1:
        links.append(Link("group", (Position(0, 1, inner=size), *per_channel), (Position(0, 1, inner=size),)))

    def local(here: Local) -> Callable[..., Tensor]:
        held = here.input_shape(0)[1] // size
        return lambda x, num_groups, *args, **kwargs: torch.group_norm(x, held, *args, **kwargs)

    return Row(tuple(links), local=local)


def batch_norm(call: Call) -> Row:
    """batch_norm(x (n, c, ...), weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)."""
    shape = call.inputs[0].shape
    training = bool(call.arg(5, "training"))
    both = 2 * shape[1] * call.inputs[0].dtype.itemsize if training else 0  # sums and sums of squares
    links = [*_channels(call)]
    for dim in (0, *range(2, len(shape))):
        if shape[dim] > 1:
            links.append(
                Link(f"d{dim}", (Position(0, dim),), (Position(0, dim),), reduced=(both, both) if training else ())
            )
    if not training:
        return Row(tuple(links))

    def local(here: Local) -> Callable[..., Tensor]:
        cut = [axis for dim in range(len(shape)) if dim != 1 for axis in here.axes_of_input(0, dim)]
        groups = groups_along(here, cut)
        if not groups:
            return operator(call.node.target)
        count = math.prod(n for dim, n in enumerate(shape) if dim != 1)
        return lambda *args, **kwargs: _synchronised(count, groups, *args, **kwargs)

    return Row(tuple(links), local=local)


def _channels(call: Call) -> tuple[Link, ...]:
    """Channels: dim 1 of x, the only dim of weight, bias, running mean and variance, as far as there are any."""
    per_channel = (Position(op, 0) for op in range(1, len(call.inputs)))
    return (Link("c", (Position(0, 1), *per_channel), (Position(0, 1),)),) if call.inputs[0].shape[1] > 1 else ()


def instance_norm(call: Call) -> Row:
    """The same arguments, each sample by itself: batch and channels; running statistics average over the batch."""
    by_sample = call.operand(3) is None or not call.arg(5, "use_input_stats")
    batch = (Link("n", (Position(0, 0),), (Position(0, 0),)),) if by_sample and call.inputs[0].shape[0] > 1 else ()

    def local(_: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)

        def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any, **kwargs: Any) -> Tensor:
            if x.numel():
                return operate(x, weight, bias, *rest, **kwargs)
            like = [-1 if dim == 1 else 1 for dim in range(x.dim())]  # torch refuses an empty batch
            x = x if weight is None else x * weight.view(like)
            return x if bias is None else x + bias.view(like)

        return run

    return Row((*_channels(call), *batch), local=local)


def weight_norm(call: Call) -> Row:
    """_weight_norm(v, g, dim): v scaled to the lengths g along every dim but `dim`; -1 means one length for all of v."""
    dim = call.arg(2, "dim", default=0)
    if dim == -1 or call.inputs[0].shape[dim] < 2:
        return Row()

    def local(_: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)

        def run(v: Tensor, g: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
            return operate(v, g, *rest, **kwargs) if v.numel() else v * g  # torch divides by the size

        return run

    return Row((Link("k", (Position(0, dim), Position(1, dim)), (Position(0, dim),)),), local=local)


def _synchronised(
    count: int,
    groups: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Training batch-norm of a local piece with the mean and variance of the whole batch of `count` values per channel."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    like = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    wide = widened(x)
    mean = all_reduce(wide.sum(dims), groups) / count
    centred = wide - mean.view(like)
    variance = all_reduce(centred.square().sum(dims), groups) / count
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = variance.detach() * (count / max(count - 1, 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    y = centred * scale.view(like)
    return (y if bias is None else y + bias.view(like)).to(x.dtype)


NORMS: dict[str, Callable[[Call], Row]] = {
    "layer_norm": layer_norm, "rms_norm": layer_norm, "native_layer_norm": native_layer_norm, "group_norm": group_norm,
    "batch_norm": batch_norm, "instance_norm": instance_norm,
    "_weight_norm": weight_norm,
}  # fmt: skip
