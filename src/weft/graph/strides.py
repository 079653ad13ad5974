"""How the values of a graph under construction lie in memory: which are views, and which are not contiguous.

Copies and `contiguous` calls are dropped when a model is captured, so that the strides which export recorded no longer hold
for views. They are followed here from call to call, by running views on tensors without data. They decide whether a
`reshape` moves bytes, and whether a product copies its operand first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.graph.cost import Work, one_kernel
from weft.graph.graph import Ref, TensorSpec, map_refs, refs_in
from weft.graph.rewrite import Draft, is_pointwise, may_view, operator

__all__ = ["Strides"]


class Strides:
    """Strides of the values that are not contiguous; `device` is the type of device that the model runs on."""

    def __init__(self, spec: Callable[[Ref], TensorSpec], device: str):
        self.spec, self.device = spec, device
        self._known: dict[Ref, tuple[int, ...]] = {}

    def __contains__(self, ref: Ref) -> bool:
        """Whether the value is scattered, that is, not contiguous."""
        return ref in self._known

    def note(self, name: str, draft: Draft, recorded: Any) -> bool:
        """Remember the strides of the outputs of call `name`; whether they are views of its first operand.

        `recorded` is what export saw the call return.
        """
        view = False
        made: Sequence[Any]
        if may_view(draft.target):
            args, kwargs = map_refs((draft.args, draft.kwargs), self._without_data)
            result = operator(draft.target)(*args, **kwargs)
            made = result if isinstance(result, (list, tuple)) else (result,)
            view = bool(made) and isinstance(args[0], Tensor) and _memory(made[0]) == _memory(args[0])
        else:
            made = self._moved(draft, recorded)
        for index, tensor in enumerate(made[: len(draft.outputs)]):
            known = isinstance(tensor, Tensor) and tuple(tensor.shape) == draft.outputs[index].shape
            if known and not tensor.is_contiguous():
                self._known[Ref(name, index)] = tuple(tensor.stride())
        return view

    def _moved(self, draft: Draft, recorded: Any) -> Sequence[Any]:
        """Outputs of a call that makes new memory: an elementwise result lies as its operand, others as export saw."""
        follows = is_pointwise(draft.target)
        if draft.target == "aten.scaled_dot_product_attention.default":
            specs = [self.spec(ref) for ref in refs_in(draft.args)]
            follows = one_kernel(Work("", draft.args, draft.kwargs, specs, draft.outputs, self.device))
            recorded = recorded if follows else None
        for ref in refs_in(draft.args) if follows else ():
            if self.spec(ref).shape == draft.outputs[0].shape:
                return (torch.empty_like(self._without_data(ref)),) if ref in self else ()
        return recorded if isinstance(recorded, (list, tuple)) else (recorded,)

    def _without_data(self, ref: Ref) -> Tensor:
        spec, strides = self.spec(ref), self._known.get(ref)
        if strides is None:
            return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return torch.empty_strided(spec.shape, strides, dtype=spec.dtype, device="meta")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
