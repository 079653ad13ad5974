"""Gradients by an exchange of `weft.comm`: the boxings Partial -> Replicate and Partial -> Shard, coded.

    data parallel         all-reduce       each process gets the whole            `Exchange.submit`
    ZeRO-1, -2, -3        reduce-scatter   each process gets its piece            `Exchange.submit` with the pieces' boxes
    ZeRO along others     all-reduce       each holder gets the whole of a piece  `Exchange.submit`, after a reduce-scatter

Every process holds partial gradients whose sum is the gradient of the global loss; an exchange delivers W @ messages, a mean
where nobody is mistrusted. So each process submits n times its part: the mean of n such messages is the sum, and each one is
about as long as the gradient of a whole batch, which is what thresholds expect. Rules that compare messages get each part over
its share of the samples, the mean gradient of a process's own ones, and no process is without any (`Coded.weigh`).

An exchange goes along axes of the mesh along which every gradient is summed (`planner.coding.carries`): all of them, or those
of data parallelism beside tensor parallelism, or beside ZeRO along the others (hybrid sharding: plain reduce-scatters inside a
node, coded messages between nodes). Then processes stand in rows, each with its parts of the parameters                  `Rows`

    a part                  to the codec a tensor of its own, with its shape and random numbers of its own
    what rows hold alike    summed as it is over the rows first; then the same bits go the same way, by the same random numbers,
                            in each row, and the same come out
    a bad step              undone in all rows (`Bucket.finish`)

A checkpoint holds every process's memories. What becomes of them in a run that goes on from it:                `check`, `read`

    the same exchange, as many processes     the same bits as without interruption
    ... another number of processes          their mean on each, which is what they owed (see comm/regroup.py), or an error
    another exchange, or other parts         an error
    no exchange, or one process              left out, with a warning
    an exchange, and none in the checkpoint  nothing is owed: empty memories; an error if the momentum was the optimizer's
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm import Exchange, Gossip, Mean, NoMemory, Peer, ScatterGather, Spec
from weft.comm.agree import agree, describe
from weft.comm.memory import VelocityMemory
from weft.comm.regroup import regrouped
from weft.comm.segments import Cut
from weft.errors import ExchangeMismatch
from weft.placement.comms import DONE, Group, Handle
from weft.placement.layout import intervals
from weft.planner.coding import Summed, carries
from weft.runtime.buckets import Bucket, ScatterBucket
from weft.runtime.choice import Choice
from weft.runtime.pieces import Holding, hold
from weft.runtime.store import Groups

__all__ = ["Coded", "Rows", "code", "about", "check", "read", "save"]

DECAY = "decay_momentum"  # in the optimizer's state
GRACE = 30.0  # seconds on top of the exchange's own limit, which reports more


@final
@dataclass(frozen=True)
class Rows:
    """Who exchanges with whom.

    Attributes:
        axes: of the mesh, along which processes of a row differ; none if there are none along which every gradient is summed.
        ranks: global, of each row.
        own: this process's row.
        parts: of each parameter that is not whole there, what each row holds of it, see `Spec.part`.
    """

    axes: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    own: int
    parts: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, buckets: Sequence[Bucket]) -> Rows:
        held = [h for bucket in buckets for h in bucket.trainable]
        mesh, axes = held[0].mesh, carries(_owed(h) for h in held)
        ranks = tuple(mesh.lines(axes))
        own = next(number for number, row in enumerate(ranks) if mesh.at(held[0].position) in row)
        parts = {h.name: [_part(h, mesh.coordinates(row[0]), axes) for row in ranks] for h in held}
        return cls(axes, ranks, own, {name: of for name, of in parts.items() if any(of)})

    @property
    def length(self) -> int:
        return len(self.ranks[0])


def _owed(h: Holding) -> Summed:
    return h.scatter_axes, h.sum_axes


def _cut_first(h: Holding, axes: Sequence[int]) -> bool:
    """Whether an exchange along some axes carries pieces of a gradient, cut along other axes before."""
    return bool(h.scatter_axes) and not {*h.scatter_axes} & {*axes}


def _part(h: Holding, position: Sequence[int], axes: Sequence[int]) -> str:
    """What of a parameter is exchanged at a position of the mesh, as one would index it; "" for all of it."""
    held = [intervals(size, dim, h.used, h.mesh, position) for dim, size in enumerate(h.shape)]
    if _cut_first(h, axes):
        there = hold(h.name, h.shape, h.dtype, h.trainable, h.placement, h.mesh, tuple(position))
        held = [_inside(ranges, *box) for ranges, box in zip(held, there.boxes[there.member], strict=True)]
    if all(ranges == [(0, size)] for ranges, size in zip(held, h.shape, strict=True)):
        return ""
    return f"[{', '.join('+'.join(f'{start}:{stop}' for start, stop in ranges) for ranges in held)}]"


def _inside(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Entries start..stop of what some index ranges hold, as index ranges.

    >>> _inside([(0, 4), (10, 14)], 2, 5)
    [(2, 4), (10, 11)]
    """
    found = []
    for low, high in ranges:
        first, last = low + max(start, 0), min(high, low + stop)
        if first < last:
            found.append((first, last))
        start, stop = start - (high - low), stop - (high - low)
    return found or [(0, 0)]


