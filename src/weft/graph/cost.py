"""What one call of an operator costs: floating-point operations, bytes moved, and what autograd keeps until backward.

Conventions
    flops      a multiply-add is 2; backward counts only gradients that somebody needs (a frozen weight has none)
    bytes      every operand read once and every result written once, forward; backward reads the output's gradient and what was
               kept, and writes the needed gradients. Views move nothing.
    keeps      which operands and outputs autograd holds on to, from each operator's derivative formula, and `saved`: bytes it
               holds besides (a mask, row statistics). Checked against torch's saved-tensor hooks, call by call, in tests.

The table `_ROWS` gives for each operator a function of the call; the rate it runs at is that of its kind (`kinds`). An operator
without a row is priced by its bytes and assumed to keep everything; `unpriced` lists such calls.

Where devices differ, `device` decides: attention with dropout or an unusual mask is one kernel on a GPU, while a CPU
computes and keeps the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.graph.graph import Cost, Graph, Kind, Node, Ref, TensorSpec, refs_in
from weft.graph.kinds import kind_of

__all__ = ["Work", "one_kernel", "price", "reprice", "unpriced"]


@dataclass(frozen=True)
class Work:
    """A call as its row sees it; `inputs` are the specs of tensor operands in the order of `Node.inputs`.

    `scattered` are operands that do not lie contiguously in memory.
    """

    op: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    device: str = "cpu"
    scattered: Collection[int] = ()

    @property
    def out(self) -> TensorSpec:
        return self.outputs[0]

    @property
    def trains(self) -> bool:
        return any(spec.requires_grad for spec in self.outputs)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def needs(self, operand: int) -> bool:
        """Whether the operand exists and backward computes its gradient."""
        return self.trains and operand < len(self.inputs) and self.inputs[operand].requires_grad

    def cost(
        self,
        forward: float,
        backward: float,
        keeps: Sequence[int] = (),
        *,
        output: bool = False,
        saved: float = 0,
        bytes_forward: float | None = None,
        bytes_backward: float | None = None,
    ) -> Cost:
        """A cost with given FLOPs; bytes by the module's conventions unless given; nothing for backward where none runs."""
        inputs, outputs = sum(s.nbytes for s in self.inputs), sum(s.nbytes for s in self.outputs)
        if bytes_forward is None:
            bytes_forward = inputs + outputs
        if not self.trains:
            return Cost(flops_forward=forward, bytes_forward=bytes_forward, keeps_inputs=(False,) * len(self.inputs))
        kept = set(keeps)
        if bytes_backward is None:
            gradients = sum(s.nbytes for s in self.outputs if s.requires_grad)
            gradients += sum(s.nbytes for s in self.inputs if s.requires_grad)
            bytes_backward = gradients + saved + (outputs if output else 0)
            bytes_backward += sum(self.inputs[i].nbytes for i in kept if i < len(self.inputs))
        return Cost(
            flops_forward=forward,
            flops_backward=backward,
            bytes_forward=bytes_forward,
            bytes_backward=bytes_backward,
            saved=int(saved),
            keeps_inputs=tuple(i in kept for i in range(len(self.inputs))),
            keeps_output=output,
        )


RowOfCost = Callable[[Work], Cost]


def price(
    target: str, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
    *, view: bool = False, device: str = "cpu", scattered: Collection[int] = (),
) -> tuple[Kind, Cost]:  # fmt: skip
    """Kind and cost of a call; `view` says that its outputs share the memory of its first operand."""
    if view:
        return "view", Cost(keeps_inputs=(False,) * len(inputs))
    op = target.split(".")[1] if target.startswith(("aten.", "transformers.")) else target
    row = _ROWS.get(op) or _ROWS.get(op.removesuffix("_")) or _unknown
    return kind_of(op), row(Work(op, args, kwargs, inputs, outputs, device, scattered))


def reprice(graph: Graph, device: str) -> Graph:
    """The same graph with the costs of another type of device ("cpu" or "cuda"): captures are priced for the model's own."""
    nodes = []
    for node in graph.nodes:
        if node.role == "call":
            inputs = [graph.spec(ref) for ref in node.inputs]
            kind, cost = price(
                node.target, node.args, node.kwargs, inputs, node.outputs, view=node.kind == "view", device=device
            )
            node = replace(node, kind=kind, cost=cost)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def unpriced(graph: Graph) -> tuple[Node, ...]:
    """Calls whose operator has no row here: their cost is a guess from their bytes."""
    return tuple(
        node
        for node in graph.calls
        if node.kind != "view" and node.op not in _ROWS and node.op.removesuffix("_") not in _ROWS
    )


