"""The joint graph of AOTAutograd (forward and backward of a compiled region in one functional graph) as a `Trace`.

Problem    which operators of the graph make bytes, which bytes each reads, how long generated code holds them, and which
           operators may run twice.
Method     one pass in the order in which forward, then backward will run                                 `_order`
           a value is one storage of the fake tensors that tracing left on the nodes; views, `getitem` and the like make
           none: they are taken anew from the value wherever they are needed (`Joint.value`, `weft.memory.compiled.emit`)
           between forward and backward stands an operator of no node: there the user holds the outputs, and the gradients
           of the outputs arrive
Lifetimes  generated code lets a value go after its last reader. Held to the end: what the caller holds (inputs, outputs,
           gradients of outputs) and what the step is for (gradients of parameters).
Twice      not: copies into inputs, collectives, values for the host, whatever reads an input that the graph overwrites (but
           training-mode batch norm does not use the running statistics that it reads), operators over subgraphs. Random
           operators may, from a copy of the generator's state taken before the first run: a value of its own (`_state`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import fx

from weft.memory.execute.random_state import state_nbytes
from weft.memory.record import Category, Op, Phase, Trace, Value
from weft.memory.schedule import Schedule
from weft.memory.tracing.fakes import result_nbytes
from weft.memory.tracing.operators import is_dense

__all__ = ["Joint", "Price", "draws", "read_joint", "stateless"]

Price = Callable[[fx.Node], tuple[float, int]]
"""(seconds, workspace bytes) of a node's operator; see `weft.memory.compiled.price`."""


@final
@dataclass(frozen=True)
class Joint:
    """A joint graph and its trace.

    Attributes:
        trace: operator i runs `nodes[i]`.
        nodes: None where the operator is not of the graph: the boundary, and copies of a generator's state.
        boundary: index of the operator between forward and backward.
        home: node -> the value whose bytes its tensor (or the view that it is) lies in; not of nodes that make several.
        outputs: node that makes several tensors -> {position: value}.
        states: random operator's index -> value that is the generator's state before it.
        forward: nodes that belong to the forward graph.
        copies: nodes that write into inputs at the end of forward, or of backward.
        results: what the graph returns, forward's first; None where there is no gradient.
        num_forward: how many of them are forward's.
    """

    trace: Trace
    nodes: tuple[fx.Node | None, ...]
    boundary: int
    home: Mapping[fx.Node, int]
    outputs: Mapping[fx.Node, Mapping[int, int]]
    states: Mapping[int, int]
    forward: frozenset[fx.Node]
    copies: tuple[fx.Node, ...]
    results: tuple[Any, ...]
    num_forward: int

    def with_states_of(self, schedule: Schedule) -> Trace:
        """The trace where a generator's state is kept no longer than `schedule` wants it, and not at all if it never does."""
        until: dict[int, int] = {}
        ran = -1
        for action in schedule.actions:
            ran = action.index if action.kind == "run" else ran
            if action.kind == "again" and action.index in self.states:
                until[self.states[action.index]] = ran + 1
        values = list(self.trace.values)
        for value in self.states.values():
            last = until.get(value)
            values[value] = replace(
                values[value], dies=last or values[value].dies, nbytes=values[value].nbytes if last else 0
            )
        return replace(self.trace, values=tuple(values))


def read_joint(
    graph: fx.Graph, num_forward: int, fixed: Sequence[int], price: Price, *, states: bool = True, device: str = "cpu"
) -> Joint:
    """The trace of a joint graph.

    Args:
        graph: as AOTAutograd hands it to a partition function; not changed.
        num_forward: how many of its outputs are forward's.
        fixed: positions of the inputs that are parameters and buffers.
        price: what operators cost.
        states: random operators may be repeated from a saved state; without, they are never repeated.
        device: that the prices hold for.

    Raises:
        ValueError: sizes of the graph are symbols, so that there are no bytes to count.
    """
    return _Reader(graph, num_forward, fixed, price, states, device).read()


