"""Rows of operators that only rearrange: views, joins, splits, padding, selections at fixed places.

All are linear, so that a Partial input gives a Partial output. Sizes among the arguments are of the whole tensor; local programs
put those of the local pieces in their place.

    reshape    the dims of input and output are cut into common factors, each a link          `common_factors`
               (b, t, h d) -> (b t, h, d):  b, t, h, d, with positions such as "dim 2, outer h"
    split      a dim cut into k equal parts is k x m: the m is the link, in each part
    repeat     the same, read backwards
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.build import dims_of, is_tensor, normal
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["VIEWS", "common_factors"]


def common_factors(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, Position, Position]]:
    """(size, place in source, place in target) of the factors that two shapes of equally many elements share.

    Reads both shapes from the left in step: the next factor is the greatest common divisor of what is left of the two
    current dims. Where that is 1 with both dims unfinished, a stretch up to the next common boundary has no factor.
    Factors of size 1 are left out.
    """
    factors: list[tuple[int, Position, Position]] = []
    left = list(source)
    right = list(target)
    if 0 in left or 0 in right:
        return factors
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == 1:
            i += 1
        elif right[j] == 1:
            j += 1
        else:
            size = _gcd(left[i], right[j])
            if size == 1:
                i, j = _next_boundary(left, right, i, j)
                continue
            left[i], right[j] = left[i] // size, right[j] // size
            factors.append((
                size,
                Position(0, i, outer=source[i] // (left[i] * size), inner=left[i]),
                Position(0, j, outer=target[j] // (right[j] * size), inner=right[j]),
            ))  # fmt: skip
    return factors


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def _next_boundary(left: list[int], right: list[int], i: int, j: int) -> tuple[int, int]:
    """First (i, j) after which the elements of the unfinished dims of both sides are equally many."""
    a, b = left[i], right[j]
    while a != b:
        if a < b:
            i += 1
            a *= left[i]
        else:
            j += 1
            b *= right[j]
    return i + 1, j + 1


def reshape(call: Call) -> Row:
    """Any change of shape that keeps the order of elements."""
    factors = common_factors(call.inputs[0].shape, call.outputs[0].shape)
    links = tuple(Link(f"f{n}", (source,), (target,)) for n, (_, source, target) in enumerate(factors))

    def local(here: Local) -> Callable[..., Tensor]:
        shape = here.output_shape()
        return lambda x, *_, **__: x.reshape(shape)

    return Row(links, linear=((0,),), local=local)


def expand(call: Call) -> Row:
    """New or repeated dims of the output may be cut, with the input whole."""
    shape, out = call.inputs[0].shape, call.outputs[0].shape
    links = []
    for dim, size in enumerate(out):
        source = dim - len(out) + len(shape)
        kept = source >= 0 and shape[source] == size
        if size > 1:
            links.append(Link(f"d{dim}", (Position(0, source),) if kept else (), (Position(0, dim),)))

    def local(here: Local) -> Callable[..., Tensor]:
        local_shape = here.output_shape()
        return lambda x, *_, **__: x.expand(local_shape)

    return Row(tuple(links), linear=((0,),), local=local)


def _moved(call: Call, order: Sequence[int]) -> Row:
    """Output dim j is input dim order[j]."""
    shape = call.inputs[0].shape
    links = (Link(f"d{i}", (Position(0, i),), (Position(0, j),)) for j, i in enumerate(order) if shape[i] > 1)
    return Row(tuple(links), linear=((0,),))


def permute(call: Call) -> Row:
    """permute(x, dims)."""
    rank = len(call.inputs[0].shape)
    return _moved(call, [normal(d, rank) for d in call.arg(1, "dims")])


def transpose(call: Call) -> Row:
    """transpose(x, dim0, dim1); `t`, `mT` and `adjoint` swap the last two dims."""
    rank = len(call.inputs[0].shape)
    order = list(range(rank))
    if rank > 1:
        a, b = normal(call.arg(1, "dim0", -2), rank), normal(call.arg(2, "dim1", -1), rank)
        order[a], order[b] = order[b], order[a]
    return _moved(call, order)


def movedim(call: Call) -> Row:
    """movedim(x, source, destination), ints or lists of them."""
    rank = len(call.inputs[0].shape)
    sources, targets = (
        (v,) if isinstance(v, int) else tuple(v) for v in (call.arg(1, "source"), call.arg(2, "destination"))
    )
    place = {normal(t, rank): normal(s, rank) for s, t in zip(sources, targets, strict=True)}
    rest = iter([d for d in range(rank) if d not in place.values()])
    return _moved(call, [place[d] if d in place else next(rest) for d in range(rank)])


def split(call: Call) -> Row:
    """split, split_with_sizes, chunk, tensor_split: the dim is cut in each part if the parts are equal."""
    shape, outputs = call.inputs[0].shape, call.outputs
    along = normal(call.arg(2, "dim", 0), len(shape))
    every = range(len(outputs))
    links = []
    for dim, size in enumerate(shape):
        if size > 1 and dim != along:
            links.append(Link(f"d{dim}", (Position(0, dim),), tuple(Position(o, dim) for o in every)))
    if len({out.shape[along] for out in outputs}) == 1 and outputs[0].shape[along] > 1:
        links.append(Link("part", (Position(0, along, outer=len(outputs)),), tuple(Position(o, along) for o in every)))

    def local(here: Local) -> Callable[..., Any]:
        sizes = [here.output_shape(o)[along] for o in every]
        return lambda x, *_, **__: torch.split_with_sizes(x, sizes, along)

    return Row(tuple(links), linear=((0,),), local=local)


def cat(call: Call) -> Row:
    """cat(tensors, dim): the dim is cut in each part if the parts are equal. Empty vectors among the tensors stay whole."""
    return _joined(call, normal(call.arg(1, "dim", 0), len(call.outputs[0].shape)))


def _joined(call: Call, along: int) -> Row:
    rank = len(call.outputs[0].shape)
    full = [op for op, spec in enumerate(call.inputs) if len(spec.shape) == rank]
    links = []
    for dim, size in enumerate(call.outputs[0].shape):
        if size > 1 and dim != along:
            links.append(Link(f"d{dim}", tuple(Position(op, dim) for op in full), (Position(0, dim),)))
    parts = {call.inputs[op].shape[along] for op in full}
    if len(parts) == 1 and parts != {1} and parts != {0}:
        inputs = tuple(Position(op, along) for op in full)
        links.append(Link("part", inputs, (Position(0, along, outer=len(full)),)))
    return Row(tuple(links), linear=(tuple(range(len(call.inputs))),))


def stack(call: Call) -> Row:
    """stack(tensors, dim): every dim but the new one."""
    new = normal(call.arg(1, "dim", 0), len(call.outputs[0].shape))
    every = range(len(call.inputs))
    links = (
        Link(f"d{dim}", tuple(Position(op, dim) for op in every), (Position(0, dim + (dim >= new)),))
        for dim, size in enumerate(call.inputs[0].shape)
        if size > 1
    )
    return Row(tuple(links), linear=(tuple(every),))


def unbind(call: Call) -> Row:
    """unbind(x, dim): every dim but the one taken apart."""
    shape = call.inputs[0].shape
    gone = normal(call.arg(1, "dim", 0), len(shape))
    every = range(len(call.outputs))
    links = (
        Link(f"d{dim}", (Position(0, dim),), tuple(Position(o, dim - (dim > gone)) for o in every))
        for dim, size in enumerate(shape)
        if size > 1 and dim != gone
    )
    return Row(tuple(links), linear=((0,),))


def select(call: Call) -> Row:
    """select(x, dim, index): where `dim` is cut, the device that holds the index gives its value and the others zeros."""
    shape = call.inputs[0].shape
    dim = normal(call.arg(1, "dim"), len(shape))
    links = [
        Link(f"d{i}", (Position(0, i),), (Position(0, i - (i > dim)),))
        for i, size in enumerate(shape)
        if size > 1 and i != dim
    ]
    if shape[dim] > 1:
        links.append(Link("selected", (Position(0, dim),), reduce="sum", contiguous=True))

    def local(here: Local) -> Callable[..., Tensor]:
        index = normal(call.arg(2, "index"), shape[dim])
        if not here.axes_of_input(0, dim):
            return operator(call.node.target)
        low, high = here.input_range(0, dim)
        if low <= index < high:
            return lambda x, *_, **__: x.select(dim, index - low)
        return lambda x, *_, **__: x.narrow(dim, 0, 0).sum(dim, dtype=x.dtype)  # zeros that autograd still sees

    return Row(tuple(links), linear=((0,),), local=local)


def slice_(call: Call) -> Row:
    """slice(x, dim, start, end, step): the sliced dim is cut where the slice is all of it, or one of k equal blocks of it."""
    shape, out = call.inputs[0].shape, call.outputs[0].shape
    along = normal(call.arg(1, "dim", 0), len(shape))
    size, length = shape[along], out[along]
    start = min(max(normal(call.arg(2, "start") or 0, size), 0), size)
    is_block = call.arg(4, "step", 1) == 1 and length > 1 and size % length == 0 and start % length == 0
    links = [
        Link(f"d{dim}", (Position(0, dim),), (Position(0, dim),))
        for dim, n in enumerate(shape)
        if n > 1 and dim != along
    ]
    if is_block:
        links.append(Link("block", (Position(0, along, outer=size // length),), (Position(0, along),)))

    def local(here: Local) -> Callable[..., Tensor]:
        if not here.axes_of_input(0, along):
            return operator(call.node.target)
        held = here.output_shape()[along]
        return lambda x, *_, **__: x.narrow(along, start // length * held, held)

    return Row(tuple(links), linear=((0,),), local=local)


def narrow(call: Call) -> Row:
    """narrow(x, dim, start, length): every other dim."""
    return _others(call, dims_of(call.arg(1, "dim"), len(call.inputs[0].shape)))


def _others(call: Call, touched: Sequence[int], linear: bool = True) -> Row:
    """Dims that the operator does not touch, at the same place in input and output."""
    links = (
        Link(f"d{dim}", tuple(Position(op, dim) for op in range(len(call.inputs))), (Position(0, dim),))
        for dim, size in enumerate(call.inputs[0].shape)
        if size > 1 and dim not in touched
    )
    return Row(tuple(links), linear=(tuple(range(len(call.inputs))),) if linear else ())


def pad(call: Call) -> Row:
    """pad(x, widths, mode, value): dims that get nothing; linear unless a constant other than 0 goes in."""
    rank, widths = len(call.inputs[0].shape), call.arg(1, "pad")
    padded = [rank - 1 - k // 2 for k, width in enumerate(widths) if width]
    constant = call.arg(2, "mode", "constant") if call.node.op == "pad" else "constant"
    value = call.arg(3 if call.node.op == "pad" else 2, "value") or 0
    if call.node.op.startswith(("reflection", "replication", "circular")):
        constant = "other"
    row = _others(call, padded, linear=constant != "constant" or value == 0)
    if constant == "constant":
        return row
    batch = rank - len(widths) // 2  # the other modes expect all the padded dims behind, and look at the rank
    return Row(tuple(link for link in row.links if link.inputs[0].dim < batch), linear=row.linear)


def along_dims(call: Call) -> Row:
    """flip, roll, tril and the like: every dim but those in the `dims` argument."""
    rank = len(call.inputs[0].shape)
    if call.node.op == "roll" and not call.arg(2, "dims", []):
        return Row(linear=((0,),))  # rolls the flattened tensor
    return _others(call, dims_of(call.arg(2 if call.node.op == "roll" else 1, "dims"), rank))


def triangle(call: Call) -> Row:
    """tril, triu: every dim but the last two; rows may be cut with the diagonal shifted."""
    rank = len(call.inputs[0].shape)
    lower = _others(call, (rank - 2, rank - 1))
    rows, columns = (
        Link(name, (Position(0, dim),), (Position(0, dim),), contiguous=True)
        for name, dim in (("row", rank - 2), ("column", rank - 1))
    )
    links = (*lower.links, *(link for link in (rows, columns) if call.inputs[0].shape[link.inputs[0].dim] > 1))

    def local(here: Local) -> Callable[..., Tensor]:
        diagonal, operate = call.arg(1, "diagonal", 0), operator(call.node.target)
        shift = 0
        if here.axes_of_input(0, rank - 2):
            shift += here.input_range(0, rank - 2)[0]
        if here.axes_of_input(0, rank - 1):
            shift -= here.input_range(0, rank - 1)[0]
        return lambda x, *_, **__: operate(x, diagonal + shift)

    return Row(links, linear=((0,),), local=local)


def repeat(call: Call) -> Row:
    """repeat(x, times), tile: a dim repeated r times is cut in each copy; new dims stay whole."""
    shape, out = call.inputs[0].shape, call.outputs[0].shape
    links = []
    for dim, size in enumerate(shape):
        target = dim + len(out) - len(shape)
        if size > 1 and out[target]:
            links.append(Link(f"d{dim}", (Position(0, dim),), (Position(0, target, outer=out[target] // size),)))
    return Row(tuple(links), linear=((0,),))


def repeat_interleave(call: Call) -> Row:
    """repeat_interleave(x, r, dim): each index becomes r neighbours, which stay together."""
    shape, out = call.inputs[0].shape, call.outputs[0].shape
    dim = call.arg(2, "dim")
    if dim is None or is_tensor(call.arg(1, "repeats")):
        return Row(linear=((0,),) if len(call.inputs) == 1 else ())
    links = (
        Link(f"d{i}", (Position(0, i),), (Position(0, i, inner=out[i] // size),))
        for i, size in enumerate(shape)
        if size > 1
    )

    def local(here: Local) -> Callable[..., Tensor]:
        repeats, along = call.arg(1, "repeats"), normal(dim, len(shape))
        return lambda x, *_, **__: torch.repeat_interleave(x, repeats, along)  # without a baked output_size

    return Row(tuple(links), linear=((0,),), local=local)


def diagonal(call: Call) -> Row:
    """diagonal(x, offset, dim1, dim2): every other dim."""
    shape = call.inputs[0].shape
    gone = {normal(call.arg(2, "dim1", 0), len(shape)), normal(call.arg(3, "dim2", 1), len(shape))}
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    links = (Link(f"d{i}", (Position(0, i),), (Position(0, o),)) for o, i in enumerate(kept) if shape[i] > 1)
    return Row(tuple(links), linear=((0,),))


def unfold(call: Call) -> Row:
    """unfold(x, dimension, size, step): every other dim."""
    return _others(call, dims_of(call.arg(1, "dimension"), len(call.inputs[0].shape)))


def complex_view(call: Call) -> Row:
    """view_as_complex, view_as_real: every dim but the last of 2, which holds real and imaginary part."""
    rank = min(len(call.inputs[0].shape), len(call.outputs[0].shape))
    shape = call.inputs[0].shape
    links = (Link(f"d{dim}", (Position(0, dim),), (Position(0, dim),)) for dim in range(rank) if shape[dim] > 1)
    return Row(tuple(links), linear=((0,),))


def meshgrid(call: Call) -> Row:
    """meshgrid(vectors, indexing): vector i is dim i of every output; "xy" swaps the first two."""
    every = range(len(call.outputs))
    order = (
        [1, 0, *range(2, len(every))] if call.node.kwargs.get("indexing") == "xy" and len(every) > 1 else list(every)
    )
    links = (
        Link(f"v{i}", (Position(i, 0),), tuple(Position(o, order[i]) for o in every))
        for i, spec in enumerate(call.inputs)
        if spec.numel > 1 and len(spec.shape) == 1
    )
    return Row(tuple(links), linear=(tuple(every),))


def stack_rows(call: Call) -> Row:
    """hstack, vstack: matrices are joined along one dim, as `cat` does; vectors become rows, or one row."""
    along = 1 if call.node.op == "hstack" else 0
    if any(len(spec.shape) < 2 for spec in call.inputs):
        return Row(linear=(tuple(range(len(call.inputs))),))
    return _joined(call, along)


def write_slice(call: Call) -> Row:
    """slice_scatter, select_scatter(x, source, dim, ...): x with a part replaced: every dim but that one."""
    rank = len(call.inputs[0].shape)
    along = normal(call.arg(2, "dim", 0), rank)
    drops = call.node.op == "select_scatter"
    links = (
        Link(f"d{dim}", (Position(0, dim), Position(1, dim - (drops and dim > along))), (Position(0, dim),))
        for dim, size in enumerate(call.inputs[0].shape)
        if size > 1 and dim != along
    )
    return Row(tuple(links), linear=((0, 1),))


VIEWS: dict[str, Callable[[Call], Row]] = {
    **dict.fromkeys(
        ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"],
        reshape,
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("permute",), permute),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "adjoint", "mT", "numpy_T"), transpose),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split"), split),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack, "unbind": unbind, "select": select, "slice": slice_, "narrow": narrow, "diagonal": diagonal,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"), pad),
    "flip": along_dims, "roll": along_dims, "tril": triangle, "triu": triangle,
    "repeat": repeat, "tile": repeat, "repeat_interleave": repeat_interleave, "unfold": unfold,
    "view_as_complex": complex_view, "view_as_real": complex_view, "meshgrid": meshgrid,
    "hstack": stack_rows, "vstack": stack_rows,
    "slice_scatter": write_slice, "select_scatter": write_slice,
}  # fmt: skip
