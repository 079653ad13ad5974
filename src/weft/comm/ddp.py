"""Put an exchange under DistributedDataParallel, in one line.

    handle = attach(ddp, exchange, optimizer)        ...train as before...        handle.remove()

`attach` registers a communication hook: DDP hands over buckets of gradients during the backward pass, the exchange works on them
in its thread (or, where nothing but the mean is wanted, all-reduces them at once as DDP itself would), and the end of the
backward pass waits for the last. State belongs to parameters, not to buckets (R2), so DDP may rebuild its buckets and a
checkpoint fits any `bucket_cap_mb`. With `no_sync()` the exchange sees one accumulated gradient per synchronised step (R5).

    velocity memories   the momentum moves from the optimizer into the memory, buffers included; `remove` gives it back. Weight
                        decay is not exchanged and stays in the optimizer, with a momentum of its own: b <- m b + decay w, kept
                        beside the memory's state, makes one step of momentum SGD of both
    non-finite (R4)     a step that is not finite on any rank changes no memory and no parameter on any rank (with `optimizer`
                        given), and is counted in `exchange.skipped`; gradients arrive as NaN, so that a loss scaler sees it
    loss scaling (R4)   give `scaler`: gradients are unscaled before they reach a memory and scaled again afterwards
    clipping (R6)       clip after the backward pass, as ever; with a velocity memory clip inside the memory: what arrives is a
                        velocity, about 1/(1 - momentum) as long as a gradient, and a warning says so where it is clipped
"""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from weft.comm.agree import announce
from weft.comm.automatic import Auto, Trial, measure_link
from weft.comm.codec import Spec
from weft.comm.core import LOOK_EVERY
from weft.comm.exchange import Exchange
from weft.comm.memories.momentum_correction import carry_decay
from weft.comm.memory import Memory
from weft.errors import PeerLost

__all__ = ["Handle", "attach"]

DECAY = "decay"  # entry of a tensor's state: the momentum of its weight decay, float32 (numel,)


class _Switch:
    """The one hook that DDP allows, pointing at whoever is attached; nobody: plain all-reduce."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.handle: Handle | None = None


def _hook(switch: _Switch, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    if switch.handle is not None:
        return switch.handle.take(bucket)
    buffer = bucket.buffer().mul_(1 / switch.group.size())
    return dist.all_reduce(buffer, group=switch.group, async_op=True).get_future().then(_first)


_hook.__annotations__ = {}  # DDP compares annotations with classes; these here are strings


def _first(done: torch.futures.Future[list[Tensor]]) -> Tensor:
    return done.value()[0]


def attach(
    ddp: DistributedDataParallel,
    exchange: Exchange | Auto,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Handle:
    """Exchange the gradients of `ddp` by `exchange` from the next backward pass on. Every rank calls this at the same time.

    Args:
        ddp: without a communication hook of its own.
        exchange: see `Exchange`; or `auto(link)`, which is decided here.
        optimizer: needed by memories that exchange velocities (DGC), and to skip steps that are not finite.
        scaler: the loss scaler in use, if any.
    Returns:
        A handle; `handle.remove()` restores plain DDP.
    Raises:
        TypeError: gradients are sparse.
        ValueError: momentum in two places, an Adam-like optimizer under a velocity memory, another hook or group.
        ExchangeMismatch: on every rank, if ranks differ in options or tensors.

    >>> attach(torch.nn.Linear(2, 2), Exchange())
    Traceback (most recent call last):
    TypeError: attach: ddp must be a DistributedDataParallel, got Linear; wrap the model in torch.nn.parallel first
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"attach: ddp must be a DistributedDataParallel, got {type(ddp).__name__}; wrap the model in torch.nn.parallel first"
        )
    for name, module in ddp.module.named_modules():
        if getattr(module, "sparse", False) is True:
            raise TypeError(
                f"attach: {name} ({type(module).__name__}) has sparse gradients, which no codec takes; make it with sparse=False"
            )
    switch = next((state for _, state in ddp._comm_hooks if isinstance(state, _Switch)), None)
    if switch is None and ddp._comm_hooks:
        raise ValueError("attach: ddp already has a communication hook, and DDP allows one; wrap the model anew")
    if switch is not None and switch.handle is not None:
        raise ValueError("attach: ddp already has an exchange; call remove() on its handle first")
    choice = exchange if isinstance(exchange, Auto) else None
    if isinstance(exchange, Auto):
        exchange = Exchange()
    if exchange.group is None:
        exchange.group = ddp.process_group
    elif dist.get_process_group_ranks(exchange.group) != dist.get_process_group_ranks(ddp.process_group):
        raise ValueError("attach: exchange.group must have the ranks of ddp's own process group; leave it out")
    handle = Handle(ddp, exchange, optimizer, scaler, choice)
    if switch is None:
        switch = _Switch(ddp.process_group)
        ddp.register_comm_hook(switch, _hook)
    switch.handle = handle
    handle._switch = switch
    return handle


