"""Gradients by an exchange of `weft.comm`: the boxings Partial -> Replicate and Partial -> Shard, coded.

    data parallel         all-reduce       each process gets the whole            `Exchange.submit`
    ZeRO-1, -2, -3        reduce-scatter   each process gets its piece            `Exchange.submit` with the pieces' boxes

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

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm import Exchange, Gossip, NoMemory, Peer, ScatterGather, Spec
from weft.comm.agree import describe
from weft.comm.memories.momentum_correction import carry_decay
from weft.comm.regroup import regrouped
from weft.comm.segments import Cut
from weft.errors import ExchangeMismatch
from weft.placement.comms import Handle
from weft.runtime.buckets import Bucket, ScatterBucket, SumBucket
from weft.runtime.choice import Choice

__all__ = ["Coded", "code", "about", "check", "read", "save"]

DECAY = "decay_momentum"  # in the optimizer's state
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
                f"run: exchange= needs gradients that all processes sum, but {other.trainable[0].name!r} is used in pieces or "
                "summed by some; use data parallelism or ZeRO over all devices (Plan.manual(..., strategy='dp' or 'zero-1', "
                "'zero-2', 'zero-3')), or leave exchange out"
            )
        if isinstance(exchange.topology, Peer | Gossip):
            raise ValueError(
                f"run: over {type(exchange.topology).__name__} every process gets a result of its own, and parameters would "
                "drift apart; use AllGather or ScatterGather, or weft.comm.attach_peer"
            )
        if exchange.group is not None and dist.get_world_size(exchange.group) != ranks:
            raise ValueError(
                f"run: the plan is for {ranks} processes, but exchange.group has {dist.get_world_size(exchange.group)}; "
                "leave group out, it is then all processes"
            )
        if exchange.memory.velocity:
            _check_momentum(exchange, optimizer)
        self.exchange, self.name, self._ranks, self._buckets = exchange, name, ranks, tuple(buckets)
        self.pieces = pieces(buckets)
        self._specs = {id(b): _specs(b) for b in buckets}
        exchange.open([spec for specs in self._specs.values() for spec in specs])
        members = dist.get_process_group_ranks(exchange.core.wired.group)
        self._cuts = {id(b): _cuts(b, members) for b in buckets}
        self._catch_up()
        for bucket in buckets:
            bucket.send = self._send

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Meanwhile gradients go by the buckets' own collectives: for somebody who only wants to look at them."""
        for bucket in self._buckets:
            bucket.send = None
        try:
            yield
        finally:
            for bucket in self._buckets:
                bucket.send = self._send

    def _catch_up(self) -> None:
        self._step, self._skipped = self.exchange.core.step + 1, self.exchange.skipped

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `Exchange.state_dict` was taken."""
        self.exchange.load_state_dict(state)
        self._catch_up()

    def _send(self, bucket: Bucket, flat: Tensor) -> Handle:
        flat.mul_(self._ranks)
        sending = _Sending(self.exchange.timeout + GRACE)
        specs = self._specs[id(bucket)]
        parts = flat.split([spec.numel for spec in specs])
        last = bucket is self._buckets[-1]
        named = list(zip(specs, parts, strict=True))
        self.exchange.submit(named, self._step, last, sending.done, self._cuts[id(bucket)])
        self._step += last
        return sending

    @torch.no_grad()
    def carry_decay(self, optimizer: torch.optim.Optimizer) -> None:
        """Before its step. What is carried is state of the optimizer, of a piece's shape, and saved and cut anew as such."""
        if not self.exchange.memory.velocity:
            return
        for group in optimizer.param_groups:
            decay, sign = group["weight_decay"], -1.0 if group.get("maximize") else 1.0
            for parameter in group["params"]:
                if parameter.grad is not None and (decay or DECAY in optimizer.state.get(parameter, ())):
                    buffer = optimizer.state[parameter].setdefault(DECAY, torch.zeros_like(parameter))
                    carry_decay(self.exchange.memory, parameter.grad, parameter, buffer, decay, sign)

    def skip(self) -> bool:
        """Whether the step just exchanged was not finite on some process: memories are as before, and so parameters must be."""
        before, self._skipped = self._skipped, self.exchange.skipped
        return self._skipped > before


