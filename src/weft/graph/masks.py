"""Attention masks that do not depend on data: recognise the causal one, and the one that hides nothing.

Problem    models that run fast with `is_causal=True` build the mask as a tensor while they are exported (HuggingFace's do), which
           costs a kernel twice the work and a copy of the mask per layer.
Method     a mask computed from constants only (arange, comparisons, expand) is computed here, once, and compared with the
           lower triangle.                                                                            `mask_kind`
Guarantee  exact: the mask's every element is looked at. Masks above 2^26 elements, or made from the batch or from
           parameters, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from weft.graph.graph import Node, Ref, map_refs
from weft.graph.rewrite import operator

__all__ = ["mask_kind"]

_MOST_ELEMENTS = 1 << 26


def mask_kind(
    mask: Ref, producer: Callable[[Ref], Node], constants: Mapping[str, Tensor]
) -> Literal["causal", "nothing", "other"]:
    """What a mask (..., queries, keys), boolean (True: look) or added to the scores, hides."""
    try:
        value = _value(mask, producer, constants, {})
    except _Unknown:
        return "other"
    for dim in range(value.dim() - 2):  # copies along an expanded dim need one look
        if value.stride(dim) == 0:
            value = value.narrow(dim, 0, 1)
    if value.dtype == torch.bool:
        seen, hidden = value, ~value
    else:
        seen, hidden = value == 0, value <= torch.finfo(value.dtype).min
    queries, keys = value.shape[-2:]
    lower = torch.ones(queries, keys, dtype=torch.bool).tril()
    if queries == keys and bool(torch.where(lower, seen, hidden).all()):
        return "causal"
    return "nothing" if bool(seen.all()) else "other"


class _Unknown(Exception):
    """The value depends on the batch, on parameters, or on chance; or it is too large to look at."""


def _value(ref: Ref, producer: Callable[[Ref], Node], constants: Mapping[str, Tensor], known: dict[str, Any]) -> Tensor:
    node = producer(ref)
    if node.name in known:
        return known[node.name][ref.index]
    if node.role == "constant":
        return constants[node.target]
    large = node.kind != "view" and sum(spec.numel for spec in node.outputs) > _MOST_ELEMENTS
    if node.role != "call" or large or torch.Tag.nondeterministic_seeded in operator(node.target).tags:
        raise _Unknown
    args, kwargs = map_refs((node.args, dict(node.kwargs)), lambda r: _value(r, producer, constants, known))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    result = operator(node.target)(*args, **kwargs)
    known[node.name] = tuple(result) if isinstance(result, (list, tuple)) else (result,)
    return known[node.name][ref.index]
