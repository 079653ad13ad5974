"""Simulated workers on real images, all rules and seeds at once: what `flag-aggregator` and `monna` measure accuracy with.

    data      scikit-learn's digits (1,797 images of 8 x 8), a fifth for testing, shared out over n workers         `Digits`
    model     64-64-10 with ReLU; gradients of many copies by batched products, written out                         `gradients`
    server    copies share parameters: one set per (rule, seed); each worker sends its momentum                     `Server`
    peers     every honest peer has parameters of its own: half steps, the first n - f, a rule of one row each      `Peers`

Everybody, all rules of a setting and all seeds of a rule, draws the same batches. Attackers know the honest vectors of the round.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.bench.digits import digit_images
from weft.bench.system import Row
from weft.comm.attacks import Attack, DataAttack

__all__ = ["Digits", "Server", "accuracy", "gradients", "side_by_side", "start"]

WIDTHS = (64, 64, 10)
LENGTH = 64 * 64 + 64 + 64 * 10 + 10


@dataclass(frozen=True)
class Digits:
    """Images (count, 64) in [0, 1], labels, and for each worker the numbers of its training images."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    shares: tuple[Tensor, ...]

    @classmethod
    def shared_out(cls, workers: int, alpha: float, seed: int) -> Digits:
        """Each class over the workers by Dirichlet(alpha) proportions; alpha = inf shares out at random, equally.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed; names the extra.
        """
        images, labels = digit_images()
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(len(labels), generator=generator)
        x = torch.tensor(images, dtype=torch.float32)[order] / 16
        y = torch.tensor(labels)[order]
        cut = len(y) // 5
        train_y = y[cut:]
        if math.isinf(alpha):
            shares = list(torch.arange(len(train_y)).chunk(workers))
        else:
            import numpy as np

            draw = np.random.default_rng(seed)
            parts: list[list[int]] = [[] for _ in range(workers)]
            for label in range(10):
                members = (train_y == label).nonzero().flatten().tolist()
                edges = (np.cumsum(draw.dirichlet([alpha] * workers)) * len(members)).round().astype(int)
                for worker, (low, high) in enumerate(zip([0, *edges[:-1]], edges, strict=True)):
                    parts[worker] += members[low:high]
            # nobody goes without data
            shares = [torch.tensor(part if part else [int(draw.integers(len(train_y)))]) for part in parts]
        return cls(x[cut:], train_y, x[:cut], y[:cut], tuple(shares))

    def batches(self, steps: int, size: int, seed: int) -> Tensor:
        """Numbers of training images (steps, workers, size), drawn with replacement from each worker's share."""
        generator = torch.Generator().manual_seed(2000 + seed)
        drawn = [share[torch.randint(len(share), (steps, size), generator=generator)] for share in self.shares]
        return torch.stack(drawn, 1)


def start(seed: int) -> Tensor:
    """Flat parameters (LENGTH,) as torch.nn.Linear draws them."""
    generator = torch.Generator().manual_seed(3000 + seed)
    parts = []
    for inner, outer in itertools.pairwise(WIDTHS):
        bound = 1 / math.sqrt(inner)
        parts += [(torch.rand(size, generator=generator) * 2 - 1) * bound for size in (inner * outer, outer)]
    return torch.cat(parts)


