"""Trace one step of a model: what it allocates, for how long, and what each operator costs.

    trace       a model, a batch, a loss and an optimizer; nothing of theirs is changed
    Recorder    any code of your own                                                        `recorder`

Two ways. *Fake*: no numbers, no memory, any device (`fakes`). *Real*: the step runs, for models that look at their data. Left to
itself `trace` tries the first and takes the second where the model needs its data.
Costs: measured operator by operator where the device is at hand, else from rates (`costs`).
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from weft.cluster.device import Device
from weft.cluster.library import device as library_device
from weft.graph.batch import call, flatten_batch
from weft.memory.arguments import expect
from weft.memory.private import unlogged
from weft.memory.record import Trace
from weft.memory.tracing.costs import CostTable, clock, gauge, measure_operators
from weft.memory.tracing.fakes import AsCuda, AsKernels, Fakes, at_once, emulates_cuda
from weft.memory.tracing.lone import count_references
from weft.memory.tracing.recorder import Recorder
from weft.memory.tracing.untouched import Untouched

__all__ = ["trace"]

REPEATS = 3  # recorded steps of a real trace that is timed
UNKNOWN_GPU = "A100-80GB"  # whose rates price a step for "cuda" where there is none


def trace(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    *,
    device: str | torch.device | Device | None = None,
    fake: bool | None = None,
    costs: CostTable | Device | str | None = None,
) -> Trace:
    """One step of training: forward, backward and, if there is an optimizer, its update, as eager torch would run it.

    Model, gradients, optimizer and random generators are afterwards as they were. Gradients are taken to be absent before
    the step (`zero_grad()`), the optimizer's state to be there. If nothing in the model wants a gradient (it is frozen, or
    `torch.no_grad` is on), the step is the forward pass alone, and a note says so.

    Args:
        model: in the mode (train, eval) in which it shall run; on any device, "meta" too.
        batch, loss: as for `weft.plan`; see `weft.graph.batch`.
        optimizer: one over the model's parameters, or a function that makes one of a list of parameters (`torch.optim.AdamW`).
        device: "cpu", "cuda", a name of `weft.cluster.library` ("A100-80GB") or a `weft.cluster.Device`; by default where the
            model is. One that is not at hand is imitated.
        fake: True: with fake tensors. False: really. None: with fake tensors unless the model looks at its data or makes sparse
            gradients.
        costs: a table; a `Device` or its name for its rates; "measure" to measure the operators here. By default they are
            measured if the device is at hand.
    Raises:
        ValueError: the model needs its data and has none, or fake=False for a device that is not at hand; there is no real
            scalar with a gradient to minimise; the optimizer has nothing to update, or runs the model itself (`LBFGS`).
    """
    expect("trace: model", model, nn.Module)
    where = _Place(model, device)
    step = _Step(model, batch, loss, optimizer)
    if fake is False and not where.at_hand:
        raise ValueError(
            f"trace: fake=False, but the model cannot run on {where.name} here; leave fake out, or move the model"
        )
    problem: Exception | None = None
    if fake is not False:
        try:
            with unlogged():
                return _fake(step, where, costs, alone=bool(fake) or not where.at_hand)
        except (
            Exception
        ) as error:  # it looks at its data, or does else what fake tensors do not allow: numpy(), extensions
            problem = error
        if fake or not where.at_hand:
            raise ValueError(
                f"trace: {type(model).__name__} cannot run with fake tensors, perhaps because it looks at its data: "
                f"{type(problem).__name__}: {_first_line(problem)}. "
                + ("Use fake=False" if where.at_hand else f"Trace it where it can run; {where.name} is not at hand")
            ) from problem
    found = _real(step, where, costs)
    if problem is None:
        return found
    note = f"run with real tensors, since fake ones would not do: {type(problem).__name__}: {_first_line(problem)}"
    return _noted(found, note)


class _Place:
    """Where the step is to run: torch's name of the device, and what it is called in the trace."""

    def __init__(self, model: nn.Module, device: str | torch.device | Device | None):
        tensors = [*model.parameters(), *model.buffers()]
        own = str(tensors[0].device) if tensors else "cpu"
        self.rates: Device | None = None
        if device is None:
            self.torch = "cpu" if own == "meta" else own
        elif isinstance(device, torch.device) or (isinstance(device, str) and device.split(":")[0] in ("cpu", "cuda")):
            self.torch = str(device)
        else:
            self.rates = device if isinstance(device, Device) else library_device(device)
            self.torch = "cpu" if self.rates.kind.startswith("cpu") else "cuda"
        if self.rates is None:
            self.rates = library_device("cpu-core" if self.torch == "cpu" else _present_gpu())
            self.name = self.torch
        else:
            self.name = self.rates.name
        # With a named device the model may be here by chance: its costs are those of the device, not of this machine.
        same = self.torch.split(":")[0] == own.split(":")[0]
        self.at_hand = same and (device is None or not isinstance(device, Device))
        if isinstance(device, str) and self.name != self.torch:
            self.at_hand = False


def _present_gpu() -> str:
    """The library's name of the GPU that is here, or a usual one."""
    if torch.cuda.is_available():
        try:
            return library_device(torch.cuda.get_device_name().replace("NVIDIA ", "")).name
        except ValueError:
            pass
    return UNKNOWN_GPU


