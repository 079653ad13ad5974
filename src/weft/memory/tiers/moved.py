"""What stands under `p.grad` for a gradient that has left for its tier, so that who uses it gets it or an error.

a change by numbers    p.grad /= 2, clip_grad_value_: done to this process's part, where it is
whatever reads         a norm, GradScaler's look, a copy: is given the elements, one gradient after the other
another change         is done to the elements, and they go back to their tier
a view                 may be written later without anybody noticing: the gradient comes back under `p.grad` until the step
None, or a tensor, put under `p.grad` takes the place of the gradient that has left.

With several processes each has a part, so all but the first is `GradientMoved`, which says what to call. So is everything where
updates are done in backward, which uses gradients up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from weft.errors import GradientMoved
from weft.memory import private
from weft.memory.tiers.fetch import Slot
from weft.memory.tiers.gradients import Gradients

__all__ = ["Moved", "MovedGradient"]

aten = torch.ops.aten
_BY_NUMBERS = frozenset((
    aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.zero_.default, aten.clamp_.default,
    aten.clamp_min_.default, aten.clamp_max_.default, aten.nan_to_num_.default,
))  # fmt: skip
_ONE_BY_ONE = aten._amp_foreach_non_finite_check_and_unscale_.default
# Methods that torch does for no subclass: done with a gradient that has come back.
_BACK = frozenset(("numpy", "tolist", "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__"))


@dataclass(eq=False)
class Note:
    """A gradient that left; once it has come back, `there` is it."""

    slot: Slot
    there: Tensor | None = None


class MovedGradient(Tensor):
    """See the file's header."""

    moved: Moved
    note: Note

    @staticmethod
    def __new__(cls, moved: Moved, note: Note) -> MovedGradient:
        slot = note.slot
        self: MovedGradient = Tensor._make_wrapper_subclass(
            cls, slot.shape, strides=slot.stride, dtype=slot.dtype, device=slot.parameter.device
        )
        self.moved, self.note = moved, note
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"gradient on a lower tier, of shape {self.note.slot.shape}, {self.note.slot.dtype}"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _BACK:
            args, kwargs = tree_map_only(MovedGradient, lambda g: g.moved.back(g.note, function), (args, kwargs))
            return function(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default:
            return MovedGradient(args[0].moved, args[0].note)
        if func is _ONE_BY_ONE and len(args[0]) > 1:
            for gradient in args[0]:
                func([gradient], *args[1:], **kwargs)
            return None
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, MovedGradient)]
        if func in _BY_NUMBERS and len(found) == 1 and not any(t.dim() for t in _tensors(args[1:], kwargs)):
            return found[0].moved.scale(found[0], func, args[1:], kwargs)
        if any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
        ):
            back = lambda gradient: gradient.moved.back(gradient.note, func)
            args, kwargs = tree_map_only(MovedGradient, back, (args, kwargs))
            return func(*args, **kwargs)
        return found[0].moved.apply(func, args, kwargs)


