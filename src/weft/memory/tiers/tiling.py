"""A linear layer too wide for the device, as a grid of tiles that run one after the other (memory-centric tiling).

    y_j = sum over i of  x_i W_ij^T,  + b_j in the last i        tiles (j, i): W[rows j, columns i] of near-equal parts

Each tile is a module with a parameter of its own, so that `Tiered` has one of them on the device at a time: working memory falls
by the number of tiles. The sum over i goes in order; splitting only the outputs gives each output the same products and sums as
the whole layer.
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, section 5.1.3.

>>> wide = nn.Linear(7, 5)
>>> tiled = tile(wide, inputs=2, outputs=3)
>>> [tuple(t.weight.shape) for row in tiled.rows for t in row]
[(2, 4), (2, 3), (2, 4), (2, 3), (1, 4), (1, 3)]
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["TiledLinear", "parts", "tile"]


def parts(size: int, count: int) -> list[int]:
    """Near-equal parts of `size`, the larger first.

    >>> parts(7, 3)
    [3, 2, 2]
    """
    return [size // count + (index < size % count) for index in range(count)]


class TiledLinear(nn.Module):
    """A linear layer of `inputs` x `outputs` tiles; see the file's header. Initialised as `nn.Linear` is.

    Args:
        in_features, out_features, bias, device, dtype: of the whole layer.
        inputs, outputs: parts into which its inputs and outputs are cut.
    Raises:
        ValueError: there are more parts than features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        inputs: int = 1,
        outputs: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for what, count, size in (("inputs", inputs, in_features), ("outputs", outputs, out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"TiledLinear: {what} are cut of features, of which there must be at least 1, got {size!r}; a lazy layer "
                    "has them after its first batch"
                )
            if not isinstance(count, int) or not 1 <= count <= size:
                raise ValueError(f"TiledLinear: {what} must be from 1 to {size} (the features to cut), got {count!r}")
        self.in_features, self.out_features = in_features, out_features
        self.columns, heights = parts(in_features, inputs), parts(out_features, outputs)
        self.rows = nn.ModuleList(
            nn.ModuleList(
                nn.Linear(width, height, bias=bias and last, device=device, dtype=dtype)
                for width, last in zip(self.columns, [False] * (inputs - 1) + [True], strict=True)
            )
            for height in heights
        )
        # nn.Linear's bound depends on the inputs of the whole layer, not on those of a tile.
        bound = 1 / math.sqrt(in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        pieces = x.split(self.columns, dim=-1)
        found = []
        for row in self.rows:
            first, *rest = row.children()
            y = first(pieces[0])
            for tile_, piece in zip(rest, pieces[1:], strict=True):
                y = y + tile_(piece)
            found.append(y)
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _tiles(self) -> Iterator[tuple[int, int, nn.Linear]]:
        """(first row, first column, tile)."""
        top = 0
        for row in self.rows:
            left = 0
            for tile_ in row:  # type: ignore[attr-defined]
                yield top, left, tile_
                left += tile_.in_features
            top += row[0].out_features  # type: ignore[index]

    @torch.no_grad()
    def load(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take over the weight (out_features, in_features) and bias (out_features) of a whole layer."""
        for top, left, tile_ in self._tiles():
            tile_.weight.copy_(weight[top : top + tile_.out_features, left : left + tile_.in_features])
            if tile_.bias is not None and bias is not None:
                tile_.bias.copy_(bias[top : top + tile_.out_features])

    @torch.no_grad()
    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the whole layer, on the CPU."""
        dtype = self.rows[0][0].weight.dtype  # type: ignore[index]
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        bias = torch.empty(self.out_features, dtype=dtype) if self.rows[0][-1].bias is not None else None  # type: ignore[index]
        for top, left, tile_ in self._tiles():
            weight[top : top + tile_.out_features, left : left + tile_.in_features] = tile_.weight.cpu()
            if bias is not None and tile_.bias is not None:
                bias[top : top + tile_.out_features] = tile_.bias.cpu()
        return weight, bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def tile(linear: nn.Linear, inputs: int = 1, outputs: int = 1) -> TiledLinear:
    """A linear layer's values in `inputs` x `outputs` tiles. To never have the layer whole, make a `TiledLinear` directly."""
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"tile: takes a torch.nn.Linear, got an object of type {type(linear).__name__}")
    weight = linear.weight
    made = TiledLinear(
        linear.in_features, linear.out_features, inputs, outputs, linear.bias is not None, weight.device, weight.dtype
    )
    made.load(weight.detach(), None if linear.bias is None else linear.bias.detach())
    for _, _, tile_ in made._tiles():
        tile_.weight.requires_grad_(weight.requires_grad)
        if tile_.bias is not None:
            tile_.bias.requires_grad_(linear.bias.requires_grad)
    return made.train(linear.training)