class _Step:
    """A model, what it is called with, and what follows."""

    def __init__(self, model: nn.Module, batch: Any, loss: Any, optimizer: Any):
        self.model, self.batch, self.loss = model, batch, loss
        self.leaves, self.paths, _ = flatten_batch(batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.forward_only = (
            not (trained or any(leaf.requires_grad for leaf in self.leaves)) or not torch.is_grad_enabled()
        )
        self.optimizer = self._made(optimizer, trained)

    def _made(self, optimizer: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        """The optimizer, whose step can be traced.

        Raises:
            ValueError: it cannot.
        """
        if optimizer is None:
            return None
        if self.forward_only:
            raise ValueError(
                "trace: nothing in the model wants a gradient, so there is nothing for an optimizer to update; leave optimizer "
                "out to trace the forward pass alone, or set requires_grad"
            )
        if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(trained)
        expect("trace: optimizer, or what it makes,", optimizer, torch.optim.Optimizer)
        wanted = inspect.signature(optimizer.step).parameters.values()
        if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in wanted):
            raise ValueError(
                f"trace: {type(optimizer).__name__} runs the model itself, by a closure, as often as it likes: there is no one "
                "step to trace. Leave optimizer out; what its state takes is then not in the trace"
            )
        return optimizer

    @property
    def notes(self) -> list[str]:
        return ["nothing wants a gradient: the step is the forward pass alone"] if self.forward_only else []

    def run(self, batch: Any, optimizer: torch.optim.Optimizer | None) -> Tensor:
        value = call(self.model, batch, self.loss)
        if not self.forward_only:
            if not value.requires_grad or value.is_complex():
                why = f"it is {value.dtype}" if value.is_complex() else "it leads back to no parameter"
                raise ValueError(
                    f"loss: must be a real scalar with a gradient, and {why}; return one such as (a - b).abs().mean()"
                )
            value.backward()
        if optimizer is not None:
            optimizer.step()
        return value

    def warm(self, optimizer: torch.optim.Optimizer) -> None:
        """One update by gradients of zero: makes the optimizer's state."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _fake(step: _Step, where: _Place, costs: Any, alone: bool) -> Trace:
    """
    Args:
        alone: there is no other way; what is not known is noted.
    """
    count_references(FakeTensor)
    fakes = Fakes(where.torch)
    batch = fakes.nested(step.batch)
    optimizer = None if step.optimizer is None else fakes.optimizer(step.optimizer)
    with ExitStack() as stack:
        stack.enter_context(Untouched(step.model))
        stack.enter_context(fakes.inside(step.model))
        stack.enter_context(_no_collection())
        if emulates_cuda(where.torch):
            stack.enter_context(AsCuda())
            if optimizer is not None:
                at_once(optimizer)
        stack.enter_context(fakes.mode)
        stack.enter_context(AsKernels())
        if optimizer is not None:
            step.warm(optimizer)
        recorder = Recorder(step.model, inputs=list(zip(step.paths, flatten_batch(batch)[0], strict=True)))
        if optimizer is not None:
            recorder.expect_state(optimizer)
        with recorder:
            held = step.run(batch, optimizer)
    del held
    recorder.notes += step.notes
    if recorder.sparse:
        note = "how many entries sparse tensors have depends on the data: they are taken to have none, so a step takes more bytes"
        if not alone:
            raise ValueError(note)
        recorder.notes.append(note)
    if recorder.views_written:
        recorder.notes.append(
            f"views are written in place {recorder.views_written} times: their backward is traced with other operators than "
            "a real step runs (see weft.memory.tracing.fakes); fake=False traces those"
        )
    if emulates_cuda(where.torch):
        recorder.notes.append(
            f"{where.name} imitated without CUDA: attention, dropout and batch norm as it would run them, others as the CPU "
            "does; workspace unknown"
        )
    table = _table(recorder, where, costs)
    if not (table.measured or table.workspace or emulates_cuda(where.torch)):
        recorder.notes.append(
            f"nothing was measured: seconds are those of the rates of {table.device}, and the workspace of operators is unknown, "
            "so that a step may take more bytes"
        )
    return recorder.trace(table)


def _real(step: _Step, where: _Place, costs: Any) -> Trace:
    timed = costs is None or costs == "measure"
    recorders: list[Recorder] = []
    with Untouched(step.model, step.optimizer) as untouched, _no_collection():
        for parameter in step.model.parameters():
            parameter.grad = None
        for _ in range(REPEATS if timed else 1):
            if step.optimizer is not None and not step.optimizer.state:  # rewound, it has none again
                with Recorder(step.model, before_write=untouched.before_write):
                    step.warm(step.optimizer)
            recorder = Recorder(
                step.model,
                inputs=list(zip(step.paths, step.leaves, strict=True)),
                clock=clock(where.torch) if timed else None,
                gauge=gauge(where.torch),
                before_write=untouched.before_write,
            )
            if step.optimizer is not None:
                recorder.expect_state(step.optimizer)
            with recorder:
                held = step.run(step.batch, step.optimizer)
            del held
            recorder.notes += step.notes
            recorders.append(recorder)
            untouched.rewind()
            for parameter in step.model.parameters():
                parameter.grad = None
    if not timed:
        return recorder.trace(_table(recorder, where, costs))
    steps = [(r.works, r.measured) for r in recorders]
    return recorder.trace(CostTable.from_steps(steps, where.name))


def _table(recorder: Recorder, where: _Place, costs: Any) -> CostTable:
    """The cost table that was asked for, with rates for what it lacks."""
    if isinstance(costs, CostTable):
        rates = where.rates
        table = costs
    elif (costs is None and where.at_hand) or costs == "measure":
        rates = where.rates
        table = measure_operators(recorder.samples, where.torch.split(":")[0])
    else:
        rates = where.rates if costs is None else costs if isinstance(costs, Device) else library_device(costs)
        table = CostTable(rates.name, {})
    return table.over(CostTable.from_rates(recorder.works, rates))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection at random moments: what dies then would seem to die by the operator that happened to run."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _noted(found: Trace, note: str) -> Trace:
    return replace(found, notes=(*found.notes, note))
