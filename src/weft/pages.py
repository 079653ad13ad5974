"""Pages to look at: self-contained HTML, no network, light and dark.

    document(title, [...])      head, style and parts of a page
    tiles([(name, value)])      the numbers that decide, large
    legend({name: colour})      what the colours c0 to c7 stand for
    chart([Line(points)])       lines over one axis, as an SVG file of its own

Names and values are escaped here; parts given to `document` are HTML already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["COLOURS", "Line", "chart", "document", "legend", "ticks", "tiles"]

COLOURS = (
    "#2563a8", "#c3592b", "#1b8a5a", "#8d5bd1", "#b98500", "#c7548c",
    "#3fa7c4", "#7a6a58", "#4c4c9d", "#86a33a", "#c4302b", "#555555",
)  # fmt: skip
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 46, 44
LEGEND = 190  # width of the names beside the plot

STYLE = """
:root { color-scheme: light dark; --surface: #fcfcfb; --page: #f4f4f1; --ink: #0b0b0b; --soft: #52514e; --line: #dddcd6;
  --c0: #b9b7af; --c1: #2a78d6; --c2: #1baf7a; --c3: #eb6834; --c4: #eda100; --c5: #8d5bd1; --c6: #17528f; --c7: #c2548c;
  --bad: #c4302b; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --page: #111110; --ink: #f5f5f3;
  --soft: #b3b1a9; --line: #3a3935; --c0: #62605a; --c1: #3987e5; --c2: #199e70; --c3: #d95926; --c4: #c98500; --c5: #9b72d9;
  --c6: #7db4f3; --c7: #e07fae; --bad: #ef6b66; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 4px; } p { margin: 0 0 12px; color: var(--soft); }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 18px 0 0; }
.tile { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; } .tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: middle; }
tr:last-child td { border-bottom: 0; } td.n, th.n { text-align: right; }
.bar { display: flex; height: 12px; width: 200px; border-radius: 4px; overflow: hidden; background: var(--page); }
.bar i { display: block; height: 100%; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 10px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.bad { color: var(--bad); } .mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
""" + "\n".join(f".c{n} {{ background: var(--c{n}); fill: var(--c{n}); }}" for n in range(8))


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The page as HTML text; its title is its first heading. `style`: CSS rules after the common ones."""
    name = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}{style}</style></head>"
        f"<body><main><h1>{name}</h1>{''.join(parts)}</main></body></html>\n"
    )


def tiles(rows: Iterable[tuple[str, str]]) -> str:
    """(what it is, its value as text) side by side."""
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in rows
    )
    return f'<div class="tiles">{cells}</div>'


def legend(colours: Mapping[str, str]) -> str:
    """Names beside their colours."""
    items = "".join(f'<span><i class="{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<div class="legend">{items}</div>'


@dataclass(frozen=True)
class Line:
    """A line of a chart: points (x, y), finite; lines without a name are not in the legend."""

    points: Sequence[tuple[float, float]]
    name: str = ""
    colour: str = COLOURS[0]
    width: float = 2


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high.

    >>> ticks(0.0, 9.5)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low
    if span < 1e-11:  # no two numbers of twelve decimals lie between them
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [
        value
        for power in powers
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if low <= math.log10(value) <= high
    ]


def chart(
    lines: Sequence[Line], title: str, subtitle: str = "", across: str = "step", up: str = "loss", log: bool = False
) -> str:
    """SVG text of lines over one axis.

    Args:
        lines: at least one point in all.
        title, subtitle: shown above the plot.
        across, up: what x and y are.
        log: y by its logarithm; all y > 0.
    Raises:
        ValueError: nothing to draw, or numbers that are not finite (or positive, for `log`).
    """
    points = [point for line in lines for point in line.points]
    if not points or not all(math.isfinite(x) and math.isfinite(y) and (y > 0 or not log) for x, y in points):
        raise ValueError("chart: needs at least one point, all finite, and above 0 on a logarithmic axis")
    level = math.log10 if log else float
    low, high = min(level(y) for _, y in points), max(level(y) for _, y in points)
    pad = (high - low) * 0.05 or max(abs(high), 1e-9) * 0.05
    low, high = low - pad, high + pad
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    named = [line for line in lines if line.name]
    right = WIDTH + (LEGEND if named else 0)
    at = lambda x: LEFT + (x - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)
    over = lambda y: TOP + (high - level(y)) / (high - low) * (HEIGHT - TOP - BOTTOM)
    text = lambda x, y, words, more="": f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {HEIGHT}" width="{right}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title, quote=True)}" font-family="system-ui, sans-serif" font-size="12" fill="#444">',
        f'<rect width="{right}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 20, title, 'font-size="15" font-weight="600" fill="#111"'),
        text(LEFT, 37, subtitle),
    ]
    for tick in _decades(low, high) if log else ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{over(tick):.1f}" y2="{over(tick):.1f}" stroke="#e5e5e5"/>'
        )
        parts.append(text(LEFT - 8, over(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    for tick in ticks(first, last, 8):
        if tick == int(tick):
            parts.append(text(at(tick), HEIGHT - BOTTOM + 18, f"{int(tick)}", 'text-anchor="middle"'))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across, 'text-anchor="middle"'))
    parts.append(
        text(14, (TOP + HEIGHT - BOTTOM) / 2, up, f'text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})"')
    )
    for line in lines:
        path = " ".join(f"{at(x):.1f},{over(y):.2f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="{line.width:g}"/>')
    for number, line in enumerate(named):
        below = TOP + 18 * number
        parts.append(f'<rect x="{WIDTH}" y="{below}" width="10" height="10" rx="2" fill="{line.colour}"/>')
        parts.append(text(WIDTH + 16, below + 9, line.name))
    return "\n".join([*parts, "</svg>", ""])
