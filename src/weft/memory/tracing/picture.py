"""A step's memory to look at: one self-contained HTML page, no network, light and dark.

tiles      peak, what is always there, time                                           `_tiles`
memory     live bytes over the step by category; the plan's curve and its budget      `_chart`
tensors    the largest at the peak, by module path                                    `_largest`
modules    bytes of activations at the peak by module                                 `_modules`
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log
from pathlib import Path
from typing import Any

from weft.memory.planning.check import check
from weft.memory.record import Trace
from weft.memory.schedule import Schedule
from weft.memory.tracing.moments import (
    LAYERS,
    by_category,
    curves,
    described,
    held_at,
    in_words,
    mebibytes,
    peak_operator,
)
from weft.pages import document, legend, tiles
from weft.paths import to_file

__all__ = ["page", "show"]

COLOURS = dict(zip(LAYERS, ("c0", "c4", "c5", "c2", "c6", "c1", "c3"), strict=True))
WIDTH, HEIGHT, LEFT = 960.0, 340.0, 80.0
POINTS = 1200  # columns of the chart: more operators than that share columns, which show their largest

STYLE = """
.plan { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.budget { stroke: var(--bad); stroke-width: 1.6; stroke-dasharray: 6 4; }
.hint { fill: transparent; } .hint:hover { fill: var(--ink); fill-opacity: 0.12; }
i.planned { background: var(--ink); } i.limit { background: var(--bad); }
"""


def show(trace: Trace, path: str | Path, plan: Any = None) -> Path:
    """Write the page to a file and return its path.

    Args:
        trace: the step.
        path: of the HTML file.
        plan: a `MemoryPlan` of this trace, or a `Schedule`: its bytes are drawn as a line, its budget as another.
    Raises:
        ValueError: the plan is not of this trace, or nothing can be written there: no such folder, say.
    """
    path = Path(path)
    to_file("trace.show:", path)
    path.write_text(page(trace, plan), encoding="utf-8")
    return path


def page(trace: Trace, plan: Any = None) -> str:
    """The page as HTML text."""
    title = f"memory of one step: {trace.model or 'a model'} on {trace.device}"
    checked, budget = _judged(trace, plan)
    body = [
        f"<p>{len(trace.ops)} operators; times are {'measured' if trace.measured else 'from the rates of the device'}. "
        f"{escape(' '.join(note + '.' for note in trace.notes))}</p>",
        _tiles(trace, checked, budget),
        _chart(trace, None if checked is None else checked.live, budget),
        _modules(trace),
        _largest(trace),
    ]
    return document(title, body, STYLE)


def _judged(trace: Trace, plan: Any) -> tuple[Any, int]:
    """What a plan costs, None without one, and its budget in bytes, 0 if it has none."""
    if plan is None:
        return None, 0
    if isinstance(plan, Schedule):
        return check(trace, plan), 0
    # What is planned is the step that runs.
    step = trace.as_run if getattr(plan, "trace", None) == trace.as_run else trace
    return check(step, plan.schedule, getattr(plan, "tier", None)), int(getattr(plan, "budget", 0) or 0)


def _tiles(trace: Trace, checked: Any, budget: int) -> str:
    rows = [("peak, executed eagerly", mebibytes(trace.peak)), ("there all the time", mebibytes(trace.fixed))]
    if checked is not None:
        rows.append(("peak of the plan", mebibytes(checked.peak)))
    if budget:
        rows.append(("budget", mebibytes(budget)))
    if trace.seconds:
        rows.append(("one step", in_words(trace.seconds)))
    if checked is not None:
        rows.append(("slower with the plan", f"{100 * checked.overhead:.1f} %"))
    return tiles(rows)


def _chart(trace: Trace, planned: Sequence[int] | None, budget: int) -> str:
    """Areas stacked by category over the operators, each as wide as it takes."""
    if not trace.ops:
        return ""
    layers = curves(trace)
    columns = _columns(trace)
    top = 1.05 * max(trace.peak, budget, max(planned or (0,)))
    below = [0.0] * len(columns)
    shapes = []
    # A column of several operators shows the one at which most is live, in all its parts: they add up to what was there.
    chosen = [max(range(first, last), key=lambda i: trace.live[i]) for first, last, _, _ in columns]
    for name in (name for name in LAYERS if name in layers):
        above = [b + layers[name][i] for b, i in zip(below, chosen, strict=True)]
        shapes.append(f'<path class="{COLOURS[name]}" d="{_area(columns, below, above, top)}"/>')
        below = above
    colours = {name: COLOURS[name] for name in LAYERS if name in layers}
    if planned is not None:
        most = [max(planned[first:last]) for first, last, _, _ in columns]
        shapes.append(f'<path class="plan" d="{_line(columns, most, top)}"/>')
        colours["with the plan"] = "planned"
    if budget:
        y = _y(budget, top)
        shapes.append(f'<line class="budget" x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}"/>')
        colours["budget"] = "limit"
    above_all = f"{_phases(trace, columns)}{_hints(trace, columns, chosen)}"
    return (
        "<section><h2>Live bytes over the step</h2>"
        "<p>While each operator runs: what it reads, what it makes, what waits to be read.</p>"
        f'{legend(colours)}<svg viewBox="0 0 {LEFT + WIDTH + 10:.0f} {HEIGHT + 34:.0f}" role="img" '
        f'aria-label="live bytes over the step">{_ticks(top)}{"".join(shapes)}{above_all}</svg></section>'
    )


def _columns(trace: Trace) -> list[tuple[int, int, float, float]]:
    """(first operator, end, left, right) of each column, in pixels; as wide as their operators take, or all alike."""
    weights = [op.seconds for op in trace.ops]
    total = sum(weights)
    # Half of the width by time, half shared evenly, so that cheap operators with large results stay visible.
    even = 1.0 / len(weights)
    weights = [0.5 * w / total + 0.5 * even if total > 0 else even for w in weights]
    columns: list[tuple[int, int, float, float]] = []
    least, x, start, first = WIDTH / POINTS, LEFT, LEFT, 0
    for index, weight in enumerate(weights):
        x += WIDTH * weight
        if x - start >= least or index + 1 == len(weights):
            columns.append((first, index + 1, start, x))
            first, start = index + 1, x
    return columns


def _y(nbytes: float, top: float) -> float:
    return HEIGHT * (1 - nbytes / top) + 8 if top else HEIGHT


def _line(columns: Sequence[tuple[int, int, float, float]], values: Sequence[float], top: float) -> str:
    steps = [
        f"{left:.1f},{_y(v, top):.1f} {right:.1f},{_y(v, top):.1f}"
        for (_, _, left, right), v in zip(columns, values, strict=True)
    ]
    return "M" + " L".join(steps)


def _area(
    columns: Sequence[tuple[int, int, float, float]], below: Sequence[float], above: Sequence[float], top: float
) -> str:
    upper = _line(columns, above, top)
    back = [(right, left, v) for (_, _, left, right), v in zip(columns, below, strict=True)]
    lower = " ".join(f"L{a:.1f},{_y(v, top):.1f} {b:.1f},{_y(v, top):.1f}" for a, b, v in reversed(back))
    return f"{upper} {lower} Z"


def _ticks(top: float) -> str:
    """Horizontal lines at round numbers of bytes, three to six of them."""
    unit = 1024 ** int(log(max(top, 1), 1024))
    step = next((unit * n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if top <= 6 * unit * n), top / 3)
    found, at = [], 0.0
    while at <= top:
        y = _y(at, top)
        found.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mebibytes(at) if at else "0"}</text>'
        )
        at += step
    return "".join(found)


def _hints(trace: Trace, columns: Sequence[tuple[int, int, float, float]], chosen: Sequence[int]) -> str:
    """What runs in each column, said when the pointer rests on it."""
    return "".join(
        f'<rect class="hint" x="{left:.1f}" y="8" width="{right - left:.1f}" height="{HEIGHT:.0f}"><title>'
        f"{index}: {escape(trace.ops[index].name)} in {escape(trace.ops[index].module or '(model)')}, "
        f"{mebibytes(trace.live[index])}</title></rect>"
        for (_, _, left, right), index in zip(columns, chosen, strict=True)
    )


def _phases(trace: Trace, columns: Sequence[tuple[int, int, float, float]]) -> str:
    """Names of the phases below the axis, a tick where each begins."""
    found, seen = [], ""
    for first, _, left, _ in columns:
        phase = trace.ops[first].phase
        if phase != seen:
            found.append(
                f'<line x1="{left:.1f}" y1="8" x2="{left:.1f}" y2="{HEIGHT + 14:.0f}" stroke="var(--line)"/>'
                f'<text x="{left + 4:.1f}" y="{HEIGHT + 28:.0f}">{phase}</text>'
            )
            seen = phase
    return "".join(found)


def _bar(share: float, colour: str) -> str:
    return f'<div class="bar"><i class="{colour}" style="width:{100 * share:.1f}%"></i></div>'


def _modules(trace: Trace, most: int = 24) -> str:
    """Activations at the peak by module path; modules beyond the first `most` are summed up."""
    totals: dict[str, int] = {}
    for value in held_at(trace, peak_operator(trace)):
        if value.category == "activation":
            totals[value.name or "(model)"] = totals.get(value.name or "(model)", 0) + value.nbytes
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    rest = sum(nbytes for _, nbytes in ranked[most:])
    rows = ranked[:most] + ([(f"{len(ranked) - most} others", rest)] if rest else [])
    largest = max((nbytes for _, nbytes in rows), default=0) or 1
    lines = [
        f'<tr><td class="mono">{escape(name)}</td><td>{_bar(nbytes / largest, COLOURS["activation"])}</td>'
        f'<td class="n">{mebibytes(nbytes)}</td></tr>'
        for name, nbytes in rows
    ]
    return (
        "<section><h2>Activations at the peak, by module</h2><p>What a plan can drop, rebuild or move away.</p>"
        f'<div class="scroll"><table>{"".join(lines)}</table></div></section>'
    )


def _largest(trace: Trace, most: int = 20) -> str:
    at = peak_operator(trace)
    held = held_at(trace, at)
    parts = ", ".join(f"{name} {mebibytes(nbytes)}" for name, nbytes in by_category(trace, at).items())
    lines = [
        f'<tr><td class="n">{mebibytes(v.nbytes)}</td><td>{v.category}</td><td class="mono">{escape(described(trace, v))}</td>'
        f"<td>{_life(trace, v.born, v.dies)}</td></tr>"
        for v in held[:most]
    ]
    where = f"operator {at}, {trace.ops[at].name} in {trace.ops[at].module or '(model)'}" if trace.ops else ""
    return (
        f"<section><h2>Largest tensors at the peak</h2><p>At {escape(where)}: {parts}.</p>"
        '<div class="scroll"><table><tr><th class="n">bytes</th><th>category</th><th>made by</th><th>operators</th></tr>'
        f"{''.join(lines)}</table></div></section>"
    )


def _life(trace: Trace, born: int, dies: int) -> str:
    start = "before" if born < 0 else str(born)
    return f"{start} to {'after' if dies >= len(trace.ops) else dies}"
