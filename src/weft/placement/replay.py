"""The tape of a model's construction, and running it one value at a time.

A `Tape` lists the operators that wrote something, in order, with a `View` (storage, size, stride, offset) for every tensor:
views need no operators of their own. `Replay` makes one value by running only the operators on which it depends, and holds
only their storages. Random operators form a chain: `Draw` says which earlier one left the generator as this one found it.

    which operators a value needs          `Replay._steps`      last writer of its storage, and what that read, and so on
    the generator's state before a draw    `Replay._state_before`
    a draw that nobody needs               `Replay._discard`    into scratch memory: it still moves the generator

States (5 KB each) are kept only while another draw must start from them: two at a time where tensors are initialised in the
order of construction.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["OVERWRITES", "Draw", "Op", "Replay", "Tape", "View"]

# In-place operators that fill their first operand whatever it held; the random ones draw by its size alone.
OVERWRITES = frozenset({
    "normal_", "uniform_", "zero_", "fill_", "copy_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_",
})  # fmt: skip


@dataclass(frozen=True)
class View:
    """A strided tensor in storage number `storage`; sizes, strides and offset in elements."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()

    def fills(self, nbytes: int) -> bool:
        """Every byte of a storage of `nbytes` belongs to exactly one element of this view."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0 and self.numel * self.dtype.itemsize == nbytes


@dataclass(frozen=True)
class Draw:
    """Where a random operator finds its generator: as random operator `previous` left it, or in a state set from outside."""

    previous: int | None = None
    state: Tensor | None = None


@dataclass(frozen=True)
class Op:
    """One operator that wrote something.

    Attributes:
        target: `aten.normal_.default`.
        args, kwargs: as called, with a `View` for every tensor.
        outputs: of the flattened result, a View for each tensor that has a storage of its own, None for the rest.
        writes: storages that it changes or makes.
        reads: storages whose earlier content its result depends on; a storage it fills completely is not among them.
        draw: for random operators.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[View | None, ...]
    writes: tuple[int, ...]
    reads: tuple[int, ...]
    draw: Draw | None = None

    @property
    def name(self) -> str:
        return self.target.split(".")[1]


@dataclass
class Tape:
    """What a model's construction wrote: grows while recording, plain data (it pickles), not changed afterwards.

    Attributes:
        ops: operators in the order of construction.
        sizes: bytes of each storage.
        literals: storages that held values from outside (a list in the code, an array): never written.
        values: the model's parameters and buffers by name, tied ones under each of their names.
        aliases: tied parameters and buffers, other name -> the first.
    """

    ops: list[Op] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    literals: dict[int, Tensor] = field(default_factory=dict)
    values: dict[str, View] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        return self


