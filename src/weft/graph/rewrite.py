"""One spelling per meaning: rules that rewrite an exported call before it becomes a node.

Export records calls as the model spelt them: `view`, `flatten` and `reshape` for one thing, sizes of -1, negative dims, casts
to the dtype a tensor already has, copies, concatenation with a cache that is empty. Later packages then need fewer rows.
A rule sees the call with every size known and answers with the value it equals (the call disappears), or with another call.

    copies, aliases, no-op casts and dropouts       disappear      `_same`, `_cast`, `_dropout`
    view, flatten, reshape, unflatten, view_as      reshape to explicit sizes, of the first value in a chain of them
    expand, expand_as, broadcast_to                 expand to explicit sizes
    transpose, t, T, mT, swapaxes / permute, movedim    transpose / permute
    dims                                            counted from the front      `count_dims_from_front`

Rules do not drop a call because sizes happen to agree (an `expand` to the shape a tensor has): the same model captured with
another batch size must give the same nodes, so that one plan fits both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from weft.graph.graph import Node, Ref, TensorSpec, refs_in

__all__ = [
    "OUT_OF_PLACE",
    "Draft",
    "count_dims_from_front",
    "dim_arguments",
    "is_pointwise",
    "may_view",
    "operator",
    "rewrite",
    "without_out",
]


@dataclass
class Draft:
    """A call on its way to becoming a node."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorSpec, ...]
    spec: Callable[[Ref], TensorSpec]
    producer: Callable[[Ref], Node]

    @property
    def source(self) -> TensorSpec:
        """Spec of the first tensor argument."""
        return self.spec(next(refs_in(self.args)))

    def becomes(self, target: str, *args: Any, **kwargs: Any) -> Draft:
        return Draft(target, args, kwargs, self.outputs, self.spec, self.producer)


Rule = Callable[[Draft], "Draft | Ref"]


@functools.cache
def operator(target: str) -> Any:
    """The `torch.ops` operator that a node's target names.

    Raises:
        ValueError: torch does not know it (its library is not imported).
    """
    namespace, name, overload = target.split(".", 2)
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as error:
        raise ValueError(
            f"operator {target} is not registered in this process; import the module that defines it first, and define it at "
            "the module's top level, not under `if __name__ == '__main__':`"
        ) from error


@functools.cache
def may_view(target: str) -> bool:
    """Whether the operator's outputs can share memory with its first operand (other operators never do)."""
    schema = operator(target)._schema
    aliased = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    return target == "aten.reshape.default" or aliased


def without_out(target: str) -> str:
    """The overload of an operator with `out=` that returns its result instead: `aten.div.Tensor` for `aten.div.out`."""
    written = operator(target)
    wanted = [(a.name, str(a.type)) for a in written._schema.arguments if not (a.alias_info and a.alias_info.is_write)]
    packet = getattr(getattr(torch.ops, written.namespace), written._opname)
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        if [(a.name, str(a.type)) for a in arguments] == wanted:
            return f"{written.namespace}.{written._opname}.{overload}"
    return target


@functools.cache
def is_pointwise(target: str) -> bool:
    """Whether the operator works element by element, as torch tags it."""
    return torch.Tag.pointwise in operator(target).tags


@functools.cache
def dim_arguments(target: str) -> tuple[tuple[int, str], ...]:
    """Positions and names of the operator's arguments that number dims of its first tensor."""
    names = [argument.name for argument in operator(target)._schema.arguments]
    return tuple((i, name) for i, name in enumerate(names) if name in _DIM_NAMES)


_DIM_NAMES = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "axis", "axis0", "axis1", "source", "destination"}
# Their dim counts the dims of the output: it has one more, or the first operand of a cat may be an empty (0,).
_OF_THE_OUTPUT = {"aten.unsqueeze.default", "aten.stack.default", "aten.cat.default", "aten.concat.default"}


def count_dims_from_front(draft: Draft) -> Draft:
    """The same call with non-negative dims."""
    where = dim_arguments(draft.target)
    if not where:
        return draft
    first = next(refs_in(draft.args), None)
    if first is None:
        return draft
    counted = draft.outputs[0] if draft.target in _OF_THE_OUTPUT else draft.spec(first)
    rank = max(len(counted.shape), 1)

    def front(dim: Any) -> Any:
        if isinstance(dim, (list, tuple)) and not isinstance(dim, Ref):
            return [front(d) for d in dim]
        return dim + rank if isinstance(dim, int) and not isinstance(dim, bool) and dim < 0 else dim

    args, kwargs = list(draft.args), dict(draft.kwargs)
    for position, name in where:
        if position < len(args):
            args[position] = front(args[position])
        elif name in kwargs:
            kwargs[name] = front(kwargs[name])
    draft.args, draft.kwargs = tuple(args), kwargs
    return draft


def _same(draft: Draft) -> Ref:
    return draft.args[0]


def _reshape(draft: Draft) -> Draft | Ref:
    """Every spelling of "the same elements in another shape", from the start of a chain of such."""
    value = draft.args[0]
    made = draft.producer(value)
    if made.target == "aten.reshape.default":
        value = made.args[0]
    shape = draft.outputs[0].shape
    return value if draft.spec(value).shape == shape else draft.becomes("aten.reshape.default", value, list(shape))


def _expand(draft: Draft) -> Draft:
    return draft.becomes("aten.expand.default", draft.args[0], list(draft.outputs[0].shape))


def _cast(draft: Draft) -> Draft | Ref:
    """Casts and moves: one device in the graph, so only the dtype matters."""
    value, dtype = draft.args[0], draft.outputs[0].dtype
    return value if draft.spec(value).dtype == dtype else draft.becomes("aten.to.dtype", value, dtype)


