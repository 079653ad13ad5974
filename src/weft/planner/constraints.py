"""What a user fixes before the search: strategies by mesh axis, placements of parameters and inputs.

A strategy is a set of states that it leaves to each operator, never a code path of its own:

    dp, zero-1, -2, -3   shards belong to the batch; readers of the batch's leaves cut it; parameters are used whole and stored
                         as the ZeRO stage says (dp: whole)
    sp                   the same for the sequence
    tp                   no shard belongs to batch or sequence; a matrix that is multiplied and can be used sharded is; a table
                         that rows are looked up in where that is cheaper (a small one is not worth its all-reduce)
    tp+sp                no shard belongs to the batch; matrices as for tp; normalisations cut the sequence
    any                  everything
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from weft.errors import ImpossibleConstraint, MeshTooLarge
from weft.graph.graph import Node, Ref
from weft.placement.assignment import ParameterPlacement
from weft.placement.layout import Mesh, Placement, Placements, Replicate, Shard, parse
from weft.placement.signature import Signature
from weft.planner.model import Model
from weft.planner.modes import Choose, Mode, used_for
from weft.planner.prepared import Call
from weft.planner.roles import Roles, batch_size
from weft.planner.search import Variable

__all__ = ["STRATEGIES", "Constraints", "masks", "modes_left"]

STRATEGIES = ("dp", "zero-1", "zero-2", "zero-3", "tp", "sp", "tp+sp", "any")
USE_WHOLE = ("dp", "zero-1", "zero-2", "zero-3", "sp")  # along their axes operands read whole parameters

Where: TypeAlias = "str | Placement | Sequence[Placement] | ParameterPlacement"


@dataclass(frozen=True)
class Constraints:
    """Decisions taken by hand; the search takes the rest.

    Attributes:
        strategy: one of `STRATEGIES` for all mesh axes, or one per axis.
        parameters: pattern of names (`h.*.mlp.*.weight`, as in `fnmatch`) -> the placement in which to use the parameter, one
            per mesh axis: `Shard(0)`, `(Replicate(), Shard(1))`, `"R S(1)"`; or a whole `ParameterPlacement`. The first
            pattern that matches counts. Unit and blocks need not be given.
        inputs: pattern of leaf paths -> the placement in which every reader of the leaf wants it.

    >>> Constraints("zero-3").per_axis(2)
    ('zero-3', 'zero-3')
    """

    strategy: str | tuple[str, ...] = "any"
    parameters: Mapping[str, Where] = field(default_factory=dict)
    inputs: Mapping[str, Where] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            object.__setattr__(self, "strategy", tuple(self.strategy))
        for name in (self.strategy,) if isinstance(self.strategy, str) else self.strategy:
            if name not in STRATEGIES:
                raise ValueError(
                    f"strategy must be one of {', '.join(STRATEGIES)}, or one of them per mesh axis; got {name!r}"
                )

    def per_axis(self, ndim: int) -> tuple[str, ...]:
        """One strategy per mesh axis."""
        if isinstance(self.strategy, str):
            return (self.strategy,) * ndim
        if len(self.strategy) != ndim:
            raise ValueError(f"strategy {self.strategy} names {len(self.strategy)} mesh axes, but the mesh has {ndim}")
        return self.strategy

    def for_parameter(self, name: str) -> Where | None:
        return next((where for pattern, where in self.parameters.items() if fnmatch.fnmatchcase(name, pattern)), None)

    def for_input(self, path: str) -> Where | None:
        return next((where for pattern, where in self.inputs.items() if fnmatch.fnmatchcase(path, pattern)), None)


def masks(model: Model, constraints: Constraints, roles: Roles) -> dict[Variable, NDArray[np.bool_]]:
    """Allowed states of the constrained variables.

    Raises:
        ImpossibleConstraint: an operator or parameter is left without any state.
        MeshTooLarge: data parallelism over more devices than the batch has entries.
    """
    strategies = constraints.per_axis(model.mesh.ndim)
    _check_batch(model, strategies)
    _check_patterns(model, constraints)
    allowed: dict[Variable, NDArray[np.bool_]] = {}
    for call in model.prepared.calls:
        node, template = call.node, model.templates[call.node.name]
        mask, preferred = np.ones((2, len(template.states)), bool)
        for axis, strategy in enumerate(strategies):
            if strategy != "any":
                left, liked = _strategy_mask(model, call, template.axis_signatures[axis], strategy, roles)
                mask = mask & left[template.index[:, axis]]
                preferred = preferred & liked[template.index[:, axis]]
        if constraints.parameters or constraints.inputs:
            for operand, ref in enumerate(call.inputs):
                mask = mask & _operand_mask(model, node, operand, ref, constraints)
        if (mask & preferred).any():  # what axes prefer may not nest, nor be what was asked for by hand
            mask = mask & preferred
        if not mask.any():
            legal = sorted({" | ".join(map(str, state)) for state in template.states})
            shapes = [list(spec.shape) for spec in call.specs]
            raise ImpossibleConstraint(node.name, node.target, shapes, str(constraints.strategy), legal)
        if not mask.all():
            allowed[node.name] = mask
    whole = [axis for axis, strategy in enumerate(strategies) if strategy in USE_WHOLE and model.mesh.shape[axis] > 1]
    # of parameters that several operands read; one that a single operand reads has the call's state, masked above
    for name, states in model.used_states.items():
        where = constraints.for_parameter(name)
        if where is None:
            mask = np.array([all(isinstance(state[axis], Replicate) for axis in whole) for state in states])
            if not mask.all():
                allowed["parameter", name] = mask
        else:
            wanted = _placements(_used(where), model.mesh, f"parameter {name!r}")
            mask = np.array([_matches(wanted, placements, model.mesh) for placements in states])
            if not mask.any():
                node = model.graph.parameters[name]
                shape, legal = list(node.outputs[0].shape), [_show(s) for s in states]
                raise ImpossibleConstraint(name, "parameter", [shape], _show(wanted), legal)
            allowed["parameter", name] = mask
    return allowed


def modes_left(constraints: Constraints, mesh: Mesh) -> Choose | None:
    """The filter of storage modes that the strategies imply; None for no filter.

    On an axis with a ZeRO stage a parameter that is used whole there has that stage, if any dim is long enough; on other named
    axes it is stored as it is used.
    """
    strategies = constraints.per_axis(mesh.ndim)
    stages = [None if s == "any" else int(s[-1]) if s.startswith("zero") else 0 for s in strategies]
    if all(stage is None for stage in stages):
        return None

    def choose(options: Sequence[Mode]) -> Sequence[Mode]:
        left = list(options)
        for axis, stage in enumerate(stages):
            if stage is not None:
                left = [m for m in left if _stage(m.placement, axis) == stage] or [
                    m for m in left if _stage(m.placement, axis) == 0
                ]
        return left or list(options)[:1]

    return choose


def overridden(constraints: Constraints, name: str, found: ParameterPlacement) -> ParameterPlacement:
    """The placement that the user gave in full, or else the one found."""
    where = constraints.for_parameter(name)
    return where if isinstance(where, ParameterPlacement) else found


def _stage(placement: ParameterPlacement, axis: int) -> int:
    """The ZeRO stage of a parameter along a mesh axis; 0 if it is stored there as used."""
    used = placement.used[axis]
    if placement.stored[axis] != used:
        return 3
    if placement.gradient[axis] != used:
        return 2
    return 1 if placement.state[axis] != used else 0


# ---------------------------------------------------------------------------------------------------------- strategies


def _strategy_mask(
    model: Model, call: Call, options: Sequence[Signature], strategy: str, roles: Roles
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which signatures of a call a strategy leaves along one axis, and which of those it prefers."""
    found = np.array([roles.of_signature(call, signature) for signature in options])
    if strategy in ("tp", "tp+sp"):
        mask = found != "batch" if strategy == "tp+sp" else (found != "batch") & (found != "sequence")
        liked = np.zeros(len(options), bool)
        matrices = [i for i, ref in enumerate(call.inputs) if _is_matrix(model, ref)]
        if matrices and call.node.op != "embedding":
            liked = mask & np.array([any(isinstance(s.inputs[i], Shard) for i in matrices) for s in options])
        elif strategy == "tp+sp" and call.node.op.endswith("_norm"):
            liked = mask & (found == "sequence")
        return mask, liked if liked.any() else mask
    along = found == ("sequence" if strategy == "sp" else "batch")
    mask = along | (found == "partial") | (found == "whole")
    reads_leaf = any(model.given(ref) for ref in call.inputs)
    return mask, along if reads_leaf and along.any() else mask


