"""Cutting a step's batch into micro-batches, and counting what is in it.

A batch's *samples* are the entries of dim 0, which its leaves share. Leaves without that dim (scalars), or with one entry there
while others have more (position ids of shape (1, T)), belong to every micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.graph.graph import Graph
from weft.placement.assignment import Assignment
from weft.placement.layout import Placements, Replicate, Shard, local_shape

__all__ = ["count_samples", "count_tokens", "held", "split"]


def count_samples(leaves: Sequence[Tensor]) -> int:
    """Entries of dim 0; 1 for a batch of scalars."""
    return max((leaf.shape[0] for leaf in leaves if leaf.dim() > 0), default=1)


def count_tokens(leaves: Sequence[Tensor]) -> int:
    """Elements of the first leaf of whole numbers with two dims or more (token ids), or 0."""
    for leaf in leaves:
        if leaf.dim() >= 2 and not leaf.is_floating_point() and leaf.dtype != torch.bool:
            return leaf.numel()
    return 0


def split(leaves: Sequence[Tensor], parts: int) -> list[tuple[list[Tensor], float]]:
    """Up to `parts` micro-batches of nearly equal size, each with its share of the samples.

    A batch of fewer samples than `parts` gives one micro-batch per sample. Shares sum to 1.

    Raises:
        ValueError: leaves disagree in their number of samples.

    >>> [(len(x[0]), share) for x, share in split([torch.zeros(5, 2)], 2)]
    [(3, 0.6), (2, 0.4)]
    """
    if parts <= 1:
        return [(list(leaves), 1.0)]
    total = count_samples(leaves)
    for number, leaf in enumerate(leaves):
        if leaf.dim() > 0 and leaf.shape[0] not in (1, total):
            raise ValueError(
                f"batch: leaf {number} has {leaf.shape[0]} entries in dim 0 and another has {total}; to accumulate over "
                "micro-batches all must agree (or have 1)"
            )
    parts = max(1, min(parts, total))
    each, more = divmod(total, parts)
    sizes = [each + (i < more) for i in range(parts)]
    cut = [
        leaf.split(sizes) if leaf.dim() > 0 and leaf.shape[0] == total and total > 1 else (leaf,) * parts
        for leaf in leaves
    ]
    return [([pieces[i] for pieces in cut], size / total) for i, size in enumerate(sizes)]


def held(graph: Graph, assignment: Assignment) -> dict[tuple[int, ...], int]:
    """How many entries of the batch each device works on, by its position on the mesh: of the leaf that is cut most."""
    leaves = {node.name: node.outputs[0].shape for node in graph.of("input")}
    read = [
        (placements, leaves[ref.node])
        for node in graph.calls
        for ref, placements in zip(node.inputs, assignment.inputs(node), strict=True)
        if ref.node in leaves
    ]
    cuts = lambda each: sum(isinstance(placement, Shard) for placement in each[0])
    nothing: tuple[Placements, tuple[int, ...]] = ((Replicate(),) * assignment.mesh.ndim, ())
    placements, shape = max(read, key=cuts, default=nothing)
    positions = assignment.mesh.positions()
    return {at: math.prod(local_shape(shape, placements, assignment.mesh, at)) for at in positions}
