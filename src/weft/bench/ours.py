"""weft as a contender of `pair.side_by_side`: its own plan, or one of the strategies written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from weft.bench.meters import local, tensor_bytes
from weft.bench.pair import Problem, Step

__all__ = ["planned"]


@contextmanager
def planned(problem: Problem, cluster: str = "", strategy: str = "") -> Iterator[Step]:
    """Train by weft's plan, or by the hand-written `strategy` (dp, tp, zero-1, zero-2, zero-3).

    The model is built without memory for its values; each process makes its own pieces (`weft.placement.deferred`).

    Args:
        problem: what to train.
        cluster: cluster file; the default is `Cluster.local` for as many processes as there are.
        strategy: "" searches for the plan.
    """
    import torch.distributed as dist

    from weft.cluster import Cluster
    from weft.placement import deferred
    from weft.planner import Plan, plan
    from weft.runtime import run

    machines = Cluster.load(cluster) if cluster else Cluster.local(processes=dist.get_world_size())
    model, batch = deferred(problem.factory, seed=problem.seed), problem.batches[0]
    if strategy:
        found = Plan.manual(model, batch, cluster=machines, strategy=strategy, optimizer=problem.optimizer)
    else:
        found = plan(model, batch, cluster=machines, optimizer=problem.optimizer)
    with run(found, model, problem.optimizer) as trainer:

        def facts() -> dict[str, float]:
            held = trainer.state_dict()["model"]
            row = {
                "parameter_bytes": float(tensor_bytes(held.values())),
                "predicted_seconds": float(found.prediction.seconds),
                "predicted_bytes": float(found.prediction.peak),
            }
            heads = [tensor for name, tensor in held.items() if name.endswith("head.weight")]
            return {**row, "head_bytes": float(sum(local(head).nbytes for head in heads))} if heads else row

        yield Step(trainer.step, facts=facts)
