"""How an operator may be split: signatures over one mesh axis, derived from declared axes.

A *signature* gives one placement per input and per output of a node such that running the operator on the local pieces
yields the pieces of the outputs. An operator's *row* declares which dims of which operands are one and the same index
(a *link*), in which operands the operator is linear, and which of its arguments must change with the local shape. From
the row follow the signatures along one mesh axis:

    split a link that every output has          Shard there, Replicate elsewhere
    split a link that the outputs lack          the contracted dim: outputs are Partial, added operands too
    linear in a group of operands               those Partial, the others Replicate, outputs Partial
    nothing                                     all Replicate: always legal

Along several axes a node has one signature per axis; the inner ones apply to the pieces that the outer ones leave.

A link's positions carry how the dim factors: `Position(operand, dim, outer, inner)` says that the operand's dim is
outer x m x inner and that the link's index is the m in the middle (views, fused projections, attention heads). Whether the
index can be cut finer or only in larger units depends on the other nodes it flows through: `axes.cuts` finds, for every dim
of every value of a graph, the few cuts (unit, blocks) that some neighbour can go on with.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.graph.graph import Node, TensorSpec
from weft.placement.layout import Partial, Placement, Replicate, Shard

__all__ = ["Call", "Link", "Local", "Position", "Row", "Signature", "linear_signature", "link_signature"]


@dataclass(frozen=True)
class Signature:
    """Placements of a node's operands and outputs along one mesh axis, in the order of `Node.inputs` and `Node.outputs`."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.inputs))} -> {' '.join(map(str, self.outputs))}".strip()


@dataclass(frozen=True)
class Position:
    """One end of a link: `dim` of operand (or output) number `operand`, seen as outer x m x inner; the m is the link's."""

    operand: int
    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Link:
    """One index that an operator maps from inputs to outputs.

    Attributes:
        name: a letter or word, for people.
        inputs, outputs: where the index stands. Operands without it are Replicate, but see `others`.
        reduce: None if the outputs keep the index; "sum", "max", ... if they lack it and are then Partial(reduce).
        others: operand -> placement instead of Replicate (an added bias is Partial under a contracted index).
        whole: outputs -> placement instead of Replicate for outputs that lack the index without owing a sum.
        contiguous: the local program needs one contiguous range per device (blocks = 1), e.g. to know an offset.
        reduced: bytes of each all-reduce that the local program makes along the axis that cuts this link, forward and
            backward, if nothing else is cut: what a planner has to price besides the operator itself.
    """

    name: str
    inputs: tuple[Position, ...]
    outputs: tuple[Position, ...] = ()
    reduce: str | None = None
    others: tuple[tuple[int, Placement], ...] = ()
    whole: tuple[tuple[int, Placement], ...] = ()
    contiguous: bool = False
    reduced: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """What one call of an operator allows: its links, its linear operand groups, and its local program.

    Attributes:
        links: indices that may be cut.
        linear: groups of operands in which the operator is jointly linear: those may be Partial together, with all other
            operands Replicate (but `added` ones Partial), and outputs Partial.
        added: operands that are only added to the result (a bias).
        extra: signatures beyond those that links and `linear` give.
        local: builds the local program where running the operator itself on local pieces would be wrong; None where it is right.
    """

    links: tuple[Link, ...] = ()
    linear: tuple[tuple[int, ...], ...] = ()
    added: tuple[int, ...] = ()
    extra: tuple[Signature, ...] = ()
    local: Callable[[Local], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class Call:
    """What a row function sees: the node and the single-device specs of its operands."""

    node: Node
    inputs: tuple[TensorSpec, ...]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.node.outputs

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        """Positional argument `index`, or keyword `name`, or the default."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def operand(self, index: int, name: str = "") -> int | None:
        """Operand number (in `Node.inputs`) of tensor argument `index` / `name`; None if it is absent or None.

        Only for arguments that are single tensors.
        """
        from weft.graph.graph import Ref, refs_in

        value = self.arg(index, name)
        if not isinstance(value, Ref):
            return None
        before = self.node.args[:index] if index < len(self.node.args) else self.node.args
        count = sum(1 for _ in refs_in(before))
        if index >= len(self.node.args):
            for key, item in self.node.kwargs.items():
                if key == name:
                    break
                count += sum(1 for _ in refs_in(item))
        return count

    def operands(self, index: int) -> tuple[int, ...]:
        """Operand numbers of all tensors in positional argument `index`, which may be a list of them."""
        from weft.graph.graph import refs_in

        if index >= len(self.node.args):
            return ()
        first = sum(1 for _ in refs_in(self.node.args[:index]))
        return tuple(range(first, first + sum(1 for _ in refs_in(self.node.args[index]))))


def link_signature(call: Call, row: Row, link: Link, blocks: int = 1, unit: int = 1) -> Signature:
    """The signature that cuts one link's index in `blocks` blocks of units of `unit`."""

    def shard(position: Position) -> Shard:
        return Shard(position.dim, None, unit * position.inner, blocks * position.outer)

    added = row.added if link.reduce is not None else ()
    inputs: list[Placement] = [Partial() if operand in added else Replicate() for operand in range(len(call.inputs))]
    owed: Placement = Replicate() if link.reduce is None else Partial(link.reduce)  # type: ignore[arg-type]
    outputs: list[Placement] = [owed] * len(call.outputs)
    for number, placement in link.others:
        inputs[number] = placement
    for number, placement in link.whole:
        outputs[number] = placement
    for position in link.inputs:
        inputs[position.operand] = shard(position)
    for position in link.outputs:
        outputs[position.operand] = shard(position)
    return Signature(tuple(inputs), tuple(outputs))


def linear_signature(call: Call, row: Row, group: tuple[int, ...]) -> Signature:
    """The signature by which the operands of a linear group, and the added ones, are terms of a sum."""
    owed = {*group, *row.added}
    inputs = tuple(Partial() if operand in owed else Replicate() for operand in range(len(call.inputs)))
    return Signature(inputs, (Partial(),) * len(call.outputs))


class Local(abc.ABC):
    """What a local program may know of where it runs. `localize` implements it for a device's program, `verify` for proofs.

    A row's `local` gets one and returns a callable that takes the node's args and kwargs (with local tensors in place of
    `Ref`s, exactly in the call's argument structure) and returns the local output(s).
    """

    node: Node

    @abc.abstractmethod
    def input_shape(self, operand: int) -> tuple[int, ...]:
        """Local shape of an operand."""

    @abc.abstractmethod
    def output_shape(self, output: int = 0) -> tuple[int, ...]:
        """Local shape of an output."""

    @abc.abstractmethod
    def input_range(self, operand: int, dim: int) -> tuple[int, int]:
        """Half-open range of the whole dim that this device holds of an operand (contiguous cuts only)."""

    @abc.abstractmethod
    def output_range(self, output: int, dim: int) -> tuple[int, int]:
        """The same for an output."""

    @abc.abstractmethod
    def axes_of_input(self, operand: int, dim: int) -> tuple[int, ...]:
        """Mesh axes over which this dim of the operand is sharded, outermost first."""

    @abc.abstractmethod
    def axes_of_output(self, output: int, dim: int) -> tuple[int, ...]:
        """The same for an output."""

    @abc.abstractmethod
    def group(self, axis: int) -> Any:
        """The `weft.placement.comms.Group` along a mesh axis, for collectives inside the operator."""

    @abc.abstractmethod
    def random_stream(self) -> Callable[[], int]:
        """A function giving the seed of this node's next random draw.

        Equal on devices along every axis where the node's output is not Shard (their values must agree), different along
        axes where it is; different from call to call and from node to node.
        """
