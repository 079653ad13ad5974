"""A plan in words: what `print(plan)` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weft.planner.coding import described
from weft.planner.price import Layer
from weft.planner.units import count, nbytes, percent, seconds

if TYPE_CHECKING:
    from weft.memory.planning.memory_plan import Part
    from weft.planner.plan import Alternative, Plan
    from weft.planner.squeeze import Squeeze

__all__ = ["again", "cut_words", "describe", "folded", "remedies", "storage_words"]

_SHOWN = 8  # alternatives


def describe(plan: Plan) -> str:
    """What was chosen and why, what it should cost, memory per device, layers by placement."""
    p, mesh = plan.prediction, plan.mesh
    shape = " x ".join(map(str, mesh.shape))
    weights = [w for w in mesh.weights if w]
    spent = f", in {seconds(plan.planning_seconds)}" if plan.planning_seconds else ""
    lines = [
        f"Plan for {mesh.size} devices ({_devices(plan)}), mesh {shape}"
        + (f", weights {'; '.join('/'.join(f'{x:g}' for x in w) for w in weights)}" if weights else ""),
        f"  found by    {plan.name}: {plan.method or 'given'}{spent}",
        f"  step        {seconds(p.seconds)}: compute {seconds(p.compute)}, communication that nothing hides "
        f"{seconds(p.exposed)} of {seconds(p.communication)}, {plan.optimizer.name} {seconds(p.update)}",
        f"  wire        {nbytes(p.nbytes)} per step over all links",
    ]
    if plan.exchange:
        lines.append(f"  exchange    gradients by {described(plan.exchange)}; give it to weft.run as well")
    if plan.lower_bound:
        bound = f"no plan can take less than {seconds(plan.lower_bound)}; this one is {percent(plan.gap)} above"
        lines.append(f"  bound       {bound}")
    lines += ["", "Memory per device"]
    lines += [f"  {line}" for line in _memory(plan)]
    lines += ["", "Layers"]
    lines += [f"  {line}" for line in _layers(plan)]
    if plan.alternatives:
        lines += ["", "Instead, priced by the same model"]
        lines += [f"  {line}" for line in _alternatives(plan)]
    return "\n".join(lines)


def _devices(plan: Plan) -> str:
    kinds: dict[str, int] = {}
    for rank in plan.mesh.ranks:
        kind = plan.cluster.devices[rank].kind
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def _memory(plan: Plan) -> list[str]:
    rows = []
    for m in plan.prediction.memory:
        whose = m.device if len(m.ranks) == 1 else f"{m.device} and {len(m.ranks) - 1} alike"
        parts = ", ".join(f"{name} {nbytes(value)}" for name, value in m.use.by_category().items() if value)
        verdict = "" if m.fits else "  DOES NOT FIT"
        rows.append(
            f"{whose}: {nbytes(m.use.peak)} of {nbytes(m.have)} ({percent(m.use.peak / m.have)}): {parts}{verdict}"
        )
        rows += [line for squeeze in plan.squeezes if squeeze.ranks == m.ranks for line in again(plan, squeeze)]
    return rows


def again(plan: Plan, squeeze: Squeeze) -> list[str]:
    """What devices compute again, and move away, to stay within their memory, and what that costs."""
    lines, whole = [], f"; would take {nbytes(squeeze.whole)} without, can do with {nbytes(squeeze.least)}"
    if squeeze.repeated:
        share = squeeze.seconds / max(plan.prediction.compute - squeeze.seconds, 1e-30)
        lines.append(
            f"  recomputes {squeeze.repeated} operators ({squeeze.operators} in forward): {seconds(squeeze.seconds)} a step, "
            f"+{percent(share)} compute{whole}"
        )
        lines += _parts(squeeze.parts)
        whole = ""
    if squeeze.tier is not None:
        lines.append(
            f"  offloads {nbytes(squeeze.moved)} to the {squeeze.tier.name}, at most {nbytes(squeeze.held)} at once: "
            f"{seconds(squeeze.waiting)} a step of waiting{whole}"
        )
        lines += _parts(squeeze.away)
    return lines


def _parts(parts: Sequence[Part]) -> list[str]:
    shown = parts[:_SHOWN]
    width = max((len(part.module) for part in shown), default=0)
    lines = [
        f"    {part.module:<{width}}  {seconds(part.seconds):>8}  {nbytes(part.nbytes):>9}  {part.what[:60]}"
        for part in shown
    ]
    left = len(parts) - len(shown)
    return [*lines, f"    and {left} more"] if left > 0 else lines


def remedies(repeated: float, waiting: float) -> str:
    """By what a plan was made to fit, and the seconds that it costs."""
    said = ((repeated, "recomputes"), (waiting, "waits for offload"))
    return ", ".join(f"{word} {seconds(cost)}" for cost, word in said if cost)


def folded(layers: Sequence[Layer]) -> list[tuple[str, int, Layer]]:
    """Layers with equal neighbours as one: (name, copies, the first of them)."""
    rows: list[tuple[str, int, Layer]] = []
    last = ""
    for layer in layers:
        if rows and _alike(rows[-1][2], layer) and _stem(rows[-1][2].name) == _stem(layer.name) != layer.name:
            first = rows[-1][2]
            rows[-1] = (f"{first.name} .. {layer.name.rpartition('.')[2]}", rows[-1][1] + 1, first)
        else:
            rows.append((layer.name, 1, layer))
        last = layer.name
    assert not layers or last == layers[-1].name
    return rows


def _stem(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return head if tail.isdigit() else name


def _alike(a: Layer, b: Layer) -> bool:
    if a.storage != b.storage or a.parameters != b.parameters or len(a.cuts) != len(b.cuts):
        return False
    near = lambda x, y: abs(x - y) <= 0.05 * max(x, y, 1e-12)
    return (
        near(a.compute, b.compute) and near(a.communication, b.communication) and cut_words(a.cuts) == cut_words(b.cuts)
    )


def cut_words(cuts: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Per mesh axis, what it cuts: roles with at least a tenth of the layer's compute, the largest first."""
    words = []
    for axis in cuts:
        total = sum(axis.values()) or 1.0
        large = sorted(((v / total, role) for role, v in axis.items() if v / total >= 0.1), reverse=True)
        words.append("+".join(role for _, role in large) or "-")
    return tuple(words)