def code(
    wanted: Exchange | Choice,
    buckets: Sequence[Bucket],
    ranks: int,
    optimizer: torch.optim.Optimizer,
    pick: Callable[[Choice], str],
) -> Coded | None:
    """Send the buckets by an exchange, or by what a choice says; None if that is all-reduce. Every process calls this.

    Args:
        wanted, buckets, ranks, optimizer: see `Coded`.
        pick: asks the choice, or knows what it said.
    """
    if isinstance(wanted, Exchange):
        return Coded(wanted, buckets, ranks, optimizer)
    name = pick(wanted) if _summed_by_some(buckets, ranks) is None else "plain"
    exchange = wanted.make(name)
    return None if exchange is None else Coded(exchange, buckets, ranks, optimizer, name)


def _summed_by_some(buckets: Sequence[Bucket], ranks: int) -> Bucket | None:
    """The first bucket whose gradients are not owed to all processes."""

    def everybody(bucket: Bucket) -> bool:
        if isinstance(bucket, ScatterBucket):
            return bucket.reducing.size == ranks and bucket.summing is None
        return isinstance(bucket, SumBucket) and bucket.group.size == ranks

    return next((bucket for bucket in buckets if not everybody(bucket)), None)


def _specs(bucket: Bucket) -> list[Spec]:
    return [Spec(h.name, tuple(h.local), h.dtype) for h in bucket.trainable]


def _cuts(bucket: Bucket, members: Sequence[int]) -> list[Cut]:
    """What each of an exchange's members (global ranks) keeps of every gradient; none where all keep it whole."""
    if not isinstance(bucket, ScatterBucket):
        return []
    order = [bucket.reducing.ranks.index(rank) for rank in members]
    return [Cut(tuple(h.local), tuple(h.boxes[member] for member in order)) for h in bucket.trainable]


def pieces(buckets: Sequence[Bucket]) -> list[str]:
    """Parameters of whose gradients each process keeps a piece."""
    return sorted(h.name for bucket in buckets if isinstance(bucket, ScatterBucket) for h in bucket.trainable)


# ---- checkpoints


def file(rank: int) -> str:
    return f"exchange-{rank}.pt"


def about(coded: Coded | None) -> dict[str, Any] | None:
    """What a checkpoint's index says of the exchange, for `check`."""
    if coded is None:
        return None
    exchange = coded.exchange
    memory = "" if isinstance(exchange.memory, NoMemory) else describe(exchange.memory)
    found = {"options": exchange.options, "ranks": exchange.core.wired.ranks, "memory": memory}
    return {**found, "pieces": coded.pieces}


def save(coded: Coded | None, folder: Path) -> list[Path]:
    """Write this process's memories; the files written. Every process calls it, between steps."""
    if coded is None:
        return []
    path = folder / file(coded.exchange.core.wired.own)
    torch.save(coded.exchange.state_dict(), path)
    return [path]


def check(exchange: Exchange | None, ranks: int, index: Mapping[str, Any], cut: Sequence[str] = ()) -> str:
    """Whether a run of so many processes can go on from a checkpoint: what is to be said of its exchange, or "".

    Args:
        cut: parameters of whose gradients each process keeps a piece, see `pieces`.
    Raises:
        ExchangeMismatch: the checkpoint is of another exchange, or of owners that kept what nobody would send any more.
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
    fresh = sorted(set(cut) - set(saved.get("pieces", ())))
    if fresh and isinstance(exchange.topology, ScatterGather) and exchange.topology.memory is not None:
        raise ExchangeMismatch(
            f"placements of {fresh[0]!r} of run and checkpoint", "each process keeps a piece of its gradient",
            "each got the whole, and owners owe a part of it",
            "Go on with a plan that keeps gradients whole (strategy 'dp'), or load the weights alone.",
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