def _split(flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, b1, second, b2 = flat.split([64 * 64, 64, 64 * 10, 10], -1)
    return first.unflatten(-1, (64, 64)), b1.unsqueeze(-2), second.unflatten(-1, (64, 10)), b2.unsqueeze(-2)


def gradients(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy gradients (c, w, LENGTH) of w workers' batches (c, w, b, 64), (c, w, b) at parameters (c, LENGTH)."""
    copies, workers, size = y.shape
    first, b1, second, b2 = _split(flat)
    inputs = x.reshape(copies, workers * size, 64)
    hidden = (inputs @ first + b1).relu_()
    error = torch.softmax(hidden @ second + b2, -1)
    error.scatter_add_(-1, y.reshape(copies, -1, 1), error.new_full((copies, workers * size, 1), -1.0))
    error /= size
    back = (error @ second.transpose(-1, -2)) * (hidden > 0)

    def each(t: Tensor) -> Tensor:
        return t.view(copies, workers, size, -1)

    found = torch.empty(copies, workers, LENGTH)
    pieces = found.split([64 * 64, 64, 64 * 10, 10], -1)
    pieces[0].copy_((each(inputs).transpose(-1, -2) @ each(back)).flatten(-2))
    pieces[1].copy_(each(back).sum(-2))
    pieces[2].copy_((each(hidden).transpose(-1, -2) @ each(error)).flatten(-2))
    pieces[3].copy_(each(error).sum(-2))
    return found


def accuracy(flat: Tensor, digits: Digits) -> Tensor:
    """Share of test images named right, for each of (c, LENGTH); 0.1 is chance. Parameters that are not finite name nothing."""
    first, b1, second, b2 = _split(flat)
    logits = (digits.test_x @ first + b1).relu() @ second + b2
    right = (logits.argmax(-1) == digits.test_y).float().mean(-1)
    return torch.where(torch.isfinite(flat).all(-1), right, torch.zeros(()))


@dataclass(frozen=True)
class Server:
    """Training with a server that combines the workers' momenta by a rule.

    Attributes:
        workers: n, the faulty ones are the last.
        steps, batch, rate, momentum: of SGD at each worker: m <- momentum m + (1 - momentum) g.
        alpha: of the data's Dirichlet distribution.
        seeds: one run each.
    """

    workers: int = 15
    steps: int = 100
    batch: int = 16
    rate: float = 1.0
    momentum: float = 0.9
    alpha: float = math.inf
    seeds: Sequence[int] = (0, 1, 2)

    def run(
        self, rules: Sequence[Callable[[Tensor], Tensor]], faulty: int, attack: Attack | DataAttack | None
    ) -> list[list[float]]:
        """Test accuracy [rule][seed]. All (rule, seed) run side by side on the same batches."""
        worlds = [Digits.shared_out(self.workers, self.alpha, seed) for seed in self.seeds]
        batches = [w.batches(self.steps, self.batch, s) for w, s in zip(worlds, self.seeds, strict=True)]
        count, repeat = len(rules), len(self.seeds)
        generator = torch.Generator().manual_seed(17)
        active = self.workers - faulty if isinstance(attack, Attack) else self.workers
        flat = torch.stack([start(s) for s in self.seeds]).repeat_interleave(count, 0)  # seed by seed, rule by rule
        memory = torch.zeros(repeat * count, active, LENGTH)
        for step in range(self.steps):
            xs, ys = [], []
            for world, numbers in zip(worlds, batches, strict=True):
                x, y = world.x[numbers[step, :active]], world.y[numbers[step, :active]]
                if isinstance(attack, DataAttack):
                    bad = slice(self.workers - faulty, None)
                    x[bad], y[bad] = attack.corrupt(x[bad], y[bad], 10, generator)
                xs.append(x)
                ys.append(y)
            x = torch.stack(xs).repeat_interleave(count, 0)
            y = torch.stack(ys).repeat_interleave(count, 0)
            memory.mul_(self.momentum).add_(gradients(flat, x, y), alpha=1 - self.momentum)
            for row, sent in enumerate(memory):
                if not bool(torch.isfinite(sent).all()):
                    continue  # the model has gone to infinity; it will name nothing
                if isinstance(attack, Attack):
                    sent = torch.cat([sent, attack.messages(sent, faulty, generator)])
                flat[row].sub_(rules[row % count](sent), alpha=self.rate)
        found = torch.stack([accuracy(flat[s * count : (s + 1) * count], world) for s, world in enumerate(worlds)])
        return found.T.tolist()


def side_by_side(measure: Callable[..., Row], settings: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
    """measure(*setting) for each, in order, by as many processes of one thread as there are cores: small tensors use one."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(measure, *zip(*settings, strict=True))