@final
class _Sending:
    """One bucket under way. `start` sees to it that it is submitted."""

    def __init__(self, seconds: float, start: Callable[[], None]):
        self._seconds, self._start = seconds, start
        self._over = threading.Event()
        self._error: BaseException | None = None

    def done(self, error: BaseException | None) -> None:
        self._error = error
        self._over.set()

    def wait(self) -> None:
        self._start()
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
        optimizer: that will apply what arrives.
        name: of the exchange among those to choose from, "" if there was no choice.
    Raises:
        ValueError: there is no axis along which all gradients are summed, or the momentum would be applied twice.
        ExchangeMismatch: on every process of the mesh, if any two differ.
    """

    def __init__(
        self,
        exchange: Exchange,
        buckets: Sequence[Bucket],
        optimizer: torch.optim.Optimizer,
        name: str = "",
    ):
        rows = Rows.of(buckets)
        aside, ranks = len(rows.ranks) > 1, len(rows.ranks) * rows.length
        if not rows.axes:
            raise ValueError(
                "run: exchange= needs axes of the mesh along which all gradients are summed, whole, or in pieces along just "
                f"these or others alone, but {_first_refused(buckets)!r} does not fit; use data parallelism or ZeRO over all "
                "devices, or along an axis beside ZeRO or tensor parallelism (Plan.manual(..., strategy='dp' or 'zero-1', or "
                "('dp', 'zero-1') or ('dp', 'tp') on a mesh), or leave exchange out"
            )
        if aside and exchange.one_group:
            raise ValueError(
                f"run: exchange= would go side by side in {len(rows.ranks)} groups of {rows.length} processes, but "
                f"{exchange.one_group}; or use data parallelism or ZeRO over all devices"
            )
        if isinstance(exchange.topology, Peer | Gossip):
            raise ValueError(
                f"run: over {type(exchange.topology).__name__} every process gets a result of its own, and parameters would "
                "drift apart; use AllGather or ScatterGather, or weft.comm.attach_peer"
            )
        if exchange.group is not None and (aside or dist.get_world_size(exchange.group) != ranks):
            raise ValueError(
                f"run: the plan is for {ranks} processes, in {len(rows.ranks)} groups, but exchange.group has "
                f"{dist.get_world_size(exchange.group)}; leave group out, the plan says who exchanges with whom"
            )
        if isinstance(exchange.memory, VelocityMemory):
            _check_momentum(exchange, optimizer)
        self.exchange, self.name, self.rows, self._buckets = exchange, name, rows, tuple(buckets)
        self.pieces = pieces(buckets, rows.axes)
        self._specs = {id(b): _specs(b, rows) for b in buckets}
        self._scale = float(rows.length)
        if aside:
            _agree(exchange, buckets)
        exchange.open([spec for specs in self._specs.values() for spec in specs], rows.ranks)
        members = dist.get_process_group_ranks(exchange.wired.group)
        self._cuts = {id(b): _cuts(b, members, rows.axes) for b in buckets}
        self._first = {id(b): _over_rows(b, rows.axes) for b in buckets}
        self._unsent: Callable[[], None] | None = None  # submits a bucket that rows sum now
        self._catch_up()
        for bucket in buckets:
            bucket.send, bucket.cut_first = self._send, _cut_first(bucket.trainable[0], rows.axes)

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

    def weigh(self, jobs: Iterable[tuple[float, Mapping[tuple[int, ...], int]]]) -> None:
        """Before a step: by how much this process's part is to be multiplied.

        Args:
            jobs: of each micro-batch its share of the samples, and how many entries of it each position of the mesh has; read
                only if the rule asks for it.
        Raises:
            ValueError: on every process: one would have no sample, and the rule takes its message for one as good as others.
        """
        if isinstance(self.exchange.combine, Mean) or self._buckets[0].send is None:
            return
        shares: dict[tuple[int, ...], float] = {}
        for weight, held in jobs:
            for position, count in held.items():
                at = tuple(position[axis] for axis in self.rows.axes)
                shares[at] = shares.get(at, 0.0) + weight * count / sum(held.values())
        empty = sum(not share for share in shares.values())
        if empty:
            raise ValueError(
                f"batch: it has no sample for {empty} of {len(shares)} processes that exchange gradients, and "
                f"{type(self.exchange.combine).__name__} would take theirs for votes; leave out so small a batch "
                "(DataLoader(drop_last=True)), or use weft.comm.Mean()"
            )
        own = self._buckets[0].trainable[0].position
        self._scale = 1.0 / shares[tuple(own[axis] for axis in self.rows.axes)]

    def _catch_up(self) -> None:
        self._step, self._skipped = self.exchange.next_step, self.exchange.skipped

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `Exchange.state_dict` was taken."""
        self.exchange.load_state_dict(state)
        self._catch_up()

    def _send(self, bucket: Bucket, flat: Tensor, after: Handle) -> Handle:
        if bucket is self._buckets[0]:
            self._unsent = None  # of a step that an error has ended
        self._submit_unsent()
        sending = _Sending(self.exchange.timeout + GRACE, self._submit_unsent)
        group = self._first[id(bucket)]
        if group is not None:
            after.wait()
            after = group.all_reduce_async(flat)

        def submit() -> None:
            after.wait()
            self._submit(bucket, flat, sending)

        self._unsent = submit
        if after is DONE:
            self._submit_unsent()
        return sending

    def _submit_unsent(self) -> None:
        """Buckets are submitted in their order; what is summed or cut before goes on while backward computes the next one."""
        if self._unsent is not None:
            unsent, self._unsent = self._unsent, None
            unsent()

    def _submit(self, bucket: Bucket, flat: Tensor, sending: _Sending) -> None:
        flat.mul_(self._scale)
        specs = self._specs[id(bucket)]
        parts = flat.split([spec.numel for spec in specs])
        last = bucket is self._buckets[-1]
        named = list(zip(specs, parts, strict=True))
        self.exchange.submit(named, self._step, last, sending.done, self._cuts[id(bucket)])
        self._step += last

    @torch.no_grad()
    def carry_decay(self, optimizer: torch.optim.Optimizer) -> None:
        """Before its step. What is carried is state of the optimizer, of a piece's shape, and saved and cut anew as such."""
        memory = self.exchange.memory
        if not isinstance(memory, VelocityMemory):
            return
        for group in optimizer.param_groups:
            decay, sign = group["weight_decay"], -1.0 if group.get("maximize") else 1.0
            for parameter in group["params"]:
                if parameter.grad is not None and (decay or DECAY in optimizer.state.get(parameter, ())):
                    buffer = optimizer.state[parameter].setdefault(DECAY, torch.zeros_like(parameter))
                    memory.carry_decay(parameter.grad, parameter, buffer, decay, sign)

    def skip(self) -> bool:
        """Whether the step just exchanged was not finite on some process: memories are as before, and so parameters must be."""
        before, self._skipped = self._skipped, self.exchange.skipped
        return self._skipped > before