def _unknown(work: Work) -> Cost:
    numel = sum(spec.numel for spec in (*work.inputs, *work.outputs))
    return work.cost(numel, 2 * numel, range(len(work.inputs)), output=True)


# -- elementwise -----------------------------------------------------------------------------------------------------


def _pointwise(flops: float, keeps: Sequence[int] = (), output: bool = False) -> RowOfCost:
    """`flops` per element forward, as many + 1 backward."""

    def row(work: Work) -> Cost:
        n = work.out.numel
        return work.cost(flops * n, (flops + 1) * n, keeps, output=output)

    return row


def _product(work: Work) -> Cost:
    """x * y: the gradient of each needs the other."""
    n = work.out.numel
    keeps = [other for own, other in ((0, 1), (1, 0)) if work.needs(own) and other < len(work.inputs)]
    return work.cost(n, n * (work.needs(0) + work.needs(1)), keeps)


def _quotient(work: Work) -> Cost:
    """x / y: x's gradient needs y, y's needs both."""
    n = work.out.numel
    two = len(work.inputs) == 2
    keeps = {1} if two and work.needs(0) else set()
    divisor_first = not two and not isinstance(work.arg(0, "self"), Ref)
    if (two and work.needs(1)) or divisor_first:
        keeps |= {0, 1} if two else {0}
    return work.cost(4 * n, 5 * n, sorted(keeps))


def _power(work: Work) -> Cost:
    n = work.out.numel
    if len(work.inputs) == 2:
        return work.cost(20 * n, 40 * n, (0, 1), output=True)
    exponent = work.arg(1, "exponent")
    scalar_base = not isinstance(work.arg(0, "self"), Ref)
    cheap = exponent in (1, 2, 3, 0.5, -1, -0.5)
    return work.cost((3 if cheap else 20) * n, (4 if cheap else 25) * n, (0,), output=scalar_base)


def _choice(work: Work) -> Cost:
    """where, masked_fill: only the condition is kept."""
    condition = 0 if work.op == "where" else 1
    return work.cost(work.out.numel, work.out.numel, (condition,) if condition < len(work.inputs) else ())


def _extremum(work: Work) -> Cost:
    return work.cost(work.out.numel, 2 * work.out.numel, (0, 1))


def _log_sigmoid(work: Work) -> Cost:
    n = work.out.numel
    return work.cost(10 * n, 4 * n, (0,), saved=work.out.nbytes if work.device == "cpu" else 0)


def _mixed(work: Work) -> Cost:
    """addcmul, addcdiv, lerp: kept as their products need."""
    keeps = range(1, len(work.inputs)) if work.op != "lerp" or len(work.inputs) > 2 else ()
    return work.cost(2 * work.out.numel, 4 * work.out.numel, keeps)


def _dropout(work: Work) -> Cost:
    """The mask is kept in the dtype of the input."""
    n = work.out.numel
    saved = work.out.nbytes if work.op in ("dropout", "alpha_dropout") else n if work.op == "native_dropout" else 0
    return work.cost(6 * n, n, saved=saved)


def _channel_dropout(work: Work) -> Cost:
    n, channels = work.out.numel, math.prod(work.out.shape[:2])
    return work.cost(n, n, saved=channels * work.out.dtype.itemsize)


def _made(work: Work) -> Cost:
    """Tensors that come from nothing but their shape: only written."""
    return Cost(bytes_forward=sum(s.nbytes for s in work.outputs), keeps_inputs=(False,) * len(work.inputs))


def _write(work: Work) -> Cost:
    return work.cost(work.out.numel, 0)


# -- products --------------------------------------------------------------------------------------------------------


def _linear(work: Work) -> Cost:
    """x (..., k), w (n, k): input kept for the weight's gradient (a copy, if it has no rows to see), weight for the input's."""
    x = work.inputs[0]
    flops = 2.0 * work.out.numel * x.shape[-1]
    copied = work.needs(1) and 0 in work.scattered and len(x.shape) > 2
    keeps = ([1] if work.needs(0) else []) + ([0] if work.needs(1) and not copied else [])
    bias = work.out.numel if work.needs(2) else 0
    flops_backward = flops * (work.needs(0) + work.needs(1)) + bias
    return work.cost(flops, flops_backward, keeps, saved=x.nbytes if copied else 0)


