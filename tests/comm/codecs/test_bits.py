"""Packing: every width, every remainder, against arithmetic with Python's integers."""

from __future__ import annotations

import pytest
import torch

from weft.comm.codecs.bits import pack, packed_length, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_round_trip_in_the_declared_bytes(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_length(count, bits)
    assert len(packed) <= count * bits / 8 + bits
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_first_code_lies_lowest(bits):
    """One layout for all widths: the bytes are those of the integer sum of code_i 2^(bits i), little-endian."""
    codes = torch.randint(0, 2**bits, (16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(2 * bits, "little")
