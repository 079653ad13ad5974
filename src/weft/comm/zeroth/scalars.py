"""How one number, a gradient projected on a known direction, goes over the wire.

    byte      c = sign(g) clamp(round(8 ln|g|) + 64, 1, 127), and 0 for g = 0;  decoded sign(c) e^((|c| - 64) / 8)   `Byte`
    float32   the number itself, four bytes, little end first                                                        `Float32`

A byte holds magnitudes e^-7.875 .. e^7.875 (3.8e-4 to 2.6e3) with a relative error of at most e^(1/16) - 1 = 6.45 %. Smaller
numbers than that become the smallest level, larger ones the largest. With `stochastic`, a level or its neighbour is drawn so
that the decoded number is right on average (below the range: the smallest level or 0; above it cannot be). What is not finite
is sent as 0, which moves nobody. Decoded levels come from a table computed in decimal arithmetic, since two machines' exp
may differ in the last bit and their parameters with it.

Source     Zelikman et al., arXiv:2306.10015, whose form (16 ln|g| in -127..127 and a sign) needs nine bits; this one is ours.
"""

from __future__ import annotations

import abc
import decimal
import math
import struct
from dataclasses import dataclass
from typing import final

__all__ = ["WIRES", "Byte", "Float32", "Wire"]


def _levels() -> tuple[float, ...]:
    with decimal.localcontext() as context:
        context.prec = 40
        return (0.0, *(float((decimal.Decimal(code - 64) / 8).exp()) for code in range(1, 128)))


LEVEL = _levels()  # LEVEL[|c|]


class Wire(abc.ABC):
    """A code for one number. Holds options, never state."""

    nbytes: int  # of one code

    @abc.abstractmethod
    def encode(self, number: float, draw: float = 0.5) -> bytes:
        """The code of `number`, of `nbytes` bytes; `draw`, uniform in [0, 1), decides where rounding is stochastic."""

    @abc.abstractmethod
    def decode(self, code: bytes) -> float:
        """The number of one code; always finite."""

    def decode_all(self, codes: bytes) -> list[float]:
        """The numbers of codes written one after the other."""
        return [self.decode(codes[at : at + self.nbytes]) for at in range(0, len(codes), self.nbytes)]


@final
@dataclass(frozen=True)
class Byte(Wire):
    """One signed byte: sign and logarithm. `stochastic` rounds without bias inside the range."""

    stochastic: bool = False
    nbytes = 1

    def encode(self, number: float, draw: float = 0.5) -> bytes:
        size = abs(number)
        if not math.isfinite(number) or size == 0:
            return b"\0"
        if self.stochastic:
            upper = min(max(math.ceil(8 * math.log(size) + 64), 1), 127)
            below, above = LEVEL[upper - 1], LEVEL[upper]
            code = upper if (size - below) > draw * (above - below) else upper - 1
        else:
            code = min(max(round(8 * math.log(size)) + 64, 1), 127)
        return struct.pack("<b", -code if number < 0 else code)

    def decode(self, code: bytes) -> float:
        (signed,) = struct.unpack("<b", code)
        if signed == -128:  # no code of ours; 127 would invent a number
            return 0.0
        return -LEVEL[-signed] if signed < 0 else LEVEL[signed]


@final
@dataclass(frozen=True)
class Float32(Wire):
    """The number in single precision."""

    nbytes = 4

    def encode(self, number: float, draw: float = 0.5) -> bytes:
        try:
            return struct.pack("<f", number if math.isfinite(number) else 0.0)
        except OverflowError:  # finite, but not in single precision
            return struct.pack("<f", 0.0)

    def decode(self, code: bytes) -> float:
        (number,) = struct.unpack("<f", code)
        return number if math.isfinite(number) else 0.0


WIRES: dict[str, Wire] = {"byte": Byte(), "byte-stochastic": Byte(stochastic=True), "float32": Float32()}
