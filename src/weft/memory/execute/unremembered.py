"""Operators that run once: nothing of the call is remembered, what it reads comes back, and what it makes or writes stays.

    communicate   collectives: other processes take part, and results may be written after the operator has returned
    regeometry    `set_`, `resize_`: a tensor gets another storage, or a storage another size
    opaque        tensors that are more, or less, than a geometry over a storage (sparse, nested, quantized, oneDNN's own, zeros)

Bytes of opaque tensors are counted where they have a storage, and are not managed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.memory.execute.calls import flat
from weft.memory.execute.facts import Facts
from weft.memory.private import below, plain_parts, storage_of
from weft.memory.tracing.operators import tensors_of, writes

if TYPE_CHECKING:
    from weft.memory.execute.online import Online

__all__ = ["adopt_parts", "opaque", "parts", "run_once"]


def run_once(online: Online, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator with `Facts.once`."""
    if facts.in_flight:
        return communicate(online, facts, args, kwargs)
    return (regeometry if facts.regeometry else opaque)(online, facts, args, kwargs)


def communicate(online: Online, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What it is given stays where it is as long as it lives; what it makes or writes has no recipe."""
    holds = dict.fromkeys(online.adopt(tensor) for tensor in tensors_of((*args, *kwargs.values())))
    for hold in holds:
        online.pin(hold)
    written = dict.fromkeys(online.adopt(tensor) for tensor in writes(facts.func, args, kwargs))
    for hold in written:
        online.core.settle(hold.block)
        if hold.block.read:
            online.cut((hold.block,))
    result = facts.call(*args, **kwargs)
    outputs = list(tensors_of((result,)))
    fresh = dict.fromkeys(online.adopt(tensor, "activation") for tensor in outputs if online.hold_of(tensor) is None)
    for hold in fresh:
        online.pin(hold)
    if online.tape is not None:
        online.tape.ran(
            facts, list(holds), list(written), list(fresh), workspace=0, seconds=0.0, repeatable=False, random=False,
            effects=online.effects,
        )  # fmt: skip
    return result


def regeometry(online: Online, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What was made from the tensors that it touches is made now, while they are what they were."""
    tensors = [tensor for value in (*args, *kwargs.values()) for tensor in flat(value)]
    for tensor in tensors:
        online.settle(tensor)
        online.cut((online.adopt(tensor).block,))
    result = facts.call(*args, **kwargs)
    for tensor in (*tensors, *flat(result)):
        online.resized(online.adopt(tensor), storage_of(tensor).nbytes())
    return result


def opaque(online: Online, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Everything that has a storage comes back and stays."""
    for value in (*args, *kwargs.values()):
        for tensor in flat(value):
            for part in parts(tensor):
                online.settle(part)
    for tensor in filter(_has_storage, writes(facts.func, args, kwargs)):
        online.cut((online.adopt(tensor).block,))
    result = facts.call(*args, **kwargs)
    for tensor in flat(result):
        adopt_parts(online, tensor)
    return result


def adopt_parts(online: Online, tensor: Tensor) -> None:
    """Count the bytes of a tensor that was just made; of a sparse one those of its indices and values."""
    for part in parts(tensor):
        online.adopt(part)


def parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with bytes that a tensor is made of: itself, indices and values, none."""
    with below():
        return [part for part in plain_parts(tensor) if _has_storage(part)]


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor._is_zerotensor()
