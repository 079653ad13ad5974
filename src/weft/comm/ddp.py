"""Put an exchange under DistributedDataParallel, in one line.

    handle = attach(ddp, exchange, optimizer)        ...train as before...        handle.remove()

`attach` registers a communication hook: DDP hands over buckets of gradients during the backward pass, the exchange works on them
in its thread (or, where nothing but the mean is wanted, all-reduces them at once as DDP itself would), and the end of the
backward pass waits for the last. State belongs to parameters, not to buckets (R2), so DDP may rebuild its buckets and a
checkpoint fits any `bucket_cap_mb`. With `no_sync()` the exchange sees one accumulated gradient per synchronised step (R5).

    velocity memories   the momentum moves from the optimizer into the memory, buffers included; `remove` gives it back, and the
                        optimizer's own `state_dict` says it has it, so that a checkpoint fits a run without an exchange. Weight
                        decay is not exchanged and stays in the optimizer, with a momentum of its own: b <- m b + decay w, kept
                        beside the memory's state, makes one step of momentum SGD of both
    non-finite (R4)     a step that is not finite on any rank changes no memory and no parameter on any rank (with `optimizer`
                        given), and is counted in `exchange.skipped`; gradients arrive as NaN, so that a loss scaler sees it, and
                        not at all where no optimizer given holds the parameter: another one passes over it
    loss scaling (R4)   give `scaler`: gradients are unscaled before they reach a memory and scaled again afterwards
    every pass counts   each synchronised backward pass is a step of the memory. Results that no optimizer given has stepped with
                        are warned about once; added to the next pass's gradients under a velocity memory they are an error
    clipping (R6)       clip after the backward pass, as ever (after the scaler's `unscale_`); with a velocity memory clip inside
                        the memory: what arrives is a velocity, about 1/(1 - momentum) as long as a gradient, and a warning says
                        so where it is clipped
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from weft.comm.automatic import Auto, Tryout
from weft.comm.codec import Spec
from weft.comm.core import LOOK_EVERY
from weft.comm.exchange import Exchange
from weft.comm.memory import VelocityMemory
from weft.comm.moved_momentum import MovedMomentum, held_by
from weft.errors import together

__all__ = ["Handle", "attach"]


class _Switch:
    """The one hook that DDP allows, pointing at whoever is attached; nobody: plain all-reduce.

    A copy of the model (deepcopy, pickle) has a reducer of its own without any hook: its copy of this is of no use and says so.
    """

    def __init__(self, ddp: DistributedDataParallel | None = None):
        self.group: dist.ProcessGroup | None = None if ddp is None else ddp.process_group
        self.handle: Handle | None = None

    def __reduce__(self) -> tuple[type[_Switch], tuple[()]]:
        return _Switch, ()


def _hook(switch: _Switch, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    if switch.handle is not None:
        return switch.handle.take(bucket)
    assert switch.group is not None
    buffer = bucket.buffer().mul_(1 / switch.group.size())
    return dist.all_reduce(buffer, group=switch.group, async_op=True).get_future().then(_first)


_hook.__annotations__ = {}  # DDP compares annotations with classes; these here are strings


def _first(done: torch.futures.Future[list[Tensor]]) -> Tensor:
    return done.value()[0]


def attach(
    ddp: DistributedDataParallel,
    exchange: Exchange | Auto,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Handle:
    """Exchange the gradients of `ddp` by `exchange` from the next backward pass on. Every rank calls this at the same time.

    Args:
        ddp: without a communication hook of its own; `torch.compile(ddp)` is taken as ddp.
        exchange: see `Exchange`, one for each model; or `auto(link)`, which is decided here.
        optimizer: that of the model, or a list of them; needed by memories that exchange velocities (DGC), and to skip steps that
            are not finite: without one, gradients arrive as NaN.
        scaler: the loss scaler in use, if any.
    Returns:
        A handle; `handle.remove()` restores plain DDP.
    Raises:
        TypeError: gradients are sparse, or parameters complex.
        ValueError: momentum in two places, an Adam-like optimizer under a velocity memory or one that holds other parameters too
            (at the first backward pass: none holds some), another hook or group, an exchange at work for another model.
        ExchangeMismatch: on every rank, if ranks differ in options or tensors.

    >>> attach(torch.nn.Linear(2, 2), Exchange())
    Traceback (most recent call last):
    TypeError: attach: ddp must be a DistributedDataParallel, got Linear; wrap the model in torch.nn.parallel first
    """
    ddp = getattr(ddp, "_orig_mod", ddp)
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"attach: ddp must be a DistributedDataParallel, got {type(ddp).__name__}; wrap the model in torch.nn.parallel first"
        )
    for name, module in ddp.module.named_modules():
        if getattr(module, "sparse", False) is True:
            raise TypeError(
                f"attach: {name} ({type(module).__name__}) has sparse gradients, which no codec takes; make it with sparse=False"
            )
    for name, parameter in ddp.module.named_parameters():
        if not parameter.is_floating_point():
            raise TypeError(f"attach: {name} is {parameter.dtype}; an exchange takes real floating-point gradients")
    ddp._comm_hooks[:] = [(hook, state) for hook, state in ddp._comm_hooks if getattr(state, "group", ddp) is not None]
    switch = next((state for _, state in ddp._comm_hooks if isinstance(state, _Switch)), None)
    if switch is None and ddp._comm_hooks:
        raise ValueError("attach: ddp already has a communication hook, and DDP allows one; wrap the model anew")
    if switch is not None and switch.handle is not None:
        raise ValueError("attach: ddp already has an exchange; call remove() on its handle first")
    choice = exchange if isinstance(exchange, Auto) else None
    if isinstance(exchange, Auto):
        exchange = Exchange()
    if exchange.group is not None:
        if dist.get_process_group_ranks(exchange.group) != dist.get_process_group_ranks(ddp.process_group):
            raise ValueError("attach: exchange.group must have the ranks of ddp's own process group; leave it out")
    optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer or ())
    handle = Handle(ddp, exchange, optimizers, scaler, choice)
    if switch is None:
        switch = _Switch(ddp)
        ddp.register_comm_hook(switch, _hook)
    switch.handle = handle
    handle._switch = switch
    return handle


def _trained(ddp: DistributedDataParallel) -> dict[str, Tensor]:
    ignored = set(getattr(ddp, "parameters_to_ignore", ()))
    return {name: p for name, p in ddp.module.named_parameters() if p.requires_grad and name not in ignored}


def _specs(trained: Mapping[str, Tensor]) -> list[Spec]:
    return [Spec(name, tuple(p.shape), p.dtype) for name, p in trained.items()]


@final
class Handle:
    """What `attach` returns.

    Attributes:
        exchange: at work; with `auto` plain at first, then the one chosen.
        step: number of steps so far.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        exchange: Exchange,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        choice: Auto | None = None,
    ):
        self.ddp, self.exchange, self.optimizers, self.scaler = ddp, exchange, optimizers, scaler
        self._switch: _Switch | None = None
        self._parameters = {id(p): name for name, p in ddp.module.named_parameters()}
        self._layouts: dict[tuple[int, ...], tuple[list[Spec], list[int]]] = {}
        self.step = 0
        self._trained = _trained(ddp)  # once: DDP's buckets are of those that were to be trained when it was made
        self._listening: list[Any] = []
        self._unused = self._piled = self._told = False  # see `_count_passes`
        self._tryout = Tryout(choice, _specs(self._trained))
        self._open(exchange)
        self._works: list[tuple[dist.Work, Tensor]] = []
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._under_way = self._backward = False
        self._awaited: set[int] = set()  # parameters whose gradients have not come in this backward pass
        self._scale = 1.0
        self._skip = False
        self._warned = False
        self._due: set[int] = set()  # optimizers that have not taken their step since the last backward pass
        self._hooks = [
            register(hook)
            for optimizer in optimizers
            for register, hook in (
                (optimizer.register_step_pre_hook, self._before_step),
                (optimizer.register_state_dict_post_hook, lambda *args: self._momentum.saved(*args)),
                (optimizer.register_load_state_dict_post_hook, lambda given: self._momentum.loaded(given)),
            )
        ]

    @property
    def chosen(self) -> str:
        """With `auto`, the name of the choice once it is made, else ""."""
        return self._tryout.chosen

    @property
    def predicted(self) -> dict[str, float]:
        """With `auto`, step seconds by name."""
        return self._tryout.predicted

    def _open(self, exchange: Exchange) -> None:
        """Begin with an exchange: its group, its momentum."""
        momentum = MovedMomentum(exchange, self.optimizers, self._parameters)
        exchange.open(_specs(self._trained), group=self.ddp.process_group)
        self.exchange, self.step, self._momentum = exchange, exchange.next_step, momentum
        momentum.take()
        self._listen_no_more()
        if exchange.core.keeps and self.optimizers:
            self._listening = [p.register_hook(partial(self._arrives, p)) for p in self._trained.values()]

    def _listen_no_more(self) -> None:
        for hook in self._listening:
            hook.remove()
        self._listening = []

    # ---- during the backward pass

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: a bucket of gradients is ready."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if not self._under_way:
            self._begin()
        # In the first backward pass of a static graph no bucket says that it is the last.
        self._awaited.difference_update(map(id, parameters))
        last = bucket.is_last() or not self._awaited
        if self.exchange.plain:
            wired = self.exchange.wired
            work = dist.all_reduce(buffer.mul_(1 / wired.ranks), group=wired.group, async_op=True)
            self._works.append((work, buffer))
            result = work.get_future().then(_first)
            if last:
                self._end_soon()
            return result
        key = tuple(map(id, parameters))
        specs, sizes = self._layouts.get(key) or self._layout(key, parameters)
        scale = self._scale
        if scale != 1.0:
            buffer.mul_(1 / scale)
        devices = [buffer.device] if buffer.device.type != "cpu" else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)

        def done(error: BaseException | None) -> None:
            if error is not None:
                self._error = error  # raised by `_end`, where it keeps its class
            elif scale != 1.0:
                buffer.mul_(scale)
            if last or error is not None:
                self._over.set()
            future.set_result(buffer)

        self.exchange.submit(list(zip(specs, buffer.split(sizes), strict=True)), self.step, last, done)
        if last:
            self._end_soon()
        return future

    def _arrives(self, parameter: Tensor, gradient: Tensor) -> None:
        """A gradient is about to be added to `parameter.grad`: to results of the last exchange, if those were not used?"""
        if self._unused and not self._piled and parameter.grad is not None:
            self._piled = bool(parameter.grad.any())

    def _layout(self, key: tuple[int, ...], parameters: list[Tensor]) -> tuple[list[Spec], list[int]]:
        specs = [Spec(self._parameters[id(p)], tuple(p.shape), p.dtype) for p in parameters]
        found = self._layouts[key] = specs, [spec.numel for spec in specs]
        return found

    def _begin(self) -> None:
        following = self._tryout.began(self.exchange.wired)
        if following is not None:
            last = self.exchange
            self._momentum.give_back()
            self._open(following)
            last.close()
        self._under_way, self._skip, self._error = True, False, None
        self._over.clear()
        self._works.clear()
        self._awaited = set(map(id, self._trained.values()))
        self._before = self.exchange.skipped
        self._scale = float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else 1.0
        self.step = self.exchange.next_step

    def _end_soon(self) -> None:
        """All buckets are on their way: `_end` when the pass that brought the last is over.

        That is one within another where activation checkpointing is reentrant: the outer pass goes on when the inner one is over,
        and an end that was asked for by the first bucket would wait for gradients that come later.
        """
        # Under `ddp.join()` a rank without data goes through the steps of the others with zeros, outside of a backward pass.
        self._backward = torch._C._current_graph_task_id() >= 0
        if self._backward:  # ours comes before DDP's own callback, which would lose the class of an error
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        else:
            self._end()

    def _end(self) -> None:
        """The end of the backward pass: wait for the last bucket."""
        began = time.perf_counter()
        self._under_way = False
        if self.exchange.plain:
            with together("the all-reduce of gradients"):
                for work, _ in self._works:
                    work.wait()
            if self.optimizers and not all(bool(buffer.sum().isfinite()) for _, buffer in self._works):
                self._skip = not all(bool(buffer.isfinite().all()) for _, buffer in self._works)
            self.exchange.count_plain(self.step, self._skip)
        else:
            self._over.wait()  # the exchange thread answers within its timeout, with results or an error
            if self._error is not None:
                raise self._error
            self._count_passes()
            self._skip = self.exchange.skipped > self._before
            if self.ddp.find_unused_parameters and not self.ddp.static_graph and self._backward:
                grads = [(p, p.grad, None if p.grad is None else p.grad._version) for p in self.ddp.module.parameters()]
                # after DDP's own callback, which hands the results to the parameters
                after = partial(self._give_back, grads)
                torch.autograd.Variable._execution_engine.queue_callback(after)  # type: ignore[attr-defined]
        if self._skip and self.optimizers and self.scaler is None and self._backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._drop)  # type: ignore[attr-defined]
        self._due = set(map(id, self.optimizers))
        self._unused, self._piled = bool(self._due) and not self._skip, False
        waited = time.perf_counter() - began
        self.exchange.waited(waited)
        self._tryout.ended(waited, len(self._works))
        self.step += 1

    def _count_passes(self) -> None:
        """Look whether the results of the exchange before this one were used, as the memory takes for granted.

        Raises:
            ValueError: they are part of this one's gradients, and a velocity went through the momentum a second time; or, at the
                first pass, velocities have come to parameters that no optimizer given holds.
        """
        memory = self.exchange.memory
        name = type(memory).__name__
        self._momentum.check_all_held(self._trained)
        if self._piled and isinstance(memory, VelocityMemory):
            raise ValueError(
                f"attach: a second synchronised backward pass before the optimizer's step, onto gradients that {name} has "
                "delivered: they are velocities, and went through its momentum again. Accumulate under ddp.no_sync(), all passes "
                "of a step but the last"
            )
        if self._unused and not self._piled and not self._told:
            self._told = True
            warnings.warn(
                f"gradients were exchanged twice without a step of the optimizer between: {name} takes each synchronised "
                "backward pass for a step, and keeps what was not sent of gradients that were thrown away. Run a pass whose "
                "gradients are not used through ddp.module, or under ddp.no_sync().",
                stacklevel=2,
            )

    def _give_back(self, before: list[tuple[Tensor, Tensor | None, int | None]]) -> None:
        """Undo the step for parameters that no rank has used: DDP drops their results, and what a memory sent would be lost.

        DDP leaves their gradient as it was; every other one it has set or written, or it is a view of the bucket.
        """
        view = self.ddp.gradient_as_bucket_view
        unused = {
            self._parameters[id(parameter)]
            for parameter, grad, version in before
            if parameter.grad is None or (not view and parameter.grad is grad and grad._version == version)
        }
        self.exchange.core.give_back(unused)

    def _drop(self) -> None:
        """Take a skipped step's gradients from parameters that no optimizer given holds: theirs would step with NaN."""
        held = held_by(self.optimizers)
        for parameter in self.ddp.module.parameters():
            if id(parameter) not in held:
                parameter.grad = None

    # ---- at the optimizer's step

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The hook; a closure makes the gradients within the step, and they are looked at after it."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._look(optimizer)
            return None

        def looked() -> Any:
            loss = closure()
            self._look(optimizer)
            return loss

        return (args, {**kwargs, "closure": looked}) if "closure" in kwargs else ((args[0], looked, *args[2:]), kwargs)

    def _look(self, optimizer: Any) -> None:
        self._unused = False
        due = id(optimizer) in self._due  # something has been exchanged since its last step
        self._due.discard(id(optimizer))
        if self._skip and due:
            for parameter in self.ddp.module.parameters():
                parameter.grad = None  # an optimizer passes over parameters without a gradient
            return
        memory = self.exchange.memory
        if not isinstance(memory, VelocityMemory):
            return
        for group in optimizer.param_groups:
            if group.get("momentum", 0):
                raise ValueError(
                    f"attach: momentum must be 0 in the optimizer while the memory has it, got {group['momentum']}: it was "
                    "set after attach (by a scheduler with cycle_momentum?)"
                )
        if not due:
            return
        if (self.step - 1) % LOOK_EVERY == 1 and not self._warned:
            self._look_for_clipping(memory, getattr(optimizer, "grad_scale", None))
        self._momentum.decay(optimizer)

    def _look_for_clipping(self, memory: VelocityMemory, pending: Tensor | None) -> None:
        """Warn where velocities are made shorter between the exchange and the optimizer: their norm is not a gradient's.

        A scaler's own step has made gradients `_scale` times shorter by now; a fused optimizer it tells to divide by `pending`.
        """
        here = [p.grad for p in self.ddp.module.parameters() if p.grad is not None]
        now = float(torch.stack([g.float().square().sum() for g in here]).sum().sqrt()) if here else 0.0
        now /= 1.0 if pending is None else float(pending)
        sent = self.exchange.core.delivered**0.5
        if now > 0.99 * sent:
            return
        self._warned = True
        gain = 1 / (1 - memory.momentum)
        warnings.warn(
            f"gradients are clipped after the exchange, from norm {sent:.3g} to {now:.3g}, but {type(memory).__name__} delivers "
            f"velocities, up to {gain:.3g} times as long as a gradient: this slows training. Clip inside the memory instead.",
            stacklevel=4,
        )

    def remove(self) -> None:
        """Restore plain DDP and the optimizer's momentum; every rank calls this at the same time, between steps.

        The memories stay with the exchange (`exchange.state_dict()`), but for the momentum.

        Raises:
            RuntimeError: as torch's collectives, if another rank does not come. DDP is plain then, and the momentum, 0 in the
                optimizer, still with the exchange.
        """
        if self._switch is None or self._switch.handle is not self:
            return
        try:
            self._momentum.give_back()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._listen_no_more()
            self._switch.handle = None
            self.exchange.close()
