"""States of whole parameters, as state dicts have them; and new elements for a parameter.

    packed      read, gathered from all processes, in the parameter's shape
    unpacked    the inverse, checked; `replace` puts it in place of what there is
    assign      other elements for a parameter

`assign` and `replace` do with a chunk as an update does: its record is read, changed, and written to the other place. A commit
comes next, or a rollback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.memory.tiers.dense import flat_like
from weft.memory.tiers.elementwise import is_small
from weft.memory.tiers.layout import Segment
from weft.memory.tiers.states import Held, States

__all__ = ["Layout", "assign", "packed", "replace", "unpacked"]

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and stride of a whole parameter."""


def packed(states: States, index: int, layout: Layout) -> dict[str, Any] | None:
    """A parameter's state, whole, on the CPU; a collective. None if it was never updated, or has no elements.

    Args:
        index: of its shard.
    """
    parts = [part for part in states.peers.gather(_own(states, index)) if part is not None]
    if not parts:
        return None
    found = {}
    for name, value in parts[0].items():
        if is_small(value):
            found[name] = value
        else:
            whole = value if len(parts) == 1 else torch.cat([part[name] for part in parts])
            found[name] = whole.as_strided(*layout)
    return found


def _own(states: States, index: int) -> dict[str, Any] | None:
    """This process's part: arrays 1-D, on the CPU."""
    shard, found = states.shards[index], {}
    for c, k in states.of_shard[index]:
        held = states.held[c][k]
        if held is None:
            return None
        segment = states.chunks[c].segments[k]
        for name, value in {**held, **_arrays_on_disk(states, c, k)}.items():
            if is_small(value):
                found[name] = _copy(value)
                continue
            whole = found.setdefault(name, torch.empty(shard.length, dtype=value.dtype))
            whole[segment.start - shard.start : segment.stop - shard.start] = value
    return found or None


def _arrays_on_disk(states: States, c: int, k: int) -> dict[str, Tensor]:
    if not states.streamed:
        return {}
    return {name: states.file.read_area(c, a, k) for a, (name, _) in enumerate(states.records[c].arrays) if a > 0}


def unpacked(
    states: States, given: Mapping[int, Mapping[str, Any]], layouts: Mapping[int, Layout]
) -> dict[int, dict[str, Any]]:
    """This process's parts of whole states.

    Args:
        given: whole states by the indices of their shards.
        layouts: of the parameters, by the same indices.
    Raises:
        ValueError: a state is not what the optimizer keeps for that parameter.
    """
    found: dict[int, dict[str, Any]] = {}
    for index, state in given.items():
        shard, (shape, stride) = states.shards[index], layouts[index]
        if not states.of_shard[index]:
            continue  # no element is here
        kept = {name for name, _ in states.arrays[states.of_shard[index][0][0]]}
        fit = {name for name in kept if isinstance(state.get(name), Tensor) and tuple(state[name].shape) == shape}
        more = {name for name, value in state.items() if name not in kept and not is_small(value)}
        if fit != kept or more:
            raise ValueError(
                f"the state given for {shard.name} is not this optimizer's: it should have {sorted(kept) or 'nothing'} of shape "
                f"{shape}, but lacks {sorted(kept - fit) or 'nothing'} and has {sorted(more) or 'nothing'} besides; load the "
                "state of an optimizer of the same kind, options and parameters"
            )
        found[index] = {
            name: flat_like(value, shape, stride, shard.name)[shard.start : shard.stop]
            if name in kept
            else _copy(value)
            for name, value in state.items()
        }
    return found


def replace(states: States, given: Mapping[int, Mapping[str, Any]]) -> None:
    """Put other optimizer states, from `unpacked`, in place of what there is; parameters that are not given have none."""
    for c, chunk in enumerate(states.chunks):
        if chunk.group < 0:
            continue
        buffer = states.claim(states.prepare(c))
        kept = {name for name, _ in states.arrays[c]}
        held: Held = [None] * len(chunk.segments)
        for k, segment in enumerate(chunk.segments):
            state = given.get(segment.shard)
            if state is not None:
                own = {
                    name: _part(states, segment, value).to(states.device, copy=True) if name in kept else _copy(value)
                    for name, value in state.items()
                }
                held[k] = states.keep(c, k, buffer, own)
        states.end(c, buffer, held)


def assign(states: States, index: int, values: Tensor) -> None:
    """Give a shard other elements (1-D), in the file; of a shard whose home is memory, they are there already."""
    for c in dict.fromkeys(c for c, _ in states.of_shard[index]):
        if not states.records[c].arrays:
            continue
        buffer = states.claim(states.prepare(c))
        assert buffer is not None
        if states.chunks[c].on_disk:
            for k, segment in enumerate(states.chunks[c].segments):
                if segment.shard == index:
                    states.records[c].view(buffer, 0, k).copy_(_part(states, segment, values))
        states.end(c, buffer, list(states.held[c]))


def _part(states: States, segment: Segment, values: Tensor) -> Tensor:
    """The elements of a segment, of those of its shard."""
    first = states.shards[segment.shard].start
    return values[segment.start - first : segment.stop - first]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
