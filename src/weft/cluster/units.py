"""Numbers with units, as people write them: `80 GiB`, `25 GB/s`, `200 Gbit/s`, `5 us`, `312 TFLOP/s`.

A plain number is in the base unit: bytes, bytes per second, seconds, FLOP/s. Units are case-sensitive where case matters
(`GB` is not `Gbit`); `k M G T P` are powers of 1000 and `Ki Mi Gi Ti Pi` powers of 1024.
"""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["DIMENSIONS", "nbytes_of", "quantity"]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}

_BYTES = {f"{prefix}B": factor for prefix, factor in {**_DECIMAL, **_BINARY}.items()}
_BYTES_PER_SECOND = {
    **{f"{unit}/s": factor for unit, factor in _BYTES.items()},
    **{f"{prefix}{bit}": factor / 8 for prefix, factor in _DECIMAL.items() for bit in ("bit/s", "bps")},
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_FLOPS = {f"{prefix}{unit}": factor for prefix, factor in _DECIMAL.items() for unit in ("FLOP/s", "FLOPS")}

# dimension -> (its units, example for errors)
DIMENSIONS: dict[str, tuple[dict[str, float], str]] = {
    "bytes": (_BYTES, "80 GiB"),
    "bytes per second": (_BYTES_PER_SECOND, "25 GB/s or 200 Gbit/s"),
    "seconds": (_SECONDS, "5 us"),
    "FLOP/s": (_FLOPS, "312 TFLOP/s"),
    "a plain number": ({}, "0.5"),
}

_FORM = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.?inf)\s*(\S.*?)?\s*")


def quantity(value: Any, dimension: str) -> float:
    """`value`, a number or text with a unit, in the base unit of `dimension` (a key of `DIMENSIONS`).

    Raises:
        ValueError: it is neither; the sentence says what would be right.

    >>> quantity("200 Gbit/s", "bytes per second")
    25000000000.0
    """
    units, example = DIMENSIONS[dimension]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    form = _FORM.fullmatch(value) if isinstance(value, str) else None
    if form is not None:
        number, unit = float(form[1].replace(".inf", "inf")), form[2]
        if unit is None:
            return number
        if unit in units:
            return number * units[unit]
        raise ValueError(f"{unit!r} in {value!r} is not a unit of {dimension}; write for example {example}")
    raise ValueError(f"must be {dimension}, for example {example}, got {value!r}")


def nbytes_of(size: Any, what: str, least: int = 1) -> int:
    """A size in bytes as people write it ("6GiB", "1.5 MB", 4096), rounded down. `what` it is, for errors.

    Raises:
        ValueError: it is no size, is not finite, or is below `least` bytes.

    >>> nbytes_of("1.5 KiB", "chunk")
    1536
    """
    try:
        found = quantity(size, "bytes")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not least <= found < math.inf:
        raise ValueError(f"{what}: must be at least {least} bytes and finite, for example 80 GiB, got {size!r}")
    return int(found)
