"""The placement of everything in a graph: what the planner decides and the runtime carries out.

An `Assignment` gives every call one signature per mesh axis, every parameter a `ParameterPlacement`, every buffer a
placement. Between a value's placement and the placement that a reader wants stands a boxing, which nobody writes down.

Inputs of the batch and tensor constants are whole on every process: cutting them is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.graph.graph import Graph, Node, Ref
from weft.placement.axes import Cuts, find_cuts, signatures
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard, parse
from weft.placement.signature import Signature

__all__ = ["Assignment", "ParameterPlacement", "refit", "replicated"]


@dataclass(frozen=True)
class ParameterPlacement:
    """Where one parameter lives. Along a mesh axis where `used` is Shard, the others are that same Shard.

    Attributes:
        used: as forward and backward read it.
        stored: between steps. Shard where `used` is Replicate: gathered before use in forward, again in backward (ZeRO-3).
        gradient: as accumulated over micro-batches. Replicate: all-reduced; Shard: reduce-scattered.
        state: of the optimizer's state, and where its update runs. Shard while `stored` is Replicate: ZeRO-1 and -2.
    """

    used: Placements
    stored: Placements
    gradient: Placements
    state: Placements

    @classmethod
    def same(cls, placements: Placements) -> ParameterPlacement:
        """Stored, accumulated and updated as it is used: data parallel where Replicate, tensor parallel where Shard."""
        return cls(placements, placements, placements, placements)

    @classmethod
    def zero(cls, used: Placements, shards: Mapping[int, Shard], stage: int) -> ParameterPlacement:
        """ZeRO over the mesh axes in `shards`, on each of which `used` must be Replicate.

        Stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameter itself.
        Source: Rajbhandari et al., ZeRO, arXiv:1910.02054.
        """
        cut = tuple(shards.get(axis, placement) for axis, placement in enumerate(used))
        if stage not in (1, 2, 3) or any(used[axis] != Replicate() for axis in shards):
            raise ValueError(
                f"ZeRO stage must be 1, 2 or 3 over axes where the parameter is Replicate, got {stage}, {used}"
            )
        return cls(used, cut if stage == 3 else used, cut if stage >= 2 else used, cut)

    def __post_init__(self) -> None:
        for what in ("stored", "gradient", "state"):
            for axis, (used, placement) in enumerate(zip(self.used, getattr(self, what), strict=True)):
                if isinstance(placement, Partial) or (isinstance(used, Shard) and placement != used):
                    raise ValueError(
                        f"a parameter used as {used} on mesh axis {axis} cannot be {what} as {placement}: a shard stays, "
                        "and Replicate may be Replicate or Shard"
                    )


@dataclass(frozen=True)
class Assignment:
    """Signatures of the calls, placements of parameters (by name in the module) and buffers, over one mesh."""

    mesh: Mesh
    signatures: Mapping[str, tuple[Signature, ...]]
    parameters: Mapping[str, ParameterPlacement]
    buffers: Mapping[str, Placements] = field(default_factory=dict)

    def inputs(self, node: Node) -> tuple[Placements, ...]:
        """Placements that a call wants of each operand."""
        return tuple(zip(*(s.inputs for s in self.signatures[node.name]), strict=True)) if node.inputs else ()

    def output(self, graph: Graph, ref: Ref) -> Placements:
        """Placements in which a value is made."""
        node = graph[ref.node]
        if node.role == "call":
            return tuple(signature.outputs[ref.index] for signature in self.signatures[node.name])
        if node.role == "parameter":
            return self.parameters[node.target].used
        if node.role == "buffer" and node.target in self.buffers:
            return self.buffers[node.target]
        return (Replicate(),) * self.mesh.ndim

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data; placements print as `S(0)`, `R`, `P`."""
        write = lambda placements: " ".join(map(str, placements))
        mesh = self.mesh
        return {
            "mesh": {
                "shape": list(mesh.shape),
                "names": list(mesh.names),
                "weights": [None if w is None else list(w) for w in mesh.weights],
                "ranks": list(mesh.ranks),
            },
            "signatures": {name: [str(s) for s in per_axis] for name, per_axis in self.signatures.items()},
            "parameters": {
                name: {what: write(getattr(p, what)) for what in ("used", "stored", "gradient", "state")}
                for name, p in self.parameters.items()
            },
            "buffers": {name: write(placements) for name, placements in self.buffers.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Assignment:
        """The inverse of `to_dict`."""
        read = lambda text: tuple(parse(item) for item in text.split())
        mesh = data["mesh"]
        return cls(
            Mesh(
                tuple(mesh["shape"]),
                tuple(mesh["names"]),
                tuple(None if w is None else tuple(w) for w in mesh["weights"]),
                tuple(mesh["ranks"]),
            ),
            {
                name: tuple(Signature(*(read(side) for side in text.split("->"))) for text in per_axis)
                for name, per_axis in data["signatures"].items()
            },
            {
                name: ParameterPlacement(read(p["used"]), read(p["stored"]), read(p["gradient"]), read(p["state"]))
                for name, p in data["parameters"].items()
            },
            {name: read(placements) for name, placements in data["buffers"].items()},
        )


def replicated(graph: Graph, mesh: Mesh) -> Assignment:
    """Everything whole everywhere: always legal, and the start for changing single decisions."""
    whole = (Replicate(),) * mesh.ndim
    return Assignment(
        mesh,
        {
            node.name: (Signature((Replicate(),) * len(node.inputs), (Replicate(),) * len(node.outputs)),) * mesh.ndim
            for node in graph.calls
        },
        {name: ParameterPlacement.same(whole) for name in graph.parameters},
        {node.target: whole for node in graph.of("buffer")},
    )


def refit(assignment: Assignment, planned: Graph, graph: Graph, *, cuts: Cuts | None = None) -> Assignment:
    """The same decisions for the same model captured with other sizes (a shorter last batch).

    Units and blocks of activations may depend on sizes (the rows of a flattened batch), so each signature is found
    again among those of the new graph by the dims that it cuts; where none is left (a dim of 1), the node runs whole.
    Parameters keep their placements. Devices may get nothing of a batch that is smaller than the mesh.

    Raises:
        ValueError: the graphs differ in more than sizes.
    """
    if [(n.role, n.target) for n in planned.nodes] != [(n.role, n.target) for n in graph.nodes]:
        raise ValueError("refit: the graph of this batch has other operators than the planned one; plan for this batch")
    cuts = cuts or find_cuts(graph, finest=assignment.mesh.size, allow_replicated=True)
    planned_cuts = find_cuts(planned, finest=assignment.mesh.size, allow_replicated=True)
    changed = {}
    for old, new in zip(planned.calls, graph.calls, strict=True):
        per_axis = []
        for axis, signature in enumerate(assignment.signatures[old.name]):
            parts = assignment.mesh.shape[axis]
            before = signatures(planned, old, parts, planned_cuts, allow_empty=True)
            after = signatures(graph, new, parts, cuts, allow_empty=True)
            per_axis.append(_counterpart(signature, before, after))
        changed[new.name] = tuple(per_axis)
    return Assignment(assignment.mesh, changed, assignment.parameters, assignment.buffers)


def _counterpart(signature: Signature, before: tuple[Signature, ...], after: tuple[Signature, ...]) -> Signature:
    """The signature of the resized node that stands where `signature` stood among those cutting the same dims."""
    if signature in after:
        return signature
    alike = [other for other in before if _bare(other) == _bare(signature)]
    candidates = [other for other in after if _bare(other) == _bare(signature)]
    if signature in alike and len(candidates) == len(alike):
        return candidates[alike.index(signature)]
    return candidates[0] if len(candidates) == 1 else after[0]


def _bare(signature: Signature) -> tuple:
    """A signature without units and blocks."""
    strip = lambda p: Shard(p.dim, p.weights) if isinstance(p, Shard) else p
    return tuple(map(strip, signature.inputs)), tuple(map(strip, signature.outputs))