def draws(node: fx.Node) -> bool:
    """Whether a node takes numbers from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _no_dropout(node)


def _no_dropout(node: fx.Node) -> bool:
    """Attention without dropout is tagged as random and is not."""
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return given == 0.0
    return False


def stateless(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """A training-mode batch norm as an operator that reads no running statistics: (target, args); None for other nodes.

    Its first three results are the same bits; the new statistics, which a repetition does not want, are missing.
    """
    if node.target is not torch.ops.aten._native_batch_norm_legit_functional.default or node.kwargs:
        return None
    x, weight, bias, _, _, training, momentum, eps = node.args
    return (
        (torch.ops.aten._native_batch_norm_legit.no_stats, (x, weight, bias, training, momentum, eps))
        if training
        else None
    )


@dataclass
class _Draft:
    nbytes: int
    category: Category
    name: str
    born: int
    dies: int


@dataclass
class _Reader:
    graph: fx.Graph
    num_forward: int
    fixed: Sequence[int]
    price: Price
    with_states: bool
    device: str
    ops: list[Op] = field(default_factory=list)
    nodes: list[fx.Node | None] = field(default_factory=list)
    values: list[_Draft] = field(default_factory=list)
    home: dict[fx.Node, int] = field(default_factory=dict)
    outputs: dict[fx.Node, dict[int, int]] = field(default_factory=dict)
    states: dict[int, int] = field(default_factory=dict)
    overwritten: set[int] = field(default_factory=set)

    def read(self) -> Joint:
        results = _results(self.graph)
        placeholders = self.graph.find_nodes(op="placeholder")
        forward, copies, backward = _order(self.graph)
        self._inputs(placeholders)
        self._mark_overwritten(copies, placeholders)
        in_forward = frozenset(n for n in (*forward, *copies) if n not in backward)
        for node in forward:
            self._visit(node, "forward")
        for node in copies:
            if node in in_forward:
                self._visit(node, "forward")
        boundary = len(self.ops)
        self._boundary([n for n in placeholders if "tangents" in str(n.target)])
        for node in backward:
            if node not in copies:
                self._visit(node, "backward")
        for node in copies:
            if node not in in_forward:
                self._visit(node, "backward")
        self._ends(results)
        trace = Trace(
            tuple(self.ops),
            tuple(
                Value(v.nbytes, i, v.category, v.name, v.born, max(v.dies, v.born)) for i, v in enumerate(self.values)
            ),
            device=self.device,
            measured=True,
        )
        trace.check()
        return Joint(
            trace, tuple(self.nodes), boundary, self.home, self.outputs, self.states, in_forward, tuple(copies), results,
            self.num_forward,
        )  # fmt: skip

    # -- values ---------------------------------------------------------------------------------------------------------

    def _new(self, nbytes: int, category: Category, name: str, born: int) -> int:
        self.values.append(_Draft(nbytes, category, name, born, born))
        return len(self.values) - 1

    def _inputs(self, placeholders: Sequence[fx.Node]) -> None:
        """Inputs, which are there before and after; several may be views of one storage."""
        seen: dict[int, int] = {}
        primals = [node for node in placeholders if "tangents" not in str(node.target)]
        trained = self._described(placeholders, "grad_of")
        for position, node in enumerate(primals):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            category: Category = "input"
            if position in self.fixed:
                category = "parameter" if node in trained else "buffer"
            key = _storage(value)
            if key not in seen:
                seen[key] = self._new(_nbytes(value), category, node.name, -1)
            self.home[node] = seen[key]
        for node in self.graph.find_nodes(op="get_attr"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                self.home[node] = self._new(_nbytes(value), "buffer", node.name, -1)

    def _mark_overwritten(self, copies: Sequence[fx.Node], placeholders: Sequence[fx.Node]) -> None:
        """Inputs that the graph, or AOTAutograd after it, overwrites."""
        for node in copies:
            if isinstance(node.args[0], fx.Node) and node.args[0] in self.home:
                self.overwritten.add(self.home[node.args[0]])
        for node in self._described(placeholders, "mutated_input"):
            if node in self.home:
                self.overwritten.add(self.home[node])

    def _described(self, placeholders: Sequence[fx.Node], attribute: str) -> set[fx.Node]:
        """Inputs that the description of some output points at."""
        inputs = {node.meta["desc"]: node for node in placeholders if node.meta.get("desc") is not None}
        described = _flat([next(iter(self.graph.find_nodes(op="output"))).meta.get("desc", ())])
        return {inputs[x] for x in (getattr(d, attribute, None) for d in described) if x is not None and x in inputs}

    # -- operators --------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node, phase: Phase) -> None:
        """One node: a view, an operator, or nothing that concerns memory."""
        if node.op in ("placeholder", "get_attr"):
            return
        value = node.meta.get("val")
        tensors = _tensors(value)
        if any(not isinstance(size, int) for t in tensors.values() for size in t.shape):
            raise ValueError(
                f"the compiled graph has symbolic sizes (at {node.name}), so its bytes cannot be planned; compile with "
                "torch.compile(..., dynamic=False)"
            )
        if node.target is operator.getitem:
            source: Any = node.args[0]
            position: Any = node.args[1]
            if source in self.outputs and position in self.outputs[source]:
                self.home[node] = self.outputs[source][position]
                return
        sources = {_storage(n.meta["val"]): self.home[n] for n in node.all_input_nodes if n in self.home}
        if (
            tensors
            and all(_storage(t) in sources for t in tensors.values())
            and node.target is not torch.ops.aten.copy_.default
        ):
            self._view(node, value, sources)
        elif node.target is not operator.getitem:
            self._operator(node, phase, tensors)

    def _view(self, node: fx.Node, value: Any, sources: Mapping[int, int]) -> None:
        if isinstance(value, torch.Tensor):
            self.home[node] = sources[_storage(value)]
        else:  # `split`: each part looks at the same value
            self.outputs[node] = {i: sources[_storage(t)] for i, t in _tensors(value).items()}

    def _operator(self, node: fx.Node, phase: Phase, tensors: Mapping[int, torch.Tensor]) -> None:
        reads = self._reads(node)
        module, writes = _module(node), node.target is torch.ops.aten.copy_.default
        random, beside = draws(node), 0
        repeatable = self._repeatable(node, reads)
        if random and repeatable:
            own = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, torch.Generator)]
            repeatable = self.with_states and phase == "forward" and not own
            if repeatable:
                state = self._state(node, module)
                reads = (*reads, state)
                beside = self.values[state].nbytes  # the state of that moment, to put back after a repetition
        index = len(self.ops)
        operands = fx.map_arg(node.args, lambda n: n.meta.get("val"))
        made = {} if writes else {
            i: self._new(_static(result_nbytes(node.target, operands, t)), "activation", module, index)
            for i, t in tensors.items()
        }  # fmt: skip
        if isinstance(node.meta.get("val"), torch.Tensor):
            if made:
                self.home[node] = made[0]
            elif writes:
                self.home[node] = self.home[node.all_input_nodes[0]]  # what is written
        else:
            self.outputs[node] = made
        seconds, workspace = self.price(node)
        for value in reads:
            self.values[value].dies = max(self.values[value].dies, index)
        name, once, makes = str(node.target), tuple(dict.fromkeys(reads)), tuple(made.values())
        op = Op(
            name, module, phase, once, makes, (), workspace + beside, seconds, repeatable, random, is_dense(node.target)
        )
        self.ops.append(op)
        self.nodes.append(node)
        if random and repeatable:
            self.states[index] = reads[-1]

    def _reads(self, node: fx.Node) -> tuple[int, ...]:
        found: list[int] = []
        for source in node.all_input_nodes:
            if source in self.home:
                found.append(self.home[source])
            elif source in self.outputs:  # an operator that takes a list apart as a whole
                found.extend(self.outputs[source].values())
        return tuple(dict.fromkeys(found))

    def _repeatable(self, node: fx.Node, reads: Sequence[int]) -> bool:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return False
        if target.namespace in ("_c10d_functional", "c10d_functional", "c10d") or not _tensors(node.meta.get("val")):
            return False
        return stateless(node) is not None or not self.overwritten & set(reads)

    def _state(self, node: fx.Node, module: str) -> int:
        """A pseudo-operator that copies the generator's state; the copy is kept to the end, so that it is there when wanted.
        It is kept on the host, and counted wherever the graph runs."""
        index = len(self.ops)
        device = next(iter(_tensors(node.meta["val"]).values())).device
        value = self._new(state_nbytes(device), "input", module, index)
        self.ops.append(Op("weft.generator_state", module, "forward", (), (value,), repeatable=False))
        self.nodes.append(None)
        return value

    def _boundary(self, tangents: Sequence[fx.Node]) -> None:
        index, made = len(self.ops), []
        for node in tangents:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                self.home[node] = self._new(_nbytes(value), "input", node.name, index)
                made.append(self.home[node])
        self.ops.append(Op("weft.backward_begins", "", "backward", (), tuple(made), repeatable=False))
        self.nodes.append(None)

    def _ends(self, results: Sequence[Any]) -> None:
        """What outlives the graph: outputs, which the caller holds, gradients, and what only the caller gives back."""
        end = len(self.ops)
        for position, node in enumerate(results):
            if isinstance(node, fx.Node) and node in self.home:
                value = self.values[self.home[node]]
                value.dies = end
                if value.category == "activation":
                    value.category = "input" if position < self.num_forward else "gradient"
        for value in self.values:
            if value.category in ("parameter", "buffer", "input"):
                value.dies = end


def _order(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node], dict[fx.Node, None]]:
    """(nodes of forward, nodes that write into inputs, nodes of backward), each in order.

    Tags say where tracing met a node. What a forward node uses is forward's too, whoever made it (passes leave no tags).
    A graph without gradients of outputs has no backward.
    """
    forward: set[fx.Node] = set()
    alone = not any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder"))
    for node in reversed(graph.nodes):
        tag = node.meta.get("partitioner_tag")
        if alone or tag in ("is_forward", "must_be_in_forward") or any(user in forward for user in node.users):
            forward.add(node)
    copies = [n for n in graph.nodes if n.target is torch.ops.aten.copy_.default]
    inner = [n for n in graph.nodes if n.op not in ("output", "placeholder")]
    backward = dict.fromkeys(n for n in inner if n not in forward)
    return [n for n in inner if n in forward and n not in copies], copies, backward


def _results(graph: fx.Graph) -> tuple[Any, ...]:
    return tuple(_flat(next(iter(graph.find_nodes(op="output"))).args))


def _flat(items: Any) -> list[Any]:
    return [x for item in items for x in (_flat(item) if isinstance(item, (list, tuple)) else [item])]


def _tensors(value: Any) -> dict[int, torch.Tensor]:
    """Position -> tensor of a node's value."""
    if isinstance(value, torch.Tensor):
        return {0: value}
    return (
        {i: t for i, t in enumerate(value) if isinstance(t, torch.Tensor)} if isinstance(value, (list, tuple)) else {}
    )


def _storage(value: Any) -> int:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else -1


def _nbytes(value: torch.Tensor) -> int:
    return _static(value.untyped_storage().nbytes())


def _static(nbytes: int | torch.SymInt) -> int:
    if not isinstance(nbytes, int):
        raise ValueError("the compiled graph has symbolic sizes; compile with torch.compile(..., dynamic=False)")
    return nbytes


def _module(node: fx.Node) -> str:
    """Path of the module that made the call, as the user writes it."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for noise in ("L['self']", "L['fn']", "L['mod']", "getattr"):
        path = path.replace(noise, "")
    return "".join(ch for ch in path if ch not in "()'\"[]").strip(".,")
