"""The planning problem of one graph on one mesh as tables for `search`.

Variables  one per call: its state, a signature per mesh axis;   one per parameter that several operands read: its placement.
Costs      of a call          forward and backward of the slowest device, its own all-reduces        `Model._call_tables`
           of a value         moving it from its producer's to its readers' placements, and the      `Model._edges`
                              gradient back. Readers of one value are chained in order: moving to the
                              placement that the reader before wanted costs nothing, since localisation
                              makes each (value, placement) once.
           of a parameter     the best of its storage modes (see `modes`), for the placement in which it is used
           memory             what a device keeps for backward, its piece of parameters, gradients, state
Ties       calls that write one buffer want it in one placement: it cannot move in between           `Model._ties`
Table      seconds + mu * seconds of communication that may hide behind compute + lambda * bytes.   `Model.tables`

Inputs of the batch, constants and buffers that nobody writes are whole on every device, so cutting them is free and they
need no variables. What the additive model leaves out (buckets, windows of overlap, the true peak) is priced by `price` and
`memory` for each candidate plan.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Ref, TensorSpec
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.axes import nests
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard
from weft.placement.signature import Signature
from weft.planner.coding import Coding
from weft.planner.costs import Costs, State
from weft.planner.modes import Choose, Mode, best_mode, modes, used_for
from weft.planner.optimizer import OptimizerCost
from weft.planner.prepared import Call, Prepared
from weft.planner.search import Factor, Solution, Variable

__all__ = ["Model"]


@dataclass(frozen=True, eq=False)
class _Choices:
    """The distinct placements that an operand, an output or a parameter may have, and which one each state means."""

    placements: tuple[Placements, ...]
    inverse: NDArray[np.int64]
    identity: Hashable


@dataclass(frozen=True, eq=False)
class _Template:
    """The states of a call, shared by all calls that are alike.

    Attributes:
        number: unique.
        states: per state, a signature per mesh axis.
        axis_signatures: signatures by mesh axis, which `index` (state, axis) numbers.
        inputs, outputs: placements of operands and outputs.
        seconds: forward, backward and inner communication per state.
        share: fraction of the work on the most loaded device, per state.
    """

    number: int
    states: tuple[State, ...]
    axis_signatures: tuple[tuple[Signature, ...], ...]
    index: NDArray[np.int64]
    inputs: tuple[_Choices, ...]
    outputs: tuple[_Choices, ...]
    seconds: NDArray[np.float64]
    share: NDArray[np.float64]


@dataclass(frozen=True)
class _Table:
    """Seconds and bytes of one kind of factor."""

    seconds: NDArray[np.float64]
    nbytes: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Distinct tuples of placements that a reader wants of one value over its operands, and per state which."""

    targets: tuple[tuple[Placements, ...], ...]
    inverse: NDArray[np.int64]
    identity: Hashable
    keeps: bool


