"""Gradients by an exchange of `weft.comm` instead of all-reduce: the boxing Partial -> Replicate, coded.

Every process holds partial gradients whose sum is the gradient of the global loss; an exchange delivers W @ messages, a mean
where nobody is mistrusted. So each process submits n times its part: the mean of n such messages is the sum, and each one is
about as long as the gradient of a whole batch, which is what thresholds and robust rules expect.

The exchange's memories are not part of a checkpoint: a resumed run starts with empty ones, and loses what was owed then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import final

import torch

from weft.comm import Exchange, Spec
from weft.placement.comms import Handle
from weft.runtime.buckets import Bucket, SumBucket

__all__ = ["Coded"]

GRACE = 30.0  # seconds on top of the exchange's own limit, which reports more


@final
class _Sending:
    """One bucket under way."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._over = threading.Event()
        self._error: BaseException | None = None

    def done(self, error: BaseException | None) -> None:
        self._error = error
        self._over.set()

    def wait(self) -> None:
        if not self._over.wait(self._seconds):
            raise TimeoutError(f"the exchange of gradients did not end within {self._seconds:g} s")
        if self._error is not None:
            raise self._error


@final
class Coded:
    """The buckets of one process, sent by an exchange.

    Args:
        exchange: of the user.
        buckets: with gradients, in the order of their reductions.
        ranks: processes of the mesh.
        optimizer: that will apply what arrives.
    Raises:
        ValueError: some gradient is not owed to all processes alike, or the momentum would be applied twice.
        ExchangeMismatch: on every process, if they differ.
    """

    def __init__(self, exchange: Exchange, buckets: Sequence[Bucket], ranks: int, optimizer: torch.optim.Optimizer):
        for bucket in buckets:
            if not isinstance(bucket, SumBucket) or bucket.group.size != ranks:
                raise ValueError(
                    f"run: exchange= needs gradients that all processes sum, but {bucket.trainable[0].name!r} is held in pieces "
                    "or summed by some; use a data-parallel plan (Plan.manual(..., strategy='dp')) or leave exchange out"
                )
        if exchange.memory.velocity:
            _check_momentum(exchange, optimizer)
        self.exchange, self._ranks, self._last = exchange, ranks, buckets[-1]
        self._specs = {id(b): [Spec(h.name, tuple(h.local), h.dtype) for h in b.trainable] for b in buckets}
        exchange.open([spec for specs in self._specs.values() for spec in specs])
        self._step, self._first, self._skipped = exchange.core.step + 1, buckets[0], exchange.skipped
        self.plain = False  # all-reduce: for gradients that somebody only wants to look at
        for bucket in buckets:
            assert isinstance(bucket, SumBucket)
            bucket.send = self._send

    def _send(self, bucket: SumBucket) -> Handle:
        if self.plain:
            return bucket.group.all_reduce_async(bucket.flat)
        bucket.flat.mul_(self._ranks)
        sending = _Sending(self.exchange.timeout + GRACE)
        specs = self._specs[id(bucket)]
        parts = bucket.flat.split([spec.numel for spec in specs])
        last = bucket is self._last
        self.exchange.submit(list(zip(specs, parts, strict=True)), self._step, last, sending.done)
        self._step += last
        return sending

    def skip(self) -> bool:
        """Whether the step just exchanged was not finite on some process: memories are as before, and so parameters must be."""
        before, self._skipped = self._skipped, self.exchange.skipped
        return self._skipped > before


def _check_momentum(exchange: Exchange, optimizer: torch.optim.Optimizer) -> None:
    name = type(exchange.memory).__name__
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"run: {name} exchanges velocities, to be applied as they are; {type(optimizer).__name__} would normalise them. "
            "Use SGD, or ErrorFeedback"
        )
    if any(group["momentum"] for group in optimizer.param_groups):
        raise ValueError(
            f"run: {name} keeps the momentum; give weft.run an SGD with momentum=0, or it would be applied twice"
        )
