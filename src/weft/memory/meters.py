"""`meter()`: how many bytes tensors take, now and at most, and what they are.

On the CPU, where torch has no such figures, it counts what is allocated while it is open and the tensors it is told about (a
model's parameters, gradients and buffers, an optimizer's state, older than it or not); on CUDA all tensors of the process on
the device. Bytes are as asked for; the allocator's rounding and free lists are not tensors.

    with weft.memory.meter(model, optimizer) as m:
        for batch in loader:
            m.count(batch, "input")
            ...
            print(m)                    # 83.1 MiB now, 244.0 MiB at most: activation 190.2, parameter 18.1, ...

Categories  `parameter`, `gradient`, `optimizer`, `buffer` are recognised from the model and the optimizer, `input` is what is
            counted as such, `workspace` what operators take and give back while they run, `activation` everything else.
Cost        a table entry per allocation and a hook per finished gradient: below 1 % of a training step (docs/make-it-fit.md),
            so a meter may stay on. The fallback without the native library is slower and does not see workspace: `m.note`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from weft.memory.arguments import device_of, expect
from weft.memory.counting import Counter, CudaCounter, DispatchCounter, NativeCounter
from weft.memory.native import NativeUnavailable, cuda

__all__ = ["Meter", "meter"]

T = TypeVar("T")

Method = Literal["auto", "native", "dispatch"]


def meter(
    model: nn.Module | Iterable[nn.Module] | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    device: torch.device | str | None = None,
    method: Method = "auto",
) -> Meter:
    """Count the bytes of tensors from now on; see the module for what counts.

    Args:
        model: one or several, whose parameters, gradients and buffers are told apart.
        optimizer: one or several; those that step the model's parameters are found without being named.
        device: of the tensors; that of the model's parameters by default, else the CPU.
        method: on the CPU, "native" needs the compiled allocator, "dispatch" watches operators from Python, "auto" takes the
            first that works.

    Returns:
        A `Meter`, counting. Use it as a context manager, or `close` it.

    Raises:
        ValueError: another kind of device or method, or no such models and optimizers.
        NativeUnavailable: method "native" where there is no compiled allocator.
    """
    models = _all("model", model, nn.Module)
    optimizers = _all("optimizer", optimizer, Optimizer)
    if device is None:
        device = next((p.device for m in models for p in m.parameters() if p.device.type != "meta"), "cpu")
    return Meter(_counter(device_of("meter: device", device), method), models, optimizers)


def _all(what: str, given: Any, kind: type[T]) -> list[T]:
    """One, several or none of a kind, as a list."""
    found = (
        [] if given is None else list(given) if isinstance(given, Iterable) and not isinstance(given, kind) else [given]
    )
    for one in found:
        expect(f"meter: {what}", one, kind)
    return found


def _counter(device: torch.device, method: Method) -> Counter:
    if method not in ("auto", "native", "dispatch"):
        raise ValueError(f"meter: method must be auto, native or dispatch, got {method!r}")
    if device.type == "cuda":
        if book := cuda.installed():
            return NativeCounter(book)
        index = torch.cuda.current_device() if device.index is None else device.index
        return CudaCounter(torch.device("cuda", index))
    if method == "dispatch":
        return DispatchCounter()
    try:
        return NativeCounter()
    except NativeUnavailable:
        if method == "native":
            raise
        return DispatchCounter()


@final
class Meter:
    """Bytes of tensors while it is open; see `meter`. After `close` the figures stay as they were.

    Attributes:
        exact: every byte is seen, workspace included.
        note: what is counted, in words.
    """

    def __init__(self, counter: Counter, models: Iterable[nn.Module] = (), optimizers: Iterable[Optimizer] = ()):
        self._counter = counter
        self.exact, self.note = counter.exact, counter.note
        self._models = weakref.WeakSet(models)
        self._optimizers = weakref.WeakSet(optimizers)
        self._state_size: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._open = True
        self._label()
        self._hooks = list(self._hook())
        # A meter that is forgotten must not leave hooks behind.
        self._end = weakref.finalize(self, _end, counter, self._hooks)

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return self._counter.live

    @property
    def peak(self) -> int:
        """Most bytes alive at any moment since the meter was made, or since `reset_peak`."""
        return self._counter.peak

    def by_category(self) -> dict[str, int]:
        """Bytes alive now, by category; they add up to `live`."""
        self._label()
        return self._counter.by_category()

    def peak_by_category(self) -> dict[str, int]:
        """Bytes by category at the moment of the peak; they add up to `peak`."""
        self._label()
        return self._counter.peak_by_category()

    def reset_peak(self) -> None:
        """Forget the peak: what is alive now is the peak so far. A closed meter keeps its peak."""
        if self._open:
            self._label()
            self._counter.reset_peak()

    def count(self, tensors: Any, category: str) -> None:
        """Count all tensors in a nesting of dicts, lists and tuples under a category (`input`, say), each storage once.

        Raises:
            ValueError: no such category.
        """
        for tensor in tree_leaves(tensors):
            if self._open and isinstance(tensor, Tensor):
                self._counter.count(tensor, category)

    def close(self) -> None:
        """Stop counting."""
        if self._open:
            self._label()
            self._open = False
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        by = sorted(self.peak_by_category().items(), key=lambda item: -item[1])
        parts = ", ".join(f"{category} {nbytes / 2**20:,.1f}" for category, nbytes in by if nbytes)
        return f"{self.live / 2**20:,.1f} MiB now, {self.peak / 2**20:,.1f} MiB at most" + (
            f": {parts}" if parts else ""
        )

    # -- recognising ----------------------------------------------------------------------------------------------------

    def _label(self) -> None:
        """Tell the counter what is what now: parameters may have been added or replaced, gradients made."""
        if not self._open:
            return
        for model in self._models:
            for parameter in model.parameters():
                self._counter.count(parameter, "parameter")
                if parameter.grad is not None:
                    self._counter.count(parameter.grad, "gradient")
            for buffer in model.buffers():
                self._counter.count(buffer, "buffer")
        for optimizer in self._optimizers:
            self._label_state(optimizer)

    def _label_state(self, optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            for tensor in tree_leaves(state):
                if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                    self._counter.count(tensor, "optimizer")

    def _label_new_state(self, optimizer: Optimizer) -> None:
        """As `_label_state`, after a step: at no cost in the usual case that the step has made no new state."""
        size = sum(map(len, optimizer.state.values()))
        if self._state_size.get(optimizer) != size:
            self._state_size[optimizer] = size
            self._label_state(optimizer)

    def _hook(self) -> Iterator[Any]:
        """Hooks for what may be gone before anyone asks: gradients when they are ready, optimizer states after a step."""
        counter = self._counter

        def ready(parameter: Tensor) -> None:
            if parameter.grad is not None:
                counter.count(parameter.grad, "gradient")

        parameters = {id(p): p for model in self._models for p in model.parameters() if p.requires_grad and p.is_leaf}
        for parameter in parameters.values():
            yield parameter.register_post_accumulate_grad_hook(ready)
        if not parameters and not self._optimizers:
            return
        # The hooks are torch's, and for all optimizers: they must not keep the meter alive.
        owner, known = weakref.ref(self), frozenset(parameters)

        def stepping(optimizer: Optimizer, *_: Any) -> None:
            counter.stepping()

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            this = owner()
            if this is not None and this._open and this._is_ours(optimizer, known):
                this._optimizers.add(optimizer)
                this._label_new_state(optimizer)
                counter.stepped()

        yield register_optimizer_step_pre_hook(stepping)
        yield register_optimizer_step_post_hook(stepped)

    def _is_ours(self, optimizer: Optimizer, parameters: frozenset[int]) -> bool:
        return optimizer in self._optimizers or any(
            id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]
        )


def _end(counter: Counter, hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    counter.close()
