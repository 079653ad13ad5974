"""Data-parallel training under compressed gradients: what two ranks do in the bench `deep-gradient-compression`.

    step_times      every method in the same two processes, taking turns: whole steps, and exchanges alone, over the link that the
                    processes were started on; bytes are those of the network interface
    text_losses     validation loss of a byte-level transformer after the same steps of each method
    image_accuracy  the same for a residual network on images

A method is a name of `METHODS`. All start from the same weights, see the same batches and use SGD with momentum 0.9; where the
memory has the momentum, `attach` takes it out of the optimizer.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from weft.bench.links import interface_bytes
from weft.bench.turns import Taken, across, rotated, watch
from weft.comm.codecs import LowRank, TopK
from weft.comm.ddp import Handle, attach
from weft.comm.exchange import Exchange
from weft.comm.memories import ErrorFeedback
from weft.comm.presets import dgc
from weft.nn import GPT, GPTOptions, ResNet, ResNetOptions

__all__ = ["METHODS", "data_folder", "image_accuracy", "say", "step_times", "text_losses", "transformer"]

MOMENTUM = 0.9
WARMUP = (0.25, 0.0625, 0.0156)

METHODS: dict[str, Callable[[int], Exchange | None]] = {  # of the steps that each ratio of a warm-up holds
    "plain DDP": lambda stage: None,
    "fp16 hook": lambda stage: None,
    "PowerSGD-4": lambda stage: Exchange(LowRank(4), ErrorFeedback(), measure=0),
    "top-k 1%, error feedback": lambda stage: Exchange(TopK(0.01), ErrorFeedback(), measure=0),
    "DGC 1%": lambda stage: _dgc(0.01, WARMUP, stage),
    "DGC 0.1%": lambda stage: _dgc(0.001, (*WARMUP, 0.004), stage),
}


def _dgc(ratio: float, warmup: Sequence[float], stage: int) -> Exchange:
    if not stage:
        return dgc(ratio, momentum=MOMENTUM, measure=0)
    return dgc(ratio, warmup=warmup, momentum=MOMENTUM, stage_steps=stage, measure=0)


def say(text: str) -> None:
    """Progress, from rank 0, to standard error."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def data_folder(name: str) -> Path:
    """The folder of a real data set.

    Raises:
        FileNotFoundError: it is not there.
    """
    folder = Path(os.environ.get("WEFT_DATA", "../shared/data")) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"no {folder}: set WEFT_DATA to the folder that holds the data sets")
    return folder


def transformer(seed: int) -> GPT:
    """A byte-level GPT of 6.5 million parameters, without biases."""
    torch.manual_seed(seed)
    return GPT(GPTOptions(vocabulary=256, context=256, layers=8, heads=8, width=256, bias=False, tied=False))


