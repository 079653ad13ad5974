"""Dense tensors as 1-D ones, in the order in which their elements lie in memory (channels last, transposed: whatever it is)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flat", "flat_like", "is_dense"]


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill its memory, each once."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def flat(tensor: Tensor) -> Tensor:
    """A 1-D alias of a dense tensor.

    Raises:
        ValueError: the tensor is not dense (a strided view), so that it has no such alias.
    """
    if not is_dense(tensor):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense; clone it first"
        )
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def flat_like(tensor: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], name: str) -> Tensor:
    """A tensor's elements in the order that a dense one of this shape and stride has them, 1-D; copied if it has another.

    Raises:
        ValueError: it is sparse.
    """
    if tensor.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name} has the layout {tensor.layout}, which cannot be streamed; use dense gradients "
            "(sparse=False)"
        )
    tensor = tensor.detach()
    if tensor.stride() != stride:
        tensor = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))
