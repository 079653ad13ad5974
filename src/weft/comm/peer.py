"""MoNNA: training among peers of whom up to f may send anything, with no server to trust.

Problem    n peers, each with its own data and parameters theta_i. Up to f of them lie, stall or die.
Method     at peer i, each round, around an unchanged `optimizer.step()`:
               m_i <- beta m_i + (1 - beta) g_i                        momentum at the sender   `MoNNA._before`
               h_i = theta_i - lr m_i                                  the optimizer's own step
               wait for the first n - f - 1 others' h_j                `weft.comm.mail`
               theta_i <- mean of the n - 2f of these nearest to h_i, itself included           `MoNNA._after`, `nearest`
           Momentum makes honest half steps concentrate; whoever hides among them can do little harm.
Guarantee  the own vector is always kept; a vector that is not finite has no influence; whoever is late is not waited for.
           The proof covers smooth losses with bounded variance and n of at least about 11 f; below that MoNNA warns.
           f = 0 is averaging of all peers' half steps.
Source     Farhadkhani et al., Robust Collaborative Learning with Linear Gradient Overhead, arXiv:2209.10931.

It exchanges parameters, not gradients: DistributedDataParallel must not average gradients as well. Bandwidth is n d per peer
and round; `period` makes rounds rarer (the analysis is for 1). Buffers such as running means are exchanged with the parameters
but do not count for the distance.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.comm.gram import weighted
from weft.comm.mail import Post
from weft.comm.rules.by_gram import check_faulty
from weft.comm.rules.subset import distances_to, nearest

__all__ = ["MoNNA", "PeerReport", "attach_peer"]


@dataclass
class PeerReport:
    """What happened so far.

    Attributes:
        rounds: exchanges done.
        kept: by rank, in how many rounds its vector was averaged.
        dropped: by rank, in how many rounds it was there and was not.
        short: rounds that ended with fewer than n - f vectors, the own one included.
        alone: rounds with the own vector only.
        skipped: steps without an update because the own gradient was not finite.
        late: vectors that came after their round.
        spread: last round's root mean square distance of the kept vectors to the own one.
        moved: how far averaging moved the own vector in the last round.
    """

    rounds: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    dropped: dict[int, int] = field(default_factory=dict)
    short: int = 0
    alone: int = 0
    skipped: int = 0
    late: int = 0
    spread: float = 0.0
    moved: float = 0.0


class MoNNA:
    """Robust averaging of parameters around every step of an optimizer; made by all peers together.

    Args:
        model: this peer's model; all peers start with the same parameters.
        optimizer: torch.optim.SGD without momentum, or another one that has none of its own.
        f: how many of the n peers may be faulty, n > 2f.
        group: process group of the peers, None for all ranks. Used at the start only.
        beta: momentum in [0, 1): 0.99 in the paper; 0 loses the guarantee.
        timeout: seconds to wait for the others in a round.
        period: steps between rounds, >= 1.
        keep: how many vectors to average at most, None for n - 2f.
        clip: norm to which a gradient is shortened before it enters the momentum, None for never.
        address: where other machines reach this process, None finds it.
    Attributes:
        post: what vectors go by.
    Raises:
        PeerLost: a peer cannot be reached at the start.
        ValueError: a number out of range, momentum in two places, a DDP module that averages gradients, or peers whose
            parameters differ in shape (on every rank).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        f: int,
        group: dist.ProcessGroup | None = None,
        beta: float = 0.99,
        timeout: float = 30.0,
        period: int = 1,
        keep: int | None = None,
        clip: float | None = None,
        address: str | None = None,
    ):
        size = dist.get_world_size(group)
        _check(model, optimizer, f, size, beta, timeout, period, keep, clip)
        self.f, self.beta, self.timeout, self.period, self.clip = f, beta, timeout, period, clip
        self.rank, self.size = dist.get_rank(group), size
        self.keep = keep if keep is not None else max(size - 2 * f, 1)
        self.optimizer = optimizer
        self._parameters = [p for group_ in optimizer.param_groups for p in group_["params"]]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._moving = sum(p.numel() for p in self._parameters)
        self._steps = 0
        self._momentum: list[Tensor] = [torch.zeros_like(p) for p in self._parameters]
        self._decay: list[float] = []  # of the groups, while a step runs
        self._report = PeerReport()
        wide = any(t.dtype == torch.float64 for t in self._tensors())
        self._dtype = torch.float64 if wide else torch.float32
        length = sum(t.numel() for t in self._tensors())
        shapes = [tuple(t.shape) for t in self._tensors()]
        digest = hashlib.sha256(repr((shapes, self._dtype)).encode()).hexdigest()[:8]
        self.post = Post(
            length * self._dtype.itemsize, f"{len(shapes)} tensors, {length} values, shapes {digest}", group, address
        )
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def step(self) -> None:
        """The local step and, every `period` steps, the round; the same as `optimizer.step()`."""
        self.optimizer.step()

    def report(self) -> PeerReport:
        """Counts and last measures."""
        self._report.late = self.post.late
        return self._report

    def remove(self) -> None:
        """Give the optimizer back as it was and close the connections."""
        for handle in self._handles:
            handle.remove()
        self._give_decay_back()
        self.post.close()

    def state_dict(self) -> dict[str, Any]:
        """Momentum and counters; tensors are copies."""
        return {"steps": self._steps, "rounds": self._report.rounds, "momentum": [m.clone() for m in self._momentum]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`.

        Raises:
            ValueError: it is of other parameters.
        """
        shapes = [tuple(m.shape) for m in state["momentum"]]
        if shapes != [tuple(m.shape) for m in self._momentum]:
            raise ValueError("MoNNA: the state is of other parameters; load the one saved with this model")
        self._momentum = [m.clone() for m in state["momentum"]]
        self._steps, self._report.rounds = state["steps"], state["rounds"]

    def _tensors(self) -> list[Tensor]:
        return [*self._parameters, *self._buffers]

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Gradients become momentum, weight decay included, so that the optimizer must add none."""
        if len(args) > 1 or kwargs:  # the first is the optimizer itself
            raise TypeError(
                "MoNNA: step(closure) computes gradients after this peer's momentum; call step() without one"
            )
        self._give_decay_back()  # what groups say is 0 if the last step has raised
        self._decay = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        decay = [
            -d if group.get("maximize") else d  # the optimizer turns gradients round, and not its own decay
            for d, group in zip(self._decay, optimizer.param_groups, strict=True)
            for _ in group["params"]
        ]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        if not math.isfinite(norm):
            self._report.skipped += 1
            for p in self._parameters:
                p.grad = None
            return
        shorten = min(1.0, self.clip / norm) if self.clip is not None and norm > 0 else 1.0
        for p, g, m, d in zip(self._parameters, grads, self._momentum, decay, strict=True):
            if not p.requires_grad:
                continue  # frozen: not even by the decay does it move
            m.mul_(self.beta).add_(torch.add(g * shorten, p, alpha=d), alpha=1 - self.beta)
            p.grad = m.clone()  # zero_grad in place, or the user's reading of it, must not reach the momentum

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._give_decay_back()
        self._steps += 1
        if self._steps % self.period == 0:
            self._round()

    def _give_decay_back(self) -> None:
        for group, decay in zip(self.optimizer.param_groups, self._decay, strict=False):  # nothing outside of a step
            group["weight_decay"] = decay
        self._decay = []

    def _round(self) -> None:
        own = torch.cat([t.detach().reshape(-1).to("cpu", self._dtype) for t in self._tensors()])
        report = self._report
        self.post.send(report.rounds, own.numpy().tobytes())
        wanted = self.size - self.f - 1
        came = self.post.collect(report.rounds, wanted, self.timeout)
        report.rounds += 1
        senders = sorted([self.rank, *came])
        me = senders.index(self.rank)
        stack = torch.stack(
            [own if r == self.rank else torch.frombuffer(bytearray(came[r]), dtype=self._dtype) for r in senders]
        )
        square = distances_to(stack[me, : self._moving], stack[:, : self._moving])
        square[~torch.isfinite(stack).all(1)] = torch.inf
        if len(came) < wanted:
            report.short += 1
        if not came:
            if report.alone == 0 and self.size > 1:
                warnings.warn(f"MoNNA: rank {self.rank} heard from no peer in round {report.rounds}; it goes on alone")
            report.alone += 1
        chosen = nearest(square, me, max(min(self.keep, len(senders) - self.f), 1))
        row = torch.zeros(len(senders), dtype=torch.float64)
        row[chosen] = 1.0 / len(chosen)
        for number, sender in enumerate(senders):
            tally = report.kept if number in chosen else report.dropped
            tally[sender] = tally.get(sender, 0) + 1
        mean = weighted(row, stack)
        report.spread = math.sqrt(float(square[chosen].clamp(min=0.0).mean()))
        report.moved = float((mean - own)[: self._moving].double().norm())
        start = 0
        for tensor in self._tensors():
            tensor.copy_(mean[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


def attach_peer(model: nn.Module, optimizer: torch.optim.Optimizer, f: int, **options: Any) -> MoNNA:
    """Make `optimizer.step()` a round among peers: `MoNNA(model, optimizer, f, ...)`; the training loop stays as it is."""
    return MoNNA(model, optimizer, f, **options)


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    f: int,
    size: int,
    beta: float,
    timeout: float,
    period: int,
    keep: int | None,
    clip: float | None,
) -> None:
    check_faulty("MoNNA", f)
    if size <= 2 * f:
        raise ValueError(f"MoNNA: needs more than 2f peers, got n = {size} for f = {f}")
    if not 0 <= beta < 1:
        raise ValueError(f"MoNNA: beta must be in [0, 1), got {beta}; 0.99 is the paper's")
    if not timeout > 0:
        raise ValueError(f"MoNNA: timeout must be above 0 seconds, got {timeout}")
    if period < 1:
        raise ValueError(f"MoNNA: period must be 1 step or more, got {period}")
    if keep is not None and not 1 <= keep <= size - 2 * f:
        raise ValueError(f"MoNNA: keep must be in 1..n - 2f = {size - 2 * f}, got {keep}")
    if clip is not None and not clip > 0:
        raise ValueError(f"MoNNA: clip must be above 0, got {clip}; None never clips")
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.require_backward_grad_sync:
        raise ValueError(
            "MoNNA: the model is a DistributedDataParallel that averages gradients, so one faulty peer would reach all "
            "models before any rule; pass the bare module (model.module)"
        )
    for group in optimizer.param_groups:
        own = [name for name in ("momentum", "betas") if group.get(name)]
        if own:
            raise ValueError(
                f"MoNNA: the optimizer has {own[0]} = {group[own[0]]}, and the momentum is kept here, at the sender; "
                "use torch.optim.SGD(momentum=0) and beta"
            )
    if f > 0 and size < 11 * f:
        warnings.warn(
            f"MoNNA: n = {size} peers for f = {f}: the proof needs n of about 11 f = {11 * f}; experiments go lower"
        )
