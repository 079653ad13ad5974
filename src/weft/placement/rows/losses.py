"""Rows of losses: pieces of the batch owe a sum, a mean divides by the count of the whole batch.

Pointwise losses sum over every dim. Cross-entropy over classes c with log-sum-exp lse_n, class weights w, smoothing e and
targets y_n (or target shares q_nc in place of the one-hot):

    loss_n = a_n lse_n - b_n,   a_n = (1 - e) w_y + e/C sum_c w_c,   b_n = (1 - e) w_y x_ny + e/C sum_c w_c x_nc

With classes cut, `lse` is agreed on by all devices (`rows.softmax`), the first adds a_n lse_n, and each subtracts what its own
classes give to b_n: the result is a partial sum, and no logits travel.                          `_split_classes`
A mean over index targets divides by sum_n w_y over rows that are not ignored, all-reduced over the axes that cut the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.collectives import groups_along, plain_sum
from weft.placement.rows.softmax import log_sum_exp, plain_log_sum_exp, widened
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["LOSSES"]

_NONE, _MEAN, _SUM = 0, 1, 2  # torch's codes of `reduction`

# where `reduction` stands among the arguments of losses that work element by element
_REDUCTION = {
    "mse_loss": 2, "l1_loss": 2, "smooth_l1_loss": 2, "huber_loss": 2, "soft_margin_loss": 2, "kl_div": 2,
    "binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4, "poisson_nll_loss": 5, "hinge_embedding_loss": 3,
    "margin_ranking_loss": 4,
}  # fmt: skip

# the same for losses of vectors, whose last dim stays whole; how many operands are vectors, how many have the dims before it
_OF_VECTORS = {
    "cosine_embedding_loss": (4, 2, 3), "triplet_margin_loss": (7, 3, 3), "multi_margin_loss": (5, 1, 2),
    "multilabel_margin_loss": (2, 2, 2),
}  # fmt: skip


def pointwise_loss(call: Call) -> Row:
    """A loss of two tensors (and weights), element by element, then none, mean or sum."""
    place = _REDUCTION[call.node.op]
    reduction = call.arg(place, "reduction", _MEAN)
    shape = torch.broadcast_shapes(*(spec.shape for spec in call.inputs))
    links = []
    for dim, size in enumerate(shape):
        behind = len(shape) - dim
        inside = tuple(
            Position(op, len(spec.shape) - behind)
            for op, spec in enumerate(call.inputs)
            if len(spec.shape) >= behind and spec.shape[-behind] == size
        )
        if size > 1:
            outputs = (Position(0, dim),) if reduction == _NONE else ()
            links.append(Link(f"d{dim}", inside, outputs, reduce=None if outputs else "sum"))
    return Row(tuple(links), local=_reduced(call, place, math.prod(shape)))


def loss_of_vectors(call: Call) -> Row:
    """A loss of vectors, one number for each (or each pair, each three), then none, mean or sum."""
    place, vectors, operands = _OF_VECTORS[call.node.op]
    kept = call.arg(place, "reduction", _MEAN) == _NONE
    shapes = [spec.shape for spec in call.inputs[:operands]]
    rows = torch.broadcast_shapes(*shapes[:vectors])[:-1]
    links = []
    for dim, size in enumerate(rows):
        inside = tuple(Position(op, dim) for op, shape in enumerate(shapes) if shape[dim : dim + 1] == (size,))
        if size > 1 and all(len(shape) == len(rows) + 1 for shape in shapes[:vectors]):
            links.append(Link(f"d{dim}", inside, (Position(0, dim),) if kept else (), reduce=None if kept else "sum"))
    return Row(tuple(links), local=_reduced(call, place, math.prod(rows)))


def _reduced(call: Call, place: int, count: int) -> Callable[[Local], Callable[..., Tensor]]:
    """The local program of a loss reduced over the whole batch, which has `count` numbers."""
    reduction = call.arg(place, "reduction", _MEAN)

    def local(here: Local) -> Callable[..., Tensor]:
        operate = operator(call.node.target)
        cut = any(here.axes_of_input(op, dim) for op, spec in enumerate(call.inputs) for dim in range(len(spec.shape)))
        if reduction == _NONE or not cut:
            return operate

        def run(*args: Any, **kwargs: Any) -> Tensor:
            if not args[0].numel():
                return args[0].sum()  # of nothing; torch's margin losses leave theirs uninitialised
            if len(args) > place:
                total = operate(*args[:place], _SUM, *args[place + 1 :], **kwargs)
            else:
                total = operate(*args, **(kwargs | {"reduction": _SUM}))
            return total / count if reduction == _MEAN else total

        return run

    return local


def cross_entropy(call: Call) -> Row:
    """cross_entropy_loss(x, target, weight, reduction, ignore_index, label_smoothing); nll_loss has the first five."""
    x, target, weight = 0, 1, call.operand(2, "weight")
    shape = call.inputs[x].shape
    classes = 0 if len(shape) == 1 else 1
    shares = call.inputs[target].dtype.is_floating_point
    reduction = call.arg(3, "reduction", _MEAN)
    links = []
    for dim, size in enumerate(shape):
        if size <= 1:
            continue
        kept = dim - (dim > classes)  # its place in index targets and in an unreduced loss
        if dim == classes:
            inside = [Position(x, dim)] + ([Position(target, dim)] if shares else [])
            inside += [Position(weight, 0)] if weight is not None else []
            rows = math.prod(shape) // size * call.inputs[x].dtype.itemsize
            reduced = () if call.node.op.startswith("nll") else (rows,) * 3
            links.append(Link("class", tuple(inside), reduce="sum", contiguous=not shares, reduced=reduced))
        else:
            inside = [Position(x, dim), Position(target, dim if shares else kept)]
            outputs = (Position(0, kept),) if reduction == _NONE else ()
            links.append(Link(f"d{dim}", tuple(inside), outputs, reduce=None if outputs else "sum"))

    def local(here: Local) -> Callable[..., Tensor]:
        return _local_cross_entropy(call, here, classes, shares, weight)

    return Row(tuple(links), local=local)


def _local_cross_entropy(
    call: Call, here: Local, classes: int, shares: bool, weight: int | None
) -> Callable[..., Tensor]:
    """The operator itself, or with `reduction` "sum" and the whole batch's denominator, or `_split_classes`."""
    operate = operator(call.node.target)
    reduction = call.arg(3, "reduction", _MEAN)
    ignored = call.arg(4, "ignore_index", -100)
    smoothing = call.arg(5, "label_smoothing", 0.0) if call.node.op == "cross_entropy_loss" else 0.0
    shape = call.inputs[0].shape
    over_classes = groups_along(here, here.axes_of_input(0, classes))
    over_batch = groups_along(
        here, [axis for d in range(len(shape)) if d != classes for axis in here.axes_of_input(0, d)]
    )
    normalised = reduction == _MEAN and (over_batch or over_classes)
    if not over_classes and not normalised:
        return operate
    low = here.input_range(0, classes)[0] if over_classes and not shares else 0
    first = all(group.index == 0 for group in over_classes)
    rows = math.prod(shape) // shape[classes]

    def run(x: Tensor, target: Tensor, class_weight: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
        class_weight = kwargs.get("weight", class_weight)
        if over_classes:
            of_class = None if shares else _weight_of(target, class_weight, ignored, low, over_classes)
            wide = widened(x)
            if shares:
                loss = _split_shares(wide, target, class_weight, classes, smoothing, shape[classes], over_classes)
            elif call.node.op == "cross_entropy_loss":
                args = (wide, target, class_weight, of_class, classes, ignored, low, first)
                loss = _split_classes(*args, smoothing, shape[classes], over_classes)
            else:
                loss = -_pick(wide, target, low, classes) * of_class
            loss = loss.to(x.dtype) if wide is not x and not torch.is_autocast_enabled(x.device.type) else loss
            total = loss if reduction == _NONE else loss.sum()
        else:
            of_class = None if shares else _weight_of(target, class_weight, ignored, 0, ())
            last = (smoothing,) if call.node.op == "cross_entropy_loss" else ()
            total = operate(x, target, class_weight, _SUM, ignored, *last)
        if not normalised:
            return total
        if shares:
            return total / rows
        return total / plain_sum(of_class.sum(dtype=torch.float64), over_batch).to(total.dtype)

    return run


def _inside(target: Tensor, low: int, size: int) -> tuple[Tensor, Tensor]:
    """Which targets are among the `size` classes from `low` on, and their local numbers (0 elsewhere)."""
    local = target - low
    held = (local >= 0) & (local < size)
    return held, torch.where(held, local, torch.zeros_like(local))


def _weight_of(target: Tensor, weight: Tensor | None, ignored: int, low: int, groups: Sequence[Any]) -> Tensor:
    """Weight of each row: its target's class weight (1 without weights), 0 where the row is ignored."""
    valid = target != ignored
    if weight is None:
        return valid.to(torch.get_default_dtype())
    held, number = _inside(target, low, weight.shape[0])
    mine = weight.detach()[number] * (held & valid) if weight.shape[0] else torch.zeros_like(target, dtype=weight.dtype)
    return plain_sum(mine, groups)


class _LseAndPick(torch.autograd.Function):
    """(log sum exp over all classes, the target's logit or 0 where another device holds it): one pass backward for both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, low: int, classes: int, groups: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        lse = plain_log_sum_exp(x, (classes,), groups)
        held, number = _inside(target, low, x.shape[classes])
        picked = _gather(x, number, held, classes)
        ctx.save_for_backward(x, lse, held, number)
        ctx.classes, ctx.groups = classes, groups
        return lse.squeeze(classes), picked

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_picked: Tensor) -> tuple[Tensor | None, ...]:
        x, lse, held, number = ctx.saved_tensors
        classes = ctx.classes
        grad = (x - lse).exp_().mul_(plain_sum(grad_lse, ctx.groups).unsqueeze(classes))
        if x.shape[classes]:
            grad.scatter_add_(classes, number.unsqueeze(classes), (grad_picked * held).unsqueeze(classes))
        return grad, None, None, None, None


def _gather(x: Tensor, number: Tensor, held: Tensor, classes: int) -> Tensor:
    if not x.shape[classes]:
        return x.sum(classes)  # zeros: this device holds no class
    return torch.where(held, x.gather(classes, number.unsqueeze(classes)).squeeze(classes), x.new_zeros(()))


def _pick(x: Tensor, target: Tensor, low: int, classes: int) -> Tensor:
    """The target's entry of x along `classes`, 0 where another device holds it."""
    held, number = _inside(target, low, x.shape[classes])
    return _gather(x, number, held, classes)


def _split_classes(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    of_class: Tensor,
    classes: int,
    ignored: int,
    low: int,
    first: bool,
    smoothing: float,
    num_classes: int,
    groups: Sequence[Any],
) -> Tensor:
    """This device's part of the loss of each row; the sum over the devices of all groups is the loss (module's header)."""
    lse, picked = _LseAndPick.apply(x, target, low, classes, groups)
    of_class = of_class.to(x.dtype)
    loss = of_class * (lse - picked if first else -picked)
    if not smoothing:
        return loss
    weight = x.new_ones(x.shape[classes]) if weight is None else weight.to(x.dtype)
    all_weights = plain_sum(weight.sum(), groups)
    like = [-1 if dim == classes else 1 for dim in range(x.dim())]
    spread = (x * weight.view(like)).sum(classes)
    spread = all_weights * lse - spread if first else -spread
    return (1 - smoothing) * loss + smoothing / num_classes * spread * (target != ignored)


def _split_shares(
    x: Tensor,
    share: Tensor,
    weight: Tensor | None,
    classes: int,
    smoothing: float,
    num_classes: int,
    groups: Sequence[Any],
) -> Tensor:
    """The same for targets that are shares of each class, cut as the logits are."""
    share = share * (1 - smoothing) + smoothing / num_classes if smoothing else share
    if weight is not None:
        share = share * weight.view([-1 if dim == classes else 1 for dim in range(x.dim())])
    lse = log_sum_exp(x, (classes,), True, groups)
    return (share * (lse - x)).sum(classes)


LOSSES: dict[str, Callable[[Call], Row]] = {
    **dict.fromkeys(_REDUCTION, pointwise_loss),
    **dict.fromkeys(_OF_VECTORS, loss_of_vectors),
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"), cross_entropy),
}
