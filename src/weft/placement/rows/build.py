"""Tools to write operator rows with.

links from an einsum-like line                `axes`
links of the dims that shapes share           `broadcast`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from weft.graph.graph import Ref
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["axes", "broadcast", "dims_of", "is_tensor", "letters", "normal"]

LocalBuilder = Callable[[Local], Callable[..., Any]]


def normal(dim: int, rank: int) -> int:
    """The dim counted from the front."""
    return dim + rank if dim < 0 else dim


def dims_of(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The dims that a `dim` argument names, counted from the front, ascending; all of them for None or an empty list."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return tuple(range(rank))
    return tuple(sorted(normal(d, rank) for d in (value if isinstance(value, (list, tuple)) else (value,))))


def is_tensor(value: Any) -> bool:
    """Whether an argument of a node is a tensor."""
    return isinstance(value, Ref)


def broadcast(
    call: Call, operands: Sequence[int], outputs: Sequence[int] = (0,), keep: Iterable[int] | None = None
) -> tuple[Link, ...]:
    """A link per output dim; operands broadcast to the output's shape, those of size 1 there stay whole.

    `keep` names the output dims that may be cut (all by default).
    """
    shape = call.outputs[outputs[0]].shape
    links = []
    for dim in range(len(shape)) if keep is None else keep:
        here = []
        for operand in operands:
            theirs = dim - len(shape) + len(call.inputs[operand].shape)
            if theirs >= 0 and call.inputs[operand].shape[theirs] == shape[dim]:
                here.append(Position(operand, theirs))
        if shape[dim] > 1:
            links.append(Link(f"d{dim}", tuple(here), tuple(Position(output, dim) for output in outputs)))
    return tuple(links)


def letters(term: str) -> list[tuple[str, bool]]:
    """(letter, may be cut) of each dim of a term, `...` as the letter "."."""
    found: list[tuple[str, bool]] = []
    rest = term.strip().lstrip("+").replace("...", ".")
    for character in rest:
        if character == "!":
            found[-1] = (found[-1][0], False)
        elif not character.isspace():
            found.append((character, True))
    return found


def axes(
    spec: str,
    call: Call,
    operands: Sequence[int | None],
    *,
    linear: Sequence[Sequence[int | None]] = (),
    local: LocalBuilder | None = None,
) -> Row:
    """The row of an operator whose dims are indices, as in einsum.

    `axes("...k, nk, +n -> ...n", call, (x, weight, bias), linear=((x,), (weight,)))` says of a linear layer: `n` and each of
    the leading dims may be cut; cutting the contracted `k` leaves a sum; the `+` operand is added, and so is Partial where
    the sum is owed. `!` after a letter: may not be cut. `...` stands for leading dims, broadcast from the right; an operand
    whose dim is 1 where others' is more stays whole. Operands that are None are dropped from the line.

    Raises:
        ValueError: a term does not fit its operand's rank (a slip in a row).
    """
    left, right = spec.split("->")
    terms = [(text, operand) for text, operand in zip(left.split(","), operands, strict=True) if operand is not None]
    added = tuple(operand for text, operand in terms if text.strip().startswith("+"))
    inputs = [(_indices(text, call.inputs[operand].shape, spec), operand) for text, operand in terms]
    results = right.split(",") if right.strip() else []
    outputs = [(_indices(text, call.outputs[i].shape, spec), i) for i, text in enumerate(results)]
    size: dict[str, int] = {}
    frozen: set[str] = set()
    for specs, side in ((call.inputs, inputs), (call.outputs, outputs)):
        for indices, number in side:
            for (name, free), n in zip(indices, specs[number].shape, strict=True):
                size[name] = max(size.get(name, 1), n)
                frozen |= set() if free else {name}
    links = []
    for name, n in size.items():
        if n <= 1 or name in frozen:
            continue
        inside = _where(name, n, inputs, [spec.shape for spec in call.inputs])
        outside = _where(name, n, outputs, [spec.shape for spec in call.outputs])
        links.append(Link(name, inside, outside, reduce=None if outside else "sum"))
    groups = tuple(tuple(op for op in group if op is not None) for group in linear)
    return Row(tuple(links), linear=tuple(group for group in groups if group), added=added, local=local)


def _indices(term: str, shape: Sequence[int], spec: str) -> list[tuple[str, bool]]:
    """(index name, may be cut) for each dim of an operand; leading dims of `...` are named by their distance from the right."""
    found = letters(term)
    leading = len(shape) - sum(letter != "." for letter, _ in found)
    if leading < 0 or (leading and (".", True) not in found and (".", False) not in found):
        raise ValueError(f"row {spec!r}: term {term.strip()!r} does not fit a tensor of rank {len(shape)}")
    indices: list[tuple[str, bool]] = []
    for letter, free in found:
        indices += [(letter, free)] if letter != "." else [(f"-{k}", free) for k in range(leading, 0, -1)]
    return indices


def _where(
    name: str, size: int, terms: Sequence[tuple[list[tuple[str, bool]], int]], shapes: Sequence[Sequence[int]]
) -> tuple[Position, ...]:
    return tuple(
        Position(number, dim)
        for indices, number in terms
        for dim, (index, _) in enumerate(indices)
        if index == name and shapes[number][dim] == size
    )