@final
class Moved:
    """Which gradients have left `p.grad`, and what is done with them there.

    Args:
        gradients: has their elements, of this process's part.
        alone: there is one process, whose part is all.
        used: gradients are used up as they come.
    """

    def __init__(self, gradients: Gradients, *, alone: bool, used: bool):
        self.gradients, self.alone, self.used = gradients, alone, used
        self._notes: dict[int, Note] = {}

    def left(self, slot: Slot) -> None:
        """A slot's gradient leaves for its tier, where it is added to one that has left before."""
        note = self._notes.setdefault(slot.index, Note(slot))
        slot.parameter.grad = MovedGradient(self, note)

    def arriving(self, slot: Slot, gradient: Tensor | None) -> None:
        """A gradient may be about to be put under a parameter: torch adds it to what is there, which must be a tensor or nothing.

        If none will be, as in `torch.autograd.grad`, what stands there goes on standing.
        """
        if gradient is not None and private.accumulates() and self.holds(slot):
            slot.parameter.grad = None

    def holds(self, slot: Slot) -> bool:
        """Whether a slot's gradient is what left for its tier; what was put under `p.grad` since then took its place."""
        note = self._notes.get(slot.index)
        if note is None:
            return False
        if _stands(note):
            return True
        if not self.used:
            self._forget(slot.index)
        return False

    def clear(self) -> None:
        """A step has used them, or they were dropped."""
        self._notes.clear()

    def close(self, slots: Iterable[Slot]) -> None:
        """No gradient is on a tier any more."""
        for slot in slots:
            if self.holds(slot):
                slot.parameter.grad = None
        self.clear()

    def back(self, note: Note, func: Any) -> Tensor:
        """A gradient returns under its parameter, where it stays."""
        if note.there is None:
            self._check(note, func)
            whole = self._whole(note.slot)
            self._forget(note.slot.index)
            note.there = whole
            if _stands(note):
                note.slot.parameter.grad = whole
        return note.there

    def scale(self, gradient: MovedGradient, func: Any, numbers: Sequence[Any], kwargs: Any) -> MovedGradient:
        """Change each element alone."""
        note = gradient.note
        if note.there is not None:
            func(note.there, *numbers, **kwargs)
            return gradient
        self._check(note, func, part=True)
        if note.slot.index in self.gradients:  # else it is all others'
            part = self.gradients.whole(note.slot.index)
            numbers, kwargs = tree_map_only(Tensor, lambda number: number.to(part.device), (tuple(numbers), kwargs))
            func(part, *numbers, **kwargs)
            self.gradients.replace(note.slot.index, part)
        return gradient

    def apply(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do something with whole gradients; what it changes goes back to its tier."""
        lent: dict[int, tuple[MovedGradient, Tensor]] = {}

        def lend(gradient: MovedGradient) -> Tensor:
            note = gradient.note
            if note.there is not None:
                return note.there
            if id(note) not in lent:
                self._check(note, func)
                lent[id(note)] = gradient, self._whole(note.slot)
            return lent[id(note)][1]

        args_there, kwargs_there = tree_map_only(MovedGradient, lend, (args, kwargs))
        result = func(*args_there, **kwargs_there)
        for gradient in _written(func, args, kwargs):
            if gradient.note.there is None:
                slot = gradient.note.slot
                self.gradients.replace(slot.index, slot.flat(lent[id(gradient.note)][1]))
        given = {id(whole): gradient for gradient, whole in lent.values()}
        return tree_map_only(Tensor, lambda tensor: given.get(id(tensor), tensor), result)

    def _whole(self, slot: Slot) -> Tensor:
        return slot.shaped(self.gradients.whole(slot.index).to(slot.parameter.device))

    def _forget(self, index: int) -> None:
        self._notes.pop(index, None)
        self.gradients.drop(index)

    def _check(self, note: Note, func: Any, *, part: bool = False) -> None:
        name = note.slot.name
        if self.used:
            raise GradientMoved(
                name,
                "was used up in backward, as update='backward' says; with update='step' it stays until the step",
            )
        if self._notes.get(note.slot.index) is not note:
            raise GradientMoved(name, "is gone: a step has used it, or it was dropped or replaced")
        if not part and not self.alone:
            what = getattr(func, "__name__", str(func))
            raise GradientMoved(
                name,
                f"is spread over the processes, and {what} needs all of it; clip norms by Tiered.clip_grad_norm_. Here it can be "
                "scaled and clamped by numbers",
            )


def _stands(note: Note) -> bool:
    """Whether what stands for a gradient is still under its parameter."""
    found = note.slot.parameter.grad
    return isinstance(found, MovedGradient) and found.note is note


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Any) -> list[MovedGradient]:
    """Which an operator changes. (Versions do not tell: torch does not count them below autograd.)"""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = [
        named.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, MovedGradient)]
