"""One operator call, remembered without its tensors: enough to run it again and get the same bits.

    Look         where a tensor of the call lay: which block, dtype, sizes, strides, offset (a view costs nothing to make again)
    take_apart   arguments -> arguments without tensors, and looks at these
    Call         the operator, its arguments with looks in place of tensors, and the generator's state if it drew numbers

What is repeated differs from what ran first in two ways only. Running statistics of a normalisation are not passed (or, where the
operator insists, zeros are passed), so that buffers move once per step. The generator is put where it was and back again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from weft.memory.core.blocks import Block
from weft.memory.execute.backends import Hold, Owner, shown
from weft.memory.execute.facts import Facts
from weft.memory.execute.random_state import Drawn
from weft.memory.private import hollow, marked, shaped, storage_of, uncast
from weft.memory.tracing.operators import moved_statistics

__all__ = ["Call", "Look", "flat", "geometry_of", "is_plain", "require_bytes", "shapes_only", "take_apart"]

Look = tuple[Any, int, Block | None, tuple[Any, ...], int]
"""(position, index in a list or -1, block, geometry, storage offset) of a tensor among the arguments. The position is a number in
`args` or a key of `kwargs`; the block is None where only the shape matters; for the geometry see `geometry_of`."""


def geometry_of(tensor: Tensor) -> tuple[Any, ...]:
    """(dtype, size, stride) of a tensor, and whether it is read as its conjugate, its negative."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.dtype, tensor.shape, tensor.stride()


def take_apart(
    args: Sequence[Any], kwargs: Mapping[str, Any], owner: Owner, adopt: Callable[[Tensor], Hold]
) -> tuple[list[Any], Mapping[str, Any], list[Look]]:
    """Arguments of a call with `None` where a tensor was (lists become tuples), and looks at the tensors.

    Args:
        owner: whose ties they are to have.
        adopt: called with each tensor that has none.
    Raises:
        NotImplementedError, RuntimeError: a tensor has no storage of its own, or no strides (sparse, nested, oneDNN's own).
    """
    looks: list[Look] = []
    plain = list(args)
    for position, value in enumerate(args):
        if isinstance(value, Tensor):
            plain[position] = None
            storage = storage_of(value)
            try:
                hold = storage._weft_tie  # type: ignore[attr-defined]
                if hold.owner is not owner:
                    hold = adopt(value)
            except AttributeError:
                hold = adopt(value)
            looks.append((position, -1, hold.block, geometry_of(value), value.storage_offset()))
        elif isinstance(value, (list, tuple)):
            plain[position] = _take_apart_list(value, position, looks, adopt)
    if not kwargs:
        return plain, kwargs, looks
    named = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            looks.append(_look(value, name, -1, adopt))
            named[name] = None
        elif isinstance(value, (list, tuple)):
            named[name] = _take_apart_list(value, name, looks, adopt)
    return plain, named, looks


def _take_apart_list(
    values: Sequence[Any], position: Any, looks: list[Look], adopt: Callable[[Tensor], Hold]
) -> tuple[Any, ...]:
    plain = list(values)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            looks.append(_look(value, position, index, adopt))
            plain[index] = None
    return tuple(plain)


def _look(tensor: Tensor, position: Any, index: int, adopt: Callable[[Tensor], Hold]) -> Look:
    return position, index, adopt(tensor).block, geometry_of(tensor), tensor.storage_offset()