def code(
    wanted: Exchange | Choice,
    buckets: Sequence[Bucket],
    optimizer: torch.optim.Optimizer,
    pick: Callable[[Choice], str],
) -> Coded | None:
    """Send the buckets by an exchange, or by what a choice says; None if that is all-reduce. Every process calls this.

    Args:
        wanted, buckets, optimizer: see `Coded`.
        pick: asks the choice, or knows what it said.
    """
    if isinstance(wanted, Exchange):
        return Coded(wanted, buckets, optimizer)
    name = pick(wanted) if Rows.of(buckets).axes else "plain"
    exchange = wanted.make(name)
    return None if exchange is None else Coded(exchange, buckets, optimizer, name)


def _first_refused(buckets: Sequence[Bucket]) -> str:
    """The first parameter whose gradient goes with none of those before."""
    held = [h for bucket in buckets for h in bucket.trainable]
    return next(h.name for i, h in enumerate(held) if not carries(_owed(before) for before in held[: i + 1]))


def _agree(exchange: Exchange, buckets: Sequence[Bucket]) -> None:
    """Compare over all processes what rows will compare only each by itself."""
    held = [h for bucket in buckets for h in bucket.trainable]
    lines = [f"{h.name} {h.shape} {h.dtype} {h.placement} on {h.mesh.shape}" for h in held]
    world, device = dist.group.WORLD, next(iter(buckets[0].leaves.values())).device
    assert world is not None
    agree(
        "options or tensors", "\n".join([exchange.options, *lines]), world, device,
        "Every process must have the same plan and the same exchange options.",
    )  # fmt: skip


