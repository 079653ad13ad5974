"""Rows of operators that work element by element, with broadcasting.

Every dim of the output may be cut. An operand whose dim is 1 or absent there stays whole. Which operands may be Partial
follows from where the operator is linear: `add` in both at once, `mul` in each by itself, `relu` in none.
"""

from __future__ import annotations

from collections.abc import Callable

from weft.placement.rows.build import broadcast, is_tensor
from weft.placement.signature import Call, Link, Position, Row

__all__ = ["NONLINEAR", "POINTWISE", "pointwise"]

_NONLINEAR = """
    abs absolute acos acosh asin asinh atan atan2 arctan2 atanh bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh digamma
    elu eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmax fmin fmod frac ge gelu gelu_backward greater
    greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan isneginf
    isposinf ldexp le leaky_relu less less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit lt maximum minimum mish nan_to_num ne nextafter not_equal
    pow reciprocal relu relu6 remainder round rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus
    softshrink special_expit special_erf sqrt square tan tanh tanh_backward threshold threshold_backward trunc xlogy
    __and__ __or__ __xor__ __lshift__ __rshift__ polar
"""
_LINEAR = """
    deg2rad neg negative positive clone contiguous to _to_copy alias detach lift_fresh_copy lift_fresh type_as real imag conj
    _conj conj_physical resolve_conj resolve_neg
"""
NONLINEAR: tuple[str, ...] = tuple(_NONLINEAR.split())


def pointwise(call: Call) -> Row:
    """Nothing but element-by-element: no operand may be Partial."""
    return Row(broadcast(call, range(len(call.inputs))))


def _tensors(call: Call, *arguments: int) -> tuple[int, ...]:
    return tuple(op for op in map(call.operand, arguments) if op is not None)


def additive(call: Call) -> Row:
    """a + alpha b, a - alpha b: linear in both operands together; not if one is a number other than 0."""
    numbers = [value for value in call.node.args[:2] if not is_tensor(value)]
    linear = () if any(value != 0 for value in numbers) else (_tensors(call, 0, 1),)
    return Row(broadcast(call, range(len(call.inputs))), linear=linear)


def product(call: Call) -> Row:
    """a b: linear in each operand by itself."""
    both = _tensors(call, 0, 1)
    return Row(broadcast(call, both), linear=tuple((op,) for op in both))


def quotient(call: Call) -> Row:
    """a / b: linear in a, unless it rounds."""
    rounds = call.node.kwargs.get("rounding_mode") is not None
    first = call.operand(0)
    return Row(broadcast(call, range(len(call.inputs))), linear=() if rounds or first is None else ((first,),))


def unary_linear(call: Call) -> Row:
    """-a, a copy of a, a in another dtype: linear in its first operand; others (`type_as`) only lend their dtype."""
    return Row(broadcast(call, (0,)), linear=((0,),))


def overwritten(call: Call) -> Row:
    """copy(x, source): x lends its shape and dtype; linear in the source, and any x will do."""
    return Row(broadcast(call, range(len(call.inputs))), linear=((0, 1), (1,)) if len(call.inputs) == 2 else ())


def filled(call: Call) -> Row:
    """fill(x, value): x lends its shape; the value is a number or a tensor of one element."""
    return Row(broadcast(call, (0,)))


def where(call: Call) -> Row:
    """where(condition, a, b): linear in a and b together, where neither is a number other than 0."""
    numbers = [value for value in call.node.args[1:3] if not is_tensor(value)]
    linear = () if any(value != 0 for value in numbers) else (_tensors(call, 1, 2),)
    return Row(broadcast(call, range(len(call.inputs))), linear=linear)


def masked_fill(call: Call) -> Row:
    """masked_fill(x, mask, value): linear in x where the value is 0, in x and the value together where that is a tensor."""
    value = call.arg(2, "value")
    linear = (_tensors(call, 0, 2),) if is_tensor(value) else (((0,),) if value == 0 else ())
    return Row(broadcast(call, range(len(call.inputs))), linear=linear)


def lerp(call: Call) -> Row:
    """a + w (b - a): linear in a and b together."""
    return Row(broadcast(call, range(len(call.inputs))), linear=(_tensors(call, 0, 1),))


def add_product(call: Call) -> Row:
    """self + value t1 t2: linear in t1 and in t2, self is added."""
    return Row(broadcast(call, range(len(call.inputs))), linear=((1,), (2,)), added=(0,))


def prelu(call: Call) -> Row:
    """prelu(x, weight): the weight has one entry per channel (dim 1 of x), or one in all."""
    links = []
    for link in broadcast(call, (0,)):
        per_channel = link.outputs[0].dim == 1 and call.inputs[1].numel > 1
        links.append(Link(link.name, (*link.inputs, Position(1, 0)) if per_channel else link.inputs, link.outputs))
    return Row(tuple(links))


def glu(call: Call) -> Row:
    """a sigmoid(b) of the halves a, b of a dim: that dim is cut in each half."""
    rank = len(call.inputs[0].shape)
    halved = call.arg(1, "dim", -1) % rank
    links = []
    for dim, size in enumerate(call.outputs[0].shape):
        if size > 1:
            inside = Position(0, dim, outer=2 if dim == halved else 1)
            links.append(Link(f"d{dim}", (inside,), (Position(0, dim),)))
    return Row(tuple(links))


POINTWISE: dict[str, Callable[[Call], Row]] = {
    **dict.fromkeys(NONLINEAR, pointwise),
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), additive),
    **dict.fromkeys(("mul", "multiply"), product),
    **dict.fromkeys(("div", "divide", "true_divide"), quotient),
    **dict.fromkeys(
        _LINEAR.split(),
        unary_linear,
    ),
    "copy": overwritten, "fill": filled,
    "where": where, "masked_fill": masked_fill, "lerp": lerp, "addcmul": add_product, "prelu": prelu, "glu": glu,
}  # fmt: skip
