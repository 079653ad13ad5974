"""What a task is: a model factory, deterministic batches, a loss, and a number that says how good the model is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Metric", "Split", "Task", "accuracy", "bits_per_token", "mean_loss"]

Batch = Any  # what `weft.plan` and `trainer.step` take: tensors in a tuple or dict
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Metric:
    """A number for a model and some batches. `measure(model, batches, loss)` computes it; `larger_is_better` says its sense."""

    name: str
    larger_is_better: bool
    measure: Callable[[nn.Module, Iterable[Batch], Callable[..., Tensor] | None], float]


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        name: of the task and its data, as "language-model/standard-library".
        factory: builds the model; its weights follow torch's global generator.
        stream: (split, batch_size, seed) -> batches. "train" goes on for ever, in an order given by the seed; "test" is
            the held-out part once, in order.
        loss: as for `weft.plan`; None where the model returns its loss.
        metric: how good a model is.
        batch_size: rows of a batch unless asked otherwise.
        tokens_per_row: items in a row that throughput counts; 0 counts rows.
        seed: of weights and batches.
    """

    name: str
    factory: Callable[[], nn.Module]
    stream: Callable[[Split, int, int], Iterator[Batch]]
    loss: Callable[..., Tensor] | None
    metric: Metric
    batch_size: int
    tokens_per_row: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"task {self.name}: batch_size must be at least 1, got {self.batch_size}")

    @property
    def model(self) -> nn.Module:
        """A new model in training mode, initialised from the seed; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.factory().train()

    @property
    def batch(self) -> Batch:
        """The first training batch, to plan with."""
        return next(self.batches())

    @property
    def tokens(self) -> int:
        """Items in a batch that throughput counts; 0 where that is rows."""
        return self.batch_size * self.tokens_per_row

    def batches(
        self, seed: int | None = None, split: Split = "train", batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Batches of a split; the seed orders the training part and says nothing for the test part.

        Raises:
            ValueError: an unknown split, or a batch size below 1.
        """
        if split not in ("train", "test"):
            raise ValueError(f"task {self.name}: split must be 'train' or 'test', got {split!r}")
        rows = self.batch_size if batch_size is None else batch_size
        if rows < 1:
            raise ValueError(f"task {self.name}: batch_size must be at least 1, got {rows}")
        return self.stream(split, rows, self.seed if seed is None else seed)

    def evaluate(self, model: nn.Module, batches: int = 8) -> float:
        """The metric over the first `batches` held-out batches, with the model in evaluation mode for their duration."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self.metric.measure(model, itertools.islice(self.batches(split="test"), batches), self.loss)
        finally:
            model.train(training)

    def but(self, **changes: Any) -> Task:
        """This task with some fields changed."""
        return replace(self, **changes)


def loss_of(model: nn.Module, batch: Batch, loss: Callable[..., Tensor] | None) -> Tensor:
    """The scalar loss of one batch, whatever form batch and output take."""
    if isinstance(batch, dict):
        output = model(**batch)
        return output.loss if loss is None else loss(output, batch)
    return model(*batch) if loss is None else loss(model(*batch[:-1]), batch[-1])


def _mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Callable[..., Tensor] | None) -> float:
    losses = [loss_of(model, batch, loss).item() for batch in batches]
    if not losses:
        raise ValueError("no held-out batch to measure on: the held-out part is smaller than one row")
    return sum(losses) / len(losses)


def _bits(model: nn.Module, batches: Iterable[Batch], loss: Callable[..., Tensor] | None) -> float:
    return _mean_loss(model, batches, loss) / math.log(2)


def _accuracy(model: nn.Module, batches: Iterable[Batch], loss: Callable[..., Tensor] | None) -> float:
    right = rows = 0
    for inputs, targets in batches:
        right += int((model(inputs).argmax(-1) == targets).sum())
        rows += len(targets)
    if not rows:
        raise ValueError("no held-out batch to measure on")
    return right / rows


mean_loss = Metric("held-out loss", False, _mean_loss)
bits_per_token = Metric("held-out bits per token", False, _bits)
accuracy = Metric("held-out accuracy", True, _accuracy)
