"""Backward operators that write over the gradient they are given, where nobody else has it.

Problem    autograd gives a node a gradient and takes another one; elementwise operators make it in fresh bytes though nobody
           reads the first again. At the beginning of a backward pass, where memory is shortest, that is one more activation.
Method     `over_its_gradient`: the operator's overload that writes where it is told, told to write there. To trace, plan and
           recipes it is an operator that writes in place, like the program's own.
Guarantee  the same bits, since the kernel is the same (`tracing.operators.OVER_GRADIENT`), and nobody misses the old ones:
               the node reads its gradient in this one call: it is one of `NODES`, and wanted for a single input
               nobody else has it: as many refer to tensor, Python object and storage as when the same node runs alone, which is
               measured when a process enters its first limit (`count_references`); a hook, a view, `retain_grad`, a second
               branch, a post hook or a capture is one more
               no graph is made of the backward pass
           The rule looks at one call and remembers nothing, so that online and replay follow the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.memory.execute.facts import Facts, facts_of
from weft.memory.private import QuickMode, disable_modes, numpy_of, references, storage_of, uncast, wanted_by

__all__ = ["NODES", "count_references", "over_its_gradient"]

# operator of `OVER_GRADIENT` -> autograd nodes whose formula for one input (in torch's derivatives.yaml) reads its gradient in
# this call and nowhere else -> a function that has such a node
NODES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "aten.gelu_backward.default": {"Gelu": F.gelu},
    "aten.silu_backward.default": {"Silu": F.silu},
    "aten.threshold_backward.default": {"Relu": F.relu, "Threshold": lambda x: F.threshold(x, 0.1, 0.2)},
    "aten.leaky_relu_backward.default": {"LeakyRelu": F.leaky_relu},
    "aten.elu_backward.default": {"Elu": F.elu},
    "aten.hardtanh_backward.default": {"Hardtanh": F.hardtanh},
    "aten.hardsigmoid_backward.default": {"Hardsigmoid": F.hardsigmoid},
    "aten.softplus_backward.default": {"Softplus": F.softplus},
    "aten.sigmoid_backward.default": {"Sigmoid": torch.sigmoid},
    "aten.tanh_backward.default": {"Tanh": torch.tanh},
    "aten._softmax_backward_data.default": {"Softmax": lambda x: x.softmax(0)},
    "aten._log_softmax_backward_data.default": {"LogSoftmax": lambda x: x.log_softmax(0)},
    "aten.mul.Tensor": {"Mul": lambda x: x * 2, "Exp": torch.exp, "Pow": lambda x: x**3},
    "aten.div.Tensor": {"Div": lambda x: x / 2},
    "aten.neg.default": {"Neg": torch.neg, "Sub": lambda x: torch.ones(2) - x},
}

Counts = tuple[tuple[int, int, int], tuple[int, int]]


class Lone(NamedTuple):
    """References to a gradient that nobody else has.

    Attributes:
        counts: `private.references` by (operator, node); empty if this torch does not tell, so that nothing is written over.
        base: those to what a gradient is a view of, if only that knows it; (0, 0), which is never found, if the view's own
            references are not those of a tensor.
    """

    counts: dict[tuple[str, str], Counts]
    base: tuple[int, int]


def over_its_gradient(
    facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Facts, dict[str, Any]] | None:
    """The operator (one with `Facts.over`) and keyword arguments with which the same call writes over its first argument; None
    if somebody may still want what is there."""
    if torch.is_grad_enabled():
        return None
    node, num_wanted = wanted_by()
    counts, lone_base = count_references()
    lone = counts.get((facts.name, node))
    if lone is None or num_wanted != 1:
        return None
    own, base = references(args, 0)
    if own != lone[0] or base not in (lone[1], lone_base) or not _same_geometry(args):
        return None
    _, variant, argument = facts.over
    return facts_of(variant), {**kwargs, argument: args[0]}


def _same_geometry(args: Sequence[Any]) -> bool:
    """Whether the result has dtype, sizes and strides of the first argument, and that has all bytes of its storage."""
    first = args[0]
    dtype, size = first.dtype, first.shape
    if type(first) is not Tensor or not dtype.is_floating_point or not first.is_contiguous():
        return False
    if storage_of(first).nbytes() != first.nbytes:
        return False
    for value in args[1:]:
        if isinstance(value, Tensor):
            if value.dtype not in (dtype, torch.bool):
                return False
            if value.shape == size:
                if value.stride() != first.stride():
                    return False  # the result might be laid out like this one: channels last
            elif torch.broadcast_shapes(value.shape, size) != size:
                return False
        elif isinstance(value, complex) or (isinstance(value, torch.dtype) and value != dtype):
            return False
    return True


# -- what references to a gradient there are when nobody else has it ----------------------------------------------------------

_KEEPERS: tuple[Callable[[Tensor, list[Any]], Any], ...] = (
    lambda made, kept: made.register_hook(kept.append),
    lambda made, kept: made.register_hook(lambda g: kept.append(g[:1])),
    lambda made, kept: made.register_hook(lambda g: kept.append(g.detach())),
    lambda made, kept: made.register_hook(lambda g: kept.append(numpy_of(g))),
    lambda made, kept: made.grad_fn.register_hook(lambda found, given: None),  # type: ignore[union-attr]
)


def _lone(
    operator: str,
    node: str,
    forward: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] = lambda made: made,
    keepers: Sequence[Callable[[Tensor, list[Any]], Any]] = _KEEPERS,
) -> Counts | None:
    """`references` to the gradient of a node in its call of an operator when nobody else has it; None if torch calls another
    one, or if they are no more when somebody has the gradient, a view, its bytes, or waits behind the node."""
    found = []
    for keeper in (lambda made, kept: None, *keepers):
        look, kept = _Look(operator, node), []
        with disable_modes(), uncast(), torch.enable_grad(), look:
            made = forward(torch.ones(2, requires_grad=True).cos())
            seen = after(made)
            keeper(seen, kept)
            seen.cos().sum().backward()
        if len(look.seen) != 1:
            return None
        found += look.seen
    return found[0] if found[0] not in found[1:] else None


class _Look(QuickMode):
    """Notes the references to the first argument of an operator's calls by a node."""

    def __init__(self, operator: str, node: str):
        super().__init__()
        self.operator, self.node = operator, node
        self.seen: list[Counts] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if facts_of(func).name == self.operator and wanted_by()[0] == self.node:
            self.seen.append(references(args, 0))
        return func(*args, **(kwargs or {}))


@functools.cache
def count_references() -> Lone:
    """Measured once, by some hundred backward passes of two numbers (0.1 s); call it before anybody listens to operators."""
    counts = {}
    try:
        for operator, nodes in NODES.items():
            for name, forward in nodes.items():
                node = f"{name}Backward0"
                found = _lone(operator, node, forward)
                if found is not None:
                    counts[operator, node] = found
        view = _lone("aten.neg.default", "NegBackward0", torch.neg, lambda made: made.view(2, 1), _KEEPERS[:-1])
    except (AttributeError, RuntimeError, TypeError):
        return Lone({}, (0, 0))
    plain = counts.get(("aten.neg.default", "NegBackward0"))
    return Lone(counts, view[1] if view is not None and plain is not None and view[0] == plain[0] else (0, 0))
