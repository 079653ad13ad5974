"""Worker processes that compute coded gradients, one mailbox each.

A mailbox holds one order, the newest: a worker that is late finds the order of the present round when it comes back, never a
queue of old ones, and the master never blocks on a full pipe (each mailbox is emptied by a thread of its own). Results carry the
number of their round, so that the master can tell those of closed rounds.

    ("load", number, bytes)     models, chunks and loss of a new run            Worker answers ("ready", number, None)
    ("round", number, orders)   compute                                         Worker answers ("done", number, {job: message})
                                                                                or ("error", number, traceback)

A message is the flat gradient of sum_k coefficient_k x (sum of losses over chunk k), with that weighted loss as last entry: the
loss is decoded by the same weights. A worker ends when its pipe does, so that no process outlives the master; Ctrl-C, which a
terminal sends to all of them, is the master's affair.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from weft.errors import PeerLost

__all__ = ["Crew", "Order", "Work", "flat", "trainable"]

START_SECONDS = 180.0  # for a process to start and import torch on a busy machine
STOP_SECONDS = 5.0

PerSample = Callable[..., Tensor]  # (model, *items of a batch, rows first) -> losses (rows,)


@dataclass(frozen=True)
class Work:
    """What a worker holds for a run: the models' structure, its chunks[batch][chunk] and the loss."""

    models: Sequence[nn.Module]
    chunks: Sequence[Mapping[int, tuple[Tensor, ...]]]
    loss: PerSample


@dataclass(frozen=True)
class Order:
    """A message to compute. `parameters` is flat, or None where the worker has those of this job already."""

    job: int
    model: int
    batch: int
    parameters: np.ndarray | None
    tasks: tuple[tuple[int, float], ...]  # (chunk, coefficient)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in their order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@final
class Crew:
    """`size` worker processes, to be used by one `Farm` at a time. A context manager; `close` ends all of them.

    A worker holds what one farm needs: a farm that runs after another one loads its own again.
    """

    def __init__(self, size: int):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"Crew: size must be a whole number >= 1, got {size!r}")
        context = multiprocessing.get_context("spawn")
        self.members: list[_Member] = []
        self.loads, self.rounds = 0, 0  # runs and rounds so far, over all farms: no number is used twice
        try:
            for _ in range(size):
                self.members.append(_Member(context))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process numbers, by worker."""
        return [member.process.pid or 0 for member in self.members]

    def load(self, work: Sequence[Work], lost: Collection[int] = ()) -> None:
        """Hand every worker what it holds for a run, all but the `lost` ones, and wait until all have it.

        Raises:
            PeerLost: a worker died or did not answer.
        """
        self.loads += 1
        waiting = {rank: member for rank, member in enumerate(self.members) if rank not in lost}
        for rank, member in waiting.items():
            member.post(("load", self.loads, pickle.dumps(work[rank])))
        deadline = time.monotonic() + START_SECONDS
        while waiting:
            rank = next(iter(waiting))
            answer = waiting[rank].read(deadline - time.monotonic())
            if answer is None or (answer[0] == "error" and answer[1] == self.loads):
                raise PeerLost(rank, "the start of a run", answer[2] if answer else "it died or did not answer")
            if answer[:2] == ("ready", self.loads):  # what is left of an earlier run is passed over
                del waiting[rank]

    def close(self) -> None:
        """End every process; nothing of them is left."""
        for member in self.members:
            member.stop()
        for member in self.members:
            member.join()
        self.members = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Member:
    """One process, its pipe and its mailbox."""

    def __init__(self, context: Any):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.alive = True
        self._newest: Any = None
        self._changed = threading.Condition()
        self.mailbox = threading.Thread(target=self._deliver, name="weft-mailbox", daemon=True)
        self.mailbox.start()

    def post(self, order: Any) -> None:
        """Put an order in the mailbox in place of one that has not been fetched."""
        with self._changed:
            self._newest = order
            self._changed.notify()

    def read(self, timeout: float) -> Any:
        """The next answer, or None if the process has died or nothing came in time."""
        try:
            return self.pipe.recv() if wait([self.pipe], max(0.0, timeout)) else None
        except (EOFError, OSError):
            self.alive = False
            return None

    def stop(self) -> None:
        self.alive = False
        self.process.kill()
        self.post(None)

    def join(self) -> None:
        self.process.join(STOP_SECONDS)
        self.mailbox.join(STOP_SECONDS)
        with contextlib.suppress(OSError):
            self.pipe.close()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                while self._newest is None:
                    if not self.alive:
                        return
                    self._changed.wait(1.0)
                order, self._newest = self._newest, None
            try:
                self.pipe.send(order)
            except (OSError, ValueError):  # the process is gone
                return


def _serve(pipe: Connection, parent: int) -> None:
    """The worker's loop: always the newest order; ends with its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    work: Work | None = None
    versions: dict[int, int] = {}
    number = -1
    while True:
        try:
            kind, number, content = pipe.recv()
            while kind == "round" and pipe.poll():  # orders of closed rounds are void
                kind, number, content = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if kind == "load":
                work, versions = pickle.loads(content), {}
                answer: tuple[Any, ...] = ("ready", number, None)
            else:
                assert work is not None
                answer = ("done", number, _messages(work, content, versions))
        except Exception:
            answer = ("error", number, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return


def _messages(work: Work, orders: Sequence[Order], versions: dict[int, int]) -> dict[int, np.ndarray]:
    """The flat message of each job, weighted loss last: one forward pass a model, and one backward pass for all of them.

    Models share nothing, so that each gets the gradient of its own loss; for small models passes cost more than samples.
    """
    parameters = [trainable(work.models[order.model]) for order in orders]
    totals = [_total(work, order, own, versions) for order, own in zip(orders, parameters, strict=True)]
    live = [total for total in totals if total is not None]
    wanted = [p for own, total in zip(parameters, totals, strict=True) if total is not None for p in own]
    found = iter(torch.autograd.grad(live, wanted, allow_unused=True) if live else ())
    messages = {}
    for order, own, total in zip(orders, parameters, totals, strict=True):
        parts = [None if total is None else next(found) for _ in own]
        full = [torch.zeros_like(p) if g is None else g for p, g in zip(own, parts, strict=True)]
        loss = full[0].new_zeros(1) if total is None else total.detach().reshape(1).to(full[0].dtype)
        messages[order.job] = torch.cat([flat(full), loss]).numpy()
    return messages


def _total(work: Work, order: Order, parameters: Sequence[nn.Parameter], versions: dict[int, int]) -> Tensor | None:
    """The weighted loss of one job's chunks; None where they have no samples."""
    model = work.models[order.model]
    if order.parameters is not None:
        nn.utils.vector_to_parameters(torch.from_numpy(order.parameters), parameters)
        versions[order.model] = order.job
    assert versions.get(order.model) == order.job, "the master left out parameters that this worker does not have"
    held = work.chunks[order.batch]
    pieces = [(held[chunk], coefficient) for chunk, coefficient in order.tasks if len(held[chunk][0])]
    if not pieces:
        return None
    items = [torch.cat(column) for column in zip(*(piece for piece, _ in pieces), strict=True)]
    losses = work.loss(model, *items)
    rows = len(items[0])
    if losses.shape != (rows,):
        raise ValueError(
            f"the loss must give one number per sample, shape ({rows},), got {tuple(losses.shape)}; use reduction='none'"
        )
    weights = torch.cat([losses.new_full((len(piece[0]),), coefficient) for piece, coefficient in pieces])
    return weights @ losses