def _over_rows(bucket: Bucket, axes: Sequence[int]) -> Group | None:
    """Those that hold the same of a bucket's parameters in other rows: gradients are summed over them first."""
    h = bucket.trainable[0]
    rest = [axis for axis in range(h.mesh.ndim) if axis in h.sum_axes and axis not in axes]
    return Groups(h.mesh, h.mesh.at(h.position)).over(rest, "reduce") if rest else None


def _specs(bucket: Bucket, rows: Rows) -> list[Spec]:
    whole, found = [""] * len(rows.ranks), []
    for h in bucket.trainable:
        shape = h.piece_shape() if _cut_first(h, rows.axes) else tuple(h.local)
        parts = rows.parts.get(h.name, whole)
        found.append(Spec(h.name, shape, h.dtype, parts[rows.own], parts.count(parts[rows.own])))
    return found


def _scattered(bucket: Bucket, axes: Sequence[int]) -> bool:
    """Whether each of those that exchange a bucket keeps a piece."""
    return isinstance(bucket, ScatterBucket) and bucket.trainable[0].scatter_axes == tuple(axes)


def _cuts(bucket: Bucket, members: Sequence[int], axes: Sequence[int]) -> list[Cut]:
    """What each of an exchange's members (global ranks) keeps of every gradient; none where all keep it whole."""
    if not _scattered(bucket, axes):
        return []
    assert isinstance(bucket, ScatterBucket)
    order = [bucket.reducing.ranks.index(rank) for rank in members]
    return [Cut(tuple(h.local), tuple(h.boxes[member] for member in order)) for h in bucket.trainable]


def pieces(buckets: Sequence[Bucket], axes: Sequence[int]) -> list[str]:
    """Parameters of whose gradients each of those that exchange them keeps a piece."""
    return sorted(h.name for bucket in buckets if _scattered(bucket, axes) for h in bucket.trainable)


# ---- checkpoints


def file(rank: int) -> str:
    return f"exchange-{rank}.pt"


def about(coded: Coded | None) -> dict[str, Any] | None:
    """What a checkpoint's index says of the exchange, for `check`."""
    if coded is None:
        return None
    exchange = coded.exchange
    memory = "" if isinstance(exchange.memory, NoMemory) else describe(exchange.memory)
    found = {"options": exchange.options, "ranks": exchange.wired.ranks, "memory": memory}
    return {**found, "pieces": coded.pieces, "parts": coded.rows.parts}


