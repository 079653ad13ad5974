"""Random legal assignments: what the property tests draw to compare with one device."""

from __future__ import annotations

import random

from weft.graph.graph import Graph, Node, Ref
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.axes import Cuts, nests, signatures
from weft.placement.layout import Mesh, Placements, Replicate, Shard
from weft.placement.signature import Signature


def random_assignment(graph: Graph, mesh: Mesh, cuts: Cuts, seed: int) -> Assignment:
    """Every call gets a random signature per axis, every parameter a random placement that some cut allows."""
    draw = random.Random(seed)
    chosen = {node.name: _random_signatures(graph, node, mesh, cuts, draw) for node in graph.calls}
    parameters = {
        name: ParameterPlacement.same(_random_placement(node, mesh, cuts, draw))
        for name, node in graph.parameters.items()
    }
    buffers: dict[str, Placements] = {}
    for node in graph.calls:  # a buffer that a call writes lives where that call wants it
        for ref in node.mutates:
            operand = node.inputs.index(ref)
            wanted = tuple(s.inputs[operand] for s in chosen[node.name])
            buffers[graph[ref.node].target] = wanted
    return Assignment(mesh, chosen, parameters, buffers)


def _random_signatures(graph: Graph, node: Node, mesh: Mesh, cuts: Cuts, draw: random.Random) -> tuple[Signature, ...]:
    while True:
        per_axis = tuple(
            draw.choice(signatures(graph, node, p, cuts, weights))
            for p, weights in zip(mesh.shape, mesh.weights, strict=True)
        )
        if fits(graph, node, per_axis, mesh):
            return per_axis


def fits(graph: Graph, node: Node, per_axis: tuple[Signature, ...], mesh: Mesh) -> bool:
    """Signatures that are legal axis by axis are legal together."""
    operands = zip(node.inputs, zip(*(s.inputs for s in per_axis), strict=True), strict=True)
    outputs = ((Ref(node.name, i), tuple(s.outputs[i] for s in per_axis)) for i in range(len(node.outputs)))
    return all(nests(graph.spec(ref).shape, placements, mesh) for ref, placements in [*operands, *outputs])


def _random_placement(node: Node, mesh: Mesh, cuts: Cuts, draw: random.Random) -> Placements:
    shape = node.outputs[0].shape
    options = [Replicate()] + [
        Shard(dim, None, unit, blocks) for dim in range(len(shape)) for blocks, unit in cuts.of(Ref(node.name), dim)
    ]
    while True:
        placements = tuple(draw.choice(options) for _ in mesh.shape)
        if nests(shape, placements, mesh) and all(
            shape[p.dim] // (p.unit * p.blocks) >= mesh.size for p in placements if isinstance(p, Shard)
        ):
            return placements
