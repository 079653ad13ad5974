"""Collectives inside local programs, each the exact adjoint of itself as one linear map over all devices.

Let x_i be what device i holds. `all_reduce` gives every device s_j = sum_i x_i; a loss that depends on all s_j then has
dL/dx_i = sum_j dL/ds_j: the backward of an all-reduce is an all-reduce of the cotangents. That holds whatever the cotangents
are, equal or not, and so composes with the placements around it (the cotangent of a replicated value is only their sum).
Maxima are taken of detached values: they serve as shifts, in which the results are constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.placement.signature import Local

__all__ = ["all_max", "all_reduce", "groups_along", "plain_sum"]


def groups_along(local: Local, mesh_axes: Sequence[int]) -> tuple[Any, ...]:
    """Communication groups of some mesh axes, without those of a single device."""
    return tuple(group for group in map(local.group, mesh_axes) if group.size > 1)


def plain_sum(x: Tensor, groups: Sequence[Any]) -> Tensor:
    """Sum over the devices of all groups, not recorded by autograd."""
    x = x.detach()
    for group in groups:
        x = group.all_reduce(x)
    return x


def all_max(x: Tensor, groups: Sequence[Any]) -> Tensor:
    """Elementwise maximum over the devices of all groups, detached."""
    x = x.detach()
    for group in groups:
        x = group.all_reduce(x, reduce="max")
    return x


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[Any]) -> Tensor:
        ctx.groups = groups
        return plain_sum(x, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return plain_sum(grad, ctx.groups), None


def all_reduce(x: Tensor, groups: Sequence[Any]) -> Tensor:
    """Sum over the devices of all groups; differentiable (see the module's header)."""
    return _AllReduce.apply(x, groups) if groups else x