def _matmul(work: Work) -> Cost:
    flops = 2.0 * work.out.numel * work.inputs[0].shape[-1]
    keeps = [other for own, other in ((0, 1), (1, 0)) if work.needs(own)]
    return work.cost(flops, flops * (work.needs(0) + work.needs(1)), keeps)


def _addmm(work: Work) -> Cost:
    """bias + a @ b."""
    flops = 2.0 * work.out.numel * work.inputs[1].shape[-1]
    keeps = [other for own, other in ((1, 2), (2, 1)) if work.needs(own)]
    bias = work.out.numel if work.needs(0) else 0
    return work.cost(flops, flops * (work.needs(1) + work.needs(2)) + bias, keeps)


def _einsum(work: Work) -> Cost:
    """All letters of the equation multiply; operands are kept for each other, as torch contracts them in pairs."""
    equation = str(work.arg(0, "equation")).replace(" ", "")
    sizes: dict[str, int] = {}
    hidden = 1
    for term, spec in zip(equation.split("->")[0].split(","), work.inputs, strict=False):
        before, _, after = term.partition("...")
        named = [*zip(before, spec.shape, strict=False)]
        named += [*zip(reversed(after), reversed(spec.shape), strict=False)] if "..." in term else []
        sizes.update(named)
        if "..." in term:
            hidden = max(hidden, math.prod(spec.shape[len(before) : len(spec.shape) - len(after)]))
    flops = 2.0 * math.prod(sizes.values()) * hidden
    gradients = sum(work.needs(i) for i in range(len(work.inputs)))
    keeps = [i for i in range(len(work.inputs)) if any(work.needs(j) for j in range(len(work.inputs)) if j != i)]
    return work.cost(flops, flops * gradients, keeps)


def _grouped(work: Work) -> Cost:
    """Rows dealt to experts: x (rows, k), weights (experts, k, n)."""
    flops = 2.0 * work.inputs[0].numel * work.out.shape[-1]
    keeps = [other for own, other in ((0, 1), (1, 0)) if work.needs(own)]
    return work.cost(flops, flops * (work.needs(0) + work.needs(1)), keeps)


def _convolution(work: Work) -> Cost:
    weight = work.inputs[1]
    transposed = "transpose" in work.op or (work.op == "convolution" and bool(work.arg(6, "transposed", False)))
    positions = work.inputs[0] if transposed else work.out
    per_position = weight.numel // weight.shape[0]
    flops = 2.0 * positions.numel * per_position
    keeps = [other for own, other in ((0, 1), (1, 0)) if work.needs(own)]
    bias = work.out.numel if work.needs(2) else 0
    return work.cost(flops, flops * (work.needs(0) + work.needs(1)) + bias, keeps)


def _attention(work: Work) -> Cost:
    """q (..., t, d), k (..., s, d), v (..., s, e): two products forward; backward repeats the first and adds four.

    A causal kernel skips the half above the diagonal. The one-kernel form keeps q, k, v, the output, a statistic per row and
    the mask in q's dtype; the composite form (on CPUs with dropout) keeps copies of q, k, v and the scores instead.
    """
    q, k, v = work.inputs[:3]
    mask = work.inputs[3] if len(work.inputs) > 3 else None
    causal, dropout = bool(work.arg(5, "is_causal", False)), bool(work.arg(4, "dropout_p", 0.0))
    rows, keys = math.prod(q.shape[:-1]), k.shape[-2]
    product = float(rows) * keys * (q.shape[-1] + v.shape[-1])
    moved = sum(s.nbytes for s in work.inputs) + work.out.nbytes
    if one_kernel(work):
        if causal:
            product *= 0.5 * (1 + 1 / max(keys, 1))
        saved = rows * max(q.dtype.itemsize, 4) + (mask.numel * q.dtype.itemsize if mask else 0)
        return work.cost(2 * product, 5 * product, (0, 1, 2), output=True, saved=saved, bytes_forward=moved)
    scores = float(rows) * keys * q.dtype.itemsize
    repeat = q.numel // max(math.prod(k.shape[:-2]) * q.shape[-2] * q.shape[-1], 1)  # query heads per key head
    copies = 3 if dropout else 1  # softmax's result; the mask, and what it leaves
    return work.cost(
        2 * product + 6 * rows * keys, 4 * product + 8 * rows * keys,
        saved=copies * scores + q.nbytes + repeat * (k.nbytes + v.nbytes),
        bytes_forward=moved + 2 * (copies + 1) * scores, bytes_backward=2 * moved + 3 * (copies + 1) * scores,
    )  # fmt: skip


