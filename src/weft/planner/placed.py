"""A graph on a mesh, prepared for pricing many assignments: placements as numbers, costs looked up, not worked out.

Two hundred calls, priced for thirty candidates on four meshes, leave some ten microseconds for each: hashing a
placement costs as much. So calls that are alike share a `kind` number, placements are numbered, and what a call costs under
a state is kept by (kind, state).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Graph, Ref, TensorSpec
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.layout import Placements
from weft.planner.costs import FREE, Boxing, Costs, State
from weft.planner.memory import held
from weft.planner.prepared import Call, Prepared

__all__ = ["PlacedGraph", "View"]


@dataclass(frozen=True)
class View:
    """A call under one state: numbers of its operands' and outputs' placements, its seconds per class of devices."""

    state: State
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    forward: NDArray[np.float64]
    backward: NDArray[np.float64]
    share: NDArray[np.float64]
    inner: Boxing


class PlacedGraph:
    """A prepared graph on the mesh of `costs`; see the module's header."""

    def __init__(self, prepared: Prepared, costs: Costs):
        self.prepared, self.costs = prepared, costs
        self._numbers: dict[Placements, int] = {}
        self._placements: list[Placements] = []
        self._views: dict[tuple[int, int], View] = {}
        self._boxings: dict[tuple[tuple[int, ...], int, bool, int, int], Boxing] = {}
        self._pieces: dict[tuple[tuple[int, ...], int], NDArray[np.float64]] = {}
        self._shares: dict[tuple[int, int], tuple[ParameterPlacement, tuple[NDArray[np.float64], ...]]] = {}

    @property
    def graph(self) -> Graph:
        return self.prepared.graph

    def number(self, placements: Placements) -> int:
        """The number by which a tuple of placements goes here."""
        found = self._numbers.get(placements)
        if found is None:
            found = self._numbers[placements] = len(self._placements)
            self._placements.append(placements)
        return found

    def placements(self, number: int) -> Placements:
        return self._placements[number]

    def view(self, call: Call, state: State) -> View:
        """A call under a state. States are told apart by identity: the view keeps its state alive."""
        found = self._views.get((call.kind, id(state)))
        if found is None:
            forward, backward, share = self.costs.operators(call.node, call.specs, [state])
            found = View(
                state,
                tuple(self.number(tuple(s.inputs[i] for s in state)) for i in range(len(call.inputs))),
                tuple(self.number(tuple(s.outputs[i] for s in state)) for i in range(len(call.values))),
                forward[0],
                backward[0],
                share[0],
                self.costs.inner(self.prepared.cuts.rows[call.node.name], state, call.trains),
            )
            self._views[call.kind, id(state)] = found
        return found

    def views(self, assignment: Assignment) -> list[View]:
        """Every call under an assignment."""
        return [self.view(call, assignment.signatures[call.node.name]) for call in self.prepared.calls]

    def sources(self, assignment: Assignment) -> dict[Ref, int]:
        """Placements of values that no call makes."""
        return {
            Ref(node.name): self.number(assignment.output(self.graph, Ref(node.name)))
            for node in self.graph.nodes
            if node.role != "call"
        }

    def boxing(self, ref: Ref, source: int, target: int) -> Boxing:
        """Cost of a value's boxing, there and back."""
        if source == target:
            return FREE
        spec = self.prepared.specs[ref]
        key = (spec.shape, spec.dtype.itemsize, spec.requires_grad, source, target)
        found = self._boxings.get(key)
        if found is None:
            a, b = self._placements[source], self._placements[target]
            found = self._boxings[key] = self.costs.boxing(spec.shape, spec.dtype.itemsize, a, b, spec.requires_grad)
        return found

    def held(self, spec: TensorSpec, number: int) -> NDArray[np.float64]:
        """Bytes of a value's piece on a device of each class."""
        key = (spec.shape, number)
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self.costs.fraction(spec.shape, self._placements[number])
        return spec.nbytes * found

    def shares(self, spec: TensorSpec, placement: ParameterPlacement) -> tuple[NDArray[np.float64], ...]:
        """Fractions of a parameter that a device of each class holds: stored, of the optimizer's state.

        Placements are told apart by identity; the cache keeps them alive.
        """
        key = (spec.numel, id(placement))
        if key not in self._shares:
            both = (placement.stored, placement.state)
            self._shares[key] = (placement, tuple(held(self.costs, spec, p) for p in both))
        return self._shares[key][1]