def _is_matrix(model: Model, ref: Ref) -> bool:
    node = model.graph[ref.node]
    return node.role == "parameter" and len(node.outputs[0].shape) >= 2


def _check_batch(model: Model, strategies: Sequence[str]) -> None:
    """Data parallelism needs an entry of the batch per device."""
    size = batch_size(model.graph)
    over = [axis for axis, s in enumerate(strategies) if s == "dp" or s.startswith("zero")]
    devices = int(np.prod([model.mesh.shape[axis] for axis in over]))
    if over and devices > size:
        raise MeshTooLarge("the batch", size, devices, "x".join(model.mesh.names[axis] for axis in over))


# ------------------------------------------------------------------------------------------------- parameters and inputs


def _operand_mask(
    model: Model, node: Node, operand: int, ref: Ref, constraints: Constraints
) -> NDArray[np.bool_] | bool:
    """States whose placement of an operand is the one asked for."""
    source = model.graph[ref.node]
    if source.role == "parameter" and source.target not in model.used_states:
        where, kind = constraints.for_parameter(source.target), "parameter"
    elif source.role == "input":
        where, kind = constraints.for_input(source.target), "input"
    else:
        return True
    if where is None:
        return True
    wanted = _placements(_used(where), model.mesh, f"{kind} {source.target!r}")
    choices = model.templates[node.name].inputs[operand]
    placements, inverse = choices.placements, choices.inverse
    fits = np.array([_matches(wanted, used_for(p) if kind == "parameter" else p, model.mesh) for p in placements])
    if not fits.any():
        legal = [_show(p) for p in placements]
        name, shape = f"{kind} {source.target} of {node.name}", list(source.outputs[0].shape)
        raise ImpossibleConstraint(name, node.target, [shape], _show(wanted), legal)
    return fits[inverse]


