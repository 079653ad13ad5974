"""Gradients on their way through a backward pass that nobody else has: an operator may write its result over them.

Problem    autograd gives a node a gradient and takes another one. Whether somebody else wants the first (a hook, a view, another
           branch, `retain_grad`, a capture) torch does not say.
Method     `alone`: as many refer to tensor, Python object and storage as when the same node runs by itself, which is measured
           once a process (`count_references`), for fake tensors by themselves; one more is somebody.
           The node reads its gradient in this one call: it is one of `NODES`, and wanted for a single input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from weft.memory.private import QuickMode, disable_modes, numpy_of, references, uncast, wanted_by
from weft.memory.tracing.operators import fits_over_first, label

__all__ = ["NODES", "alone", "count_references"]

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


def alone(operator: str, args: Sequence[Any]) -> bool:
    """Whether nobody wants the first argument of the call under way (of an operator that has such a variant) any more after it,
    and its result would fit there; for plain and fake tensors."""
    if torch.is_grad_enabled():
        return False
    kind = type(args[0])
    if kind is not Tensor and kind is not FakeTensor:
        return False
    node, num_wanted = wanted_by()
    counts, lone_base = count_references(kind)
    lone = counts.get((operator, node))
    if lone is None or num_wanted != 1:
        return False
    own, base = references(args, 0)
    return own == lone[0] and base in (lone[1], lone_base) and fits_over_first(args)


# -- what references to a gradient there are when nobody else has it ----------------------------------------------------------


def _by_numpy(made: Tensor, kept: list[Any]) -> Any:
    return made.register_hook(lambda g: kept.append(numpy_of(g)))


_KEEPERS: tuple[Callable[[Tensor, list[Any]], Any], ...] = (
    lambda made, kept: made.register_hook(kept.append),
    lambda made, kept: made.register_hook(lambda g: kept.append(g[:1])),
    lambda made, kept: made.register_hook(lambda g: kept.append(g.detach())),
    _by_numpy,
    lambda made, kept: made.grad_fn.register_hook(lambda found, given: None),  # type: ignore[union-attr]
)


def _lone(
    operator: str,
    node: str,
    forward: Callable[[Tensor], Tensor],
    kind: type[Tensor],
    keepers: Sequence[Callable[[Tensor, list[Any]], Any]],
    after: Callable[[Tensor], Tensor] = lambda made: made,
) -> Counts | None:
    """`references` to the gradient of a node in its call of an operator when nobody else has it; None if torch calls another
    one, or if they are no more when somebody has the gradient, a view, its bytes, or waits behind the node."""
    found, mode = [], FakeTensorMode if kind is FakeTensor else nullcontext
    for keeper in (lambda made, kept: None, *keepers):
        look, kept = _Look(operator, node), []
        with disable_modes(), uncast(), torch.enable_grad(), mode(), look:
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
        if label(func) == self.operator and wanted_by()[0] == self.node:
            self.seen.append(references(args, 0))
        return func(*args, **(kwargs or {}))


@functools.cache
def count_references(kind: type[Tensor], /) -> Lone:
    """Of plain tensors or `FakeTensor`s: measured once, by some hundred backward passes of two numbers (0.1 s); call it before
    anybody listens to operators."""
    counts = {}
    keepers = tuple(keeper for keeper in _KEEPERS if kind is Tensor or keeper is not _by_numpy)
    try:
        for operator, nodes in NODES.items():
            for name, forward in nodes.items():
                node = f"{name}Backward0"
                found = _lone(operator, node, forward, kind, keepers)
                if found is not None:
                    counts[operator, node] = found
        view = _lone("aten.neg.default", "NegBackward0", torch.neg, kind, keepers[:-1], lambda made: made.view(2, 1))
    except (AttributeError, RuntimeError, TypeError):
        return Lone({}, (0, 0))
    plain = counts.get(("aten.neg.default", "NegBackward0"))
    return Lone(counts, view[1] if view is not None and plain is not None and view[0] == plain[0] else (0, 0))