class Model:
    """Tables of a graph on the mesh of `costs`; see the module's header.

    Attributes:
        templates: states by call name.
        sizes, factors: the structure for `search.Program`.
        repeats: variables of each copy of each repeated block.
        parameter_of: for each parameter read once, the (call, operand) that reads it.
        used_states: for each parameter read several times, the placements that its variable stands for.
        coding, along: an exchange of gradients, and the axes of the mesh along which it sums them; see `carried`.
    """

    def __init__(self, prepared: Prepared, costs: Costs, optimizer: OptimizerCost):
        self.prepared, self.graph, self.costs, self.optimizer = prepared, prepared.graph, costs, optimizer
        self.templates: dict[str, _Template] = {}
        self.sizes: dict[Variable, int] = {}
        self.factors: list[Factor] = []
        self.parameter_of: dict[str, tuple[str, int]] = {}
        self.used_states: dict[str, tuple[Placements, ...]] = {}
        self._tables: dict[Hashable, _Table] = {}
        self.coding: Coding | None = None
        self.along: tuple[int, ...] = ()
        self._asked: dict[Hashable, tuple[TensorSpec, Sequence[Placements], NDArray[np.int64]]] = {}
        self._mode_tables: dict[Hashable, tuple[tuple[Mode, ...], ...]] = {}
        self._mode_cache: dict[tuple, tuple[Mode, ...]] = {}
        self._by_shape: dict[Hashable, _Template] = {}
        self._box_cache: dict[Hashable, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._nested: dict[tuple[tuple[int, ...], Placements], bool] = {}
        self._dominated: dict[int, NDArray[np.bool_]] = {}
        self.whole = self._whole_calls()
        writes = Counter(ref for call in prepared.calls for ref in set(call.node.mutates))
        self._tied = {ref for ref, count in writes.items() if count > 1}  # buffers that several calls write
        for call in prepared.calls:
            self.templates[call.node.name] = template = self._template(call)
            self.sizes[call.node.name] = len(template.states)
        self._parameters()
        self._call_tables()
        for call in prepared.calls:
            for ref, choices in zip(call.values, self.templates[call.node.name].outputs, strict=True):
                if not self.given(ref):
                    self._edges(call.node.name, choices, ref)
        for name, states in self.used_states.items():
            choices = _Choices(states, np.arange(len(states)), ("parameter", name))
            self._edges(("parameter", name), choices, Ref(self.graph.parameters[name].name))
        self._ties()
        self._loss()

    @property
    def mesh(self) -> Mesh:
        return self.costs.mesh

    @property
    def repeats(self) -> list[list[list[Variable]]]:
        calls = self.prepared.calls
        return [
            [
                [c.node.name for c in calls[r.start + k * r.length : r.start + (k + 1) * r.length]]
                for k in range(r.count)
            ]
            for r in self.graph.repeats
        ]

    # ---- states

    def _template(self, call: Call) -> _Template:
        mesh = self.mesh
        found = [self.prepared.signatures(call, p, mesh.weights[axis]) for axis, p in enumerate(mesh.shape)]
        parameters = tuple(self.graph[ref.node].role == "parameter" for ref in call.inputs)
        written = tuple((ref in call.node.mutates) + self._is_tied(call, ref) for ref in call.inputs)
        given = tuple(self.given(ref) for ref in call.inputs)
        whole = call.node.name in self.whole
        key = (call.kind, tuple(number for _, number in found), parameters, written, given, whole)
        template = self._by_shape.get(key)
        if template is None:
            per_axis = tuple(signatures[: 1 if whole else None] for signatures, _ in found)
            template = self._by_shape[key] = self._make_template(len(self._by_shape), call, per_axis)
        return template

    def _make_template(self, number: int, call: Call, per_axis: tuple[tuple[Signature, ...], ...]) -> _Template:
        states, index = [], []
        for chosen in itertools.product(*(range(len(s)) for s in per_axis)):
            state = tuple(s[i] for s, i in zip(per_axis, chosen, strict=True))
            if self._legal(call, state):
                states.append(state)
                index.append(chosen)
        forward, backward, work = self.costs.operators(call.node, call.specs, states)
        row = self.prepared.cuts.rows[call.node.name]
        inner = np.array([self.costs.inner(row, state, call.trains).forward for state in states])
        inputs = [
            _choices([tuple(s.inputs[i] for s in state) for state in states], (number, "in", i))
            for i in range(len(call.specs))
        ]
        outputs = [
            _choices([tuple(s.outputs[i] for s in state) for state in states], (number, "out", i))
            for i in range(len(call.values))
        ]
        return _Template(
            number, tuple(states), per_axis, np.array(index), tuple(inputs), tuple(outputs),
            (forward + backward).max(axis=1) + inner, work.max(axis=1),
        )  # fmt: skip

    def _legal(self, call: Call, state: State) -> bool:
        """Nested cuts agree and leave every device something; parameters of unusual optimizers and written buffers stay whole."""
        for i, (ref, spec) in enumerate(zip(call.inputs, call.specs, strict=True)):
            placements = tuple(s.inputs[i] for s in state)
            if not self._nests(spec.shape, placements):
                return False
            sharded = any(isinstance(p, Shard) for p in placements)
            if (
                sharded
                and not self.optimizer.elementwise
                and spec.requires_grad
                and self.graph[ref.node].role == "parameter"
            ):
                return False
            if ref in call.node.mutates and any(isinstance(p, Partial) for p in placements):
                return False
        outputs = enumerate(call.node.outputs)
        return all(self._nests(spec.shape, tuple(s.outputs[i] for s in state)) for i, spec in outputs)

    def _nests(self, shape: tuple[int, ...], placements: Placements) -> bool:
        dims = [p.dim for p in placements if isinstance(p, Shard)]
        if len(dims) == len(set(dims)):
            return True
        key = (shape, placements)
        if key not in self._nested:
            self._nested[key] = nests(shape, placements, self.mesh)
        return self._nested[key]

    def _whole_calls(self) -> frozenset[str]:
        """Calls without gradient that are computed whole everywhere: masks, positions, rotary tables, shifted labels.

        Cutting a whole value is free, so their readers need not agree with them or, through them, with each other. They
        are taken in order while all that they read is whole too, and as long as all of them together add at most a
        hundredth to the step's compute.
        """
        times, added = [], []
        for call in self.prepared.calls:
            whole = Signature((Replicate(),) * len(call.inputs), (Replicate(),) * len(call.values))
            forward, backward, _ = self.costs.operators(call.node, call.specs, [(whole,) * self.mesh.ndim])
            overhead = self.costs.seconds(call.node.kind, np.zeros(1), np.zeros(1), "float32").max()
            times.append(float((forward + backward).max()))
            added.append(max(0.0, float(forward.max() - overhead)))
        room = 0.01 * sum(times) / self.mesh.size
        found: set[str] = set()
        for call, more in zip(self.prepared.calls, added, strict=True):
            fixed = all(
                self.graph[ref.node].role not in ("call", "parameter") or ref.node in found for ref in call.inputs
            )
            if (
                fixed
                and more <= room
                and not (call.trains or call.node.mutates or call.node.name == self.graph.loss.node)
            ):
                found.add(call.node.name)
                room -= more
        return frozenset(found)

    def given(self, ref: Ref) -> bool:
        """Whether a value is whole on every device whatever is chosen, so that every placement of it is free."""
        return ref.node in self.whole or self.graph[ref.node].role in ("input", "constant", "buffer")

    # ---- factors

    def _add(self, scope: tuple[Variable, ...], key: Hashable, make: Callable[[], _Table]) -> None:
        if key not in self._tables:
            self._tables[key] = make()
        self.factors.append(Factor(scope, key))

    def _call_tables(self) -> None:
        for call in self.prepared.calls:
            template = self.templates[call.node.name]
            kept = tuple(self.prepared.retention.kept_storage(ref) for ref in call.values)
            make = lambda call=call, template=template, kept=kept: self._call_table(call, template, kept)
            self._add((call.node.name,), ("call", template.number, kept), make)

    def _call_table(self, call: Call, template: _Template, kept: tuple[bool, ...]) -> _Table:
        """Seconds of the call, bytes that it makes and backward needs."""
        nbytes = call.node.cost.saved * template.share
        for spec, choices, keep in zip(call.node.outputs, template.outputs, kept, strict=True):
            if keep:
                nbytes = nbytes + np.array([self.costs.nbytes(spec, p) for p in choices.placements])[choices.inverse]
        return _Table(template.seconds, nbytes)

    def _wanted(self, call: Call, operands: Sequence[int]) -> _Wanted:
        template = self.templates[call.node.name]
        keeps = any(self.prepared.retention.keeps(call.node, i) for i in operands)
        identity = (template.number, tuple(operands), keeps)
        if len(operands) == 1:
            choices = template.inputs[operands[0]]
            return _Wanted(tuple((p,) for p in choices.placements), choices.inverse, identity, keeps)
        wanted = [
            tuple(dict.fromkeys(tuple(s.inputs[i] for s in state) for i in operands)) for state in template.states
        ]
        return _Wanted(*_distinct(wanted), identity, keeps)

    def _edges(self, source: Variable, made: _Choices, ref: Ref) -> None:
        """Boxing of one value to its readers, each reader seeing what the one before it wanted."""
        spec = self.prepared.specs[ref]
        by_node: dict[str, list[int]] = {}
        for call, operand in self.prepared.readers.get(ref, ()):
            by_node.setdefault(call.node.name, []).append(operand)
        before: tuple[str, _Wanted] | None = None
        for name, operands in by_node.items():
            wanted = self._wanted(self.prepared.by_name[name], operands)
            key = ("edge", spec.requires_grad, made.identity, wanted.identity)
            if before is None:
                self._add((source, name), key, lambda w=wanted: self._edge(spec, made, w, None))
            else:
                earlier = before[1]
                key = (*key, earlier.identity)
                self._add((source, before[0], name), key, lambda w=wanted, e=earlier: self._edge(spec, made, w, e))
            before = (name, wanted)

    def _edge(self, spec: TensorSpec, made: _Choices, wanted: _Wanted, before: _Wanted | None) -> _Table:
        """Seconds and bytes over (source state, state of the reader before, state of the reader)."""
        seconds, nbytes = self._box_tables(spec, made, wanted.targets, wanted.keeps)
        if before is None:
            grid = np.ix_(made.inverse, wanted.inverse)
            return _Table(seconds[grid], nbytes[grid])
        if all(len(t) == 1 for t in wanted.targets):
            fresh = np.array([[targets[0] not in earlier for targets in wanted.targets] for earlier in before.targets])
            seconds3, nbytes3 = seconds[:, None, :] * fresh[None], nbytes[:, None, :] * fresh[None]
        else:
            shape = (len(made.placements), len(before.targets), len(wanted.targets))
            seconds3, nbytes3 = np.zeros(shape), np.zeros(shape)
            for b, earlier in enumerate(before.targets):
                left = tuple(tuple(p for p in targets if p not in earlier) for targets in wanted.targets)
                seconds3[:, b], nbytes3[:, b] = self._box_tables(spec, made, left, wanted.keeps)
        grid = np.ix_(made.inverse, before.inverse, wanted.inverse)
        return _Table(seconds3[grid], nbytes3[grid])

    def _box_tables(
        self, spec: TensorSpec, made: _Choices, targets: tuple[tuple[Placements, ...], ...], keeps: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Over (source placement, tuple of wanted placements): seconds there and back, bytes of copies kept for backward."""
        number: dict[Placements, int] = {}
        several = [[number.setdefault(target, len(number)) for target in wanted] for wanted in targets]
        sources, flat = made.placements, tuple(number)
        if not flat:
            nothing = np.zeros((len(sources), len(targets)))
            return nothing, nothing
        key = (spec, made.identity, flat, keeps)
        if key not in self._box_cache:
            nbytes = np.zeros((len(sources), len(flat)))
            if keeps:
                copies = np.array([self.costs.nbytes(spec, target) for target in flat])
                nbytes = copies * np.array([[not _is_view(source, target) for target in flat] for source in sources])
            self._box_cache[key] = (self.costs.box_table(spec, sources, flat), nbytes)
        seconds, nbytes = self._box_cache[key]
        if all(len(wanted) == 1 for wanted in several):
            chosen = [wanted[0] for wanted in several]
            return seconds[:, chosen], nbytes[:, chosen]
        among = np.array([[n in wanted for n in range(len(flat))] for wanted in several], float).T
        return seconds @ among, nbytes @ among

    def _is_tied(self, call: Call, ref: Ref) -> bool:
        """Whether the call writes a buffer that other calls write too."""
        return ref in self._tied and ref in call.node.mutates

    def _ties(self) -> None:
        """Of the calls that write one buffer, each wants it as the one before did."""
        before: dict[Ref, tuple[str, _Wanted]] = {}
        for call in self.prepared.calls:
            for ref in dict.fromkeys(call.node.mutates):
                if ref not in self._tied:
                    continue
                name, wanted = call.node.name, self._wanted(call, (call.inputs.index(ref),))
                if ref in before:
                    other, earlier = before[ref]
                    key = ("tie", earlier.identity, wanted.identity)
                    self._add((other, name), key, lambda e=earlier, w=wanted: _equal(e, w))
                before[ref] = name, wanted

    def _loss(self) -> None:
        """The loss ends whole or as a sum: a sharded or otherwise partial loss has no seed."""
        template = self.templates.get(self.graph.loss.node)
        if template is None:
            return
        choices = template.outputs[self.graph.loss.index]
        allowed = np.array([all(p in (Replicate(), Partial()) for p in ps) for ps in choices.placements])[
            choices.inverse
        ]
        table = np.where(allowed, 0.0, np.inf)
        self._add((self.graph.loss.node,), ("loss", template.number), lambda: _Table(table, np.zeros_like(table)))

    # ---- parameters

    def _parameters(self) -> None:
        """A parameter read once rides on its reader's state; one read several times is a variable."""
        for name, node in self.graph.parameters.items():
            uses = self.prepared.readers.get(Ref(node.name), [])
            spec = node.outputs[0]
            if len(uses) == 1:
                reader, operand = uses[0]
                template = self.templates[reader.node.name]
                self.parameter_of[name] = (reader.node.name, operand)
                choices = template.inputs[operand]
                key = ("modes", spec.requires_grad, template.number, operand)
                self._mode_factor(
                    reader.node.name, key, spec, [used_for(p) for p in choices.placements], choices.inverse
                )
            elif uses:
                wanted = [
                    used_for(p) for reader, i in uses for p in self.templates[reader.node.name].inputs[i].placements
                ]
                states = tuple(dict.fromkeys([self.costs.whole, *wanted]))
                self.used_states[name] = states
                self.sizes["parameter", name] = len(states)
                self._mode_factor(("parameter", name), ("modes", name), spec, states, np.arange(len(states)))

    def _mode_factor(
        self,
        variable: Variable,
        key: Hashable,
        spec: TensorSpec,
        used: Sequence[Placements],
        inverse: NDArray[np.int64],
    ) -> None:
        if key not in self._mode_tables:
            self._asked[key] = (spec, used, inverse)
            self._mode_tables[key] = self._modes_by_state(spec, used, inverse)
        self.factors.append(Factor((variable,), key))

    def _modes_by_state(
        self, spec: TensorSpec, used: Sequence[Placements], inverse: NDArray[np.int64]
    ) -> tuple[tuple[Mode, ...], ...]:
        found = [self.modes_of(spec, placements) for placements in used]
        return tuple(found[i] for i in inverse)

    def carried(self, coding: Coding, along: tuple[int, ...]) -> Model:
        """The same problem for the plans whose gradients an exchange can carry along some mesh axes, and with its price."""
        made = copy.copy(self)
        made.coding, made.along, made._mode_cache, made._dominated = coding, along, {}, {}
        made._mode_tables = {key: made._modes_by_state(*asked) for key, asked in self._asked.items()}
        return made

    def modes_of(self, spec: TensorSpec, used: Placements) -> tuple[Mode, ...]:
        """Storage modes of a parameter in a used placement."""
        key = (spec, used)
        if key not in self._mode_cache:
            self._mode_cache[key] = modes(spec, used, self.costs, self.optimizer, self.coding, self.along)
        return self._mode_cache[key]

    def used(self, name: str, solution: Solution) -> Placements:
        """The placement in which a solution uses a parameter."""
        if name in self.used_states:
            return self.used_states[name][solution.states["parameter", name]]
        if name not in self.parameter_of:
            return self.costs.whole
        call, operand = self.parameter_of[name]
        choices = self.templates[call].inputs[operand]
        return used_for(choices.placements[choices.inverse[solution.states[call]]])

    # ---- dominance

    def undominated(self, name: str, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """The allowed states of a call that no other allowed state makes needless.

        State s is needless if some other state t costs less even with a boxing of every operand from where s wants it to where t
        wants it and of every output from where t makes it to where s does, there and back, and keeps no more memory. (Moving
        in two steps never costs less than in one; what readers of one value share is left out.)
        """
        worse = self._dominance(name)
        if allowed is not None:
            worse = worse[:, allowed]
        kept = ~worse.any(axis=1)
        return kept if allowed is None else kept & allowed

    def _dominance(self, name: str) -> NDArray[np.bool_]:
        """Over (state, other state): whether the other makes it needless; of two that do so to each other, the later."""
        template, call = self.templates[name], self.prepared.by_name[name]
        found = self._dominated.get(template.number)
        if found is None:
            detour = np.zeros((len(template.states),) * 2)
            leaner = np.ones((len(template.states),) * 2, bool)
            costs = [template.seconds, template.seconds]
            for operand, (ref, spec, choices) in enumerate(zip(call.inputs, call.specs, template.inputs, strict=True)):
                grid = np.ix_(choices.inverse, choices.inverse)
                nbytes = np.array([self.costs.nbytes(spec, p) for p in choices.placements])
                leaner &= (nbytes[None, :] <= nbytes[:, None])[grid]
                if self.parameter_of.get(self.graph[ref.node].target) == (name, operand):
                    options = self._mode_tables["modes", spec.requires_grad, template.number, operand]
                    costs = [
                        c + np.array([best_mode(o, mu, 0.0, None)[0] for o in options])
                        for c, mu in zip(costs, (0.0, 1.0), strict=True)
                    ]
                elif self._is_tied(call, ref):
                    detour += np.where(choices.inverse[:, None] == choices.inverse[None, :], 0.0, np.inf)
                elif not self.given(ref):
                    detour += self.costs.box_table(spec, choices.placements, choices.placements)[grid]
            for spec, choices in zip(call.node.outputs, template.outputs, strict=True):
                grid = np.ix_(choices.inverse, choices.inverse)
                detour += self.costs.box_table(spec, choices.placements, choices.placements).T[grid]
                nbytes = np.array([self.costs.nbytes(spec, p) for p in choices.placements])
                leaner &= (nbytes[None, :] <= nbytes[:, None])[grid]
            better = leaner & np.logical_and.reduce([c[None, :] + detour <= c[:, None] for c in costs])
            order = np.arange(len(template.states))
            found = self._dominated[template.number] = better & (~better.T | (order[None, :] < order[:, None]))
        return found

    # ---- solving

    def tables(self, mu: float, weight: float, choose: Choose | None = None) -> dict[Hashable, NDArray[np.float64]]:
        """The table of every factor key: seconds + mu * hidden seconds + weight * bytes."""
        made: dict[Hashable, NDArray[np.float64]] = {}
        for key, table in self._tables.items():
            made[key] = table.seconds + weight * table.nbytes if weight else table.seconds
        cost: dict[int, float] = {}
        for key, per_state in self._mode_tables.items():
            for options in per_state:
                if id(options) not in cost:
                    cost[id(options)] = best_mode(options, mu, weight, choose)[0]
            made[key] = np.array([cost[id(options)] for options in per_state])
        return made

    def assignment(self, solution: Solution, mu: float, weight: float, choose: Choose | None = None) -> Assignment:
        """The placements that a solution stands for."""
        chosen = {name: template.states[solution.states[name]] for name, template in self.templates.items()}
        parameters: dict[str, ParameterPlacement] = {}
        best: dict[int, ParameterPlacement | None] = {}
        for name, node in self.graph.parameters.items():
            used = self.used(name, solution)
            options = self.modes_of(node.outputs[0], used)
            if id(options) not in best:
                mode = best_mode(options, mu, weight, choose)[1]
                best[id(options)] = mode.placement if mode else None
            parameters[name] = best[id(options)] or ParameterPlacement.same(used)
        buffers = {node.target: self.costs.whole for node in self.graph.of("buffer")}
        for call in self.prepared.calls:
            for ref in call.node.mutates:
                operand = call.inputs.index(ref)
                buffers[self.graph[ref.node].target] = tuple(s.inputs[operand] for s in chosen[call.node.name])
        return Assignment(self.mesh, chosen, parameters, buffers)


def _choices(items: Sequence[Placements], identity: Hashable) -> _Choices:
    return _Choices(*_distinct(items), identity)


def _equal(one: _Wanted, other: _Wanted) -> _Table:
    """Free where both want the same, impossible elsewhere."""
    same = np.array([[a == b for b in other.targets] for a in one.targets])
    table = np.where(same[np.ix_(one.inverse, other.inverse)], 0.0, np.inf)
    return _Table(table, np.zeros_like(table))


def _distinct(items: Sequence) -> tuple[tuple, NDArray[np.int64]]:
    """The different items in order of appearance, and for each item its number among them."""
    number: dict = {}
    inverse = np.array([number.setdefault(item, len(number)) for item in items], dtype=np.int64)
    return tuple(number), inverse


def _is_view(source: Placements, target: Placements) -> bool:
    """Whether boxing only narrows: the piece shares the memory of the whole."""
    return all(
        a == b or (isinstance(a, Replicate) and isinstance(b, Shard)) for a, b in zip(source, target, strict=True)
    )
