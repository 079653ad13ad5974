"""weft: write a PyTorch model once, for one device; weft plans it and trains it over whatever machines you have.

    cluster = weft.Cluster.local(processes=2)            what there is: devices and links (or `Cluster.load("cluster.yaml")`)
    plan = weft.plan(model, batch, cluster=cluster)      where every value and parameter lives, and why
    with weft.run(plan, model) as trainer:               local processes, or the processes of torchrun
        loss = trainer.step(batch)                       global batch in, global loss out

Verbs stand here, packages are nouns (`weft.memory`, `weft.comm`, ...). Importing `weft` imports neither torch nor a solver: each
name below, and each package, is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "Cluster": "weft.cluster", "Device": "weft.cluster", "Link": "weft.cluster", "profile": "weft.cluster",
    "Graph": "weft.graph", "capture": "weft.graph",
    "Mesh": "weft.placement", "Partial": "weft.placement", "Replicate": "weft.placement", "Shard": "weft.placement",
    "deferred": "weft.placement",
    "Plan": "weft.planner", "plan": "weft.planner",
    "Trainer": "weft.runtime", "run": "weft.runtime",
    "WeftError": "weft.errors",
}  # fmt: skip


_PACKAGES = (
    "bench",
    "cluster",
    "comm",
    "federated",
    "graph",
    "memory",
    "nn",
    "placement",
    "planner",
    "runtime",
    "tasks",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"weft.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'weft' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