def save(coded: Coded | None, folder: Path) -> list[Path]:
    """Write this process's memories; the files written. Every process calls it, between steps."""
    if coded is None:
        return []
    path = folder / file(coded.rows.own * coded.rows.length + coded.exchange.wired.own)
    torch.save(coded.exchange.state_dict(), path)
    return [path]


def check(exchange: Exchange | None, buckets: Sequence[Bucket], index: Mapping[str, Any]) -> str:
    """Whether a run of such buckets can go on from a checkpoint: what is to be said of its exchange, or "".

    Raises:
        ExchangeMismatch: the checkpoint is of another exchange, of other parts of the parameters, or of owners that kept what
            nobody would send any more.
        ValueError: the memory is to keep a momentum that the checkpoint has in its optimizer.
    """
    saved, rows = index.get("exchange"), Rows.of(buckets)
    if exchange is None or len(rows.ranks) * rows.length == 1:
        if saved is None or not saved["memory"]:
            return ""
        return (
            f"the checkpoint's exchange kept memories ({saved['memory']}) on {_many(saved)}. This run sends its gradients "
            "without an exchange: what was kept is left out"
        )
    if saved is None:
        momentum = any(group.get("momentum") for group in index["optimizer"]["groups"])
        if momentum and isinstance(exchange.memory, VelocityMemory):
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
    before = saved.get("parts", {})
    for name in sorted({*before, *rows.parts}):
        if before.get(name) != rows.parts.get(name):
            ours, theirs = (" and ".join(parts.get(name, ["the whole"])) for parts in (rows.parts, before))
            raise ExchangeMismatch(
                f"parts of {name!r} that groups of run and checkpoint exchange", ours, theirs,
                "Go on with a plan that cuts parameters as the one that saved, over any number of processes in a group, or load "
                "the weights alone: trainer.load_state_dict(weft.runtime.read_whole(path)).",
            )  # fmt: skip
    fresh = sorted(set(pieces(buckets, rows.axes)) - set(saved.get("pieces", ())))
    if fresh and isinstance(exchange.topology, ScatterGather) and exchange.topology.memory is not None:
        raise ExchangeMismatch(
            f"placements of {fresh[0]!r} of run and checkpoint", "each process keeps a piece of its gradient",
            "each got the whole, and owners owe a part of it",
            "Go on with a plan that keeps gradients whole (strategy 'dp'), or load the weights alone.",
        )  # fmt: skip
    if saved["ranks"] == rows.length or not saved["memory"]:
        return ""
    return (
        f"the checkpoint's exchange kept memories ({saved['memory']}) on {_many(saved)}, and this run has {rows.length}: each "
        "begins with their mean, which conserves what is owed"
    )


def _many(saved: Mapping[str, Any]) -> str:
    return f"{saved['ranks']} processes" + (" of each group" if saved.get("parts") else "")


def read(coded: Coded | None, index: Mapping[str, Any]) -> dict[str, Any]:
    """This process's part of a checkpoint that `check` has passed; empty if there is none for it.

    Raises:
        ExchangeMismatch: on every process; the memories have no exact form on this number of processes.
    """
    saved = index.get("exchange")
    if coded is None or saved is None:
        return {}
    exchange, folder = coded.exchange, Path(index["path"])
    wired = exchange.wired

    def of(rank: int) -> dict[str, Any]:
        path = folder / file(coded.rows.own * saved["ranks"] + rank)
        return torch.load(path, weights_only=True, map_location=wired.device)

    if saved["ranks"] == wired.ranks:
        return of(wired.own)
    everyone = [of(rank) for rank in range(saved["ranks"])]
    parts = {name: spec.part for name, spec in exchange.core.specs.items()}
    return regrouped(everyone, exchange.memory, exchange.combine, exchange.seed, wired.own, wired.ranks, parts)


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
