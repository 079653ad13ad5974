"""The slow, readable meaning of placements: local pieces made from nothing, and the whole value that pieces stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard, intervals, take

REDUCTIONS = {
    "sum": lambda s: s.sum(0), "avg": lambda s: s.mean(0), "max": lambda s: s.amax(0), "min": lambda s: s.amin(0),
}  # fmt: skip


def random_pieces(placements: Placements, mesh: Mesh, shape: Sequence[int], seed: int = 0) -> list[Tensor]:
    """A legal local tensor for every device, in row-major order: equal where replicated, unlike where partial."""
    owed = [axis for axis, placement in enumerate(placements) if isinstance(placement, Partial)]
    cuts = tuple(placement if isinstance(placement, Shard) else Replicate() for placement in placements)
    result = []
    for position in mesh.positions():
        own = sum(position[axis] * 7**number for number, axis in enumerate(owed))
        generator = torch.Generator().manual_seed(seed * 1000 + own)
        result.append(
            take(torch.randn(tuple(shape), generator=generator, dtype=torch.float64), cuts, mesh, position).clone()
        )
    return result


def whole_of(pieces: Sequence[Tensor], placements: Placements, mesh: Mesh, shape: Sequence[int]) -> Tensor:
    """The value that local tensors stand for. Fails if replicas differ or an index is held by nobody."""

    def over(axis: int, position: tuple[int, ...]) -> Tensor:
        if axis == mesh.ndim:
            value = torch.full(tuple(shape), torch.nan, dtype=torch.float64)
            held = [
                torch.cat([torch.arange(*run) for run in intervals(size, dim, placements, mesh, position)])
                for dim, size in enumerate(shape)
            ]
            piece = pieces[mesh.ranks.index(mesh.at(position))].double()
            if not held:
                return piece
            value[torch.meshgrid(*held, indexing="ij")] = piece
            return value
        parts = [over(axis + 1, (*position, i)) for i in range(mesh.shape[axis])]
        placement = placements[axis]
        if isinstance(placement, Partial):
            return REDUCTIONS[placement.reduce](torch.stack(parts))
        if isinstance(placement, Replicate):
            for part in parts[1:]:
                torch.testing.assert_close(part, parts[0], rtol=0, atol=0, equal_nan=True)
            return parts[0]
        stacked = torch.stack(parts)
        assert (stacked.isnan().sum(0) >= len(parts) - 1).all(), "an index is held twice"
        return torch.where(stacked.isnan().all(0), torch.nan, stacked.nan_to_num(0).sum(0))

    value = over(0, ())
    assert not value.isnan().any(), "an index is held by nobody"
    return value
