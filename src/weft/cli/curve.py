"""A loss curve as an SVG file, in a few lines and without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["curve_svg", "smooth", "ticks"]

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 46, 44


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high.

    >>> ticks(0.0, 9.5)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


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
    low, high = min(losses), max(losses)
    pad = (high - low) * 0.05 or max(abs(high), 1e-9) * 0.05
    low, high = low - pad, high + pad
    last = max(len(losses), 2)
    x = lambda step: LEFT + (step - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)
    y = lambda loss: TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)
    path = lambda values: " ".join(f"{x(step):.1f},{y(loss):.2f}" for step, loss in enumerate(values, 1))
    text = lambda at_x, at_y, words, more="": f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{escape(words)}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title, quote=True)}" font-family="system-ui, sans-serif" font-size="12" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 20, title, 'font-size="15" font-weight="600" fill="#111"'),
        text(LEFT, 37, subtitle),
    ]
    for tick in ticks(low, high):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e5e5e5"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    for tick in ticks(1, last, 8):
        if tick >= 1 and tick == int(tick):
            parts.append(text(x(tick), HEIGHT - BOTTOM + 18, f"{int(tick)}", 'text-anchor="middle"'))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step", 'text-anchor="middle"'))
    parts.append(
        text(14, (TOP + HEIGHT - BOTTOM) / 2, "loss", f'text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})"')
    )
    parts.append(f'<polyline points="{path(losses)}" fill="none" stroke="#c3c8cf" stroke-width="1"/>')
    parts.append(f'<polyline points="{path(smooth(losses))}" fill="none" stroke="#2563a8" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])
