"""A loss curve as an SVG file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weft.pages import Line, chart

__all__ = ["curve_svg", "smooth"]


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the bias towards its first value.

    >>> smooth([2.0, 2.0])
    [2.0, 2.0]
    """
    averaged, total, weight = [], 0.0, 0.0
    for item in values:
        total, weight = decay * total + (1 - decay) * item, decay * weight + (1 - decay)
        averaged.append(total / weight)
    return averaged


def curve_svg(losses: Sequence[float], title: str, subtitle: str = "") -> str:
    """SVG text of the loss (y) over steps (x, from 1), every step in grey and its moving average in colour.

    Args:
        losses: at least one finite number.
        title, subtitle: shown above the plot.
    Raises:
        ValueError: no loss, or one that is not finite.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise ValueError("curve_svg: needs at least one loss, all finite")
    raw, averaged = (list(enumerate(values, 1)) for values in (losses, smooth(losses)))
    return chart([Line(raw, colour="#c3c8cf", width=1), Line(averaged)], title, subtitle)
