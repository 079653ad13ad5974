"""A plan to look at: one self-contained HTML page, no network, light and dark.

tiles           the numbers that decide                                `_tiles`
layers          what cuts each layer, seconds, bytes moved; equal neighbours folded                   `_layers`
memory          per class of devices, by category, against what it has                               `_memory`
timeline        compute and communication of one step                                                `_timeline`
alternatives    what else was priced                                                                 `_alternatives`
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from weft.pages import document, legend, tiles
from weft.planner.coding import described
from weft.planner.memory import CATEGORIES
from weft.planner.price import Event, Prediction
from weft.planner.text import again, folded, remedies, storage_words
from weft.planner.units import count, nbytes, percent, seconds

if TYPE_CHECKING:
    from weft.planner.plan import Plan

__all__ = ["page"]

ROLES = {"batch": "c1", "sequence": "c2", "tensor": "c3", "whole": "c0"}
MEMORY = dict(zip(CATEGORIES, ("c1", "c2", "c3", "c4", "c5"), strict=True))
EVENTS = {
    "forward": "c1", "backward": "c6", "update": "c0", "activations": "c3", "gather parameters": "c2", "scatter gradients": "c4",
    "sum gradients": "c5", "recompute": "c7", "offload": "c4", "code gradients": "c3", "exchange gradients": "c5",
}  # fmt: skip

STYLE = """
tr.own td { font-weight: 600; } .bar { width: 150px; gap: 2px; } .wide { width: 100%; height: 18px; }
"""


def page(plan: Plan) -> str:
    """The page as HTML text."""
    mesh = " x ".join(map(str, plan.mesh.shape))
    title = f"weft plan: {plan.mesh.size} devices, mesh {mesh}"
    sent = f"Gradients by {described(plan.exchange)}. " if plan.exchange else ""
    body = [
        f"<p>{escape(plan.name)}: {escape(plan.method or 'given')}. Cluster {escape(plan.cluster.name)}. {escape(sent)}"
        "Figures are predictions of the cost model.</p>",
        _tiles(plan),
        _layers(plan),
        _memory(plan),
        _timeline(plan.prediction),
        _alternatives(plan),
    ]
    return document(title, body, STYLE)


def _tiles(plan: Plan) -> str:
    p = plan.prediction
    fullest = max(p.memory, key=lambda m: m.use.peak / m.have)
    rows = [
        ("predicted step", seconds(p.seconds)),
        ("compute", seconds(p.compute)),
        ("communication not hidden", f"{seconds(p.exposed)} of {seconds(p.communication)}"),
        ("on the wire per step", nbytes(p.nbytes)),
        (f"memory on the fullest device, of {nbytes(fullest.have)}", nbytes(fullest.use.peak)),
    ]
    if plan.lower_bound:
        rows.append((f"above the lower bound of {seconds(plan.lower_bound)}", percent(plan.gap)))
    return tiles(rows)


def _bar(parts: Sequence[tuple[str, float, str]], css: str = "bar", style: str = "") -> str:
    """Parts (name, share of the whole, colour) side by side."""
    cells = "".join(
        f'<i class="{colour}" style="width:{100 * share:.2f}%" title="{escape(name)}"></i>'
        for name, share, colour in parts
        if share > 0
    )
    return f'<div class="{css}"{f" style={style}" if style else ""}>{cells}</div>'


def _layers(plan: Plan) -> str:
    rows = [row for row in folded(plan.prediction.layers) if row[2].compute or row[2].parameters or row[2].nbytes]
    slowest = max((layer.compute + layer.communication for _, _, layer in rows), default=0.0) or 1.0
    used = [role for role in ROLES if any(role in cut for _, _, layer in rows for cut in layer.cuts)]
    axes = zip(plan.mesh.names, plan.mesh.shape, strict=True)
    head = "".join(f"<th>axis {escape(name)} ({size}) cuts</th>" for name, size in axes)
    lines = []
    for name, copies, layer in rows:
        bars = ""
        for cut in layer.cuts:
            total = sum(cut.values()) or 1.0
            shares = {role: cut.get(role, 0.0) / total for role in used}
            parts = [(f"{role}: {percent(share)} of compute", share, ROLES[role]) for role, share in shares.items()]
            bars += f"<td>{_bar(parts)}</td>"
        span = layer.compute + layer.communication
        waits = f"communication {seconds(layer.communication)}"
        time = _bar(
            [
                (f"compute {seconds(layer.compute)}", layer.compute / slowest, "c1"),
                (waits, layer.communication / slowest, "c3"),
            ]
        )
        times = f" x {copies}" if copies > 1 else ""
        lines.append(
            f'<tr><td class="mono">{escape(name)}{times}</td>{bars}<td>{time}</td><td class="n">{seconds(span)}</td>'
            f'<td class="n">{nbytes(layer.nbytes)}</td><td class="n">{count(layer.parameters)}</td>'
            f"<td>{escape(storage_words(layer.storage))}</td></tr>"
        )
    return (
        "<section><h2>Layers by placement</h2>"
        "<p>What each mesh axis cuts, by share of the layer's compute; equal neighbours are folded.</p>"
        f"{legend({role: ROLES[role] for role in used})}"
        f'<div class="scroll"><table><tr><th>layer</th>{head}<th>compute, waiting for activations</th>'
        '<th class="n">seconds</th><th class="n">bytes moved</th><th class="n">parameters</th><th>stored</th></tr>'
        f"{''.join(lines)}</table></div></section>"
    )


def _memory(plan: Plan) -> str:
    prediction = plan.prediction
    top = max(max(m.have, m.use.peak) for m in prediction.memory)
    lines = []
    for m in prediction.memory:
        full = max(m.have, m.use.peak)
        parts = [
            (f"{name}: {nbytes(value)}", value / full, MEMORY[name]) for name, value in m.use.by_category().items()
        ]
        free = max(0.0, m.have - m.use.peak)
        whose = m.device if len(m.ranks) == 1 else f"{m.device} and {len(m.ranks) - 1} alike"
        verdict = "" if m.fits else ' <b class="bad">does not fit</b>'
        detail = ", ".join(f"{name} {nbytes(value)}" for name, value in m.use.by_category().items() if value)
        bar = _bar(parts, "bar wide", f"width:{100 * full / top:.1f}%")
        lines.append(
            f'<tr><td>{escape(whose)}</td><td style="width:45%">{bar}</td>'
            f'<td class="n">{nbytes(m.use.peak)} of {nbytes(m.have)}, {nbytes(free)} free{verdict}</td></tr>'
            f'<tr><td></td><td colspan="2"><span class="legend">{escape(detail)}</span></td></tr>'
        )
        lines += [
            f'<tr><td></td><td colspan="2"><span class="mono">{escape(line.strip())}</span></td></tr>'
            for squeeze in plan.squeezes
            if squeeze.ranks == m.ranks
            for line in again(plan, squeeze)
        ]
    return (
        f"<section><h2>Memory at the peak</h2><p>A bar is as long as what the device has, the longest {nbytes(top)}.</p>"
        f'{legend(MEMORY)}<div class="scroll"><table>{"".join(lines)}</table></div></section>'
    )


def _timeline(prediction: Prediction) -> str:
    if not prediction.timeline or prediction.seconds <= 0:
        return ""
    left, width, height = 110.0, 960.0, 30.0
    scale = width / prediction.seconds
    lanes = ("compute", "communication")
    kinds = [kind for kind in EVENTS if any(event.kind == kind for event in prediction.timeline)]
    shapes = [
        _event(event, left + event.start * scale, 10 + 42 * lanes.index(event.lane), scale, height)
        for event in prediction.timeline
    ]
    names = [f'<text x="0" y="{30 + 42 * n}">{lane}</text>' for n, lane in enumerate(lanes)]
    ticks = []
    for n in range(6):
        x = left + width * n / 5
        anchor = "end" if n == 5 else "middle" if n else "start"
        ticks.append(
            f'<line x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="88" stroke="var(--line)"/>'
            f'<text x="{x:.1f}" y="104" text-anchor="{anchor}">{seconds(prediction.seconds * n / 5)}</text>'
        )
    return (
        "<section><h2>Timeline of one step</h2>"
        "<p>The slowest device: communication beside compute hides behind it; activations are waited for.</p>"
        f"{legend({kind: EVENTS[kind] for kind in kinds})}"
        f'<svg viewBox="0 0 {left + width + 10:.0f} 112" role="img" aria-label="timeline">'
        f"{''.join([*ticks, *shapes, *names])}</svg></section>"
    )


def _event(event: Event, x: float, y: float, scale: float, height: float) -> str:
    width = max(0.4, (event.stop - event.start) * scale - 0.5)
    words = f"{event.kind}, {event.label}: {seconds(event.stop - event.start)} from {seconds(event.start)}"
    return (
        f'<rect class="{EVENTS.get(event.kind, "c0")}" x="{x:.2f}" y="{y:.0f}" width="{width:.2f}" height="{height:.0f}">'
        f"<title>{escape(words)}</title></rect>"
    )


def _alternatives(plan: Plan) -> str:
    p = plan.prediction
    mine = remedies(max((squeeze.seconds for squeeze in plan.squeezes), default=0.0), p.waiting)
    rows = [(plan.name, plan.mesh.shape, p.seconds, p.exposed, p.nbytes, p.peak, p.fits, mine, True)]
    rows += [
        (a.name, a.mesh, a.seconds, a.exposed, a.nbytes, a.peak, a.fits, remedies(a.repeated, a.waiting), False)
        for a in plan.alternatives
    ]
    slowest = max(row[2] for row in rows) or 1.0
    lines = []
    for name, mesh, time, exposed, moved, peak, fits, squeezed, own in rows:
        verdict = squeezed if fits else "<span class=bad>does not fit</span>"
        bar = _bar([(seconds(time), time / slowest, "c1" if own else "c0")])
        lines.append(
            f"<tr{' class=own' if own else ''}><td>{escape(name)}{' (this plan)' if own else ''}</td>"
            f'<td>{"x".join(map(str, mesh))}</td><td>{bar}</td><td class="n">{seconds(time)}</td>'
            f'<td class="n">{seconds(exposed)}</td><td class="n">{nbytes(moved)}</td><td class="n">{nbytes(peak)}</td>'
            f"<td>{verdict}</td></tr>"
        )
    return (
        "<section><h2>What else was priced</h2><p>By the same cost model; bars are step times.</p>"
        '<div class="scroll"><table><tr><th>plan</th><th>mesh</th><th></th><th class="n">step</th><th class="n">not hidden</th>'
        f'<th class="n">moved</th><th class="n">per device</th><th></th></tr>{"".join(lines)}</table></div></section>'
    )
