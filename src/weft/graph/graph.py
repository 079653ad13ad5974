"""A model as an operator graph: the frozen value every later package reads.

A `Graph` is a list of `Node`s in the order in which one device runs them. A node names its operator
(`aten.linear.default`), its arguments (constants, and `Ref`s to earlier values), the shape and dtype of each output, and
what forward and backward cost. There are no `getitem` nodes: `Ref(node, index)` names output `index` of a node, and a node
with k outputs defines k values. There are no in-place operators on activations either (`capture` rewrites them); an
operator that writes a buffer lists it in `mutates`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

__all__ = ["Cost", "Graph", "Node", "Ref", "Repeat", "TensorSpec", "map_refs", "refs_in"]

# What a node is. "call" runs an operator; the others bring a value in: a leaf of the batch, a parameter, a buffer,
# or a tensor constant that the model's code made.
Role = Literal["input", "parameter", "buffer", "constant", "call"]

# Operator classes that a device runs at different rates (see `weft.cluster.Device`).
Kind = Literal["matmul", "conv", "attention", "norm", "elementwise", "gather", "recurrent", "view", "none"]


class Ref(NamedTuple):
    """A value: output `index` of the node called `node`."""

    node: str
    index: int = 0

    def __str__(self) -> str:
        return self.node if self.index == 0 else f"{self.node}:{self.index}"


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and differentiability of one value of the single-device program."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """Work of one node on one device: floating-point operations and bytes read or written, forward and backward.

    `saved` is the bytes of activations that autograd keeps for backward *beyond* the node's own inputs and outputs
    (a softmax's log-sum-exp, a dropout's mask); `keeps_inputs[i]` and `keeps_output` say which of those it keeps.
    """

    flops_forward: float = 0.0
    flops_backward: float = 0.0
    bytes_forward: float = 0.0
    bytes_backward: float = 0.0
    saved: int = 0
    keeps_inputs: tuple[bool, ...] = ()  # one per tensor input, in the order of `Node.inputs`
    keeps_output: bool = False


@dataclass(frozen=True)
class Node:
    """One operator, or one value from outside.

    Attributes:
        name: unique in the graph.
        role: "call" for an operator, else where the value comes from.
        target: the operator (`aten.linear.default`); for a parameter or buffer its name in the module
            (`h.0.attn.weight`); for an input its path in the batch (`0`, `labels`); for a constant its name.
        args, kwargs: the call's arguments, in which every tensor is a `Ref` (nested lists and tuples are kept).
        outputs: one `TensorSpec` per output; one for everything that is not a call.
        module: path of the module whose forward made the call (`h.0.attn`), "" for the model itself.
        where: `file.py:123` of the user's code, "" where unknown.
        kind: operator class, for the cost model.
        cost: FLOPs and bytes.
        mutates: buffers the operator writes.
    """

    name: str
    role: Role
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[TensorSpec, ...] = ()
    module: str = ""
    where: str = ""
    kind: Kind = "none"
    cost: Cost = Cost()
    mutates: tuple[Ref, ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[Ref, ...]:
        """Every tensor argument, depth first through args then kwargs, repetitions kept: the operands of signatures."""
        return tuple(refs_in((self.args, dict(self.kwargs))))

    @property
    def op(self) -> str:
        """Short operator name: `linear` for `aten.linear.default`."""
        parts = self.target.split(".")
        return parts[1] if self.role == "call" and len(parts) > 2 else self.target


@dataclass(frozen=True)
class Repeat:
    """`count` consecutive copies of one block: nodes [start, start + count * length) of `Graph.calls`, equal up to names.

    Equal means: same operators, constants, shapes, dtypes and the same wiring among themselves, to the previous copy, and to
    values outside all copies. Parameters belong to the copy that uses them.
    """

    start: int
    length: int
    count: int


@dataclass(frozen=True)
class Graph:
    """A captured model: nodes in execution order, ending in the scalar `loss` (or the model's output).

    Attributes:
        nodes: inputs, parameters, buffers, constants and calls, topologically sorted.
        loss: the value that training minimises.
        batch: JSON-able description of the batch's structure (see `weft.graph.batch`).
        aliases: tied parameters, other name -> the name under which the graph holds it.
        constants: values of "constant" nodes by name (small CPU tensors; not part of equality).
        repeats: blocks found by `weft.graph.fold`.
        train: captured in training mode.
    """

    nodes: tuple[Node, ...]
    loss: Ref
    batch: Any = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    repeats: tuple[Repeat, ...] = ()
    train: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {node.name: node for node in self.nodes})

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]  # type: ignore[attr-defined]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name  # type: ignore[attr-defined]

    def spec(self, ref: Ref) -> TensorSpec:
        return self[ref.node].outputs[ref.index]

    def of(self, role: Role) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.role == role)

    @property
    def calls(self) -> tuple[Node, ...]:
        return self.of("call")

    @property
    def parameters(self) -> dict[str, Node]:
        """Parameter nodes by the parameter's name in the module."""
        return {node.target: node for node in self.of("parameter")}

    def __str__(self) -> str:
        from weft.graph.table import table

        return table(self)

    def with_repeats(self, repeats: tuple[Repeat, ...]) -> Graph:
        return replace(self, repeats=tuple(repeats))

    def consumers(self) -> dict[Ref, list[tuple[Node, int]]]:
        """For each value, the (node, operand number) pairs that read it."""
        readers: dict[Ref, list[tuple[Node, int]]] = {}
        for node in self.calls:
            for operand, ref in enumerate(node.inputs):
                readers.setdefault(ref, []).append((node, operand))
        return readers


def refs_in(tree: Any) -> Iterator[Ref]:
    """Every `Ref` of a nested structure, depth first; dictionaries in insertion order."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs_in(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from refs_in(item)


def map_refs(tree: Any, change: Callable[[Ref], Any]) -> Any:
    """The same structure with every `Ref` replaced by `change(ref)`, called in the order of `refs_in`."""
    if isinstance(tree, Ref):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_refs(item, change) for item in tree)
    if isinstance(tree, Mapping):
        return {key: map_refs(item, change) for key, item in tree.items()}
    return tree
