"""What a client does with the model it was sent: K steps of SGD on its own data, and the change goes back.

Method     theta <- theta_sent;  K times:  g = gradient on the next batch, norm clipped;  v <- m v + g;  theta <- theta - lr v
           v starts at 0 every time (a momentum kept from earlier rounds belongs to another model). Change: theta - theta_sent.
Batches    passes over the client's data in random order, laid end to end and cut into batches of one size; the order is a
           function of (seed, client, number of the job), never of who else computes or when.
Vectorised Jobs whose batches have one shape are computed together: parameters stacked (m, d), `torch.func.vmap` of the loss over
           the stack, one backward pass of the sum; models without rules for it (recurrent ones) one by one   `Trainer.changes`

Source: the setting of Fraboni et al., arXiv:2206.10189 (momentum 0.9 and fresh, batch 64, norm at most 1e4).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from weft.comm.codec import Spec

__all__ = ["LocalSGD", "Loss", "Trainer", "flatten", "unflatten"]

Loss = Callable[[Tensor, Tensor], Tensor]  # (model output, target) -> mean over the batch, a scalar
Data = tuple[Tensor, Tensor]  # inputs (n, ...), targets (n, ...)


@final
@dataclass(frozen=True)
class LocalSGD:
    """Options of a client's work.

    Attributes:
        steps: K >= 0; 0 does nothing and returns exactly 0.
        lr: local rate, >= 0.
        momentum: in [0, 1), starting at 0 in every job.
        batch_size: examples a step, or None for all data at once.
        clip: largest norm of a step's gradient.
    """

    steps: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int | None = 64
    clip: float = 1e4

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"LocalSGD: steps must be >= 0, got {self.steps}; 10 is usual")
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"LocalSGD: lr must be >= 0 and finite, got {self.lr}; tune it for each schedule")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"LocalSGD: momentum must be in [0, 1), got {self.momentum}; 0.9 is usual")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"LocalSGD: batch_size must be >= 1 or None for all data, got {self.batch_size}")
        if not self.clip > 0:
            raise ValueError(f"LocalSGD: clip must be > 0, got {self.clip}; inf does not clip")


def specs(model: nn.Module) -> list[Spec]:
    """The tensors that are trained, in the order in which they lie in the flat vector.

    Raises:
        ValueError: there are none, or they are of several dtypes: one vector has one.
    """
    found = [Spec(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters() if p.requires_grad]
    if len({spec.dtype for spec in found}) != 1:
        said = sorted({str(spec.dtype) for spec in found}) or "none that requires a gradient"
        raise ValueError(f"the model must have trained parameters, all of one dtype, got {said}")
    return found


def flatten(model: nn.Module) -> Tensor:
    """The trained parameters as one new vector (d,)."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def unflatten(vector: Tensor, model: nn.Module) -> nn.Module:
    """Write a vector (d,) into the model's trained parameters; returns the model."""
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(vector[start : start + p.numel()].view_as(p))
                start += p.numel()
    return model


@final
class Trainer:
    """Does the work of clients 0 .. n - 1, each with its data.

    Raises:
        ValueError: nothing to train, mixed dtypes, batch statistics (running means are not a change of parameters), empty data.
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Sequence[Data | None], work: LocalSGD, seed: int = 0):
        self.model, self.loss, self.data, self.work, self.seed = (
            copy.deepcopy(model).train(),
            loss,
            list(data),
            work,
            seed,
        )
        self._vectorised = True
        self.specs = specs(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise ValueError(
                    f"the model must keep no batch statistics, got {type(module).__name__} {name!r}; use GroupNorm"
                )
        for client, pair in enumerate(self.data):
            if pair is not None and (len(pair[0]) < 1 or len(pair[0]) != len(pair[1])):
                raise ValueError(
                    f"client {client} must have as many inputs as targets, at least one, got {len(pair[0])} and {len(pair[1])}"
                )

    def changes(self, starts: Tensor, clients: Sequence[int], jobs: Sequence[int]) -> Tensor:
        """theta_K - theta_sent (m, d) of m jobs: clients' `jobs`-th, begun at the rows of `starts` (m, d)."""
        found = torch.empty_like(starts)
        groups: dict[tuple[int, ...], list[int]] = {}  # jobs whose batches have one shape
        orders = [self._order(client, job) for client, job in zip(clients, jobs, strict=True)]
        for i, order in enumerate(orders):
            groups.setdefault(tuple(order.shape), []).append(i)
        for rows in groups.values():
            mine = [self._own(clients[i]) for i in rows]
            inputs, targets = (  # (K, m, batch, ...)
                torch.stack([own[part][orders[i]] for own, i in zip(mine, rows, strict=True)], dim=1) for part in (0, 1)
            )
            found[rows] = self._descend(starts[rows], inputs, targets)
        return found

    def loss_of(self, vector: Tensor, client: int) -> float:
        """F_i: the mean loss of a model (d,) on all data of a client."""
        inputs, targets = self._own(client)
        self.model.eval()
        with torch.no_grad():
            found = float(self.loss(unflatten(vector, self.model)(inputs), targets))
        self.model.train()
        return found

    def _own(self, client: int) -> tuple[Tensor, Tensor]:
        pair = self.data[client]
        assert pair is not None, f"client {client} has its data elsewhere"
        return pair

    def _order(self, client: int, job: int) -> Tensor:
        """Which examples go into which step: (K, batch) of positions in the client's data."""
        size = len(self._own(client)[0])
        batch = self.work.batch_size
        if batch is None:
            return torch.arange(size).expand(self.work.steps, size)
        random = np.random.default_rng((self.seed, client, job))
        passes = -(-self.work.steps * batch // size)
        order = np.concatenate([random.permutation(size) for _ in range(passes)] or [np.empty(0, np.int64)])
        return torch.from_numpy(order[: self.work.steps * batch].reshape(self.work.steps, batch))

    def _descend(self, starts: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        theta, velocity = starts.clone(), torch.zeros_like(starts)
        for x, y in zip(inputs, targets, strict=True):
            theta.requires_grad_()
            (gradient,) = torch.autograd.grad(self._losses(theta, x, y).sum(), theta)
            with torch.no_grad():
                norm = gradient.norm(dim=1, keepdim=True)
                gradient *= (self.work.clip / norm).clamp(max=1.0)
                velocity.mul_(self.work.momentum).add_(gradient)
                theta = torch.add(theta, velocity, alpha=-self.work.lr)
        return theta.detach() - starts

    def _losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The loss of each job (m,), one by one from when on vmap is found to have no rule for the model or the loss."""
        if self._vectorised:
            try:
                return torch.func.vmap(self._loss_at, randomness="different")(theta, x, y)
            except RuntimeError as error:  # torch has no finer class: recurrent layers, branches on values
                if "vmap" not in str(error) and "Batching rule" not in str(error):
                    raise
                self._vectorised = False
        return torch.stack([self._loss_at(*job) for job in zip(theta, x, y, strict=True)])

    def _loss_at(self, vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = vector.split([spec.numel for spec in self.specs])
        named = {spec.name: piece.view(spec.shape) for spec, piece in zip(self.specs, pieces, strict=True)}
        return self.loss(torch.func.functional_call(self.model, named, (x,)), y)
