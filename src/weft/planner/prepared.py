"""A graph made ready for planning on any mesh: what every model, price and role would otherwise work out again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from weft.graph.graph import Graph, Node, Ref, TensorSpec
from weft.placement.axes import Cuts, signatures
from weft.placement.parameters import Readings
from weft.placement.signature import Signature
from weft.planner.memory import Retention

__all__ = ["Call", "Prepared", "layer_of"]


def layer_of(module: str) -> str:
    """The layer that a module path belongs to: down to its first number, else its first two names.

    >>> layer_of("transformer.h.3.mlp.c_fc"), layer_of("lm_head"), layer_of("")
    ('transformer.h.3', 'lm_head', 'model')
    """
    names = module.split(".") if module else []
    for place, name in enumerate(names):
        if name.isdigit():
            return ".".join(names[: place + 1])
    return ".".join(names[:2]) or "model"


@dataclass(frozen=True, eq=False)
class Call:
    """A call with what never changes about it.

    Attributes:
        node: of the graph.
        inputs, specs: its operands.
        values: its outputs.
        kind: equal for calls of one operator on operands of one shape that cost the same.
        layer: it belongs to.
        trains: whether it has a backward.
    """

    node: Node
    inputs: tuple[Ref, ...]
    specs: tuple[TensorSpec, ...]
    values: tuple[Ref, ...]
    kind: int
    layer: str
    trains: bool


class Prepared:
    """A graph with its cuts, made ready once for all meshes of one size.

    Attributes:
        calls, by_name: the calls in order, and by name.
        specs: of every value.
        readers: (call, operand) pairs that read each value, in order.
        retention, readings: what autograd keeps; who reads parameters.
    """

    def __init__(self, graph: Graph, cuts: Cuts):
        self.graph, self.cuts = graph, cuts
        self.specs = {Ref(node.name, index): spec for node in graph.nodes for index, spec in enumerate(node.outputs)}
        self.readers: dict[Ref, list[tuple[Call, int]]] = {}
        self.calls: list[Call] = []
        kinds: dict[Hashable, int] = {}
        for node in graph.calls:
            inputs = node.inputs
            specs = tuple(self.specs[ref] for ref in inputs)
            key = (node.target, node.kind, node.cost, specs, node.outputs)
            values = tuple(Ref(node.name, index) for index in range(len(node.outputs)))
            trains = any(spec.requires_grad for spec in node.outputs)
            call = Call(node, inputs, specs, values, kinds.setdefault(key, len(kinds)), layer_of(node.module), trains)
            self.calls.append(call)
            for operand, ref in enumerate(inputs):
                self.readers.setdefault(ref, []).append((call, operand))
        self.by_name = {call.node.name: call for call in self.calls}
        self.retention, self.readings = Retention.of(graph), Readings.of(graph)
        self._signatures: dict[tuple, tuple[tuple[Signature, ...], int]] = {}
        self._numbers: dict[tuple[Signature, ...], tuple[tuple[Signature, ...], int]] = {}

    def signatures(
        self, call: Call, parts: int, weights: tuple[float, ...] | None
    ) -> tuple[tuple[Signature, ...], int]:
        """Legal signatures along an axis, and a number that is equal for equal ones. One device cuts nothing."""
        key = (call.node.name, parts, weights)
        found = self._signatures.get(key)
        if found is None:
            made = signatures(self.graph, call.node, parts, self.cuts, weights)[: 1 if parts == 1 else None]
            found = self._signatures[key] = self._numbers.setdefault(made, (made, len(self._numbers)))
        return found
