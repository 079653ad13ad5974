"""Gradients by an exchange of `weft.comm` instead of all-reduce: the boxing Partial -> Replicate, coded.

Every process holds partial gradients whose sum is the gradient of the global loss; an exchange delivers W @ messages, a mean
where nobody is mistrusted. So each process submits n times its part: the mean of n such messages is the sum, and each one is
about as long as the gradient of a whole batch, which is what thresholds and robust rules expect.

A checkpoint holds every process's memories. What becomes of them in a run that goes on from it:                `check`, `read`

    the same exchange, as many processes     the same bits as without interruption
    ... another number of processes          their mean on each, which is what they owed (see comm/regroup.py), or an error
    another exchange                         an error
    no exchange, or one process              left out, with a warning
    an exchange, and none in the checkpoint  nothing is owed: empty memories; an error if the momentum was the optimizer's
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch

from weft.comm import Exchange, NoMemory, Spec
from weft.comm.agree import describe
from weft.comm.regroup import regrouped
from weft.errors import ExchangeMismatch
from weft.placement.comms import Handle
from weft.runtime.buckets import Bucket, SumBucket
from weft.runtime.choice import Choice

__all__ = ["Coded", "code", "about", "check", "read", "save"]

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
    """The buckets of one process, sent by an exchange; see `code`.

    Args:
        exchange: of the user.
        buckets: with gradients, in the order of their reductions.
        ranks: processes of the mesh.
        optimizer: that will apply what arrives.
        name: of the exchange among those to choose from, "" if there was no choice.
    Raises:
        ValueError: some gradient is not owed to all processes alike, or the momentum would be applied twice.
        ExchangeMismatch: on every process, if they differ.
    """

    def __init__(
        self,
        exchange: Exchange,
        buckets: Sequence[Bucket],
        ranks: int,
        optimizer: torch.optim.Optimizer,
        name: str = "",
    ):
        other = _summed_by_some(buckets, ranks)
        if other is not None:
            raise ValueError(
                f"run: exchange= needs gradients that all processes sum, but {other.trainable[0].name!r} is held in pieces "
                "or summed by some; use a data-parallel plan (Plan.manual(..., strategy='dp')) or leave exchange out"
            )
        if exchange.memory.velocity:
            _check_momentum(exchange, optimizer)
        self.exchange, self.name, self._ranks, self._last = exchange, name, ranks, buckets[-1]
        self._specs = {id(b): _specs(b) for b in buckets}
        exchange.open([spec for specs in self._specs.values() for spec in specs])
        self._catch_up()
        self.plain = False  # all-reduce: for gradients that somebody only wants to look at
        for bucket in buckets:
            assert isinstance(bucket, SumBucket)
            bucket.send = self._send

    def _catch_up(self) -> None:
        self._step, self._skipped = self.exchange.core.step + 1, self.exchange.skipped

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `Exchange.state_dict` was taken."""
        self.exchange.load_state_dict(state)
        self._catch_up()

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


def code(
    wanted: Exchange | Choice, buckets: Sequence[Bucket], ranks: int, optimizer: torch.optim.Optimizer, name: str = ""
) -> Coded | None:
    """Send the buckets by an exchange, or by what a choice says; None if that is all-reduce. Every process calls this.

    Args:
        wanted, buckets, ranks, optimizer: see `Coded`.
        name: of the choice, where it is made already.
    """
    if isinstance(wanted, Exchange):
        return Coded(wanted, buckets, ranks, optimizer)
    if not name and _summed_by_some(buckets, ranks) is None:
        specs = [spec for bucket in buckets for spec in _specs(bucket)]
        name = wanted.pick(specs, ranks, len(buckets), buckets[0].gradients()[0].device)
    exchange = wanted.make(name or "plain")
    return None if exchange is None else Coded(exchange, buckets, ranks, optimizer, name)


def _summed_by_some(buckets: Sequence[Bucket], ranks: int) -> Bucket | None:
    """The first bucket whose gradients are not owed to all processes alike."""
    return next((b for b in buckets if not isinstance(b, SumBucket) or b.group.size != ranks), None)


def _specs(bucket: Bucket) -> list[Spec]:
    return [Spec(h.name, tuple(h.local), h.dtype) for h in bucket.trainable]


# ---- checkpoints


def file(rank: int) -> str:
    return f"exchange-{rank}.pt"


def about(coded: Coded | None) -> dict[str, Any] | None:
    """What a checkpoint's index says of the exchange, for `check`."""
    if coded is None:
        return None
    exchange = coded.exchange
    memory = "" if isinstance(exchange.memory, NoMemory) else describe(exchange.memory)
    return {"options": exchange.options, "ranks": exchange.core.wired.ranks, "memory": memory}


def save(coded: Coded | None, folder: Path) -> list[Path]:
    """Write this process's memories; the files written. Every process calls it, between steps."""
    if coded is None:
        return []
    path = folder / file(coded.exchange.core.wired.own)
    torch.save(coded.exchange.state_dict(), path)
    return [path]


def check(exchange: Exchange | None, ranks: int, index: Mapping[str, Any]) -> str:
    """Whether a run of so many processes can go on from a checkpoint: what is to be said of its exchange, or "".

    Raises:
        ExchangeMismatch: the checkpoint is of another exchange.
        ValueError: the memory is to keep a momentum that the checkpoint has in its optimizer.
    """
    saved = index.get("exchange")
    if exchange is None or ranks == 1:
        if saved is None or not saved["memory"]:
            return ""
        return (
            f"the checkpoint's exchange kept memories ({saved['memory']}) on {saved['ranks']} processes. This run sends its "
            "gradients without an exchange: what was kept is left out"
        )
    if saved is None:
        if exchange.memory.velocity and any(group.get("momentum") for group in index["optimizer"]["groups"]):
            raise ValueError(
                f"run: {type(exchange.memory).__name__} keeps the momentum, but the checkpoint is of a run whose optimizer had "
                "it; go on without exchange=, or load the weights alone: trainer.load_state_dict(weft.runtime.read_whole(path))"
            )
        return ""
    if saved["options"] != exchange.options:
        for ours, theirs in zip(exchange.options.splitlines(), saved["options"].splitlines(), strict=False):
            if ours != theirs:
                raise ExchangeMismatch(
                    "options of exchange and checkpoint", ours, theirs,
                    "Give weft.run the exchange of the run that saved, or load the weights alone: "
                    "trainer.load_state_dict(weft.runtime.read_whole(path)).",
                )  # fmt: skip
    if saved["ranks"] == ranks or not saved["memory"]:
        return ""
    return (
        f"the checkpoint's exchange kept memories ({saved['memory']}) on {saved['ranks']} processes, and this run has "
        f"{ranks}: each begins with their mean, which conserves what is owed"
    )


def read(coded: Coded | None, index: Mapping[str, Any]) -> dict[str, Any]:
    """This process's part of a checkpoint that `check` has passed; empty if there is none for it.

    Raises:
        ExchangeMismatch: on every process; the memories have no exact form on this number of processes.
    """
    saved = index.get("exchange")
    if coded is None or saved is None:
        return {}
    exchange, folder = coded.exchange, Path(index["path"])
    wired = exchange.core.wired

    def part(rank: int) -> dict[str, Any]:
        return torch.load(folder / file(rank), weights_only=True, map_location=wired.device)

    if saved["ranks"] == wired.ranks:
        return part(wired.own)
    everyone = [part(rank) for rank in range(saved["ranks"])]
    return regrouped(everyone, exchange.memory, exchange.combine, exchange.seed, wired.own, wired.ranks)


# ---- what may not be


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