def is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether all tensors of a call are a geometry over a storage and no more: not sparse, nested, quantized, oneDNN's own, or
    known to be zero (as forward-mode derivatives are) and therefore without bytes."""
    return all(
        tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor._is_zerotensor())
        for value in (*args, *kwargs.values())
        for tensor in flat(value)
    )


def require_bytes(tensor: Tensor) -> None:
    """Raise `RuntimeError` if a tensor is known to be zero: it has a storage, and no bytes."""
    if tensor._is_zerotensor():
        raise RuntimeError("this tensor is known to be zero and has no bytes")


def shapes_only(looks: Sequence[Look], positions: Collection[Any] | None = None) -> list[Look]:
    """The same looks, for an operator that reads no bytes of its arguments at `positions` (None: of none of them)."""
    return [
        (position, index, None if positions is None or position in positions else block, geometry, offset)
        for position, index, block, geometry, offset in looks
    ]


def stand_in(
    geometry: tuple[Any, ...], offset: int, storage: torch.UntypedStorage | None, device: torch.device
) -> Tensor:
    """A tensor of this geometry over a storage; without one it has no bytes, for operators that only ask for shapes."""
    dtype, size, stride, *bits = geometry
    if storage is None:
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
        storage = hollow((last + 1) * dtype.itemsize, device)
    tensor = shaped(storage, dtype, size, stride, offset)
    return marked(tensor, *bits) if bits else tensor


def flat(result: Any) -> Sequence[Tensor]:
    """Tensors of a result, in order."""
    if isinstance(result, Tensor):
        return (result,)
    found: list[Tensor] = []
    if isinstance(result, (tuple, list)):
        for item in result:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (tuple, list)):
                found.extend(flat(item))
    return found


@final
class Call:
    """An operator call without its tensors.

    Attributes:
        facts: of the operator.
        args, kwargs: as passed, with `None` where a tensor was.
        looks: at each of its tensors.
        drawn: what to put back before it draws again; None if it does not draw.
        device: of its tensors. dtype: torch's default one when it ran: factories and mixed arithmetic go by that.
        grad: whether autograd recorded when it ran: a recurrent layer on a CPU makes its workspace only then.
        keep: storages that have no recipe and that this one needs: held as long as somebody may want to repeat this.
        soft: it leans on others, too, that have no recipe: held only while it would have to be repeated (`leaves`).
        over, made: (old, new) of what it wrote and the blocks of its fresh outputs; replay's own, online has a `Step` for that.
        places: for each of the call's outputs in fresh storages, in order: position among its flat results.
    """

    __slots__ = (
        "args",
        "device",
        "drawn",
        "dtype",
        "facts",
        "grad",
        "keep",
        "kwargs",
        "looks",
        "made",
        "over",
        "places",
        "soft",
    )

    def __init__(
        self,
        facts: Facts,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        looks: Sequence[Look],
        device: torch.device,
        keep: Sequence[torch.UntypedStorage] | None = None,
        soft: bool = False,
    ):
        self.facts = facts
        self.args = args
        self.kwargs = kwargs
        self.looks = looks
        self.device = device
        self.dtype = torch.get_default_dtype()
        self.grad = torch.is_grad_enabled()
        self.drawn: Drawn | None = None
        self.keep = keep
        self.soft = soft
        self.places: Sequence[int] = ()
        self.over: Sequence[tuple[Block, Block]] = ()
        self.made: Sequence[Block] = ()

    def __repr__(self) -> str:
        return self.facts.name

    def again(
        self, run: Callable[..., Any], places: Any = (), workspace: tuple[int, int] = (-1, 0)
    ) -> list[torch.UntypedStorage]:
        """Run it once more; the storages of its fresh outputs, in order. What it writes in place it writes over the bytes of the
        overwritten block. `run` is that of a backend, as are `places` and `workspace`."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for position, index, block, geometry, offset in self.looks:
            tensor = stand_in(geometry, offset, shown(block) if block is not None else None, self.device)
            holder: Any = kwargs if isinstance(position, str) else args
            if index < 0:
                holder[position] = tensor
            else:
                holder[position] = items = list(holder[position])
                items[index] = tensor
        if self.facts.statistics:
            _leave_out(self.facts, args)
        with uncast(), _default(self.dtype), torch.set_grad_enabled(self.grad):
            if self.drawn is None:
                result = run(places, workspace, self.facts.call, args, kwargs)
            else:
                with self.drawn.put_back():
                    result = run(places, workspace, self.facts.call, args, kwargs)
        outputs = flat(result)
        return [storage_of(outputs[place]) for place in self.places]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype is this one."""
    now = torch.get_default_dtype()
    if dtype is now:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(now)


def _leave_out(facts: Facts, args: list[Any]) -> None:
    """Running statistics that move, as a repetition gets them: not at all, or zeros where the operator insists."""
    for position in moved_statistics(facts.func, args):
        optional = facts.func._schema.arguments[position].alias_info is None
        args[position] = None if optional else torch.zeros_like(args[position])
