"""Rows of matrix products: linear layers, matmul and its kin, einsum.

A product is linear in each factor by itself, also where both factors are one tensor: operands are placed one by one.
"""

from __future__ import annotations

from collections.abc import Callable

from weft.placement.rows.build import axes, normal
from weft.placement.signature import Call, Row

__all__ = ["PRODUCTS"]


def linear(call: Call) -> Row:
    """x (..., k) weight (n, k) bias (n) -> (..., n)."""
    x, weight, bias = call.operand(0), call.operand(1), call.operand(2, "bias")
    spec = "...k, nk, +n -> ...n" if len(call.inputs[1].shape) == 2 else "...k, k, + -> ..."
    return axes(spec, call, (x, weight, bias), linear=((x,), (weight,)))


def addmm(call: Call) -> Row:
    """added (m, n) or smaller, a (m, k), b (k, n) -> (m, n). beta and alpha scale; beta 0 ignores the added one's value."""
    shape = call.inputs[0].shape
    spec = {0: "+", 1: "+n", 2: "+mn"}[len(shape)]
    return axes(f"{spec}, mk, kn -> mn", call, (0, 1, 2), linear=((1,), (2,)))


def baddbmm(call: Call) -> Row:
    """added, a (b, m, k), c (b, k, n) -> (b, m, n)."""
    spec = "+" + "bmn"[3 - len(call.inputs[0].shape) :]
    return axes(f"{spec}, bmk, bkn -> bmn", call, (0, 1, 2), linear=((1,), (2,)))


def addbmm(call: Call) -> Row:
    """added, a (b, m, k), c (b, k, n) -> (m, n): the batch is summed as well."""
    spec = "+" + "mn"[2 - len(call.inputs[0].shape) :]
    return axes(f"{spec}, bmk, bkn -> mn", call, (0, 1, 2), linear=((1,), (2,)))


def addmv(call: Call) -> Row:
    """added (m), a (m, k), v (k) -> (m)."""
    return axes("+m, mk, k -> m" if call.inputs[0].shape else "+, mk, k -> m", call, (0, 1, 2), linear=((1,), (2,)))


def matmul(call: Call) -> Row:
    """a (..., m, k) b (..., k, n) -> (..., m, n); either may be a vector."""
    a, b = (len(spec.shape) for spec in call.inputs)
    left = "k" if a == 1 else "...mk"
    right = "k" if b == 1 else "...kn"
    out = "..." + ("m" if a > 1 else "") + ("n" if b > 1 else "")
    out = "" if a == b == 1 else out
    return _product(f"{left}, {right} -> {out}", call)


def einsum(call: Call) -> Row:
    """The equation says it all; a letter that stands twice in one operand (a diagonal) may not be cut."""
    equation = call.arg(0).replace(" ", "")
    operands = call.operands(1)
    left, arrow, right = equation.partition("->")
    if not arrow:
        names = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(names) if names.count(c) == 1))
    if any(term.replace("...", "").count(c) > 1 for term in left.split(",") for c in term if c != "."):
        return Row(linear=tuple((op,) for op in operands))
    return axes(f"{left}->{right}", call, operands, linear=[(op,) for op in operands])


def _product(spec: str, call: Call) -> Row:
    return axes(spec, call, (0, 1), linear=((0,), (1,)))


def mm(call: Call) -> Row:
    """a (m, k) b (k, n) -> (m, n)."""
    return _product("mk, kn -> mn", call)


def bmm(call: Call) -> Row:
    """a (b, m, k) c (b, k, n) -> (b, m, n)."""
    return _product("bmk, bkn -> bmn", call)


def mv(call: Call) -> Row:
    """a (m, k) v (k) -> (m)."""
    return _product("mk, k -> m", call)


def dot(call: Call) -> Row:
    """a (k) b (k) -> ()."""
    return _product("k, k -> ", call)


def outer(call: Call) -> Row:
    """a (m) b (n) -> (m, n)."""
    return _product("m, n -> mn", call)


def bilinear(call: Call) -> Row:
    """x (..., i), y (..., j), weight (o, i, j), bias (o) -> (..., o)."""
    operands = (call.operand(0), call.operand(1), call.operand(2), call.operand(3, "bias"))
    return axes("...i, ...j, oij, +o -> ...o", call, operands, linear=((0,), (1,), (2,)))


def tensordot(call: Call) -> Row:
    """tensordot(a, b, dims of a, dims of b): those dims are contracted in pairs, the others follow each other."""
    a, b = (len(spec.shape) for spec in call.inputs)
    over_a, over_b = (
        [normal(d, rank) for d in call.arg(n, name)] for n, name, rank in ((2, "dims_self", a), (3, "dims_other", b))
    )
    names = iter("abcdefghijklmnopqrstuvwxyz")
    left, right = [next(names) for _ in range(a)], [next(names) for _ in range(b)]
    for i, j in zip(over_a, over_b, strict=True):
        right[j] = left[i]
    kept = [left[d] for d in range(a) if d not in over_a] + [right[d] for d in range(b) if d not in over_b]
    return _product(f"{''.join(left)}, {''.join(right)} -> {''.join(kept)}", call)


def cdist(call: Call) -> Row:
    """a (..., m, k) b (..., n, k) -> distances (..., m, n)."""
    return axes("...mk!, ...nk! -> ...mn", call, (0, 1))


PRODUCTS: dict[str, Callable[[Call], Row]] = {
    "linear": linear, "addmm": addmm, "baddbmm": baddbmm, "addbmm": addbmm, "addmv": addmv, "matmul": matmul, "mm": mm,
    "bmm": bmm, "mv": mv, "dot": dot, "vdot": dot, "outer": outer, "ger": outer, "einsum": einsum, "bilinear": bilinear,
    "tensordot": tensordot, "cdist": cdist,
}  # fmt: skip
