"""Rows of operators that read or write at positions held in a tensor.

Reading   the dims of the index go to the result, and so do the table's other dims. The looked-up dim may be cut too: a device
          answers for its own range and gives zeros elsewhere, and a sum is owed (vocabulary-split embedding).
Writing   dims that table, index and source share may be cut; where entries are added, the source's rows may be cut, and the
          pieces' results are terms of a sum.
Counting  over pieces adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.build import is_tensor, normal
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["INDEXING"]


def _held(index: Tensor, low: int, size: int) -> tuple[Tensor, Tensor]:
    """Which entries are in [low, low + size), and their distance from low (0 for the others)."""
    local = index - low
    held = (local >= 0) & (local < size)
    return held, torch.where(held, local, torch.zeros_like(local))


def embedding(call: Call) -> Row:
    """embedding(weight (v, d), index (...), padding_idx, scale_grad_by_freq, sparse) -> (..., d)."""
    vocabulary, width = call.inputs[0].shape
    index = call.inputs[1].shape
    by_frequency = bool(call.arg(3, "scale_grad_by_freq", False))
    links = []
    if not by_frequency:  # else a row's gradient depends on all occurrences of it
        links += [Link(f"d{d}", (Position(1, d),), (Position(0, d),)) for d, size in enumerate(index) if size > 1]
    if width > 1:
        links.append(Link("width", (Position(0, 1),), (Position(0, len(index)),)))
    if vocabulary > 1 and not by_frequency:
        links.append(Link("vocabulary", (Position(0, 0),), reduce="sum", contiguous=True))

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        if not here.axes_of_input(0, 0):
            return operate
        low, high = here.input_range(0, 0)
        padding = call.arg(2, "padding_idx", -1)
        own_padding = padding - low if low <= padding < high else -1

        def run(weight: Tensor, ids: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
            if low == high:
                return weight.sum(0).expand(*ids.shape, weight.shape[1])  # no word lives here
            held, own = _held(ids, low, high - low)
            looked_up = operate(
                weight, own, own_padding, *rest[1:], **{k: v for k, v in kwargs.items() if k != "padding_idx"}
            )
            return looked_up.masked_fill(~held.unsqueeze(-1), 0)

        return run

    return Row(tuple(links), linear=((0,),), local=local)


def embedding_bag(call: Call) -> Row:
    """embedding_bag(weight (v, d), ids, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights, ...): the width d.

    Which ids are whose bag, `offsets` say with numbers: neither can be cut.
    """
    shape, largest = call.inputs[0].shape, call.arg(4, "mode", 0) == 2
    outside = [
        Position(o, 1) for o, out in enumerate(call.outputs) if out.shape[1:] == shape[1:] and (o == 0 or largest)
    ]
    links = (Link("width", (Position(0, 1),), tuple(outside)),) if shape[1] > 1 else ()
    return Row(links)


def index_select(call: Call) -> Row:
    """index_select(x, dim, index (n))."""
    shape = call.inputs[0].shape
    along = normal(call.arg(1, "dim"), len(shape))
    links = [Link(f"d{d}", (Position(0, d),), (Position(0, d),)) for d, n in enumerate(shape) if n > 1 and d != along]
    if call.inputs[1].numel > 1 and len(call.inputs[1].shape) == 1:
        links.append(Link("index", (Position(1, 0),), (Position(0, along),)))
    if shape[along] > 1:
        links.append(Link("looked-up", (Position(0, along),), reduce="sum", contiguous=True))

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        if not here.axes_of_input(0, along):
            return operate
        low, high = here.input_range(0, along)

        def run(x: Tensor, dim: int, index: Tensor) -> Tensor:
            if low == high:
                return x.sum(along, keepdim=True, dtype=x.dtype).expand(here.output_shape())
            held, own = _held(index, low, high - low)
            like = [-1 if d == along else 1 for d in range(x.dim())]
            return operate(x, along, own).masked_fill(~held.view(like), 0)

        return run

    return Row(tuple(links), linear=((0,),), local=local)


def gather(call: Call) -> Row:
    """gather(x, dim, index), take_along_dim(x, index, dim): other dims are cut where x and index have the same size."""
    shape, index = call.inputs[0].shape, call.inputs[1].shape
    reordered = call.node.op == "take_along_dim"
    dim = call.arg(2 if reordered else 1, "dim")
    if dim is None or not shape or len(shape) != len(index):
        return Row(linear=((0,),))
    along = normal(dim, len(shape))
    links = [
        Link(f"d{d}", (Position(0, d), Position(1, d)), (Position(0, d),))
        for d, size in enumerate(index)
        if d != along and size == shape[d] and size > 1
    ]
    if index[along] > 1:
        links.append(Link("index", (Position(1, along),), (Position(0, along),)))
    if shape[along] > 1:
        links.append(Link("looked-up", (Position(0, along),), reduce="sum", contiguous=True))

    def local(here: Local) -> Callable[..., Tensor]:
        if not here.axes_of_input(0, along):
            return operator(call.node.target)
        low, high = here.input_range(0, along)

        def run(x: Tensor, *rest: Any, **_: Any) -> Tensor:
            positions = rest[0] if reordered else rest[1]
            if low == high:
                return _no_rows(x, positions.shape, along)
            held, own = _held(positions, low, high - low)
            found = torch.take_along_dim(x, own, along) if reordered else x.gather(along, own)
            return found.masked_fill(~held, 0)

        return run

    return Row(tuple(links), linear=((0,),), local=local)


def take(call: Call) -> Row:
    """take(x, index): entries of the flattened x."""
    shape = call.inputs[1].shape
    links = (Link(f"d{d}", (Position(1, d),), (Position(0, d),)) for d, size in enumerate(shape) if size > 1)
    return Row(tuple(links), linear=((0,),))


def _no_rows(x: Tensor, shape: Sequence[int], along: int) -> Tensor:
    """Zeros of `shape`, as autograd sees them, from an x whose dim `along` is empty."""
    zeros = x.sum(along, keepdim=True, dtype=x.dtype)
    return zeros[tuple(slice(0, 1 if d == along else n) for d, n in enumerate(shape))].expand(*shape)


def scatter(call: Call) -> Row:
    """scatter(x, dim, index, source or value), scatter_add, scatter_reduce: dims that all share, except `dim`.

    scatter_add may also cut index and source along `dim`: what each piece adds is a term of the sum.
    """
    shape, index = call.inputs[0].shape, call.inputs[1].shape
    along = normal(call.arg(1, "dim"), len(shape))
    sources = tuple(range(2, len(call.inputs)))
    sources = tuple(op for op in sources if call.inputs[op].shape)
    links = [
        Link(f"d{d}", tuple(Position(op, d) for op in (0, 1, *sources)), (Position(0, d),))
        for d, size in enumerate(shape)
        if d != along and size > 1 and all(call.inputs[op].shape[d] == size for op in (1, *sources))
    ]
    adds = call.node.op == "scatter_add"
    equal = all(call.inputs[op].shape[along] == index[along] for op in sources)
    if adds and equal and index[along] > 1:
        links.append(Link("source", tuple(Position(op, along) for op in (1, *sources)), reduce="sum"))
    plain = "reduce" not in call.node.kwargs and call.node.op in ("scatter", "scatter_add")
    value_is_zero = is_tensor(call.arg(3)) or call.arg(3) == 0
    linear = ((0, *range(2, len(call.inputs))),) if plain and value_is_zero else ()
    return Row(tuple(links), linear=linear, added=(0,) if adds else ())


def index_add(call: Call) -> Row:
    """index_add(x, dim, index (n), source): other dims, and the n rows, whose results add up. index_copy: other dims."""
    shape = call.inputs[0].shape
    along = normal(call.arg(1, "dim"), len(shape))
    links = [
        Link(f"d{d}", (Position(0, d), Position(2, d)), (Position(0, d),))
        for d, n in enumerate(shape)
        if n > 1 and d != along
    ]
    adds = call.node.op == "index_add"
    if adds and call.inputs[1].numel > 1:
        links.append(Link("source", (Position(1, 0), Position(2, along)), reduce="sum"))
    return Row(tuple(links), linear=((0, 2),), added=(0,) if adds else ())


def index_fill(call: Call) -> Row:
    """index_fill(x, dim, index, value): every other dim."""
    shape = call.inputs[0].shape
    along = normal(call.arg(1, "dim"), len(shape))
    links = (Link(f"d{d}", (Position(0, d),), (Position(0, d),)) for d, n in enumerate(shape) if n > 1 and d != along)
    return Row(tuple(links), linear=((0,),) if call.arg(3, "value") == 0 else ())


def _advanced(call: Call) -> tuple[list[int], list[int], int] | None:
    """(indexed dims of x, operand of each, first output dim of the index's dims) of `index`; None if there is a mask.

    Index tensors side by side put their broadcast dims in place of the indexed ones, others put them in front.
    """
    indices = call.arg(1, "indices")
    operands = list(call.operands(1))
    if any(call.inputs[op].dtype in (torch.bool, torch.uint8) for op in operands):
        return None
    dims = [dim for dim, item in enumerate(indices) if item is not None]
    together = dims == list(range(dims[0], dims[0] + len(dims))) if dims else True
    return dims, operands, dims[0] if together and dims else 0


def index(call: Call) -> Row:
    """x[..., i, j, ...] with index tensors i, j: their dims, and the dims of x that are not indexed.

    With one index tensor, the indexed dim may be cut as well, as in an embedding.
    """
    read = _advanced(call)
    shape, linear = call.inputs[0].shape, ((0,),)
    if read is None:
        return Row(linear=linear)
    dims, operands, first = read
    out, rank = call.outputs[0].shape, _index_rank(call, operands)
    links = _around(shape, dims, first, rank, lambda d, o: ((Position(0, d),), (Position(0, o),)))
    for dim in range(rank):
        size = out[first + dim]
        inside = tuple(
            Position(op, dim - rank + len(call.inputs[op].shape))
            for op in operands
            if len(call.inputs[op].shape) >= rank - dim and call.inputs[op].shape[dim - rank] == size
        )
        if size > 1:
            links.append(Link(f"index{dim}", inside, (Position(0, first + dim),)))
    if len(dims) == 1 and shape[dims[0]] > 1:
        links.append(Link("looked-up", (Position(0, dims[0]),), reduce="sum", contiguous=True))

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        if len(dims) != 1 or not here.axes_of_input(0, dims[0]):
            return operate
        along = dims[0]
        low, high = here.input_range(0, along)

        def run(x: Tensor, indices: list[Tensor | None]) -> Tensor:
            positions = indices[along]
            assert positions is not None
            positions = torch.where(positions < 0, positions + shape[along], positions)
            if low == high:
                return x.sum(along, keepdim=True, dtype=x.dtype).movedim(along, -1).squeeze(-1).reshape(
                    *x.shape[:along], *(1,) * positions.dim(), *x.shape[along + 1 :]
                ).expand(here.output_shape())  # fmt: skip
            held, own = _held(positions, low, high - low)
            found = operate(x, [*indices[:along], own, *indices[along + 1 :]])
            return found.masked_fill(~held.view(*held.shape, *(1,) * (x.dim() - along - 1)), 0)

        return run

    return Row(tuple(links), linear=linear, local=local)


def _index_rank(call: Call, operands: list[int]) -> int:
    return max((len(call.inputs[op].shape) for op in operands), default=0)


def _around(
    shape: tuple[int, ...],
    dims: list[int],
    first: int,
    index_rank: int,
    place: Callable[[int, int], tuple[tuple[Position, ...], tuple[Position, ...]]],
) -> list[Link]:
    """Links of the dims that are not indexed; `place(dim of x, dim of the indexed result)` gives their positions."""
    links = []
    rest = [d for d in range(len(shape)) if d not in dims]
    for number, dim in enumerate(rest):
        result = number if number < first else number + index_rank
        if shape[dim] > 1:
            links.append(Link(f"d{dim}", *place(dim, result)))
    return links


def index_put(call: Call) -> Row:
    """index_put(x, indices, values, accumulate): dims of x that are not indexed, where `values` has them in full.

    With `accumulate`, the rows of a single index vector and of its values may be cut: their results add up.
    """
    read = _advanced(call)
    accumulate = bool(call.arg(3, "accumulate", False))
    values = call.operand(2)
    linear = ((0, values),) if values is not None else ()
    if read is None or values is None:
        return Row(linear=linear)
    dims, operands, first = read
    rank = _index_rank(call, operands)
    shape, given = call.inputs[0].shape, call.inputs[values].shape
    result_rank = len(shape) - len(dims) + rank

    def place(dim: int, result: int) -> tuple[tuple[Position, ...], tuple[Position, ...]]:
        theirs = result - result_rank + len(given)
        has = theirs >= 0 and given[theirs] == shape[dim]
        return (Position(0, dim), *((Position(values, theirs),) if has else ())), (Position(0, dim),)

    links = _around(shape, dims, first, rank, place)
    if accumulate and rank == 1 and call.inputs[operands[0]].numel > 1 and len(given) == result_rank:
        if all(call.inputs[op].shape == given[first : first + 1] for op in operands):
            inside = (*(Position(op, 0) for op in operands), Position(values, first))
            links.append(Link("source", inside, reduce="sum"))
    return Row(tuple(links), linear=linear, added=(0,) if accumulate else ())


def one_hot(call: Call) -> Row:
    """one_hot(index, num_classes) -> (..., num_classes); without the number, the largest index decides: nothing is cut."""
    if call.arg(1, "num_classes", -1) < 0:
        return Row()
    shape = call.inputs[0].shape
    return Row(tuple(Link(f"d{d}", (Position(0, d),), (Position(0, d),)) for d, size in enumerate(shape) if size > 1))


def count(call: Call) -> Row:
    """histc(x, bins, min, max) with a given range, bincount with none: counts of pieces add up."""
    if call.node.op == "histc" and call.arg(2, "min", 0) == call.arg(3, "max", 0):
        return Row()  # the range is that of the values
    shape = call.inputs[0].shape
    return Row(tuple(Link(f"d{d}", (Position(0, d),), reduce="sum") for d, size in enumerate(shape) if size > 1))


def search(call: Call) -> Row:
    """bucketize(x, boundaries), searchsorted(boundaries (n), x): element by element in x; isin(x, elements)."""
    values = 1 if call.node.op == "searchsorted" else 0
    if not call.inputs or len(call.inputs) < 2 or len(call.inputs[1 - values].shape) != 1:
        return Row()
    shape = call.inputs[values].shape
    return Row(
        tuple(Link(f"d{d}", (Position(values, d),), (Position(0, d),)) for d, size in enumerate(shape) if size > 1)
    )


def depends_on_data(call: Call) -> Row:
    """nonzero, masked_select, unique, bincount: the result's size depends on all values; nothing may be cut."""
    del call
    return Row()


INDEXING: dict[str, Callable[[Call], Row]] = {
    "embedding": embedding, "embedding_bag": embedding_bag,
    "index_select": index_select, "gather": gather, "take_along_dim": gather, "take": take,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    **dict.fromkeys(("index_add", "index_copy"), index_add), "index_fill": index_fill, "index": index,
    **dict.fromkeys(("index_put", "_unsafe_index_put"), index_put), "_unsafe_index": index, "one_hot": one_hot, "histc": count,
    **dict.fromkeys(("bucketize", "searchsorted", "isin"), search),
    **dict.fromkeys(("nonzero", "masked_select", "_unique2", "bincount", "masked_scatter"), depends_on_data),
}  # fmt: skip
