"""Record what runs: every operator call and every allocation, with the moment at which its bytes were given back.

Problem    Which operators ran in a block of Python code, autograd's backward included; which bytes each read, made and
           overwrote; between which two operators eager execution freed each allocation.
Method     A dispatch mode sees every call below autograd, in the thread that computes (autograd hands it on to its own).
           Allocations are known by their storage, which all views and autograd's saved copies share: a weak reference to
           the storage object rings when the last of them is gone, in the middle of an autograd node too.
           Calls that only look at a storage (views), and such as ask for shapes, are no operators of the trace.
Guarantee  `Trace.live` without workspace equals what torch's profiler counts in a run without the recorder, operator by
           operator (tests/memory/tracing/test_recorder.py).

Where a call belongs: in forward, to the innermost `nn.Module` being called; in backward, to the module that ran when the
autograd node was made (nodes are numbered).
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weft.memory.private import QuickMode, backward_node, faking, in_backward, is_wrapper, sequence_number
from weft.memory.record import Category, Op, Phase, Trace, Value
from weft.memory.tracing.costs import CostTable, Sample, Work, describe, sample
from weft.memory.tracing.lone import alone, count_references
from weft.memory.tracing.operators import (
    communicates,
    draws,
    fills,
    is_dense,
    is_metadata,
    is_view,
    label,
    makes_empty,
    moved_statistics,
    over_gradient,
    reads_bytes,
    tensors_of,
    wrapped_bytes,
    writes,
)

__all__ = ["Recorder", "storages_of"]

CONSTANT = "aten.lift_fresh.default"
"""What `torch.tensor(...)` ends with. Its bytes were made before it, out of sight: they count as an input, as under a limit."""


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def storages_of(tensor: Tensor) -> tuple[Any, ...]:
    """Storages that hold a tensor's bytes: one, or those of indices and values of a sparse tensor; none if it is opaque."""
    if tensor.layout is torch.strided:
        try:
            return (tensor.untyped_storage(),)
        except (NotImplementedError, RuntimeError):
            return ()
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices().untyped_storage(), tensor._values().untyped_storage())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tuple(t.untyped_storage() for t in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    return ()


@dataclass(slots=True)
class _Draft:
    """A `Value` being written."""

    nbytes: int
    storage: int
    born: int
    dies: int = -2  # -2: still there
    module: str = ""


@dataclass(slots=True)
class _Held:
    """A storage that is there: the number of its present value, and the bell that rings when it is freed."""

    value: int
    bell: Any = None


@dataclass(slots=True)
class _Known:
    """What a storage is to the user."""

    category: Category
    name: str


@dataclass
class _Row:
    """An `Op` being written."""

    name: str
    module: str
    phase: Phase
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    overwrites: tuple[tuple[int, int], ...]
    moves: frozenset[int]  # running statistics
    repeatable: bool
    random: bool
    dense: bool
    workspace: int | None  # None: not measured
    wrapped: int
    seconds: float
    work: Work | None
    over: str  # what may write over the first read, if that dies here


class Recorder:
    """Context manager that records the code inside it; `trace()` afterwards gives the `Trace`.

    Usable around any code: a step of your own loop, or one part of it. With a model, parameters, buffers and gradients get
    their names; without, parameters are recognised by their type. An optimizer need not be given: its step announces itself.

    Args:
        model: whose parameters, buffers and module paths are known by name.
        inputs: (path, tensor) pairs of the batch, for names.
        priced: describe every call for a cost table (`works`, `samples`).
        clock: seconds now (`costs.clock()`), or None not to time calls.
        gauge: counts allocations around a call, workspace included: `mark()` before, `since()` after gives (most bytes, bytes
            left) relative to the mark; `weft.memory.native.ledger()` is one. None: no workspace is measured.
        before_write: called with the storage before a call changes something that was there before the recorded block.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        inputs: Sequence[tuple[str, Tensor]] = (),
        priced: bool = True,
        clock: Callable[[], float] | None = None,
        gauge: Any = None,
        before_write: Callable[[Any], None] | None = None,
    ):
        self.model, self._priced, self._clock, self._gauge = model, priced, clock, gauge
        self._before_write = before_write
        self.samples: dict[str, Sample] = {}  # by signature
        self._inputs = list(inputs)
        self.notes: list[str] = []
        self.views_written = 0  # calls in forward that wrote a view in place which has a gradient
        self.sparse = 0  # calls that made sparse tensors
        self._rows: list[_Row] = []
        self._unfilled: dict[int, int] = {}  # values made empty that no operator has filled yet -> who made them
        self._values: list[_Draft] = []
        self._known: dict[int, _Known] = {}  # by storage number
        self._held: dict[int, _Held] = {}  # by id of the storage object, while it lives
        self._began: list[int] = []  # by storage number: the operator that made it, -1 if it was there before
        self._running: list[int] | None = None  # values that died in the call under way
        self._path_of_node: dict[int, str] = {}
        self._sorted_nodes: list[int] | None = None
        self._stack: list[str] = []
        self._paths: dict[int, str] = {}
        self._phase: Phase = "forward"
        self._backward_path = ""
        self._names: dict[int, str] = {}  # id of a parameter -> name
        self._optimizers: list[Optimizer] = []
        self._mode: Any = None
        self._hooks: list[Any] = []
        self._finished = False

    # -- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if self._mode is not None or self._finished:
            raise RuntimeError("Recorder: it records one block once; make another one for another block")
        count_references(Tensor)
        if self.model is not None:
            self._adopt_model(self.model)
        for path, tensor in self._inputs:
            self._adopt(tensor, "input", path)
        for optimizer in self._optimizers:
            self._see_state(optimizer, self._adopt)
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        if self.model is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._mark_gradient(name)))
        self._mode = _Mode(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._mode.__exit__(*problem)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._mode, self._finished = [], None, True
        if self.model is not None:  # what became a buffer or a gradient meanwhile
            for name, buffer in self.model.named_buffers():
                self._tell(buffer, "buffer", name)
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    self._tell(parameter.grad, "gradient", name)
        end = len(self._rows)
        for held in self._held.values():
            self._values[held.value].dies = end
        self._held.clear()
        self._names.clear()
        self._inputs.clear()
        self._optimizers.clear()

    def _adopt_model(self, model: nn.Module) -> None:
        self._paths = {id(module): name for name, module in model.named_modules()}
        for name, parameter in model.named_parameters():
            self._names[id(parameter)] = name
            self._adopt(parameter, "parameter", name)
            if parameter.grad is not None:
                self._adopt(parameter.grad, "gradient", name)
        for name, buffer in model.named_buffers():
            self._adopt(buffer, "buffer", name)

    # -- storages -----------------------------------------------------------------------------------------------------

    def _adopt(self, tensor: Tensor, category: Category, name: str) -> None:
        """A tensor that was there before: its storage becomes a value born before the first operator."""
        for storage in storages_of(tensor):
            if id(storage) not in self._held:
                self._hold(storage, -1)
                self._known[self._values[-1].storage] = _Known(category, name)

    def _tell(self, tensor: Tensor, category: Category, name: str) -> None:
        """Say what a storage has become to the user."""
        for storage in storages_of(tensor):
            held = self._held.get(id(storage))
            if held is not None:
                self._known.setdefault(self._values[held.value].storage, _Known(category, name))

    def _hold(self, storage: Any, born: int, module: str = "") -> int:
        """A new value in a storage not met before; returns its number."""
        number, key = len(self._values), id(storage)
        self._values.append(_Draft(storage.nbytes(), len(self._began), born, module=module))
        self._began.append(born)
        self._held[key] = _Held(number, weakref.ref(storage, lambda _: self._freed(key)))
        return number

    def _freed(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is None:
            return
        if self._running is None:
            self._values[held.value].dies = len(self._rows) - 1
        else:
            self._running.append(held.value)

    def _value_of(self, tensor: Tensor, storage: Any) -> int:
        held = self._held.get(id(storage))
        if held is None:
            self._adopt(tensor, *self._guess(tensor))
            held = self._held[id(storage)]
        return held.value

    def _guess(self, tensor: Tensor) -> tuple[Category, str]:
        """What a tensor is that was there before the first operator and that nobody has announced."""
        if isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            return "parameter", self._names.get(id(tensor), "")
        return "input", ""

    # -- one call -----------------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operator and write down what it did."""
        phase, module = self._place()
        if is_metadata(func) or label(func) == CONSTANT:
            return func(*args, **kwargs)
        variant = over_gradient(func) if phase == "backward" else None
        # asked before anything here refers to a tensor
        over = variant[0] if variant is not None and alone(label(func), args) else ""
        index = len(self._rows)
        before = [
            (tensor, storage) for tensor in tensors_of((*args, *kwargs.values())) for storage in storages_of(tensor)
        ]
        read = dict.fromkeys(self._value_of(tensor, storage) for tensor, storage in before)
        targets = list(writes(func, args, kwargs))
        written = dict.fromkeys(self._held[id(s)].value for tensor in targets for s in storages_of(tensor))
        for target in targets:
            if fills(func, target):
                self._filled(target)
        self.views_written += phase == "forward" and any(t._is_view() and t.requires_grad for t in targets)
        moves = frozenset(self._held[id(s)].value for i in moved_statistics(func, args) for s in storages_of(args[i]))
        objects = {id(storage): storage for _, storage in before}
        if self._before_write is not None:
            self._announce(moves.union(written), objects)
        self._running = []
        try:
            result, seconds, taken = self._timed(func, args, kwargs)
        finally:
            died, self._running = self._running, None
        outputs = list(tensors_of((result,)))
        self.sparse += any(output.layout in _SPARSE for output in outputs)
        makes, overwrites = [], []
        for number in written:
            new = self._overwrite(number, index, objects, module)
            makes.append(new)
            if self._values[new].storage == self._values[number].storage:
                overwrites.append((number, new))
        for tensor in outputs:
            for storage in storages_of(tensor):
                if id(storage) not in self._held:
                    makes.append(self._hold(storage, index, module))
        if makes or not outputs or not is_view(func):
            if not reads_bytes(func):
                read = written
            if makes_empty(func):
                self._unfilled.update(dict.fromkeys(makes, index))
            made = sum(self._values[v].nbytes for v in makes if v not in {new for _, new in overwrites})
            self._rows.append(
                _Row(
                    label(func), module, phase, tuple(read), tuple(makes), tuple(overwrites), moves,
                    repeatable=bool(outputs or written)
                    and not (communicates(func) or makes_empty(func)),
                    random=draws(func, args, kwargs), dense=is_dense(func), seconds=seconds,
                    workspace=None if self._gauge is None else max(0, taken - made), wrapped=wrapped_bytes(func, args),
                    work=self._describe(func, args, kwargs, result) if self._priced else None, over=over,
                )
            )  # fmt: skip
        for number in died:
            self._values[number].dies = len(self._rows) - 1
        return result

    def _timed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, float, int]:
        """Result, seconds, and the most bytes that were allocated at once meanwhile (0 without a gauge)."""
        clock, gauge = self._clock, self._gauge
        if gauge is not None:
            gauge.mark()
        start = clock() if clock is not None else 0.0
        result = func(*args, **kwargs)
        seconds = clock() - start if clock is not None else 0.0
        return result, seconds, gauge.since()[0] if gauge is not None else 0

    def _describe(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Work:
        work = describe(func, args, kwargs, result)
        if work.signature not in self.samples:
            self.samples[work.signature] = sample(func, args, kwargs)
        return work

    def _announce(self, changed: Set[int], objects: Mapping[int, Any]) -> None:
        """Tell `before_write` of the values that the call is about to change, unless the recorded block made them."""
        for key, storage in objects.items():
            number = self._held[key].value
            if number in changed and self._began[self._values[number].storage] < 0:
                self._before_write(storage)

    def _filled(self, tensor: Tensor) -> None:
        """An operator is about to give a storage all its content. If it was made empty, it can be made again."""
        for storage in storages_of(tensor):
            if (index := self._unfilled.pop(self._held[id(storage)].value, None)) is not None:
                self._rows[index].repeatable = True

    def _overwrite(self, number: int, index: int, objects: Mapping[int, Any], module: str) -> int:
        """The storage of a value gets new contents: the value ends, another one begins."""
        old = self._values[number]
        held, storage = next(
            (self._held[key], storage) for key, storage in objects.items() if self._held[key].value == number
        )
        old.dies = index
        new = len(self._values)
        self._values.append(_Draft(storage.nbytes(), old.storage, index, module=old.module or module))
        if storage.nbytes() != old.nbytes:  # resized: other bytes at another address
            self._values[new].storage = len(self._began)
            if old.storage in self._known:
                self._known[len(self._began)] = self._known[old.storage]
            self._began.append(self._began[old.storage])
        held.value = new
        return new

    # -- where ----------------------------------------------------------------------------------------------------------

    def _place(self) -> tuple[Phase, str]:
        """Phase and module path of the call under way; remembers which module made the newest autograd node."""
        if self._phase == "optimizer":
            return "optimizer", ""
        path = self._stack[-1] if self._stack else ""
        if not in_backward():
            self._path_of_node.setdefault(sequence_number(), path)
            return "forward", path
        if not self._stack:  # modules called in backward belong to a checkpointed forward
            number = backward_node()
            if number >= 0:
                self._backward_path = self._path_near(number)
            path = self._backward_path
        return "backward", path

    def _path_near(self, number: int) -> str:
        """Path of the module that made an autograd node, or the last one before it that made a known one."""
        found = self._path_of_node.get(number)
        if found is None:
            if self._sorted_nodes is None or len(self._sorted_nodes) != len(self._path_of_node):
                self._sorted_nodes = sorted(self._path_of_node)
            at = bisect_right(self._sorted_nodes, number)
            found = self._path_of_node[self._sorted_nodes[at - 1]] if at else ""
        return found

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        path = self._paths.get(id(module))
        if path is None:
            above = self._stack[-1] if self._stack else ""
            path = f"{above}.{type(module).__name__}" if above else type(module).__name__
        self._stack.append(path)

    def _leave_module(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        if self._stack:
            self._stack.pop()

    def _enter_optimizer(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._phase = "optimizer"
        self._see_state(optimizer, self._adopt)

    def _leave_optimizer(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._phase = "forward"
        self._see_state(optimizer, self._tell)

    def _see_state(self, optimizer: Optimizer, note: Callable[[Tensor, Category, str], None]) -> None:
        for parameter, state in optimizer.state.items():
            name = self._names.get(id(parameter), "")
            for key, value in state.items():
                for tensor in tensors_of((value,)):
                    note(tensor, "optimizer", f"{name}.{key}" if name else str(key))

    def expect_state(self, optimizer: Optimizer) -> None:
        """Count the state that an optimizer has when the block is entered among what was there before."""
        self._optimizers.append(optimizer)

    def _mark_gradient(self, name: str) -> Callable[[Tensor], None]:
        def mark(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._tell(parameter.grad, "gradient", name)

        return mark

    # -- the result -----------------------------------------------------------------------------------------------------

    @property
    def works(self) -> tuple[Work, ...]:
        """What each operator of the trace amounts to, in order; empty if calls were not described."""
        return tuple(row.work for row in self._rows if row.work is not None)

    @property
    def measured(self) -> tuple[float, ...]:
        """Seconds of each operator of the trace as the clock saw them, in order."""
        return tuple(row.seconds for row in self._rows)

    def trace(self, costs: CostTable | None = None, *, device: str = "cpu") -> Trace:
        """What was recorded.

        Args:
            costs: seconds (and workspace, where the gauge saw none) of the operators; by default seconds as timed here.
            device: for the trace; that of `costs` if they are given.
        Raises:
            RuntimeError: the block has not ended.
            ValueError: `costs` lack an operator.
        """
        if not self._finished:
            raise RuntimeError("Recorder: leave the with-block before asking for its trace")
        works = self.works
        seconds = self.measured if costs is None else [costs.of(work) for work in works]
        known = {} if costs is None else costs.workspace
        taken = [known.get(work.signature, 0) for work in works] or [0] * len(self._rows)
        spaces = [
            row.wrapped + (from_table if row.workspace is None else row.workspace)
            for row, from_table in zip(self._rows, taken, strict=True)
        ]
        values = tuple(self._value(draft) for draft in self._values)
        fixed = [value.category != "activation" for value in values]
        moved: frozenset[int] = frozenset().union(*(row.moves for row in self._rows))
        ops = tuple(
            Op(
                row.name, row.module, row.phase, row.reads, row.makes, row.overwrites, space, float(cost),
                repeatable=row.repeatable
                and not any(fixed[old] for old, _ in row.overwrites)
                and moved.isdisjoint(set(row.reads) - row.moves),
                random=row.random, dense=row.dense, over=row.over if self._dies_as_read(index, row, values) else "",
            )
            for index, (row, cost, space) in enumerate(zip(self._rows, seconds, spaces, strict=True))
        )  # fmt: skip
        name = type(self.model).__name__ if self.model is not None else ""
        measured = self._clock is not None if costs is None else costs.measured
        return Trace(ops, values, device if costs is None else costs.device, name, measured, tuple(self.notes))

    def _dies_as_read(self, index: int, row: _Row, values: Sequence[Value]) -> bool:
        """Whether an operator's first read is a gradient on its way that nobody has afterwards, and its result another one."""
        if not row.reads or len(row.makes) != 1:
            return False
        old, new = values[row.reads[0]], values[row.makes[0]]
        made = old.born >= 0 and self._rows[old.born].phase == "backward"
        return made and old.dies == index and old.category == new.category == "activation" and old.nbytes == new.nbytes

    def _value(self, draft: _Draft) -> Value:
        known = self._known.get(draft.storage)
        category: Category = known.category if known is not None else "activation"
        name = known.name if known is not None else draft.module
        return Value(draft.nbytes, draft.storage, category, name, draft.born, draft.dies)


class _Mode(QuickMode):
    """Hands every call to its recorder."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder, self.fakes = recorder, faking()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if faking() is not self.fakes:  # shapes that DTensor asks for in the middle of a step
            return func(*args, **kwargs)
        if any(is_wrapper(t) for t in tensors_of((*args, *kwargs.values()))):
            return NotImplemented  # DTensor and the like: their parts come back here
        return self.recorder.call(func, args, kwargs)
