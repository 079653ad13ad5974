"""What the executor asks of an operator at every call, worked out once per operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from weft.memory.private import direct
from weft.memory.tracing.operators import (
    STATISTICS,
    communicates,
    draws,
    is_dense,
    is_metadata,
    is_view,
    label,
    makes_empty,
    over_gradient,
    reads_bytes,
    written_arguments,
)

__all__ = ["Facts", "facts_of"]

# these give an existing tensor other bytes or another geometry: what was recorded of it no longer holds
_REGEOMETRY = frozenset(("aten.set_", "aten.resize_", "aten.resize_as_", "aten._resize_output_", "aten.set_data"))


@final
class Facts:
    """An operator as the executor sees it.

    Attributes:
        name: with overload (`aten.addmm.default`).
        call: runs it; cheaper than the operator object itself.
        view: only looks at storages: it makes no bytes, reads none and writes none.
        written: (position, name) of the arguments that it writes in place.
        statistics: positions of running statistics, which it writes in training and which a repetition leaves out.
        needs_bytes: False if it asks only for the shapes of its tensors.
        effect: it does something besides its outputs, and cannot be repeated.
        in_flight: its results may be written after it returns (collectives).
        regeometry: it changes which bytes a tensor lies over.
        opaque: it makes tensors that are known to be zero, without bytes.
        once: calls of it are not remembered (`unremembered`).
        dense: many operations per byte.
        random: some of its calls draw from a generator.
        varies: bytes of its outputs depend on the data.
        empty: its outputs have no content yet.
        over: its variant that writes over the gradient it is given (see `over_gradient`); None if it has none.
    """

    __slots__ = (
        "call",
        "dense",
        "effect",
        "empty",
        "func",
        "in_flight",
        "name",
        "needs_bytes",
        "once",
        "opaque",
        "over",
        "random",
        "regeometry",
        "statistics",
        "varies",
        "view",
        "written",
    )

    def __init__(self, func: Any):
        packet = str(getattr(func, "overloadpacket", func))
        self.func = func
        self.name = label(func)
        self.call: Callable[..., Any] = direct(func)
        self.view = is_metadata(func) or is_view(func)
        self.written = written_arguments(func)
        self.statistics = STATISTICS.get(packet, ())
        self.needs_bytes = reads_bytes(func)
        self.in_flight = communicates(func)
        self.regeometry = packet in _REGEOMETRY
        self.opaque = packet == "aten._efficientzerotensor"
        self.once = self.in_flight or self.regeometry or self.opaque
        self.effect = self.in_flight or self.regeometry or self.name == "aten._local_scalar_dense.default"
        self.dense = is_dense(func)
        tags = getattr(func, "tags", ())
        self.random = torch.Tag.nondeterministic_seeded in tags
        self.over = over_gradient(func)
        self.empty = makes_empty(func)
        self.varies = torch.Tag.dynamic_output_shape in tags

    def draws(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether this call takes numbers from a generator."""
        return self.random and draws(self.func, args, kwargs)

    def __repr__(self) -> str:
        return f"Facts({self.name})"


def facts_of(func: Any) -> Facts:
    """The facts of an operator. They are kept on the operator object itself: hashing one calls into Python."""
    try:
        return func._weft_facts
    except AttributeError:
        func._weft_facts = found = Facts(func)
        return found
