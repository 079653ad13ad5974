"""weft: write a PyTorch model once, for one device; weft plans it and trains it over whatever machines you have.

    cluster = weft.Cluster.local(processes=2)            what there is: devices and links (or `Cluster.load("cluster.yaml")`)
    plan = weft.plan(model, batch, cluster=cluster)      where every value and parameter lives, and why
    with weft.run(plan, model) as trainer:               local processes, or the processes of torchrun
        loss = trainer.step(batch)                       global batch in, global loss out

Verbs stand here, packages are nouns (`weft.memory`, `weft.comm`, ...). Importing `weft` imports neither torch nor a solver: each
name below, and each package, is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.names import lazily

if TYPE_CHECKING:
    from weft.cluster import Cluster, Device, Link, profile
    from weft.errors import WeftError
    from weft.graph import Graph, capture
    from weft.placement import Mesh, Partial, Replicate, Shard, deferred
    from weft.planner import Plan, plan
    from weft.runtime import Trainer, run

__version__ = "0.1.0"

__all__ = [
    "Cluster", "Device", "Graph", "Link", "Mesh", "Partial", "Plan", "Replicate", "Shard", "Trainer", "WeftError",
    "capture", "deferred", "plan", "profile", "run",
]  # fmt: skip

_HOME = {  # public name -> the package that has it
    "Cluster": "cluster", "Device": "cluster", "Link": "cluster", "profile": "cluster",
    "Graph": "graph", "capture": "graph",
    "Mesh": "placement", "Partial": "placement", "Replicate": "placement", "Shard": "placement",
    "deferred": "placement",
    "Plan": "planner", "plan": "planner",
    "Trainer": "runtime", "run": "runtime",
    "WeftError": "errors",
}  # fmt: skip

__getattr__, __dir__ = lazily(
    __name__,
    _HOME,
    ("bench", "cluster", "comm", "federated", "graph", "memory", "nn", "placement", "planner", "runtime", "tasks"),
)
