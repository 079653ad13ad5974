"""Exchanges under DistributedDataParallel, measured: against plain on loopback, and `auto` against fixed choices on real links.

attached      a contender of `pair.side_by_side`: DDP with an exchange that changes nothing
plain         DDP without a hook, the same otherwise
on_wire       one rank of `links.on_links`: plain, fixed exchanges and `auto` take turns; wall seconds a step
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weft.bench.pair import Problem, Step
from weft.bench.turns import rotated, watch

__all__ = ["attached", "on_wire", "plain"]


@contextmanager
def plain(problem: Problem) -> Iterator[Step]:
    """DistributedDataParallel; `facts` has a digest of the parameters."""
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel(problem.model(), gradient_as_bucket_view=True)
    yield _step(problem, ddp, problem.optimizer(ddp.parameters()))


@contextmanager
def attached(problem: Problem) -> Iterator[Step]:
    """The same, with `attach(ddp, Exchange(), optimizer)`: every step is also looked through for what is not finite."""
    from torch.nn.parallel import DistributedDataParallel

    from weft.comm.ddp import attach
    from weft.comm.exchange import Exchange

    ddp = DistributedDataParallel(problem.model(), gradient_as_bucket_view=True)
    optimizer = problem.optimizer(ddp.parameters())
    handle = attach(ddp, Exchange(), optimizer)
    yield _step(problem, ddp, optimizer)
    handle.remove()


def _step(problem: Problem, ddp: Any, optimizer: Any) -> Step:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()

    def run(batch: tuple[Any, ...]) -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = ddp(*problem.share(batch, rank, world))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Step(run, mean=True, facts=lambda: {"parameters_digest": digest(ddp.module)})


def digest(model: Any) -> float:
    """48 bits of a hash of all parameters, as a float: equal for bit-identical models."""
    found = hashlib.blake2b(digest_size=6)
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().numpy().tobytes())
    return float(int.from_bytes(found.digest(), "little"))


def on_wire(seed: int, rounds: int, layers: int, width: int, link: tuple[float, float] | None = None) -> dict[str, Any]:
    """Median wall seconds of a step of plain, every candidate of `auto`, and `auto`, taking turns over one wire.

    Args:
        seed: of the model and the text.
        rounds: timed steps of each.
        layers, width: of the byte-level GPT.
        link: (latency, bytes per second) that `auto` is told, or None to let it measure.
    Returns:
        {"seconds": {method: seconds}, "chosen": the name that `auto` chose, "predicted": {name: seconds}}.
    """
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from weft.bench.problems import gpt_on_text
    from weft.cluster import Link
    from weft.comm.automatic import auto, usual
    from weft.comm.ddp import attach

    problem = gpt_on_text(layers=layers, width=width, heads=4, batch=8, tokens=64, count=4, seed=seed)
    choice = auto(None if link is None else Link(*link), trial=5)
    handles, steps = {}, {}
    for name in ("plain", *usual(), "auto"):
        ddp = DistributedDataParallel(problem.model(), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        if name != "plain":
            handles[name] = attach(ddp, choice if name == "auto" else usual()[name], optimizer)
        steps[name] = _step(problem, ddp, optimizer)
    for turn in range(2 * choice.trial + 2):  # `auto` alone on the wire, as in training: choice and check
        steps["auto"].run(problem.batches[turn % 4])
    for name in steps:
        for turn in range(2 if name != "auto" else 1):  # DDP rebuilds its buckets, buffers are made
            steps[name].run(problem.batches[turn])
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in rotated(list(steps), turn):
            dist.barrier()
            with watch() as taken:
                steps[name].run(problem.batches[turn % 4])
            found[name].append(taken.wall)
    seconds = {name: statistics.median(times) for name, times in found.items()}
    return {"seconds": seconds, "chosen": handles["auto"].chosen, "predicted": handles["auto"].predicted}
