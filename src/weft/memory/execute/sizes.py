"""How many bytes a call is about to make: asked before it runs, so that room can be made first.

A call's *signature* is its operator, the geometry of its tensors, its other arguments with their types (`x + 1` is an integer
where `x + 1.0` is none) and torch's default dtype; of a call that writes in place, whose floats say nothing about sizes and may
be others in every step (an optimizer's), only that they are floats. The first call of a signature is tried on fake tensors
(about a millisecond); afterwards what was seen is remembered: bytes of fresh outputs, workspace, and seconds, which are frozen
after `SETTLED` runs so that decisions do not follow the load of the machine. Operators whose sizes depend on the data (`nonzero`)
have a `Size` without bytes: they run first, and room is made for what they made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor

from weft.memory.execute.backends import Owner
from weft.memory.execute.calls import Look, flat, is_plain, take_apart
from weft.memory.execute.facts import Facts
from weft.memory.private import FakeTensorMode, storage_of, unlogged

__all__ = ["SETTLED", "Size", "Sizes", "signature"]

SETTLED = 3  # runs after which the seconds of a signature stay as they are (the least seen)

_geometry = itemgetter(3)  # of a look
_NOBODY = Owner()
_STRANGER: Any = SimpleNamespace(block=None)  # whatever the tensor


@final
class Size:
    """What calls of one signature take.

    Attributes:
        fresh: bytes of each output in a storage of its own, in order; None if it depends on the data.
        workspace: bytes taken and given back. seconds: the least seen. runs: seen so far.
        managed: False if a tensor among the arguments is more than its geometry and bytes, so that they cannot be repeated.
    """

    __slots__ = ("fresh", "managed", "runs", "seconds", "workspace")

    def __init__(
        self,
        fresh: tuple[int, ...] | None,
        workspace: int = 0,
        seconds: float = 0.0,
        runs: int = 0,
        managed: bool = True,
    ):
        self.fresh = fresh
        self.managed = managed
        self.workspace = workspace
        self.seconds = seconds
        self.runs = runs

    @property
    def taken(self) -> int:
        """Bytes in all, as far as they are known."""
        return sum(self.fresh or ()) + self.workspace


@final
class Sizes:
    """Table of signatures met so far."""

    def __init__(self) -> None:
        self.known: dict[Any, Size] = {}

    def of(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Size:
        """The entry of a call, whose tensors are not to be known."""
        plain, named, looks = take_apart(args, kwargs, _NOBODY, lambda tensor: _STRANGER)
        return self.look_up(signature(facts, plain, named, looks), facts, args, kwargs)

    def look_up(self, key: tuple[Any, ...], facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Size:
        """The entry of a signature (hashable or not); a new one is worked out."""
        try:
            return self.known[key]
        except TypeError:
            key = (facts, repr(key))
            found = self.known.get(key)
        except KeyError:
            found = None
        if found is None:
            found = self.known[key] = Size(foresee(facts, args, kwargs), managed=is_plain(args, kwargs))
        return found


def signature(facts: Facts, plain: Sequence[Any], named: Mapping[str, Any], looks: Sequence[Look]) -> tuple[Any, ...]:
    """The signature of a call that was taken apart (`calls.take_apart`)."""
    if facts.written:
        plain = [type(value) if type(value) is float or type(value) is tuple else value for value in plain]
    # grad mode: a recurrent layer makes one output more where autograd records
    key = (facts, torch.get_default_dtype(), torch.is_grad_enabled(), *map(_geometry, looks), *plain, *map(type, plain))
    return (*key, *named.items(), *map(type, named.values())) if named else key


def foresee(facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Bytes of each storage that a call would make, from a run on fake tensors; None if only a real run can tell."""
    try:
        with unlogged(), FakeTensorMode(allow_non_fake_inputs=True):
            stand_ins: dict[int, Tensor] = {}  # by storage, so that an output in an argument's bytes is seen
            fakes = [_fake(value, stand_ins) for value in args]
            named = {name: _fake(value, stand_ins) for name, value in kwargs.items()}
            taken = {storage_of(fake)._cdata for fake in stand_ins.values()}
            fresh: list[int] = []
            for output in flat(facts.func(*fakes, **named)):
                storage = storage_of(output)
                if storage._cdata not in taken:
                    taken.add(storage._cdata)
                    fresh.append(storage.nbytes())
            return tuple(int(n) for n in fresh)
    except Exception:  # whatever it is, the real call tells: it raises, or shows its sizes
        return None


def _fake(value: Any, stand_ins: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        stand_ins[id(fake)] = fake
        return fake
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return type(value)([_fake(item, stand_ins) for item in value])
    return value
