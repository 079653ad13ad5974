"""Find the repeated blocks of a graph, so that later stages plan one copy for all.

Problem    calls c[0..n). A repeat (start s, length L, count k >= 2) claims that its k copies are equal up to names: call i of a
           copy and call i of the next have the same operator, constants, shapes and dtypes (equal labels), and operands that are
               both made at the same place of their own copy, or both at the same place of the copy before,
               or one value outside all copies (a mask), or parameters of their own with equal shapes.
           The first copy's "copy before" is outside: what it reads there may come from anywhere.
Method     for each L: maximal runs of label[i] == label[i + L]                                    `_runs`
           of each run, the start that gives most copies and passes fewest values between copies    `_best_start`
           then take repeats by calls saved, (k - 1) L, as long as they do not overlap              `find_repeats`
Guarantee  every repeat returned meets the claim (`_matches`), and nothing outside reads a copy but the last, so that
           copies can be exchanged; not the best possible cover. O(n^2) integer comparisons, and O(L^2) per run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from weft.graph.graph import Graph, Node, Ref, Repeat

__all__ = ["find_repeats"]

_SHORTEST = 3  # calls in a block; shorter repeats save nothing


def find_repeats(graph: Graph) -> tuple[Repeat, ...]:
    """Non-overlapping repeats of `graph.calls`, in order of their start."""
    wiring = _Wiring(graph)
    found: list[tuple[int, Repeat]] = []
    for length in range(_SHORTEST, wiring.count // 2 + 1):
        for first, last in _runs(wiring.labels, length):
            repeat = _best_start(wiring, first, last, length)
            if repeat is not None:
                found.append(((repeat.count - 1) * length, repeat))
    found.sort(key=lambda item: (-item[0], item[1].length, item[1].start))
    chosen: list[Repeat] = []
    for _, repeat in found:
        if all(_end(repeat) <= other.start or _end(other) <= repeat.start for other in chosen):
            chosen.append(repeat)
    return tuple(sorted(chosen, key=lambda repeat: repeat.start))


def _end(repeat: Repeat) -> int:
    return repeat.start + repeat.length * repeat.count


def _runs(labels: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Maximal ranges [first, last) in which every label equals the one `length` later; only those that hold a whole copy."""
    equal = labels[:-length] == labels[length:]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.view(np.int8), [0]))))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if last - first >= length:
            yield int(first), int(last)


def _best_start(wiring: _Wiring, first: int, last: int, length: int) -> Repeat | None:
    """The best repeat whose copies lie in calls [first, last + length): most copies, then fewest values carried over."""
    total = last + length - first
    for count in range(total // length, 1, -1):
        best: tuple[int, int] | None = None
        for start in range(first, first + total - count * length + 1):
            carried = _matches(wiring, start, length, count)
            if carried is not None and (best is None or carried < best[0]):
                best = carried, start
        if best is not None:
            return Repeat(best[1], length, count)
    return None


def _matches(wiring: _Wiring, start: int, length: int, count: int) -> int | None:
    """How many values each copy hands to the next if the copies are equal, else None."""
    end = start + length * count
    if (wiring.last_reader[start : end - length] >= end).any():
        return None  # something outside reads a copy that is not the last
    carried: dict[
        int, int
    ] = {}  # value made in the first copy and read by the second -> what the first reads in its place
    for i in range(start, end - length):
        low = start + (i - start) // length * length  # first call of i's copy
        for mine, next_one in zip(wiring.operands[i], wiring.operands[i + length], strict=True):
            made, made_next = mine // _OUTPUTS, next_one // _OUTPUTS
            if mine == next_one:
                if start <= made < end:
                    return None  # one copy's value read by all
            elif mine < 0 or next_one < 0:
                if not wiring.private(mine, low, low + length) or not wiring.private(
                    next_one, low + length, low + 2 * length
                ):
                    return None
            elif made >= start:
                if next_one != mine + length * _OUTPUTS or made < low - length:
                    return None
                if made < low:
                    carried.setdefault(mine, mine)
            elif not (
                low == start and start <= made_next < start + length and carried.setdefault(next_one, mine) == mine
            ):
                return None
    return len(carried)


_OUTPUTS = 1 << 10  # operand code of a call's output: call * _OUTPUTS + output; negative for what comes from outside


class _Wiring:
    """The graph's calls as integers: equal labels for calls that look alike, and codes for what they read."""

    def __init__(self, graph: Graph):
        calls = graph.calls
        self.count = len(calls)
        number = {node.name: i for i, node in enumerate(calls)}
        outside = {node.name: -1 - i for i, node in enumerate(node for node in graph.nodes if node.role != "call")}
        code = {name: i * _OUTPUTS for name, i in number.items()} | outside
        self.operands = [[code[ref.node] + ref.index for ref in node.inputs] for node in calls]
        known: dict[Any, int] = {}
        looks = {Ref(node.name, i): spec for node in calls for i, spec in enumerate(node.outputs)}
        looks |= {Ref(node.name): _outside_look(graph, node) for node in graph.nodes if node.role != "call"}
        self.labels = np.array([known.setdefault(_label(node, looks), len(known)) for node in calls], dtype=np.int64)
        self.last_reader = np.zeros(self.count, dtype=np.int64)
        self._readers: dict[int, tuple[int, int]] = {}
        for i, operands in enumerate(self.operands):
            for operand in operands:
                if operand >= 0:
                    self.last_reader[operand // _OUTPUTS] = i
                else:
                    self._readers[operand] = (self._readers.get(operand, (i, i))[0], i)
        if graph.loss.node in number:
            self.last_reader[number[graph.loss.node]] = self.count

    def private(self, operand: int, low: int, high: int) -> bool:
        """Whether a value from outside is read by calls [low, high) only."""
        first, last = self._readers.get(operand, (high, high))
        return operand < 0 and low <= first and last < high


def _outside_look(graph: Graph, node: Node) -> Any:
    """What two values from outside must share to be exchangeable; constants also their numbers."""
    spec = node.outputs[0]
    if node.role == "constant":
        return "constant", spec, repr(graph.constants[node.target].reshape(-1)[:64].tolist())
    return (node.role, spec, node.name) if node.role == "input" else (node.role, spec)


def _label(node: Node, looks: dict[Ref, Any]) -> Any:
    """All of a call but names: equal labels mean equal work."""
    return node.target, _frozen((node.args, dict(node.kwargs)), looks), node.outputs, len(node.mutates)


def _frozen(tree: Any, looks: dict[Ref, Any]) -> Any:
    """A hashable copy of arguments, with what a `Ref` stands for in its place; 1, 1.0 and True stay different."""
    if isinstance(tree, Ref):
        return "ref", tree.index, looks[tree]
    if isinstance(tree, (list, tuple)):
        return tuple([_frozen(item, looks) for item in tree])
    if isinstance(tree, dict):
        return tuple([(key, _frozen(value, looks)) for key, value in tree.items()])
    return (type(tree), repr(tree)) if isinstance(tree, (float, bool)) else tree
