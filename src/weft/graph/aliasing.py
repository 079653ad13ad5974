"""Values that share memory, and what writing to one of them does to the others.

A graph has no in-place operators on activations: a write `v.mul_(2)` becomes a new value. But v may be a view of x
(`v = x[:, 0]`), and then x, and every other view of x, has changed too. This module keeps, for each value of the exported
program, the chain of views that leads to it from the tensor that owns the memory:

    write    new value of v, then of each tensor it is a view of, by the view's inverse (`select` -> `select_scatter`)
    read     a value whose memory was written since it was made is made again from what it is a view of

Nothing is emitted for memory that is never written, which is nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from weft.graph.graph import Ref

__all__ = ["Memory", "NotWritable", "Tracked", "View"]


class NotWritable(Exception):
    """A write that has no out-of-place equivalent; the text says why."""


@dataclass(eq=False)
class Memory:
    """One allocation. `buffer` or `parameter` name it if the module owns it."""

    buffer: Ref | None = None
    parameter: str | None = None
    version: int = 0


@dataclass(frozen=True)
class View:
    """How a value is made from another that owns or shares its memory: output `index` of `target(source, *args, **kwargs)`."""

    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int = 0


@dataclass(eq=False)
class Tracked:
    """A tensor of the exported program: its current value in the graph, and its memory."""

    ref: Ref
    memory: Memory
    source: Tracked | None = None
    view: View | None = None
    version: int = 0


class _Emitter(Protocol):
    """What reading and writing need of the graph under construction."""

    def shape(self, ref: Ref) -> tuple[int, ...]: ...
    def emit(self, target: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, like: Ref) -> Ref: ...
    def emit_view(self, source: Ref, view: View, like: Ref) -> Ref: ...


def read(value: Tracked, graph: _Emitter) -> Ref:
    """The value's current `Ref`, made again if its memory was written."""
    if value.version != value.memory.version:
        assert value.source is not None and value.view is not None, "only views can be out of date"
        value.ref = graph.emit_view(read(value.source, graph), value.view, like=value.ref)
        value.version = value.memory.version
    return value.ref


def write(value: Tracked, new: Ref, graph: _Emitter) -> Tracked:
    """Make `new` the value of a tensor and of all it is a view of; returns the tensor that owns the memory.

    Raises:
        NotWritable: a view on the way has no inverse.
    """
    before: list[Ref] = []
    link = value
    while link.source is not None:
        before.append(read(link.source, graph))
        link = link.source
    value.memory.version += 1
    value.ref, value.version = new, value.memory.version
    for old in before:
        source = value.source
        assert source is not None and value.view is not None
        if value.view.target == "aten.detach.default":
            raise NotWritable("it writes to a tensor that needs gradients, under no_grad or through detach()")
        inverse = _INVERSE.get(value.view.target)
        if inverse is None:
            raise NotWritable(f"it writes through `{value.view.target}`, a view that weft cannot follow backwards")
        source.ref = inverse(old, value.ref, value.view, graph)
        source.version = source.memory.version
        value = source
    return value


def _reshape_back(old: Ref, new: Ref, view: View, graph: _Emitter) -> Ref:
    return graph.emit("aten.reshape.default", (new, list(graph.shape(old))), like=old)


def _swap_back(old: Ref, new: Ref, view: View, graph: _Emitter) -> Ref:
    return graph.emit("aten.transpose.int", (new, *view.args), like=old)


def _permute_back(old: Ref, new: Ref, view: View, graph: _Emitter) -> Ref:
    order = list(view.args[0])
    return graph.emit("aten.permute.default", (new, [order.index(dim) for dim in range(len(order))]), like=old)


def _select_back(old: Ref, new: Ref, view: View, graph: _Emitter) -> Ref:
    return graph.emit("aten.select_scatter.default", (old, new, *view.args), like=old)


def _slice_back(old: Ref, new: Ref, view: View, graph: _Emitter) -> Ref:
    return graph.emit("aten.slice_scatter.default", (old, new, *view.args), like=old)


def _diagonal_back(old: Ref, new: Ref, view: View, graph: _Emitter) -> Ref:
    return graph.emit("aten.diagonal_scatter.default", (old, new, *view.args), view.kwargs, like=old)


_INVERSE: dict[str, Callable[[Ref, Ref, View, _Emitter], Ref]] = {
    "aten.reshape.default": _reshape_back,
    "aten.unsqueeze.default": _reshape_back,
    "aten.squeeze.default": _reshape_back,
    "aten.squeeze.dim": _reshape_back,
    "aten.squeeze.dims": _reshape_back,
    "aten.transpose.int": _swap_back,
    "aten.permute.default": _permute_back,
    "aten.select.int": _select_back,
    "aten.slice.Tensor": _slice_back,
    "aten.diagonal.default": _diagonal_back,
}
