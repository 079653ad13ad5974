"""Operators beyond the model families: captured and run like the module, with costs that hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.graph.test_cost import differences
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.graph import Ref, capture, from_json, interpret, to_json, unpriced

ROWS, STEPS, IMAGES = torch.randn(4, 6), torch.randn(3, 5, 6), torch.randn(2, 4, 8, 8)
ZEROS = torch.zeros(4, dtype=torch.int64)


class Group(nn.Module):
    """Sums what a function makes of `x` and a parameter; `parts` are submodules for it."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.w = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x):
        y = x @ self.w if x.shape[-1] == 6 else x * self.w[0, 0]
        results = self.function(x, y, *self.parts)
        return sum(result.float().sum() for result in (results if isinstance(results, list) else [results]))


def each(x, y, *parts):
    return [part(y) for part in parts]


GROUPS: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "activations": (
        Group(
            each, nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU("tanh"), nn.Hardswish(), nn.Hardtanh(), nn.Hardsigmoid(),
            nn.LeakyReLU(),
            nn.LogSigmoid(), nn.Mish(), nn.PReLU(), nn.ReLU6(), nn.Sigmoid(), nn.SiLU(), nn.Softplus(), nn.Softshrink(),
            nn.Softsign(), nn.Tanhshrink(), nn.Threshold(0.0, 1.0), nn.GLU(), nn.Softmin(1), nn.LogSoftmax(1),
        ),
        ROWS,
    ),
    "functions": (
        Group(lambda x, y: [
            y.exp(), y.abs(), y.sin(), y.cos(), y.tan(), y.tanh(), y.abs().add(1).rsqrt(), y**2, 2**y, y / (x.abs() + 1),
            y.div(2), 1 / (y.abs() + 1), y.clamp(-1, 1), y.clamp_min(0), y.maximum(x), y.minimum(x), torch.where(x > 0, y, x),
            y.masked_fill(x > 0, 0.0), torch.lerp(y, x, 0.3), torch.addcmul(y, y, x), y.erf(), y.round(), y.sign(), y.square(),
            y.atan(), y.nan_to_num(), y.expm1(), y.fmod(2), torch.logaddexp(y, x), y.abs() ** x.abs(),
        ]),
        ROWS,
    ),
    "reductions": (
        Group(lambda x, y: [
            y.cumsum(0), y.cumprod(1), y.logsumexp(1), y.norm(), y.norm(dim=1), y.var(1), y.std(0), y.mean(0), y.amax(1),
            y.max(1).values, y.max(), y.min(), y.prod(1), y.topk(2).values, y.sort(0).values, y.softmax(0), F.normalize(y),
        ]),
        ROWS,
    ),
    "shapes": (
        Group(lambda x, y: [
            y.tril(), y.triu(1), y.roll(1, 0), y.flip(0), y.repeat(2, 1), y.repeat_interleave(2, 0), y.diagonal(), y[None].mT,
            torch.stack([y, x], -1), y.unbind(0)[0], torch.cat([y, x]).chunk(2)[0], y.unfold(1, 2, 2), F.unfold(y[None, None], 2),
            F.pad(y, (1, 1)), F.pad(y[None], (1, 1), "reflect"), y.movedim(-1, 0), y.squeeze(0), y[..., None].squeeze(-1),
        ]),
        ROWS,
    ),
    "gathers": (
        Group(lambda x, y: [
            y.gather(1, ZEROS[:, None]), y.index_select(0, ZEROS), y[ZEROS], y.scatter(1, ZEROS[:, None], 1.0),
            torch.scatter_add(y, 0, ZEROS[:, None].expand(4, 6), y), y.index_add(0, ZEROS[:2], x[:2]), F.embedding(ZEROS, y),
            torch.take_along_dim(y, ZEROS[:, None], 1), F.one_hot(ZEROS, 4),
        ]),
        ROWS,
    ),
    "products": (
        Group(lambda x, y: [
            torch.einsum("ij,kj->ik", y, x), torch.outer(y[0], y[1]), y.matmul(x.T), torch.bmm(y[None], x.T[None]),
            torch.baddbmm(y[None] @ x.T, y[None], x.T[None]), torch.dot(y[0], x[0]), y.mv(x[0]), torch.addmm(x, y, y.T @ x),
        ]),
        ROWS,
    ),
    "losses": (
        Group(lambda x, y: [
            F.mse_loss(y, x), F.l1_loss(y, x), F.smooth_l1_loss(y, x), F.huber_loss(y, x), F.cross_entropy(y, x.softmax(-1)),
            F.binary_cross_entropy_with_logits(y, x.sigmoid()), F.kl_div(F.log_softmax(y, -1), x.softmax(-1), reduction="sum"),
            F.nll_loss(F.log_softmax(y, -1), ZEROS), F.cross_entropy(y, ZEROS, label_smoothing=0.1),
            F.binary_cross_entropy(y.sigmoid(), x.sigmoid()),
        ]),
        ROWS,
    ),
    "images": (
        Group(
            each, nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d(1),
            nn.UpsamplingBilinear2d(scale_factor=2), nn.ConvTranspose2d(4, 2, 2, 2), nn.PixelShuffle(2), nn.BatchNorm2d(4),
            nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True), nn.InstanceNorm2d(4, affine=True),
            nn.Dropout2d(0.3), nn.AlphaDropout(0.3),
        ),
        IMAGES,
    ),
    "sequences": (
        Group(
            lambda x, y, attend, encode, norm: [attend(y, y, y)[0], encode(y), norm(y)],
            nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True), nn.TransformerEncoderLayer(6, 2, 12, batch_first=True),
            nn.RMSNorm(6),
        ),
        STEPS,
    ),
    "recurrent": (
        Group(
            lambda x, y, gru, rnn, cell: [gru(y)[0], rnn(y)[0], cell(y[0])[0]],
            nn.GRU(6, 4, 2), nn.RNN(6, 4, bidirectional=True), nn.LSTMCell(6, 4),
        ),
        STEPS,
    ),
    "parametrised": (
        Group(
            each, nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
        ),
        ROWS,
    ),
    "half and complex": (
        Group(
            lambda x, y, half: [
                half(y.bfloat16()), torch.fft.rfft(y).abs(),
                torch.view_as_real(torch.view_as_complex(y.view(4, 3, 2)) * torch.polar(torch.ones(3), torch.arange(3.0))),
            ],
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Softmax(-1)).bfloat16(),
        ),
        ROWS,
    ),
    "checkpointed": (
        Group(lambda x, y, part: checkpoint(part, y, use_reentrant=False), nn.Sequential(nn.Linear(6, 6), nn.GELU())), ROWS,
    ),
}  # fmt: skip

