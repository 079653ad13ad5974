"""Small codes in few bits: n codes below 2^b take n b / 8 bytes, groups of eight codes in b bytes each.

Eight codes of b bits are b bytes for every b, so a group never shares a byte with its neighbour and whole arrays are packed by
shifts. Two and four bits take a shorter way (whole codes within one byte); the layout is the same: the first code lies lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_length", "unpack"]


def packed_length(count: int, bits: int) -> int:
    """Bytes for `count` codes of `bits` bits: whole groups of eight codes.

    >>> packed_length(9, 3)
    6
    """
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 (count,), each below 2^bits, into uint8 (packed_length(count, bits),); 1 <= bits <= 8."""
    count = len(codes)
    short = -count % 8
    if short:
        codes = torch.cat((codes, codes.new_zeros(short)))
    if bits == 8:
        return codes
    if bits in (1, 2, 4):
        lanes = codes.view(-1, 8 // bits)
        packed = lanes[:, 0].clone()
        for place in range(1, 8 // bits):
            packed |= lanes[:, place] << (bits * place)
        return packed
    groups = codes.view(-1, 8)
    word = groups.new_zeros(len(groups), dtype=torch.int64)
    for place in range(8):
        word |= groups[:, place].to(torch.int64) << (bits * place)
    return word.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes uint8 (count,) that `pack` packed."""
    if bits == 8:
        return packed[:count]
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        lanes = [(packed >> (bits * place)) & mask for place in range(8 // bits)]
        return torch.stack(lanes, 1).view(-1)[:count]
    wide = packed.new_zeros(len(packed) // bits, 8)
    wide[:, :bits] = packed.view(-1, bits)
    word = wide.view(torch.int64)
    lanes = [((word >> (bits * place)) & mask).to(torch.uint8) for place in range(8)]
    return torch.cat(lanes, 1).view(-1)[:count]
