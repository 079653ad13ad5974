"""What lies in memory at each moment of a trace, by category and by name; as numbers and as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from weft.memory.record import CATEGORIES, Trace, Value

__all__ = ["LAYERS", "by_category", "curves", "described", "held_at", "in_words", "mebibytes", "peak_operator", "table"]

LAYERS: tuple[str, ...] = (*CATEGORIES, "workspace")


def mebibytes(nbytes: float) -> str:
    """
    >>> mebibytes(3 * 2**20), mebibytes(10), mebibytes(5 * 2**30)
    ('3.0 MiB', '10 B', '5.00 GiB')
    """
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:,.2f} GiB"
    if nbytes >= 2**20:
        return f"{nbytes / 2**20:,.1f} MiB"
    return f"{nbytes / 2**10:,.1f} KiB" if nbytes >= 2**10 else f"{nbytes:.0f} B"


def peak_operator(trace: Trace) -> int:
    """Index of the operator while which most bytes are live; -1 for a trace without operators."""
    return max(range(len(trace.ops)), key=lambda i: trace.live[i], default=-1)


def held_at(trace: Trace, index: int) -> list[Value]:
    """The values live while an operator runs, largest first; of an overwritten storage the one that the operator makes."""
    found: dict[int, Value] = {}
    for value in trace.values:
        if value.born <= index <= value.dies:
            found[value.storage] = value
    return sorted(found.values(), key=lambda value: -value.nbytes)


def by_category(trace: Trace, index: int) -> dict[str, int]:
    """Bytes live while an operator runs, by category, "workspace" among them; only what is not zero."""
    found = dict.fromkeys(LAYERS, 0)
    for value in held_at(trace, index):
        found[value.category] += value.nbytes
    if 0 <= index < len(trace.ops):
        found["workspace"] = trace.ops[index].workspace
    return {name: nbytes for name, nbytes in found.items() if nbytes}


def curves(trace: Trace) -> dict[str, list[int]]:
    """Live bytes while each operator runs, for each category and "workspace"; they add up to `Trace.live`."""
    end = len(trace.ops)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    kind: dict[int, tuple[str, int]] = {}
    for value in trace.values:
        first[value.storage] = min(first.get(value.storage, end), max(value.born, 0))
        last[value.storage] = max(last.get(value.storage, -1), min(value.dies, end))
        kind[value.storage] = (value.category, value.nbytes)
    change: dict[str, list[int]] = {name: [0] * (end + 2) for name in CATEGORIES}
    for storage, (category, nbytes) in kind.items():
        change[category][first[storage]] += nbytes
        change[category][last[storage] + 1] -= nbytes
    result = {name: _running(steps)[:end] for name, steps in change.items()}
    result["workspace"] = [op.workspace for op in trace.ops]
    return {name: values for name, values in result.items() if any(values)}


def _running(steps: Sequence[int]) -> list[int]:
    total, found = 0, []
    for step in steps:
        total += step
        found.append(total)
    return found


def described(trace: Trace, value: Value) -> str:
    """Where a value comes from, for people: `h.3.mlp: gelu.default`, the name of a parameter, `batch labels`."""
    if value.category == "input":
        return f"batch {value.name}" if value.name else "given from outside"
    if value.born < 0 or value.category in ("parameter", "buffer", "optimizer"):
        return value.name or "unnamed"
    made = trace.ops[value.born]
    return f"{value.name or '(model)'}: {made.name.removeprefix('aten.')}" + (
        " in backward" if made.phase == "backward" else ""
    )


def table(trace: Trace, rows: int = 12) -> str:
    """The trace in words and figures: peak, where it is, what lies there by category, and the largest tensors."""
    if not trace.ops:
        return f"Trace of {trace.model or 'a step'}: no operators, {mebibytes(trace.fixed)}"
    at = peak_operator(trace)
    op = trace.ops[at]
    counts = {phase: sum(o.phase == phase for o in trace.ops) for phase in ("forward", "backward", "optimizer")}
    phases = ", ".join(f"{count} {phase}" for phase, count in counts.items() if count)
    lines = [
        f"{trace.model or 'step'} on {trace.device}: {len(trace.ops)} operators ({phases}), {in_words(trace.seconds)} "
        f"({'measured' if trace.measured else 'from rates'})",
        f"peak {mebibytes(trace.peak)} at operator {at}, {op.name} in {op.module or '(model)'} ({op.phase}); "
        f"{mebibytes(trace.fixed)} are there all the time",
        "",
        "at the peak",
    ]
    for name, nbytes in sorted(by_category(trace, at).items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<12}{mebibytes(nbytes):>12}  {100 * nbytes / trace.peak:5.1f} %")
    held = held_at(trace, at)
    lines += ["", f"largest of {len(held)} tensors there"]
    for (nbytes, category, what), count in list(
        Counter((v.nbytes, v.category, described(trace, v)) for v in held).items()
    )[:rows]:
        times = f"  x {count}" if count > 1 else ""
        lines.append(f"  {mebibytes(nbytes):>12}  {category:<11}{what}{times}")
    return "\n".join([*lines, *(f"note: {note}" for note in trace.notes)])


def in_words(seconds: float) -> str:
    """
    >>> in_words(1.5), in_words(0.0123), in_words(2e-5)
    ('1.5 s', '12.3 ms', '0.02 ms')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