def _check_patterns(model: Model, constraints: Constraints) -> None:
    """A pattern that names nothing is a slip of the pen."""
    known = {
        "parameters": (constraints.parameters, list(model.graph.parameters)),
        "inputs": (constraints.inputs, [node.target for node in model.graph.of("input")]),
    }
    for what, (patterns, names) in known.items():
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"constraint on {what}: no name matches {pattern!r}; the model has {', '.join(names[:8])}, ..."
                )


def _used(where: Where) -> str | Placement | Sequence[Placement]:
    return where.used if isinstance(where, ParameterPlacement) else where


def _placements(where: str | Placement | Sequence[Placement], mesh: Mesh, what: str) -> Placements:
    """One placement per mesh axis from what the user wrote."""
    if isinstance(where, str):
        found: Placements = tuple(parse(text) for text in where.split())
    elif isinstance(where, Sequence):
        found = tuple(where)
    else:
        found = (where,)
    if len(found) != mesh.ndim:
        raise ValueError(
            f"{what}: give one placement per mesh axis; the mesh {mesh.shape} has {mesh.ndim}, got {_show(found)!r}"
        )
    for axis, p in enumerate(found):
        if isinstance(p, Shard) and p.weights is not None and len(p.weights) != mesh.shape[axis]:
            axis_name, devices = mesh.names[axis], mesh.shape[axis]
            raise ValueError(f"{what}: {p} has {len(p.weights)} weights, but axis {axis_name!r} has {devices} devices")
    return found


def _matches(wanted: Placements, placements: Placements, mesh: Mesh) -> bool:
    """Whether a placement is the one asked for; units and blocks only where asked for, axes of one device not at all."""

    def fits(a: Placement, b: Placement) -> bool:
        if isinstance(a, Shard) and isinstance(b, Shard):
            return a.dim == b.dim and a.unit in (1, b.unit) and a.blocks in (1, b.blocks)
        return a == b

    return all(size == 1 or fits(a, b) for a, b, size in zip(wanted, placements, mesh.shape, strict=True))


def _show(placements: Sequence[Placement]) -> str:
    return " ".join(str(p) for p in placements) or str(Replicate())