def storage_words(storage: Mapping[str, int]) -> str:
    """How parameters are stored, the most of them first."""
    total = sum(storage.values()) or 1
    large = sorted(((n, mode) for mode, n in storage.items() if n / total >= 0.02), reverse=True)
    return "+".join(mode for _, mode in large) or "-"


def _layers(plan: Plan) -> list[str]:
    names = plan.mesh.names
    table = [("layer", "compute", "moved", *(f"{name} cuts" for name in names), "parameters", "stored")]
    for name, copies, layer in folded(plan.prediction.layers):
        if not layer.compute and not layer.parameters and not layer.nbytes:
            continue
        times = f" (x{copies})" if copies > 1 else ""
        stored = (count(layer.parameters), storage_words(layer.storage))
        table.append((name + times, seconds(layer.compute), nbytes(layer.nbytes), *cut_words(layer.cuts), *stored))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _alternatives(plan: Plan) -> list[str]:
    own = plan.prediction.seconds
    shown: Sequence[Alternative] = plan.alternatives[:_SHOWN]
    table = []
    for a in shown:
        mesh = "x".join(map(str, a.mesh))
        slower = f"{a.seconds / own:.2f} times" if own else ""
        fits = remedies(a.repeated, a.waiting) if a.fits else "does not fit"
        size = (f"{nbytes(a.nbytes)} moved", f"{nbytes(a.peak)} per device")
        table.append((a.name, f"on {mesh}", seconds(a.seconds), slower, *size, fits))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))] if table else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    left = len(plan.alternatives) - len(shown)
    return [*lines, f"and {left} more"] if left > 0 else lines
