"""Rows of convolutions, pooling and resampling: batch, channels in and out, groups; never pixels, which need their neighbours.

A convolution whose windows tile the input (patch embeddings: stride = kernel, no padding) may also be cut between windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["CONVOLUTION"]


def _each(value: Any, index: int, default: int) -> int:
    """Entry `index` of an argument that is an int or a list of one or more."""
    if value is None or value == []:
        return default
    if isinstance(value, (list, tuple)):
        return value[index] if len(value) > 1 else value[0]
    return value


def convolution(call: Call) -> Row:
    """conv1d..3d(x (n, c, ...), weight (o, c/g, ...), bias (o), stride, padding, dilation, groups)."""
    stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
    dilation, groups = call.arg(5, "dilation", 1), call.arg(6, "groups", 1)
    return _convolution(call, groups, 6, transposed=False, tiles=(stride, padding, dilation))


def convolution_transposed(call: Call) -> Row:
    """conv_transpose1d..3d(x, weight (c, o/g, ...), bias, stride, padding, output_padding, groups, dilation)."""
    return _convolution(call, call.arg(6, "groups", 1), 6, transposed=True)


def general_convolution(call: Call) -> Row:
    """aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    transposed = bool(call.arg(6, "transposed"))
    tiles = None if transposed else (call.arg(3, "stride"), call.arg(4, "padding"), call.arg(5, "dilation"))
    return _convolution(call, call.arg(8, "groups"), 8, transposed=transposed, tiles=tiles)


def _convolution(
    call: Call, groups: int, place: int, transposed: bool, tiles: tuple[Any, Any, Any] | None = None
) -> Row:
    x, weight, bias = call.inputs[0].shape, call.inputs[1].shape, call.operand(2, "bias")
    batched = len(x) == len(weight)
    channel = 1 if batched else 0
    links: list[Link] = []
    if batched and x[0] > 1:
        links.append(Link("n", (Position(0, 0),), (Position(0, 0),)))
    into, out = (0, 1) if transposed else (1, 0)  # dims of the weight
    added = () if bias is None else (Position(bias, 0),)
    out_channels = call.outputs[0].shape[channel]
    if groups == 1:
        if out_channels > 1:
            links.append(Link("out", (Position(1, out), *added), (Position(0, channel),)))
        if x[channel] > 1:
            links.append(Link("in", (Position(0, channel), Position(1, into)), reduce="sum"))
    else:
        per_in, per_out = x[channel] // groups, out_channels // groups
        of_bias = () if bias is None else (Position(bias, 0, inner=per_out),)
        of_weight = Position(1, 0, inner=per_in if transposed else per_out)
        inside = (Position(0, channel, inner=per_in), of_weight, *of_bias)
        links.append(Link("group", inside, (Position(0, channel, inner=per_out),)))
    for dim in range(channel + 1, len(x)):
        if tiles is not None and _tiles(x[dim], weight[dim - channel + 1], dim - channel - 1, *tiles):
            size = weight[dim - channel + 1]
            if x[dim] > size:
                links.append(Link(f"window{dim}", (Position(0, dim, inner=size),), (Position(0, dim),)))

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        if groups == 1 or not here.axes_of_input(0, channel):
            return operate
        held = here.input_shape(0)[channel] // (x[channel] // groups)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            if len(args) > place:
                return operate(*args[:place], held, *args[place + 1 :], **kwargs)
            return operate(*args, **(kwargs | {"groups": held}))

        return run

    rest = () if bias is None else (bias,)
    return Row(tuple(links), linear=((0,), (1,)), added=rest, local=local)


def _tiles(size: int, kernel: int, index: int, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether windows along a dim neither overlap nor leave the input, and use all of it."""
    if isinstance(padding, str):
        return False
    alone = kernel == 1 or _each(dilation, index, 1) == 1
    return alone and _each(stride, index, 1) == kernel and _each(padding, index, 0) == 0 and size % kernel == 0


def leading(call: Call) -> Row:
    """Pooling and resampling: batch and channels, the dims before those that the operator works on; sizes may be baked in."""
    spatial = _SPATIAL[call.node.op]
    shape = call.inputs[0].shape
    outputs = range(len(call.outputs))
    links = (
        Link(f"d{dim}", (Position(0, dim),), tuple(Position(o, dim) for o in outputs))
        for dim in range(len(shape) - spatial)
        if shape[dim] > 1
    )
    linear = ((0,),) if "max" not in call.node.op else ()
    return Row(tuple(links), linear=linear)


def shuffle(call: Call) -> Row:
    """pixel_shuffle, pixel_unshuffle, channel_shuffle: the dims before channels."""
    shape = call.inputs[0].shape
    links = (Link(f"d{d}", (Position(0, d),), (Position(0, d),)) for d in range(len(shape) - 3) if shape[d] > 1)

    def local(here: Local) -> Callable[..., Tensor]:
        operate, made = operator(call.node.target), here.output_shape()
        return lambda x, *args: operate(x, *args) if x.numel() else x.reshape(made)  # torch gets empty ones wrong

    return Row(tuple(links), linear=((0,),), local=local)


_SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)}, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    **{f"upsample_nearest{n}d": n for n in (1, 2, 3)}, "_upsample_nearest_exact2d": 2, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
}  # fmt: skip

CONVOLUTION: dict[str, Callable[[Call], Row]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution_transposed),
    "convolution": general_convolution, **dict.fromkeys(_SPATIAL, leading),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), shuffle),
}  # fmt: skip
