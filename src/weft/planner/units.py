"""Numbers with units, for people."""

from __future__ import annotations

__all__ = ["count", "nbytes", "percent", "seconds"]


def seconds(value: float) -> str:
    """
    >>> seconds(0.01234), seconds(2.5e-5), seconds(75.0)
    ('12.3 ms', '25 us', '75 s')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return "0 s" if value == 0 else f"{value:.2g} s"


def nbytes(value: float) -> str:
    """
    >>> nbytes(3 * 2**30), nbytes(1536), nbytes(10)
    ('3 GiB', '1.5 KiB', '10 B')
    """
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """
    >>> count(124_000_000), count(512)
    ('124M', '512')
    """
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.1f} %"