# Composites whose parts keep small things of their own.
APPROXIMATE = {
    "gru", "rnn_tanh", "lstm_cell", "fft_rfft", "scaled_dot_product_attention", "vdot", "mv", "pad", "index_add",
    "take_along_dim",
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_operators(name):
    model, x = GROUPS[name]
    model = copy.deepcopy(model).train()
    other = copy.deepcopy(model)
    graph = capture(model, x)
    assert from_json(to_json(graph)) == graph
    assert not unpriced(graph)

    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for run, own in ((lambda: model(x), model), (lambda: interpret(graph, tensors, [x]), other)):
        torch.manual_seed(1)
        own.value = run()
        own.value.backward()
    torch.testing.assert_close(other.value, model.value)
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            torch.testing.assert_close(theirs.grad, mine.grad)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(theirs, mine)

    values = {
        Ref(node.name): graph.constants.get(node.target, x)
        for node in graph.nodes
        if node.role in ("input", "constant")
    }
    values |= {Ref(node.name): tensors[node.target] for node in graph.nodes if node.role in ("parameter", "buffer")}
    wrong = {}
    for node in graph.calls:
        found = differences(graph, node, values)
        if found and node.op not in APPROXIMATE:
            wrong[f"{node.name} = {node.target}{[graph.spec(ref).shape for ref in node.inputs]}"] = found
    assert not wrong