def one_kernel(work: Work) -> bool:
    """Whether attention runs as one kernel: always on a GPU; on a CPU without dropout or a mask that needs gradients."""
    masked = len(work.inputs) > 3 and work.inputs[3].requires_grad
    return work.device != "cpu" or not (work.arg(4, "dropout_p", 0.0) or masked or len(work.inputs[0].shape) != 4)


# -- normalisation, reductions, losses -------------------------------------------------------------------------------


def _normalise(groups: Callable[[Work], int], flops: float = 8.0) -> RowOfCost:
    """Norms: input, weight and two statistics per group are kept."""

    def row(work: Work) -> Cost:
        n = work.inputs[0].numel
        statistics = 2 * groups(work) * max(work.inputs[0].dtype.itemsize, 4)
        return work.cost(flops * n, 1.5 * flops * n, range(len(work.inputs)), saved=statistics)

    return row


def _rows_of_layer_norm(work: Work) -> int:
    return work.inputs[0].numel // max(math.prod(work.arg(1, "normalized_shape")), 1)


def _rms_norm(work: Work) -> Cost:
    """One kernel on a GPU; on a CPU squares, mean, rsqrt and two products, which keep the normalised input too."""
    n, statistics = work.inputs[0].numel, _rows_of_layer_norm(work) * max(work.out.dtype.itemsize, 4)
    saved = statistics if work.device != "cpu" else 2 * statistics + work.out.nbytes
    return work.cost(6 * n, 9 * n, range(len(work.inputs)), saved=saved)


def _softmax(work: Work) -> Cost:
    n = work.out.numel
    return work.cost(12 * n, 4 * n, output=True)


def _cross_entropy(work: Work) -> Cost:
    """Log-softmax and its pick: the log-probabilities are kept, and the targets."""
    logits = work.inputs[0]
    n = logits.numel
    return work.cost(
        12 * n, 6 * n, range(1, len(work.inputs)), saved=logits.nbytes + logits.dtype.itemsize,
        bytes_forward=3 * logits.nbytes + work.inputs[1].nbytes, bytes_backward=3 * logits.nbytes + work.inputs[1].nbytes,
    )  # fmt: skip


def _reduction(flops: float = 1.0, keeps: Sequence[int] = (), output: bool = False) -> RowOfCost:
    def row(work: Work) -> Cost:
        n = work.inputs[0].numel
        return work.cost(flops * n, flops * n, keeps, output=output)

    return row


def _picked(work: Work) -> Cost:
    """max, min, sort, topk, ...: the positions are kept."""
    n = work.inputs[0].numel
    whole = len(work.outputs) == 1  # max() of everything compares with its result
    factor = math.log2(n + 2) if work.op in ("sort", "topk", "msort", "argsort") else 1
    return work.cost(factor * n, n, range(len(work.inputs)) if whole else (), output=whole or work.trains)


def _compare_loss(work: Work) -> Cost:
    """mse, l1, binary cross-entropy, ...: input and target are kept."""
    n = work.inputs[0].numel
    if work.op == "l1_loss":
        return work.cost(2 * n, 2 * n, saved=work.inputs[0].nbytes)  # the difference, for its sign
    return work.cost(4 * n, 4 * n, (1,) if work.op == "kl_div" else range(len(work.inputs)))


def _nll(work: Work) -> Cost:
    n = work.out.numel + work.inputs[1].numel
    return work.cost(n, n, range(len(work.inputs)), saved=work.inputs[0].dtype.itemsize)


# -- gathers ---------------------------------------------------------------------------------------------------------


def _embedding(work: Work) -> Cost:
    """Rows picked forward; backward fills a dense gradient of the table and adds the rows."""
    table = work.inputs[0]
    return work.cost(
        0, work.out.numel, (1,), bytes_forward=2 * work.out.nbytes + work.inputs[1].nbytes,
        bytes_backward=table.nbytes + 3 * work.out.nbytes,
    )  # fmt: skip


def _indexed(work: Work) -> Cost:
    """index, gather, scatter and kin: everything that is not of a floating dtype is an index, and kept."""
    keeps = [i for i, spec in enumerate(work.inputs) if i > 0 and not spec.dtype.is_floating_point]
    keeps += [0] if work.op == "gather" else []
    moved = 2 * work.out.nbytes + sum(work.inputs[i].nbytes for i in keeps if i > 0)
    return work.cost(0, work.out.numel, keeps, bytes_forward=moved, bytes_backward=moved + work.inputs[0].nbytes)