def _dropout(draft: Draft) -> Draft | Ref:
    value, p, train = (*draft.args, *draft.kwargs.values())[:3]
    return value if not train or p == 0 else draft


def _cat(draft: Draft) -> Draft | Ref:
    """Without the empty operands that torch lets `cat` ignore (a cache before its first token)."""
    tensors = [ref for ref in draft.args[0] if draft.spec(ref).shape != (0,)]
    if len(tensors) == 1 and draft.spec(tensors[0]).dtype == draft.outputs[0].dtype:
        return tensors[0]
    dim = draft.args[1] if len(draft.args) > 1 else draft.kwargs.get("dim", 0)
    return draft.becomes("aten.cat.default", tensors, dim) if tensors else draft


def _slice(draft: Draft) -> Draft | Ref:
    """Explicit start, end and step; nothing for `x[:]`; the source of `slice_scatter(x, source, ...)[the same range]`."""
    value, dim, start, end, step = (*draft.args, *(0, None, None, 1)[len(draft.args) - 1 :])
    size = draft.spec(value).shape[dim]
    if (start is None or start == 0) and (end is None or end >= 2**62) and step == 1:
        return value
    start = min(max(0 if start is None else start + size if start < 0 else start, 0), size)
    end = min(max(size if end is None else end + size if end < 0 else end, start), size)
    made = draft.producer(value)
    if made.target == "aten.slice_scatter.default" and made.args[2:] == (dim, start, end, step):
        return made.args[1]
    return draft.becomes("aten.slice.Tensor", value, dim, start, end, step)


def _select(draft: Draft) -> Draft | Ref:
    value, dim, index = draft.args
    index = index + draft.spec(value).shape[dim] if index < 0 else index
    made = draft.producer(value)
    if made.target == "aten.select_scatter.default" and made.args[2:] == (dim, index):
        return made.args[1]
    return draft.becomes("aten.select.int", value, dim, index)


def _narrow(draft: Draft) -> Draft | Ref:
    value, dim, start, length = draft.args
    start = start + draft.spec(value).shape[dim] if start < 0 else start
    return draft.becomes("aten.slice.Tensor", value, dim, start, start + length, 1)


def _transpose(draft: Draft) -> Draft | Ref:
    """Two dims swapped, however it was said; a tensor of one dim is its own transpose."""
    rank = len(draft.source.shape)
    first, second = draft.args[1:3] if len(draft.args) == 3 else (rank - 2, rank - 1)
    return draft.args[0] if rank < 2 else draft.becomes("aten.transpose.int", draft.args[0], first, second)


def _reverse(draft: Draft) -> Draft:
    rank = len(draft.source.shape)
    return draft.becomes("aten.permute.default", draft.args[0], list(range(rank - 1, -1, -1)))


def _movedim(draft: Draft) -> Draft:
    value, source, target = draft.args
    source, target = ([source], [target]) if isinstance(source, int) else (list(source), list(target))
    order = [dim for dim in range(len(draft.source.shape)) if dim not in source]
    for to, dim in sorted(zip(target, source, strict=True)):
        order.insert(to, dim)
    return draft.becomes("aten.permute.default", value, order)


def _add(draft: Draft) -> Draft | Ref:
    """Adding the integer 0 to integers (an offset of positions) does nothing."""
    value, other = draft.args[:2]
    spec = draft.spec(value) if isinstance(value, Ref) else None
    integer = spec is not None and not spec.dtype.is_floating_point and not spec.dtype.is_complex
    return value if integer and type(other) is int and other == 0 and spec.dtype == draft.outputs[0].dtype else draft


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "alias.default", "clone.default", "contiguous.default", "lift.default", "lift_fresh.default",
            "lift_fresh_copy.default", "detach_.default", "detach.default", "view_copy.default", "_conj_physical.default",
            "resolve_conj.default", "resolve_neg.default",
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
            "view_as.default", "reshape_as.default", "_reshape_alias.default", "ravel.default",
        ),
        _reshape,
    ),
    **dict.fromkeys(("expand.default", "expand_as.default", "broadcast_to.default"), _expand),
    **dict.fromkeys(
        (
            "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default", "_to_copy.default",
            "to.prim_Device", "to.prim_dtype", "to.prim_other",
        ),
        _cast,
    ),
    **dict.fromkeys(
        ("dropout.default", "alpha_dropout.default", "feature_dropout.default", "feature_alpha_dropout.default"), _dropout
    ),
    **dict.fromkeys(("transpose.int", "t.default", "swapaxes.default", "swapdims.default", "mT.default"), _transpose),
    **dict.fromkeys(("numpy_T.default",), _reverse),
    **dict.fromkeys(("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist"), _movedim),
    **dict.fromkeys(("cat.default", "concat.default", "concatenate.default"), _cat),
    "slice.Tensor": _slice,
    "select.int": _select,
    "narrow.default": _narrow,
    "add.Tensor": _add,
}  # fmt: skip

# Out-of-place operator of an in-place one, where it is not the same name without the underscore.
OUT_OF_PLACE = {
    "aten.zero_.default": "aten.zeros_like.default",
    "aten.fill_.Scalar": "aten.full_like.default",
    "aten.bernoulli_.float": "aten.bernoulli.p",
    "aten.normal_.default": "aten.normal_functional.default",
}


def rewrite(draft: Draft) -> Draft | Ref:
    """The call in its one spelling, or the value that it equals."""
    draft = count_dims_from_front(draft)
    rule = _RULES.get(draft.target.removeprefix("aten."))
    return draft if rule is None else rule(draft)
