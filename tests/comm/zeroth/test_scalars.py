"""The byte: round trips, range, error, what is not finite; unbiased where it says so."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.comm.zeroth.scalars import LEVEL, WIRES, Byte, Float32

SMALLEST, LARGEST = math.exp(-63 / 8), math.exp(63 / 8)


@pytest.mark.parametrize("code", range(-127, 128))
def test_every_code_is_a_fixed_point(code):
    packed = struct.pack("<b", code)
    assert len(packed) == Byte.nbytes == 1
    value = Byte().decode(packed)
    assert Byte().encode(value) == packed
    assert value == pytest.approx(math.copysign(math.exp((abs(code) - 64) / 8), code) if code else 0.0, rel=1e-15)


@given(st.floats(SMALLEST, LARGEST), st.sampled_from([-1, 1]))
def test_error_inside_the_range(size, sign):
    number = sign * size
    assert abs(Byte().decode(Byte().encode(number)) - number) <= 0.065 * size


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1, exclude_max=True))
@pytest.mark.parametrize("name", WIRES)
def test_every_float_has_a_code_of_fixed_size_that_decodes_to_something_finite(name, number, draw):
    wire = WIRES[name]
    code = wire.encode(number, draw)
    assert len(code) == wire.nbytes
    back = wire.decode(code)
    assert math.isfinite(back) and back * (number if math.isfinite(number) else 0.0) >= 0
    if not math.isfinite(number):
        assert back == 0.0


def test_outside_the_range():
    assert Byte().decode(Byte().encode(1e-30)) == LEVEL[1]
    assert Byte().decode(Byte().encode(-1e30)) == -LEVEL[127]
    assert Byte().decode(b"\x80") == 0.0  # a code that nobody of ours sends
    assert Float32().decode(struct.pack("<f", math.inf)) == 0.0
    assert Float32().encode(1e300) == struct.pack("<f", 0.0)


@pytest.mark.parametrize("number", [1.0, 0.97, -3.21, 1e-4, 2e-5, 700.0, LEVEL[64], -LEVEL[3]])
def test_stochastic_rounding_is_unbiased(number):
    """Over equally spaced draws the mean of the decoded numbers is the number."""
    draws = [(i + 0.5) / 4000 for i in range(4000)]
    mean = sum(WIRES["byte-stochastic"].decode(WIRES["byte-stochastic"].encode(number, d)) for d in draws) / 4000
    assert mean == pytest.approx(number, rel=1e-3, abs=LEVEL[1] / 4000)


def test_decode_all():
    codes = b"".join(Byte().encode(x) for x in (1.0, -2.0, 0.0))
    assert Byte().decode_all(codes) == [LEVEL[64], -LEVEL[70], 0.0]