def _moved(work: Work) -> Cost:
    """cat, pad, copies and casts: bytes only, nothing kept."""
    return work.cost(0, 0)


def _pool(work: Work) -> Cost:
    n = work.inputs[0].numel
    window = work.arg(1, "kernel_size", 1)
    size = math.prod(window) if isinstance(window, (list, tuple)) else 1
    size = max(size, n // max(work.out.numel, 1))
    positions = len(work.outputs) > 1
    chosen = work.op.startswith(("max_pool", "adaptive_max_pool")) and not positions
    saved = 8 * work.out.numel if chosen else 0
    return work.cost(size * work.out.numel, n, (0,), output=positions, saved=saved)


def _adaptive_mean(work: Work) -> Cost:
    """To one position it is a mean, which keeps nothing."""
    n = work.inputs[0].numel
    single = all(size == 1 for size in work.arg(1, "output_size"))
    return work.cost(n, n, () if single else (0,))


def _resize(work: Work) -> Cost:
    n = work.out.numel
    return work.cost(4 * n, 4 * n)


def _distance(work: Work) -> Cost:
    """Distances of every pair of rows."""
    flops = 3.0 * work.out.numel * work.inputs[0].shape[-1]
    return work.cost(flops, 2 * flops, (0, 1), output=True)


def _recurrent(kind: str) -> RowOfCost:
    """lstm, gru, rnn (x, states, weights, biases?, layers, ...): per step, layer and direction, products with the gates' weights.

    Kept are each layer's input and, per unit of state and step, 7 numbers (1 for a plain rnn); the CPU's float32 lstm kernel
    keeps a workspace instead, of 15.4 + 14 / steps numbers by our measurement, and its output.
    """

    def row(work: Work) -> Cost:
        x, states = work.inputs[0], list(refs_in((work.arg(1, "hx"),)))
        weights = [w for w in work.inputs[1 + len(states) :] if len(w.shape) == 2]
        layers, directions = int(work.arg(4, "num_layers", 1)), 2 if work.arg(7, "bidirectional", False) else 1
        width = work.inputs[1].shape[-1]
        steps = x.shape[1 if work.arg(8, "batch_first", False) else 0]
        positions = x.numel // max(x.shape[-1], 1)
        flops = sum(2.0 * positions * w.numel for w in weights)
        cells = positions * width * layers * directions
        workspace = kind == "lstm" and work.device == "cpu" and x.dtype.itemsize == 4
        numbers = 15.4 + 14 / max(steps, 1) if workspace else 1.0 if kind == "rnn" else 7.0
        # what each layer but the last hands on, its mask, and what is left
        inner = positions * width * directions * (layers - 1)
        inner *= 3 if work.arg(5, "dropout", 0.0) else 1
        saved = (numbers * cells + inner + x.numel) * x.dtype.itemsize if work.trains else 0
        keeps = range(1, len(work.inputs))
        return work.cost(flops + 20 * cells, 2 * flops + 30 * cells, keeps, output=workspace, saved=saved)

    return row


def _cell(work: Work) -> Cost:
    """One step of an lstm, gru or rnn: x, states, weights of x and of the state, biases."""
    weights = [spec for spec in work.inputs[-4:] if len(spec.shape) == 2]
    flops = 2.0 * work.inputs[0].shape[0] * sum(w.numel for w in weights)
    numbers = 1 if "rnn" in work.op else 5
    return work.cost(flops, 2 * flops, range(len(work.inputs)), saved=numbers * work.out.nbytes)


def _fourier(work: Work) -> Cost:
    n = max(work.inputs[0].numel, work.out.numel)
    return work.cost(5 * n * math.log2(n + 1), 5 * n * math.log2(n + 1))


# -- the table -------------------------------------------------------------------------------------------------------


def _table() -> dict[str, RowOfCost]:
    rows: dict[str, RowOfCost] = {}

    def put(row: RowOfCost, names: str) -> None:
        rows.update((name, row) for name in names.split())

    put(_pointwise(1), "add sub rsub neg __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor bitwise_not "
        "logical_and logical_or logical_not logical_xor eq ne lt le gt ge floor ceil round trunc sign isnan isinf isfinite "
        "floor_divide remainder fmod clone contiguous copy detach triu tril one_hot real imag")  # fmt: skip
    put(_pointwise(1, (0,)), "nan_to_num abs clamp clamp_min clamp_max relu6 hardtanh leaky_relu "
        "hardswish hardsigmoid hardshrink softshrink threshold square prelu")  # fmt: skip
    put(_pointwise(10, (0,)), "gelu silu sin cos log log2 log10 log1p erf erfc softplus mish elu celu "
        "selu asin acos atan xlogy special_xlogy logit glu atan2 hypot erfinv")  # fmt: skip
    put(_pointwise(1, output=True), "relu sqrt rsqrt reciprocal")
    put(_pointwise(10, output=True), "tanh tan sigmoid exp exp2 expm1")
    put(_product, "mul multiply outer")
    put(_distance, "cdist")
    put(_quotient, "div divide true_divide")
    put(_power, "pow")
    put(_choice, "where masked_fill")
    put(_extremum, "maximum minimum fmax fmin")
    put(_mixed, "addcmul addcdiv lerp")
    put(_pointwise(10, (0, 1)), "grid_sampler grid_sampler_2d grid_sampler_3d polar logaddexp")
    put(_log_sigmoid, "log_sigmoid")
    put(_fourier, "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2")
    put(_dropout, "dropout native_dropout alpha_dropout bernoulli")
    put(_channel_dropout, "feature_dropout feature_alpha_dropout")
    put(_made, "arange zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones "
        "new_full new_empty scalar_tensor eye linspace rand randn rand_like randn_like randint uniform normal_functional "
        "tril_indices triu_indices")  # fmt: skip
    put(_moved, "cat stack pad constant_pad_nd to _to_copy roll flip repeat tile repeat_interleave reshape "
        "select_scatter slice_scatter diagonal_scatter meshgrid expand view_as_real view_as_complex pixel_shuffle "
        "pixel_unshuffle hstack vstack fill unfold im2col col2im tril triu masked_scatter copy zero block_diag")  # fmt: skip
    put(_linear, "linear")
    put(_matmul, "matmul mm bmm mv dot vdot inner chain_matmul linalg_multi_dot tensordot")
    put(_addmm, "addmm baddbmm addbmm addmv")
    put(_einsum, "einsum bilinear")
    put(_grouped, "grouped_mm_fallback _grouped_mm grouped_mm")
    put(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
    put(_attention, "scaled_dot_product_attention")
    put(_normalise(_rows_of_layer_norm), "layer_norm native_layer_norm")
    put(_normalise(lambda work: work.inputs[0].shape[0] * int(work.arg(1, "num_groups"))), "group_norm")
    put(_normalise(lambda work: work.inputs[0].shape[1]), "batch_norm")
    put(_normalise(lambda work: math.prod(work.inputs[0].shape[:2])), "instance_norm")
    put(_rms_norm, "rms_norm")
    put(_softmax, "softmax log_softmax _softmax _log_softmax")
    put(_cross_entropy, "cross_entropy_loss")
    put(_nll, "nll_loss nll_loss_nd nll_loss2d")
    put(_compare_loss, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div soft_margin_loss "
        "binary_cross_entropy_with_logits poisson_nll_loss hinge_embedding_loss cosine_embedding_loss margin_ranking_loss "
        "triplet_margin_loss "
        "cosine_similarity pairwise_distance")  # fmt: skip
    put(_reduction(), "sum mean all any count_nonzero argmax argmin nansum cumsum histc bincount")
    put(_reduction(2, (0, 1)), "_weight_norm")
    put(_reduction(2, (0,)), "var var_mean")
    put(_reduction(2, (0,), output=True), "std std_mean amax amin prod norm linalg_vector_norm logsumexp cumprod "
        "logcumsumexp frobenius_norm")  # fmt: skip
    put(_picked, "max min sort topk msort argsort kthvalue median mode aminmax cummax cummin")
    put(_embedding, "embedding")
    put(_indexed, "index gather take_along_dim index_select index_put _unsafe_index scatter scatter_add "
        "scatter_reduce index_add index_copy index_fill take masked_select embedding_bag bucketize searchsorted")  # fmt: skip
    put(_pool, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool2d max_pool2d_with_indices lp_pool2d")  # fmt: skip
    put(_adaptive_mean, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
    put(_resize, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
        "upsample_linear1d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact2d")  # fmt: skip
    put(_cell, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
    put(_recurrent("lstm"), "lstm")
    put(_recurrent("gru"), "gru")
    put(_recurrent("rnn"), "rnn_tanh rnn_relu")
    return rows


_ROWS = _table()
