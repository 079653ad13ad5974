"""Plans made by hand for the runtime's tests: they depend on placement alone, not on what the planner would choose."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.graph import capture
from weft.graph.graph import Graph, Node
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.axes import Cuts, find_cuts, signatures
from weft.placement.layout import Mesh, Partial, Placement, Replicate, Shard
from weft.placement.signature import Signature

VOCABULARY = 13


class Tiny(nn.Module):
    """A language model of odd sizes with tied weights, dropout, a bias and a norm."""

    def __init__(self, dropout: float = 0.0, width: int = 10):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.up = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(self.dropout(F.gelu(self.up(x))))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(dropout).to(dtype)


def batch(samples: int = 6, tokens: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(0, VOCABULARY, (samples, tokens), generator=generator)
    return draw(), draw()


@dataclass(frozen=True)
class HandPlan:
    """What `weft.run` reads of a plan."""

    assignment: Assignment
    graph: Graph | None = None
    optimizer: Any = field(default_factory=lambda: SimpleNamespace(name="AdamW"))
    loss: Any = None
    exchange: str = ""
    squeezes: tuple[Any, ...] = ()
    prediction: Any = field(default_factory=lambda: SimpleNamespace(peak=0))
    cluster: Any = field(default_factory=lambda: SimpleNamespace(devices=[SimpleNamespace(kind="cpu-core")]))

    def check_graph(self, graph: Graph) -> None:
        assert set(self.assignment.parameters) == set(graph.parameters)


def data_parallel(graph: Graph, mesh: Mesh, cuts: Cuts, axis: int = 0) -> dict[str, tuple[Signature, ...]]:
    """Signatures that cut dim 0 of whatever depends on the batch along one axis, and nothing along the others."""
    chosen: dict[str, tuple[Signature, ...]] = {}
    carries = {node.name for node in graph.of("input")}
    for node in graph.calls:
        options = signatures(graph, node, mesh.shape[axis], cuts, mesh.weights[axis])
        on_batch = [ref.node in carries for ref in node.inputs]
        if any(on_batch):
            carries.add(node.name)
            fitting = [s for s in options if _cuts_batch(s, on_batch)]
            one = fitting[0]
        else:
            one = options[0]
        whole = Signature((Replicate(),) * len(node.inputs), (Replicate(),) * len(node.outputs))
        chosen[node.name] = tuple(one if a == axis else whole for a in range(mesh.ndim))
    return chosen


def _cuts_batch(signature: Signature, on_batch: list[bool]) -> bool:
    first = lambda p: isinstance(p, Shard) and p.dim == 0
    operands = all(first(p) if on else p == Replicate() for p, on in zip(signature.inputs, on_batch, strict=True))
    return operands and all(first(p) or isinstance(p, Partial) for p in signature.outputs)


def zero(graph: Graph, mesh: Mesh, stage: int, axes: tuple[int, ...] = (0,)) -> dict[str, ParameterPlacement]:
    """Every parameter used whole, and cut along dim 0 by ZeRO of the given stage over some axes; 0 for data parallel."""
    whole = (Replicate(),) * mesh.ndim
    if stage == 0:
        return {name: ParameterPlacement.same(whole) for name in graph.parameters}
    return {name: ParameterPlacement.zero(whole, {axis: Shard(0) for axis in axes}, stage) for name in graph.parameters}


def plan_of(
    model: nn.Module,
    example: Any,
    shape: tuple[int, ...] = (2,),
    stage: int = 0,
    weights: tuple[float, ...] | None = None,
    loss: Any = None,
) -> HandPlan:
    """Data parallel over the first axis, ZeRO of a stage over all."""
    mesh = Mesh(shape, weights=(weights, *(None,) * (len(shape) - 1)))
    graph = capture(model, example, loss)
    cuts = find_cuts(graph, finest=mesh.size)
    whole = (Replicate(),) * mesh.ndim
    buffers = {node.target: whole for node in graph.of("buffer")}
    parameters = zero(graph, mesh, stage, tuple(range(mesh.ndim)))
    return HandPlan(Assignment(mesh, data_parallel(graph, mesh, cuts), parameters, buffers), graph)


def with_random_zero(assignment: Assignment, graph: Graph, seed: int) -> Assignment:
    """Some stage of ZeRO, along some dim, on each mesh axis where a parameter is used whole."""
    draw = random.Random(seed)
    changed: dict[str, ParameterPlacement] = {}
    for name, placement in assignment.parameters.items():
        changed[name] = _with_zero(graph.parameters[name], placement, assignment.mesh, draw)
    return replace(assignment, parameters=changed)


def _with_zero(node: Node, placement: ParameterPlacement, mesh: Mesh, draw: random.Random) -> ParameterPlacement:
    shape = node.outputs[0].shape
    shards: Mapping[int, Placement] = {}
    if shape:
        shards = {
            axis: Shard(draw.randrange(len(shape)))
            for axis, used in enumerate(placement.used)
            if used == Replicate() and draw.random() < 0.7
        }
    if not shards:
        return placement
    return ParameterPlacement.zero(placement.used, shards, draw.choice([1, 2, 3]))  # type: ignore[arg-type]
