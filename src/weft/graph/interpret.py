"""Run a graph operator by operator on one device: slow, readable, and what every faster way is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from weft.graph.graph import Graph, Ref, map_refs
from weft.graph.rewrite import operator

__all__ = ["interpret"]


def interpret(graph: Graph, tensors: Mapping[str, Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """The graph's loss, differentiable in `tensors` by autograd.

    Args:
        graph: from `capture`.
        tensors: parameters and buffers by name (a model's `named_parameters` and `named_buffers`); written buffers are
            written in place. A tied parameter may stand under either name.
        leaves: tensors of the batch, in the order of `flatten_batch`.
    Raises:
        ValueError: a parameter or buffer that the graph reads is missing.
    """
    values: dict[Ref, Any] = {}
    inputs = iter(leaves)
    names = {first: other for other, first in graph.aliases.items()}
    read = {ref for node in graph.calls for ref in node.inputs} | {graph.loss}
    for node in graph.nodes:
        if node.role == "call":
            args, kwargs = map_refs((node.args, dict(node.kwargs)), values.__getitem__)
            result = operator(node.target)(*args, **kwargs)
            for index, output in enumerate(result if isinstance(result, (list, tuple)) else (result,)):
                values[Ref(node.name, index)] = output
        elif node.role == "input":
            values[Ref(node.name)] = next(inputs)
        elif node.role == "constant":
            values[Ref(node.name)] = graph.constants[node.target]
        else:
            tensor = tensors.get(node.target, tensors.get(names.get(node.target, "")))
            if tensor is None and Ref(node.name) in read:
                raise ValueError(f"interpret: tensors lacks the {node.role} {node.target!r}")
            values[Ref(node.name)] = tensor
    return values[graph.loss]
