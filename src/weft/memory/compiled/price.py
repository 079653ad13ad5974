"""What the operators of a graph cost: seconds, and the workspace that they take and give back.

Each kind of call (operator, shapes, strides) is run once or a few times on made-up numbers, one after the other, by
`weft.memory.tracing.costs`; the native counter sees its workspace. What does not run so, or does not fit beside the model, is
priced from a CPU core's rates.
"""

from __future__ import annotations

import torch
from torch import fx

from weft.cluster.device import Device
from weft.cluster.library import device as library_device
from weft.memory.compiled.joint import Price
from weft.memory.private import disable_modes
from weft.memory.tracing.costs import CostTable, Sample, Work, describe, measure_operators, sample

__all__ = ["device_of", "price_graph"]

EFFORT = 1.0  # seconds for repeating measurements, beyond running each kind of call once


def price_graph(graph: fx.Graph, costs: CostTable | Device | None, room: int) -> Price:
    """Prices of a graph's operators.

    Args:
        graph: with fake tensors on its nodes.
        costs: a table, which is taken as far as it goes; a device for its rates; None to measure here.
        room: bytes that measuring may take.
    """
    works: dict[fx.Node, Work] = {}
    samples: dict[str, Sample] = {}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            work = describe(node.target, args, kwargs, node.meta.get("val"))
            works[node] = work
            if work.nbytes <= room:
                samples.setdefault(work.signature, sample(node.target, args, kwargs))
    device = device_of(graph)
    rates = costs if isinstance(costs, Device) else library_device("cpu-core")
    table = CostTable.from_rates(list(works.values()), rates)
    if isinstance(costs, CostTable):
        table = costs.over(table)
    elif costs is None:
        with disable_modes():  # torch compiles under fake tensors, which take no time and no bytes
            table = measure_operators(samples, device, effort=EFFORT).over(table)

    def price(node: fx.Node) -> tuple[float, int]:
        work = works.get(node)
        return (table.of(work), table.workspace.get(work.signature, 0)) if work is not None else (0.0, 0)

    return price


def device_of(graph: fx.Graph) -> str:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return str(value.device)
    return "cpu"
