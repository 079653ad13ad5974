"""The momentum of optimizers while a velocity memory has it.

what a memory takes over     `MovedMomentum.take`   from the optimizers' buffers, which lose theirs; again where one is loaded
what it gives back           `give_back`            the mean over the ranks, into the optimizers' buffers
what is saved meanwhile      `saved`                an optimizer that has it: a checkpoint fits a run without an exchange
weight decay                 `decay`                is not exchanged and stays in the optimizer, with a momentum of its own:
                             b <- m b + decay w, kept beside the memory's state, makes one step of momentum SGD of both

Where the memory is none for velocities nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm.exchange import Exchange
from weft.comm.memory import VelocityMemory

__all__ = ["MovedMomentum", "held_by"]

DECAY = "decay"  # entry of a tensor's state: the momentum of its weight decay, float32 (numel,)


@final
class MovedMomentum:
    """See the module's header.

    Args:
        exchange: whose memory it is.
        optimizers: that had it.
        names: of the model's parameters, by id.
    Raises:
        ValueError: momentum in two places, or optimizers that a velocity is nothing for.
    """

    def __init__(self, exchange: Exchange, optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]):
        self.exchange, self.optimizers, self.names = exchange, optimizers, names
        self.memory = exchange.memory if isinstance(exchange.memory, VelocityMemory) else None
        self.moved = _check(self.memory, optimizers, names)
        self._all_held = False  # as far as `check_all_held` knows

    def take(self) -> None:
        memory, core = self.memory, self.exchange.core
        if memory is None:
            return
        for optimizer, group in groups(self.optimizers):
            group["momentum"], group["nesterov"] = 0.0, False
            for parameter in group["params"]:
                buffer = optimizer.state.get(parameter, {}).pop("momentum_buffer", None)
                name = self.names.get(id(parameter))
                if buffer is not None and name is not None and memory.buffer not in core.state(name):
                    held = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
                    _shaped(held, parameter).copy_(buffer)
                    core.state(name)[memory.buffer] = held.mul_(_unit(memory, group))

    def saved(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Say in an optimizer's state dict that it has its momentum, as before."""
        for group in state["param_groups"] if self.memory is not None and self.moved else ():
            group["momentum"], group["nesterov"] = self.memory.momentum, self.memory.nesterov

    def loaded(self, optimizer: Any) -> None:
        """A loaded optimizer has its momentum again."""
        self.moved |= _check(self.memory, (optimizer,), self.names)
        self.take()

    def give_back(self) -> None:
        """Raises what torch's all-reduce raises; the memory has it still then."""
        memory, core = self.memory, self.exchange.core
        if memory is None or not self.moved:
            return
        means = []
        for optimizer, group in groups(self.optimizers):
            for parameter in group["params"]:
                state = core.states.get(self.names.get(id(parameter), ""), {})
                held, decayed = state.get(memory.buffer), state.get(DECAY)
                if held is None:
                    continue
                share = self.exchange.wired.ranks * _unit(memory, group)
                mean = held / share  # ranks hold their own; equal ones again keep the ranks bit-identical
                dist.all_reduce(mean, group=self.exchange.wired.group)
                if decayed is not None:
                    mean.add_(decayed)
                means.append((optimizer, parameter, state, mean))
        for optimizer, parameter, state, mean in means:  # only now: a rank that is gone leaves the memory as it was
            optimizer.state[parameter]["momentum_buffer"] = _shaped(mean, parameter).to(parameter.dtype)
            del state[memory.buffer]
            state.pop(DECAY, None)
        for _, group in groups(self.optimizers):
            group["momentum"], group["nesterov"] = memory.momentum, memory.nesterov

    def decay(self, optimizer: Any) -> None:
        """Add to an optimizer's gradients, which are velocities, the momentum of its weight decay; see `carry_decay`."""
        memory, core = self.memory, self.exchange.core
        if memory is None:
            return
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)  # a fused optimizer divides gradients by it
        for group in optimizer.param_groups:
            decay, sign = group["weight_decay"], -scale if group.get("maximize") else scale
            for parameter in group["params"]:
                name = self.names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                last = core.states.get(name, {}).get(DECAY)
                if last is None and not decay:
                    continue
                now = torch.zeros(parameter.numel(), device=parameter.device) if last is None else last.clone()
                memory.carry_decay(parameter.grad, parameter.detach(), _shaped(now, parameter), decay, sign)
                core.state(name)[DECAY] = now

    def check_all_held(self, trained: Mapping[str, Tensor]) -> None:
        """See that every parameter that velocities come to is one of the optimizers'.

        Raises:
            ValueError: some is not.
        """
        if self._all_held or self.memory is None:
            return
        held = held_by(self.optimizers)
        for name, parameter in trained.items():
            if id(parameter) not in held:
                raise ValueError(
                    f"attach: optimizer must hold all trained parameters with {type(self.memory).__name__}, {name} is "
                    "in none: a velocity arrives there, too. Give attach all optimizers, as a list, or freeze it before the "
                    "model is wrapped"
                )
        self._all_held = True


def held_by(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    """Ids of the optimizers' parameters."""
    return {id(parameter) for _, group in groups(optimizers) for parameter in group["params"]}


def groups(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    return ((optimizer, group) for optimizer in optimizers for group in optimizer.param_groups)


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


def _unit(memory: VelocityMemory, group: dict[str, Any]) -> float:
    """A velocity memory's u over the optimizer's momentum buffer: Nesterov's u <- m (u + g) is ahead of it by the factor m."""
    ahead = float(memory.momentum) if memory.nesterov else 1.0
    return -ahead if group.get("maximize") else ahead


def _check(
    memory: VelocityMemory | None, optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]
) -> bool:
    """Whether momentum moves from the optimizers into the memory, to be given back."""
    if memory is None:
        return False
    name = type(memory).__name__
    if not optimizers:
        raise ValueError(
            f"attach: optimizer must be given with {name}, which exchanges velocities: momentum moves out of the optimizer"
        )
    own, nesterov = float(memory.momentum), memory.nesterov
    found = set()
    for optimizer, group in groups(optimizers):
        if not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"attach: optimizer must be torch.optim.SGD with {name}, got {type(optimizer).__name__}: what arrives is a "
                "velocity, not a gradient; use ErrorFeedback() with other optimizers"
            )
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
        for parameter in group["params"]:
            if parameter.requires_grad and id(parameter) not in names:
                raise ValueError(
                    f"attach: optimizer must hold parameters of ddp alone with {name}, got another one of shape "
                    f"{tuple(parameter.shape)}, which would lose its momentum; give it an optimizer of its own"
                )
        found.add(float(group["momentum"]))
    if len(found) > 1:
        raise ValueError(
            f"attach: momentum must be the same in all parameter groups with {name}, which has one for all, got {sorted(found)}"
        )
    return found == {own} and own > 0