class Probe(nn.Module):
    """A model and its loss; called without a batch, it has gradients that cost nothing: those it was given as `fixed`."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss
        self.fixed: list[Tensor] = []

    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if x is not None and y is not None:
            return self.loss(self.model, x, y)
        parts = [
            (parameter * given).sum() for parameter, given in zip(self.model.parameters(), self.fixed, strict=True)
        ]
        return torch.stack(parts).sum()


class Contender:
    """One method: model, optimizer, exchange."""

    def __init__(
        self, method: str, model: nn.Module, loss: Callable[..., Tensor], lr: float, decay: float = 0.0, stage: int = 0
    ):
        self.method = method
        self.probe = Probe(model, loss)
        self.ddp = DistributedDataParallel(self.probe)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=decay)
        exchange = METHODS[method](stage)
        if method == "fp16 hook":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            self.ddp.register_comm_hook(None, fp16_compress_hook)
        self.handle: Handle | None = None if exchange is None else attach(self.ddp, exchange, self.optimizer)

    def step(self, *batch: Tensor, update: bool = True, exchange: bool = True) -> float:
        """Forward, backward with exchange, update; the loss."""
        self.optimizer.zero_grad()
        with nullcontext() if exchange else self.ddp.no_sync():
            loss = self.ddp(*batch)
            loss.backward()
        if update:
            self.optimizer.step()
        return float(loss.detach())

    def codec_seconds(self) -> float:
        """CPU seconds of memory and codec on this rank, so far."""
        if self.handle is None:
            return 0.0
        report = self.handle.exchange.report()
        return report.codec_seconds * report.steps

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss per target of logits (..., classes)."""
    logits = model(x)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def text_batches(
    text: bytes, context: int, rows: int, seed: int, part: str = "train"
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, next tokens), each (rows, context), of this rank."""
    from weft.tasks.text import windows

    share = seed * dist.get_world_size() + dist.get_rank()
    for window in windows(text, context, "train" if part == "train" else "test", rows, share):
        yield window[:, :-1], window[:, 1:]


# ---- time and bytes


def step_times(
    methods: Sequence[str], rounds: int, seed: int, rows: int = 4, context: int = 64
) -> list[dict[str, float]]:
    """Medians over `rounds` turns: seconds and bytes of a whole step and of an exchange alone, for each method in order.

    Args:
        methods: of `METHODS`; ratios hold from the first step on, without warm-up.
        rounds: timed turns after one that is not.
        seed: of weights and batches.
        rows, context: a rank's batch.
    Returns:
        Per method: step_seconds, exchange_seconds (wall clock of the slowest rank); compute_seconds (a step without exchange);
        wire_bytes (sent by the interface of rank 0 in a step); cpu_seconds of a step, summed over ranks; codec_cpu_seconds of a
        step, of one rank.
    """
    text = _text()
    batches = list(islice(text_batches(text, context, rows, seed), 8))
    contenders = [Contender(method, transformer(seed), cross_entropy, lr=0.01) for method in methods]
    for contender in contenders:  # gradients of a real batch, for exchanges alone
        contender.step(*batches[0], update=False, exchange=False)
        contender.probe.fixed = [p.grad.clone() for p in contender.probe.model.parameters() if p.grad is not None]
    kinds: dict[str, dict[str, Any]] = {
        "step": {"batch": True, "exchange": True},
        "exchange": {"batch": False, "exchange": True},
        "compute": {"batch": True, "exchange": False},
    }
    seen: list[dict[str, list[Taken]]] = [{kind: [] for kind in kinds} for _ in methods]
    codec = [0.0] * len(methods)  # seconds of the turn that is not timed, in which states are made
    for turn in range(-1, rounds):
        if turn == 0:
            codec = [contender.codec_seconds() for contender in contenders]
        for index in rotated(range(len(contenders)), turn):
            for kind, what in kinds.items():
                batch = batches[turn % len(batches)] if what["batch"] else ()
                dist.barrier()
                sent = interface_bytes()[1]
                with watch() as taken:
                    contenders[index].step(*batch, update=what["batch"], exchange=what["exchange"])
                taken.nbytes = float(interface_bytes()[1] - sent)
                if turn >= 0:
                    seen[index][kind].append(taken)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    found = []
    for index, contender in enumerate(contenders):
        taken_by = {kind: across([own[index][kind] for own in everyone]) for kind in kinds}
        found.append({
            **{f"{kind}_seconds": taken["wall_seconds"] for kind, taken in taken_by.items()},
            "cpu_seconds": taken_by["step"]["cpu_seconds"],
            "wire_bytes": taken_by["step"]["wire_bytes"],
            "codec_cpu_seconds": (contender.codec_seconds() - codec[index]) / (2 * rounds),  # whole steps, exchanges alone
        })  # fmt: skip
    return found


# ---- quality


def text_losses(
    methods: Sequence[str], steps: int, seed: int, lr: float, rows: int, context: int, stage: int
) -> list[dict[str, float]]:
    """Train the transformer by each method for `steps` steps; mean validation loss in nats per byte, and whether ranks agree.

    The learning rate rises over the first tenth and falls to a tenth by a cosine, for all methods alike; a warm-up ratio holds
    `stage` steps. Validation: 64 windows of the held-out tenth of the text.
    """
    text, found = _text(), []
    held = next(text_batches(text, 128, 64, 0, "test"))
    for method in methods:
        began = time.perf_counter()
        contender = Contender(method, transformer(seed), cross_entropy, lr=lr, stage=stage)
        for step, batch in enumerate(islice(text_batches(text, context, rows, seed), steps)):
            _set_rate(contender.optimizer, lr, step, steps, 0.1)
            contender.step(*batch)
        with torch.no_grad():
            loss = float(contender.probe.loss(contender.probe.model, *held))
        apart = _ranks_apart(contender.probe.model)
        contender.close()
        found.append({"validation_loss": loss, "ranks_apart": apart})
        say(f"  {method}: validation loss {loss:.4f} after {steps} steps, {time.perf_counter() - began:.0f} s")
    return found


def image_accuracy(
    methods: Sequence[str],
    epochs: int,
    seeds: Sequence[int],
    rates: Sequence[float],
    rows: int,
    widths: tuple[int, ...],
    held_out: int,
) -> list[dict[str, float]]:
    """Train a residual network on the lossless images of CIFAR-10 by each method; mean test accuracy in percent.

    Of the 4,000 images the last `held_out` are for the test. Which of `rates` is a method's learning rate the images before them
    decide: as many are held out of the training, with a seed that is none of `seeds`. Each method then trains on all but the test
    images once per seed; its accuracy, and its loss in training (of one rank's batches), are means over the seeds and over the
    last three epochs, with random flips and shifts in training. As in the paper, each ratio of a warm-up holds an epoch, and the
    learning rate falls to a hundredth; it rises as for the text.
    """
    import numpy as np

    with np.load(data_folder("cifar10") / "lossless_first4000.npz", allow_pickle=False) as file:
        pixels = torch.from_numpy(file["x"].transpose(0, 3, 1, 2).copy()).float().div_(255).sub_(0.47).div_(0.25)
        labels = torch.from_numpy(file["y"].astype("int64"))
    images = Images(pixels, labels, rows, epochs, widths)
    testing, judging = (range(len(labels) - n * held_out, len(labels) - (n - 1) * held_out) for n in (1, 2))
    found = []
    for method in methods:
        began = time.perf_counter()
        judged = [statistics.mean(images.trained(method, lr, max(seeds) + 1, judging)[0]) for lr in rates]
        say(f"  {method}: {', '.join(f'rate {r:g}: {100 * a:.1f} %' for r, a in zip(rates, judged, strict=True))}")
        lr = rates[judged.index(max(judged))]
        runs = [images.trained(method, lr, seed, testing) for seed in seeds]
        found.append({
            "accuracy_percent": 100 * statistics.mean(statistics.mean(accuracies) for accuracies, _ in runs),
            "training_loss": statistics.mean(loss for _, loss in runs),
            "learning_rate": lr,
        })  # fmt: skip
        say(
            f"  {method}: accuracy {found[-1]['accuracy_percent']:.2f} %, loss in training "
            f"{found[-1]['training_loss']:.3f} at rate {lr:g}, {time.perf_counter() - began:.0f} s"
        )
    return found


@dataclass(frozen=True)
class Images:
    """Pictures and their classes, and how a network is trained on them."""

    pixels: Tensor  # (n, 3, 32, 32)
    labels: Tensor  # (n,)
    rows: int  # a rank's batch
    epochs: int
    widths: tuple[int, ...]

    def trained(self, method: str, lr: float, seed: int, held: range) -> tuple[list[float], float]:
        """Train on the images before `held`; accuracies on `held` after each of the last three epochs, mean loss in those."""
        ranks, own = dist.get_world_size(), dist.get_rank()
        per_epoch = held.start // (self.rows * ranks)
        torch.manual_seed(seed)
        model = ResNet(ResNetOptions(3, 10, self.widths, (1,) * len(self.widths)))
        contender = Contender(method, model, cross_entropy, lr, decay=5e-4, stage=per_epoch)
        g = torch.Generator().manual_seed(seed)
        accuracies, losses = list[float](), list[float]()
        for epoch in range(self.epochs):
            order = torch.randperm(held.start, generator=g)
            for step in range(per_epoch):
                _set_rate(contender.optimizer, lr, epoch * per_epoch + step, self.epochs * per_epoch, 0.01)
                chosen = order[(step * ranks + own) * self.rows :][: self.rows]
                x = _augmented(self.pixels[chosen], seed * 10**6 + epoch * per_epoch + step)
                loss = contender.step(x, self.labels[chosen])
                if epoch >= self.epochs - 3:
                    losses.append(loss)
            if epoch >= self.epochs - 3:
                accuracies.append(
                    _accuracy(model, self.pixels[held.start : held.stop], self.labels[held.start : held.stop])
                )
        contender.close()
        return accuracies, statistics.mean(losses)


def _text() -> bytes:
    import gzip

    return gzip.decompress((data_folder("tinyshakespeare") / "input.txt.gz").read_bytes())


def _set_rate(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int, end: float) -> None:
    rise = max(1, steps // 10)
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / (steps - rise))
    for group in optimizer.param_groups:
        group["lr"] = lr * min((step + 1) / rise, end + (1 - end) * cosine)


def _augmented(x: Tensor, seed: int) -> Tensor:
    """Flipped or not, and shifted by up to 4 pixels, one draw a batch and rank."""
    g = torch.Generator().manual_seed(seed * 2 + dist.get_rank())
    down, right, flip = (int(torch.randint(0, top, (), generator=g)) for top in (9, 9, 2))
    x = F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
    return x.flip(3) if flip else x


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True))
    model.train()
    return right / len(y)


def _ranks_apart(model: nn.Module) -> float:
    """Largest difference between a parameter of rank 0 and of another rank; 0 is required."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    reference = flat.clone()
    dist.broadcast(reference, 0)
    worst = (flat - reference).abs().max().view(1)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)
