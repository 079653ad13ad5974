"""Where the messages of a bucket lie in one row of bytes.

    [step << 1 | flag, int64 | message of tensor 1 | message of tensor 2 | ...]

Offsets are fixed by specs and settings, so that buffers and the typed views into them are made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec

__all__ = ["HEADER", "Packing"]

HEADER = 8  # bytes


@final
class Packing:
    """Where the messages of a bucket lie in a row of bytes; rows are multiples of 8 bytes long."""

    def __init__(self, parts: Sequence[tuple[Codec, Spec, Setting]]):
        self.places: list[tuple[tuple[int, int, tuple[int, ...], torch.dtype], ...]] = []
        end = HEADER
        for codec, spec, setting in parts:
            places = []
            for shape, dtype in codec.message(spec, setting):
                start = -(-end // 8) * 8  # views of wider types need aligned offsets
                end = start + math.prod(shape) * dtype.itemsize
                places.append((start, end, tuple(shape), dtype))
            self.places.append(tuple(places))
        self.nbytes = -(-end // 8) * 8

    def views(self, row: Tensor) -> list[tuple[Tensor, ...]]:
        """The message tensors inside one row (nbytes,) of uint8."""
        return [
            tuple(row[start:end].view(dtype).view(shape) for start, end, shape, dtype in places)
            for places in self.places
        ]