def _specs(ddp: DistributedDataParallel) -> list[Spec]:
    ignored = set(getattr(ddp, "parameters_to_ignore", ()))
    return [
        Spec(name, tuple(p.shape), p.dtype)
        for name, p in ddp.module.named_parameters()
        if p.requires_grad and name not in ignored
    ]


@final
class Handle:
    """What `attach` returns.

    Attributes:
        exchange: at work; with `auto` plain at first, then the one chosen.
        step: number of steps so far.
        chosen: with `auto`, the name of the choice once it is made, else "".
        predicted: with `auto`, step seconds by name.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        exchange: Exchange,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        choice: Auto | None = None,
    ):
        self.chosen, self.predicted = "", dict[str, float]()
        self._choice, self._trials = choice, list[tuple[float, float, float]]()
        self._began, self._ended, self._buckets, self._plain_step = 0.0, 0.0, 0, 0.0
        self.ddp, self.exchange, self.optimizer, self.scaler = ddp, exchange, optimizer, scaler
        self._switch: _Switch | None = None
        self._parameters = {id(p): name for name, p in ddp.module.named_parameters()}
        self._layouts: dict[tuple[int, ...], tuple[list[Spec], list[int]]] = {}
        momenta = _check_momentum(exchange, optimizer)
        exchange.open(_specs(ddp))
        self.step = exchange.core.step + 1
        self._momenta = momenta
        self._take_momentum()
        self._works: list[tuple[dist.Work, Tensor]] = []
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._under_way = False
        self._scale = 1.0
        self._skip = False
        self._arrived = 0.0  # norm of what was delivered, on steps where clipping is looked for
        self._warned = False
        self._pre = optimizer.register_step_pre_hook(self._before_step) if optimizer is not None else None

    # ---- during the backward pass

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: a bucket of gradients is ready."""
        buffer = bucket.buffer()
        if not self._under_way:
            self._begin()
        if self.exchange.plain:
            group = self.exchange.core.wired.group
            work = dist.all_reduce(buffer.mul_(1 / self.exchange.core.wired.ranks), group=group, async_op=True)
            self._works.append((work, buffer))
            self._buckets += 1
            return work.get_future().then(_first)
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        specs, sizes = self._layouts.get(key) or self._layout(key, parameters)
        last, scale = bucket.is_last(), self._scale
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
        return future

    def _layout(self, key: tuple[int, ...], parameters: list[Tensor]) -> tuple[list[Spec], list[int]]:
        specs = [Spec(self._parameters[id(p)], tuple(p.shape), p.dtype) for p in parameters]
        found = self._layouts[key] = specs, [spec.numel for spec in specs]
        return found

    def _begin(self) -> None:
        if self._choice is not None:
            if len(self._trials) >= self._choice.trial:
                (self._confirm if self.chosen else self._decide)(self._choice)
            self._began, self._buckets = time.perf_counter(), 0
        self._under_way, self._skip, self._error = True, False, None
        self._over.clear()
        self._works.clear()
        self._before = self.exchange.skipped
        self._scale = float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else 1.0
        # Ours comes before DDP's own callback, which would lose the class of an error.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]

    def _end(self) -> None:
        """The end of the backward pass: wait for the last bucket."""
        began = time.perf_counter()
        self._under_way = False
        if self.exchange.plain:
            try:
                for work, _ in self._works:
                    work.wait()
            except RuntimeError as error:  # torch has no finer class: a closed connection, a timeout
                raise PeerLost(-1, "the all-reduce of gradients", str(error).splitlines()[0]) from error
            core = self.exchange.core
            if self.optimizer is not None and not all(bool(buffer.sum().isfinite()) for _, buffer in self._works):
                self._skip = not all(bool(buffer.isfinite().all()) for _, buffer in self._works)
                core.skipped += self._skip
            core.step = self.step
            core.plain_steps += 1
        else:
            self._over.wait()  # the exchange thread answers within its timeout, with results or an error
            if self._error is not None:
                raise self._error
            self._skip = self.exchange.skipped > self._before
        ended = time.perf_counter()
        self.exchange.waited(ended - began)
        if self._choice is not None:
            self._trials.append((ended - self._ended, began - self._began, ended - began))
            self._ended = ended
        self.step += 1

    def _decide(self, choice: Auto) -> None:
        """End the trial of `auto`: nothing is on the wire, and the momentum is where plain steps left it."""
        core = self.exchange.core
        steps = self._trials[1:]  # the first has no beginning
        trial = Trial(*(statistics.median(kind) for kind in zip(*steps, strict=True)), buckets=max(self._buckets, 1))
        link = choice.link if choice.link is not None else measure_link(core.wired.group)
        found = None
        if core.wired.own == 0:
            predicted = choice.predict(_specs(self.ddp), core.wired.ranks, trial, link)
            found = choice.choose(predicted), predicted
        self.chosen, self.predicted = announce(found, core.wired.group, core.wired.device)
        self._trials.clear()
        if self.chosen == "plain":
            self._choice = None
            return
        self._plain_step = trial.step
        self._replace(choice.candidates()[self.chosen])

    def _confirm(self, choice: Auto) -> None:
        """End the trial of what `auto` chose: back to plain where steps are in fact no shorter."""
        core = self.exchange.core
        step = statistics.median(steps[0] for steps in self._trials[1:])
        shorter = announce(step < self._plain_step, core.wired.group, core.wired.device)
        self._choice = None
        if not shorter:
            self.chosen = "plain"
            self._give_momentum_back()
            self._replace(Exchange())

    def _replace(self, exchange: Exchange) -> None:
        self._momenta = _check_momentum(exchange, self.optimizer)
        exchange.group = self.exchange.group
        exchange.open(_specs(self.ddp))
        self.exchange.close()
        self.exchange, self.step = exchange, 0
        self._take_momentum()

    # ---- at the optimizer's step

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._skip:
            for parameter in self.ddp.module.parameters():
                parameter.grad = None  # an optimizer passes over parameters without a gradient
            return
        if not self.exchange.memory.velocity:
            return
        for group in optimizer.param_groups:
            if group.get("momentum", 0):
                raise ValueError(
                    f"attach: momentum must be 0 in the optimizer while the memory has it, got {group['momentum']}: it was "
                    "set after attach (by a scheduler with cycle_momentum?)"
                )
        if (self.step - 1) % LOOK_EVERY == 1 and not self._warned:
            self._look_for_clipping()
        self._carry_decay(optimizer)

    def _carry_decay(self, optimizer: Any) -> None:
        """Weight decay has a momentum of its own, see `carry_decay`."""
        memory, core = self.exchange.memory, self.exchange.core
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)  # a fused optimizer divides gradients by it
        for group in optimizer.param_groups:
            decay, sign = group["weight_decay"], -scale if group.get("maximize") else scale
            for parameter in group["params"]:
                name = self._parameters.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                last = core.states.get(name, {}).get(DECAY)
                if last is None and not decay:
                    continue
                now = torch.zeros(parameter.numel(), device=parameter.device) if last is None else last.clone()
                carry_decay(memory, parameter.grad, parameter.detach(), _shaped(now, parameter), decay, sign)
                core.state(name)[DECAY] = now

    def _look_for_clipping(self) -> None:
        """Warn where velocities are made shorter between the exchange and the optimizer: their norm is not a gradient's."""
        memory = self.exchange.memory
        here = [p.grad for p in self.ddp.module.parameters() if p.grad is not None]
        now = float(torch.stack([g.float().square().sum() for g in here]).sum().sqrt()) if here else 0.0
        sent = self.exchange.core.delivered**0.5 * self._scale
        if self._scale != 1.0 or now > 0.99 * sent:
            return
        self._warned = True
        gain = 1 / (1 - memory.momentum)  # type: ignore[attr-defined]
        warnings.warn(
            f"gradients are clipped after the exchange, from norm {sent:.3g} to {now:.3g}, but {type(memory).__name__} delivers "
            f"velocities, up to {gain:.3g} times as long as a gradient: this slows training. Clip inside the memory instead.",
            stacklevel=4,
        )

    # ---- momentum of velocity memories

    def _take_momentum(self) -> None:
        memory, optimizer = self.exchange.memory, self.optimizer
        if not memory.velocity or optimizer is None:
            return
        core = self.exchange.core
        for group in optimizer.param_groups:
            group["momentum"], group["nesterov"] = 0.0, False
            for parameter in group["params"]:
                buffer = optimizer.state.get(parameter, {}).pop("momentum_buffer", None)
                name = self._parameters.get(id(parameter))
                if buffer is not None and name is not None and memory.buffer not in core.state(name):
                    held = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
                    _shaped(held, parameter).copy_(buffer)
                    core.state(name)[memory.buffer] = held.mul_(_unit(memory, group))

    def _give_momentum_back(self) -> None:
        memory, optimizer = self.exchange.memory, self.optimizer
        if optimizer is None or not self._momenta:
            return
        core = self.exchange.core
        for group, (momentum, nesterov) in zip(optimizer.param_groups, self._momenta, strict=True):
            group["momentum"], group["nesterov"] = momentum, nesterov
            for parameter in group["params"]:
                name = self._parameters.get(id(parameter))
                state = core.states.get(name, {}) if name is not None else {}
                held, decayed = state.pop(memory.buffer, None), state.pop(DECAY, None)
                if held is None or not momentum:
                    continue
                share = core.wired.ranks * _unit(memory, group)
                mean = held / share  # ranks hold their own; equal ones again keep the ranks bit-identical
                dist.all_reduce(mean, group=core.wired.group)
                if decayed is not None:
                    mean.add_(decayed)
                optimizer.state[parameter]["momentum_buffer"] = _shaped(mean, parameter).to(parameter.dtype)

    def remove(self) -> None:
        """Restore plain DDP and the optimizer's momentum; every rank calls this at the same time, between steps.

        The memories stay with the exchange (`exchange.state_dict()`), but for the momentum.
        """
        if self._switch is None or self._switch.handle is not self:
            return
        self._give_momentum_back()
        if self._pre is not None:
            self._pre.remove()
        self._switch.handle = None
        self.exchange.close()