class Replay:
    """Makes values from a tape.

    Attributes:
        live, peak: bytes of all storages that replay holds now, and at most so far; what it handed out does not count.
    """

    def __init__(self, tape: Tape):
        self.tape, self.live, self.peak = tape, 0, 0
        self._writers: dict[int, list[int]] = defaultdict(list)
        self._next_draws: dict[int, list[int]] = defaultdict(list)
        for index, op in enumerate(tape.ops):
            for storage in op.writes:
                self._writers[storage].append(index)
            if op.draw is not None and op.draw.previous is not None:
                self._next_draws[op.draw.previous].append(index)
        self._after: dict[int, Tensor] = {}  # state of the generator after a random op
        self._drawn: set[int] = set()
        self._awaited: Counter[int] = Counter()  # random op -> values still to be made that run it

    def run(self, views: Mapping[str, View]) -> Iterator[tuple[str, Tensor]]:
        """Make the given values one after the other, ordered by where their random numbers stand in the stream."""
        draws = {}
        for name, view in views.items():
            draws[name] = [i for i in self._steps([(view.storage, None)]) if self.tape.ops[i].draw is not None]
            self._awaited.update(draws[name])
        for name in sorted(views, key=lambda name: draws[name][:1]):
            yield name, self.value(views[name])

    def value(self, view: View) -> Tensor:
        """The final value of a view, in a storage of its own."""
        store: dict[int, Tensor] = {}
        try:
            self._execute(self._steps([(view.storage, None)]), store, keep={view.storage})
            if view.storage not in store:
                self._hold(store, view.storage, zero=True)  # never initialised: the single device has garbage here
            value = self._tensor(view, store)
        finally:
            self._drop(store, list(store))
        return value

    def _steps(self, wanted: list[tuple[int, int | None]]) -> list[int]:
        """Indices of the operators on which storages depend, each as it was before a given operator (None: at the end)."""
        needed: set[int] = set()
        pending = list(wanted)
        while pending:
            storage, before = pending.pop()
            writers = self._writers[storage]
            last = (len(writers) if before is None else bisect.bisect_left(writers, before)) - 1
            if last >= 0 and writers[last] not in needed:
                needed.add(writers[last])
                pending += [(read, writers[last]) for read in self.tape.ops[writers[last]].reads]
        return sorted(needed)

    def _execute(self, steps: list[int], store: dict[int, Tensor], keep: set[int]) -> None:
        """Run operators in order, dropping every storage outside `keep` after its last use."""
        last = {s: step for step in steps for s in (*self.tape.ops[step].reads, *self.tape.ops[step].writes)}
        for step in steps:
            self._run(step, store)
            self._awaited[step] -= 1
            self._forget(step)
            op = self.tape.ops[step]
            self._drop(store, [s for s in {*op.reads, *op.writes} if last[s] == step and s not in keep])

    def _run(self, index: int, store: dict[int, Tensor]) -> None:
        op = self.tape.ops[index]
        if op.draw is not None:
            self._state_before(index)  # earlier draws are made now, before this operator's own memory is held
        made = {view.storage for view in op.outputs if view is not None}
        for storage in dict.fromkeys((*op.reads, *op.writes)):
            if storage not in store and storage not in made:
                self._hold(store, storage, zero=storage in op.reads)
        place = lambda item: self._tensor(item, store) if isinstance(item, View) else item
        with torch.no_grad(), self._generator_of(index):
            result = _function(op.target)(*tree_map(place, op.args), **tree_map(place, dict(op.kwargs)))
        for view, item in zip(op.outputs, tree_flatten(result)[0], strict=True):
            if view is not None:
                self._adopt(store, view, item)

    def _adopt(self, store: dict[int, Tensor], view: View, result: Tensor) -> None:
        """Take an operator's result as the storage of `view`, copied where it is laid out in another way."""
        storage = result.untyped_storage()
        same = (tuple(result.shape), result.stride(), result.storage_offset()) == (view.size, view.stride, view.offset)
        if same and storage.nbytes() >= self.tape.sizes[view.storage]:
            self._put(
                store, view.storage, torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            )
        else:
            self._hold(store, view.storage, zero=False)
            self._tensor(view, store).copy_(result)

    # random numbers

    @contextlib.contextmanager
    def _generator_of(self, index: int) -> Iterator[None]:
        """Run the body from the generator state of random op `index`; the user's generator is left alone."""
        if self.tape.ops[index].draw is None:
            yield
            return
        state = self._state_before(index)
        mine = torch.get_rng_state()
        try:
            torch.set_rng_state(state)
            yield
            self._after[index] = torch.get_rng_state()
            self._drawn.add(index)
        finally:
            torch.set_rng_state(mine)

    def _state_before(self, index: int) -> Tensor:
        """State from which a random op draws; draws that nobody made yet are made in scratch memory, in order."""
        missing, draw = [], self.tape.ops[index].draw
        while draw is not None and draw.previous is not None and draw.previous not in self._after:
            missing.append(draw.previous)
            draw = self.tape.ops[draw.previous].draw
        for earlier in reversed(missing):
            self._discard(earlier)
            self._forget(earlier)
        draw = self.tape.ops[index].draw
        assert draw is not None
        return draw.state if draw.previous is None else self._after[draw.previous]  # type: ignore[return-value]

    def _discard(self, index: int) -> None:
        """Make a draw only to move the generator."""
        op = self.tape.ops[index]
        store: dict[int, Tensor] = {}
        views = [item for item in tree_flatten((op.args, dict(op.kwargs)))[0] if isinstance(item, View)]
        if op.name in OVERWRITES and len(views) == 1:
            scratch = torch.empty_strided(views[0].size, views[0].stride, dtype=views[0].dtype)
            nbytes = scratch.untyped_storage().nbytes()
            self._count(nbytes)
            place = lambda item: scratch if isinstance(item, View) else item
            with torch.no_grad(), self._generator_of(index):
                _function(op.target)(*tree_map(place, op.args), **tree_map(place, dict(op.kwargs)))
            self._count(-nbytes)
        else:  # how much it draws may depend on the values of its operands
            self._execute(self._steps([(view.storage, index) for view in views]), store, {v.storage for v in views})
            self._run(index, store)
        self._drop(store, list(store))

    def _forget(self, index: int) -> None:
        """Drop the generator state before op `index` unless another draw still starts from it."""
        draw = self.tape.ops[index].draw
        if draw is None or draw.previous is None:
            return
        if all(
            follower in self._drawn and self._awaited[follower] <= 0 for follower in self._next_draws[draw.previous]
        ):
            self._after.pop(draw.previous, None)

    # storages

    def _tensor(self, view: View, store: dict[int, Tensor]) -> Tensor:
        storage = store[view.storage].untyped_storage()
        return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.size, view.stride)

    def _hold(self, store: dict[int, Tensor], storage: int, *, zero: bool) -> None:
        literal = self.tape.literals.get(storage)
        if literal is not None:
            store[storage] = literal
            return
        make = torch.zeros if zero else torch.empty
        self._put(store, storage, make(self.tape.sizes[storage], dtype=torch.uint8))

    def _put(self, store: dict[int, Tensor], storage: int, flat: Tensor) -> None:
        store[storage] = flat
        self._count(flat.nbytes)

    def _drop(self, store: dict[int, Tensor], storages: Iterable[int]) -> None:
        for storage in storages:
            flat = store.pop(storage, None)
            if flat is not None and storage not in self.tape.literals:
                self._count(-flat.nbytes)

    def _count(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def _function(target: str) -> Any:
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
