"""A graph as text for people: one line per call, a repeated block printed once."""

from __future__ import annotations

from typing import Any

import torch

from weft.graph.graph import Graph, Node, Ref, Repeat, TensorSpec

__all__ = ["table"]

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "bool",
}  # fmt: skip
_WIDEST = 46  # characters of an argument list


def table(graph: Graph) -> str:
    """Header with totals, then `module, result = operator(arguments), shape, kind, FLOPs, bytes` per call.

    FLOPs and bytes are of forward and backward together. `[*12]` marks a block of which all 12 copies look alike.
    """
    rows: list[tuple[str, ...]] = [("module", "call", "result", "kind", "flops", "bytes")]
    rules: set[int] = set()
    starts = {repeat.start: repeat for repeat in graph.repeats}
    calls, position = graph.calls, 0
    while position < len(calls):
        repeat = starts.get(position) or Repeat(position, 1, 1)
        if repeat.count > 1:
            rules.add(len(rows))
            last = calls[repeat.start + repeat.length * (repeat.count - 1)].module
            rows.append(
                (
                    f"[*{repeat.count}]",
                    f"{repeat.length} calls, {repeat.count} times, the last in {last or 'the model'}",
                    "",
                    "",
                    "",
                    "",
                )
            )
        rows.extend(
            _row(graph, node, "| " if repeat.count > 1 else "") for node in calls[position : position + repeat.length]
        )
        position += repeat.length * repeat.count
    widths = [max(len(row[i]) for n, row in enumerate(rows) if n not in rules) for i in range(len(rows[0]))]
    lines = [_header(graph)]
    for n, row in enumerate(rows):
        if n in rules:
            lines.append(f"{row[0]} {row[1]}")
        else:
            aligned = [
                cell.rjust(w) if i > 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _header(graph: Graph) -> str:
    parameters = graph.of("parameter")
    count = sum(node.outputs[0].numel for node in parameters)
    flops = sum(node.cost.flops_forward + node.cost.flops_backward for node in graph.calls)
    inputs = ", ".join(f"{node.target} {_spec(node.outputs[0])}" for node in graph.of("input"))
    mode = "training" if graph.train else "evaluation"
    return (
        f"graph in {mode} mode: {len(graph.calls)} calls, {len(parameters)} parameters with {_si(count)} numbers, "
        f"{_si(flops, 'FLOP')} per step\nbatch: {inputs}"
    )


def _row(graph: Graph, node: Node, mark: str) -> tuple[str, ...]:
    cost = node.cost
    flops, nbytes = cost.flops_forward + cost.flops_backward, cost.bytes_forward + cost.bytes_backward
    values = [_argument(graph, item) for item in node.args] + [
        f"{name}={_argument(graph, item)}"
        for name, item in node.kwargs.items()
        if name not in ("device", "pin_memory", "layout")
    ]
    text = ", ".join(values)
    text = text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
    name = node.op if not node.mutates else f"{node.op}!"
    result = " ".join(_spec(spec) for spec in node.outputs[:3]) + (" ..." if len(node.outputs) > 3 else "")
    work = (_si(flops) if flops else "", _si(nbytes, "B") if nbytes else "")
    return (mark + node.module, f"{node.name} = {name}({text})", result, node.kind, *work)


def _argument(graph: Graph, item: Any) -> str:
    if isinstance(item, Ref):
        node = graph[item.node]
        return node.target if node.role != "call" else str(item)
    if isinstance(item, (list, tuple)):
        return f"[{', '.join(_argument(graph, value) for value in item)}]"
    if isinstance(item, float):
        return f"{item:g}"
    return str(item).removeprefix("torch.")


def _spec(spec: TensorSpec) -> str:
    return f"{_DTYPES.get(spec.dtype, str(spec.dtype).removeprefix('torch.'))}[{', '.join(map(str, spec.shape))}]"


def _si(number: float, unit: str = "") -> str:
    """A count with a decimal prefix and its unit: 1.23 M, 45 kB."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(number) >= 1000 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}{unit}".rstrip()