def _shaped(flat: Tensor, parameter: Tensor) -> Tensor:
    """A state (numel,) seen with the parameter's shape.

    States have the order of DDP's buckets: that of the parameter in memory (channels last, say) where it lies there without
    gaps, else that of its indices.
    """
    width = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size > 1 and stride != width:
            return flat.view(parameter.shape)
        width *= size
    return flat.as_strided(parameter.shape, parameter.stride())


def _unit(memory: Memory, group: dict[str, Any]) -> float:
    """A velocity memory's u over the optimizer's momentum buffer: Nesterov's u <- m (u + g) is ahead of it by the factor m."""
    ahead = float(memory.momentum) if memory.nesterov else 1.0  # type: ignore[attr-defined]
    return -ahead if group.get("maximize") else ahead


def _check_momentum(exchange: Exchange, optimizer: torch.optim.Optimizer | None) -> list[tuple[float, bool]]:
    """(momentum, nesterov) of every group of the optimizer, to be given back; [] if the memory has no velocity."""
    memory = exchange.memory
    if not memory.velocity:
        return []
    name = type(memory).__name__
    if optimizer is None:
        raise ValueError(
            f"attach: optimizer must be given with {name}, which exchanges velocities: momentum moves out of the optimizer"
        )
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"attach: optimizer must be torch.optim.SGD with {name}, got {type(optimizer).__name__}: what arrives is a velocity, "
            "not a gradient; use ErrorFeedback() with other optimizers"
        )
    own, nesterov = float(getattr(memory, "momentum", 0.0)), bool(getattr(memory, "nesterov", False))
    momenta = []
    for group in optimizer.param_groups:
        if group["momentum"] and group["momentum"] != own:
            raise ValueError(
                f"attach: momentum must be in one place, got {group['momentum']} in the optimizer and {own} in {name}; give both "
                "the same number (attach moves it), or 0 to the optimizer"
            )
        if group["momentum"] and bool(group["nesterov"]) != nesterov:
            raise ValueError(
                f"attach: nesterov must be the same in the optimizer ({group['nesterov']}) and {name} ({nesterov})"
            )
        if group["dampening"]:
            raise ValueError(f"attach: dampening must be 0 with {name}, got {group['dampening']}")
        momenta.append((float(group["momentum"]), bool(group["nesterov"])))
    return momenta
