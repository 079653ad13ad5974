"""Small codes in few bits: n codes below 2^b take n b / 8 bytes, groups of eight codes in b bytes each.

Eight codes of b bits are b bytes for every b, so a group never shares a byte with its neighbour and whole arrays are packed by
shifts. The first code lies lowest.

    b in 1, 2, 4      neighbours move together: codes to pairs, pairs to fours, until a byte is full, all bytes at a time
    b in 3, 5, 6, 7   eight codes are one word of 64 bits, in which neighbours move together: codes to pairs, pairs to fours,
                      fours to eights, all words at a time; the top bit stays 0, so that shifts to the right bring no ones
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
        while bits < 8:
            pairs = codes.view(torch.int16)
            codes, bits = (pairs >> (8 - bits)).bitwise_or_(pairs).to(torch.uint8), 2 * bits
        return codes
    word = (codes if short else codes.clone()).view(torch.int64)  # a copy of its own lies where words may
    for lane in (8, 16, 32):
        low = _low(lane, lane)
        odd = (word >> lane).bitwise_and_(low).bitwise_left_shift_(lane // 8 * bits)
        word = (word & low).bitwise_or_(odd)
    return word.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes uint8 (count,) that `pack` packed."""
    if bits == 8:
        return packed[:count]
    if bits in (1, 2, 4):
        held = 4
        while held >= bits:
            pairs, low = packed.to(torch.int16), (1 << held) - 1
            high = (pairs & (low << held)).bitwise_left_shift_(8 - held)
            packed, held = (pairs & low).bitwise_or_(high).view(torch.uint8), held // 2
        return packed[:count]
    wide = packed.new_zeros(len(packed) // bits, 8)
    wide[:, :bits] = packed.view(-1, bits)
    word = wide.view(-1).view(torch.int64)
    for lane in (32, 16, 8):
        low = _low(lane, lane // 8 * bits)
        odd = (word >> (lane // 8 * bits)).bitwise_and_(low).bitwise_left_shift_(lane)
        word = (word & low).bitwise_or_(odd)
    return word.view(torch.uint8)[:count]


def _low(lane: int, bits: int) -> int:
    """The mask of the lowest `bits` bits of every second lane, in a word of 64 bits."""
    return sum(((1 << bits) - 1) << start for start in range(0, 64, 2 * lane))
