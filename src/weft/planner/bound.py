"""A time that no plan can beat under the cost model: perfect division of work, no communication.

Problem    call n takes t[n, d] seconds on device d if it does all of it there (roofline, without the overhead of a call).
           A plan gives device d some share of each call; a step lasts at least as long as the busiest device computes.
Method     for any weights y >= 0 that sum to 1 (weak duality of the linear programme over shares)
               T >= sum over d of y[d] (seconds of d) >= sum over n of min over d of y[d] t[n, d]
           and y[d] proportional to the speed of d makes it exact for devices that differ by one factor.   `lower_bound`
           Every device also makes every call, and every step, so the least overheads are added; and the update of
           its share of the optimizer's state.
Guarantee  a bound for all plans that this planner can make, in its own cost model. It ignores memory and communication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weft.graph.graph import Graph
from weft.planner.costs import dtype_name
from weft.planner.optimizer import OptimizerCost

if TYPE_CHECKING:
    from weft.cluster import Cluster

__all__ = ["lower_bound", "speeds"]


def _times(graph: Graph, cluster: Cluster, optimizer: OptimizerCost) -> tuple[np.ndarray, np.ndarray]:
    """t[n, d], the optimizer last, without overheads; and the total overhead per device."""
    devices = cluster.devices
    rows, overhead = [], np.zeros(len(devices))
    for node in graph.calls:
        if node.kind in ("view", "none"):
            continue
        dtype = dtype_name(node.outputs[0]) if node.outputs else "float32"
        trains = any(spec.requires_grad for spec in node.outputs)
        passes = [(node.cost.flops_forward, node.cost.bytes_forward)]
        passes += [(node.cost.flops_backward, node.cost.bytes_backward)] if trains else []
        rows.append([sum(d.seconds(node.kind, f, b, dtype, 0) for f, b in passes) for d in devices])
        overhead += [len(passes) * d.seconds(node.kind, 0.0, 0.0, dtype, 1) for d in devices]
    specs = [node.outputs[0] for node in graph.of("parameter") if node.outputs[0].requires_grad]
    numel, nbytes = sum(s.numel for s in specs), sum(s.nbytes for s in specs)
    rows.append(
        [d.seconds("optimizer", optimizer.flops(numel), optimizer.moved_bytes(nbytes), "float32", 0) for d in devices]
    )
    overhead += [d.seconds("optimizer", 0.0, 0.0, "float32", 1) if specs else 0.0 for d in devices]
    return np.array(rows), overhead


def speeds(graph: Graph, cluster: Cluster, optimizer: OptimizerCost) -> np.ndarray:
    """Share of the work that each device should do: by its speed on this model. Shape (devices,), sums to 1."""
    times, overhead = _times(graph, cluster, optimizer)
    speed = 1.0 / np.maximum(times.sum(axis=0) + overhead, 1e-30)
    return speed / speed.sum()


def lower_bound(graph: Graph, cluster: Cluster, optimizer: OptimizerCost) -> float:
    """Seconds that a step takes at least, whatever the plan."""
    times, overhead = _times(graph, cluster, optimizer)
    speed = 1.0 / np.maximum(times.sum(axis=0), 1e-30)
    overhead = overhead + [device.step for device in cluster.devices]
    return float((times * (speed / speed.sum())).min(axis=1).sum() + overhead.min())
