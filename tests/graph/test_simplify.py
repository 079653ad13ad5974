"""Writes, views and spellings: the rewritten graph runs like the module that was captured."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weft.graph import Graph, capture, interpret


class Body(nn.Module):
    """A model whose forward is a function, with two parameters and two buffers to play with."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.function(self, x)


def check(function: Callable[..., torch.Tensor], tolerance: float = 1e-12) -> Graph:
    """Capture a model of `function`, run both twice, compare; the graph for further looks."""
    torch.manual_seed(0)
    model = Body(function)
    x = torch.randn(4, 4, dtype=torch.float64)
    graph = capture(model, x.clone())
    for node in graph.calls:
        assert not node.target.split(".")[1].endswith("_") or node.target.startswith("aten.__") or node.mutates, node
    other = copy.deepcopy(model)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for _ in range(2):
        torch.manual_seed(3)
        mine = model(x.clone())
        torch.manual_seed(3)
        theirs = interpret(graph, tensors, [x.clone()])
        torch.testing.assert_close(theirs, mine, rtol=tolerance, atol=tolerance)
        mine.backward()
        theirs.backward()
    for (name, mine_p), theirs_p in zip(model.named_parameters(), other.parameters(), strict=True):
        if mine_p.grad is None:
            assert theirs_p.grad is None, name
        else:
            torch.testing.assert_close(theirs_p.grad, mine_p.grad, rtol=tolerance, atol=tolerance)
    for mine_b, theirs_b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(theirs_b, mine_b)
    return graph


def test_writes_through_views_reach_the_base_and_its_other_views():
    def forward(self, x):
        y = x @ self.w
        flat, turned, first = y.view(2, 8), y.t(), y[:, 0]
        y.mul_(2)
        first.add_(self.b)
        y[:, 1] = 3.0
        y[1:3, 2:] += 1
        turned[2].zero_()
        return (flat * flat).sum() + (turned * self.w).sum() + first.sum() + y.sum()

    check(forward)


def test_writes_to_copies_stay_there():
    def forward(self, x):
        y = x @ self.w
        copy_, same = y.clone(), y.contiguous()
        copy_.mul_(3)
        same.add_(1)
        return (y * y).sum() + copy_.sum() + same.sum()

    check(forward)


def test_writes_to_the_batch_and_index_put():
    def forward(self, x):
        x[0] = 5.0
        x.clamp_(-1, 2)
        y = x @ self.w
        y[torch.arange(3)] = self.b
        return (y * y).sum()

    check(forward)


def test_buffers_keep_their_writes_and_reads_see_the_right_one():
    def forward(self, x):
        before = self.seen.clone()
        y = x @ self.w
        self.seen.copy_(y.detach()[0])
        self.seen[:2].mul_(0.5)
        self.seen += before
        self.count += 1
        return (y * self.seen).sum() + before.sum()

    graph = check(forward)
    written = {ref.node for node in graph.calls for ref in node.mutates}
    assert written == {node.name for node in graph.of("buffer")}


def test_batch_norm_lists_the_statistics_it_writes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graph = capture(model, (torch.ones(3, 4), torch.ones(3, 4)), F.mse_loss)
    norm = next(node for node in graph.calls if node.op == "batch_norm")
    assert [graph[ref.node].target for ref in norm.mutates] == ["1.running_mean", "1.running_var"]
    counter = next(node for node in graph.calls if node.op == "add_")
    assert [graph[ref.node].target for ref in counter.mutates] == ["1.num_batches_tracked"]


def test_no_grad_regions_are_inlined_and_detached():
    def forward(self, x):
        y = x @ self.w
        with torch.no_grad():
            scale = (y * 2).abs().max()
            constant = x.sum() * 2
        return (y / scale).sum() * constant

    graph = check(forward)
    assert [node.op for node in graph.calls].count("detach") == 1
    assert all("set_grad" not in node.target for node in graph.calls)


def test_random_writes_have_out_of_place_forms():
    def forward(self, x):
        keep = torch.empty(4, dtype=torch.float64).bernoulli_(0.5)
        noise = torch.zeros(4, dtype=torch.float64).uniform_()
        return ((x @ self.w) * keep + noise).sum()

    check(forward)


def test_in_place_operators_keep_the_dtype_they_write_to():
    def forward(self, x):
        y = (x @ self.w).float()
        y.mul_(self.b)  # float32 times float64, written to float32
        return y.double().sum()

    check(forward, tolerance=1e-6)


@pytest.mark.parametrize(
    "spell",
    [
        lambda x: x.view(-1, 8), lambda x: x.reshape(2, -1), lambda x: x.flatten(), lambda x: x.unflatten(0, (2, -1)),
        lambda x: x.view_as(torch.empty(2, 8)), lambda x: x.view(2, -1).view(8, 2).flatten(),
    ],
)  # fmt: skip
def test_every_reshape_is_one_reshape_with_explicit_sizes(spell):
    graph = check(lambda self, x: (spell(x @ self.w) ** 2).sum())
    shaped = [node for node in graph.calls if node.op in ("view", "reshape", "flatten", "unflatten", "view_as")]
    assert [node.target for node in shaped] == ["aten.reshape.default"]
    assert list(shaped[0].outputs[0].shape) == shaped[0].args[1]


@pytest.mark.parametrize(
    ("spell", "target", "args"),
    [
        (lambda x: x.mT, "aten.transpose.int", (0, 1)),
        (lambda x: x.T, "aten.permute.default", ([1, 0],)),
        (lambda x: x.t(), "aten.transpose.int", (0, 1)),
        (lambda x: x.swapaxes(-1, 0), "aten.transpose.int", (1, 0)),
        (lambda x: x.movedim(0, -1), "aten.permute.default", ([1, 0],)),
        (lambda x: x[-1], "aten.select.int", (0, 3)),
        (lambda x: x[1:-1], "aten.slice.Tensor", (0, 1, 3, 1)),
        (lambda x: x.narrow(1, 1, 2), "aten.slice.Tensor", (1, 1, 3, 1)),
        (lambda x: x[:, None].expand(-1, 2, -1), "aten.expand.default", ([4, 2, 4],)),
        (lambda x: x.softmax(-1), "aten.softmax.int", (1,)),
        (lambda x: torch.cat([torch.empty(0), x, x], -1), "aten.cat.default", (1,)),
    ],
)
def test_spellings_with_explicit_sizes_and_dims(spell, target, args):
    graph = check(lambda self, x: (spell(x @ self.w) ** 2).sum())
    node = next(node for node in graph.calls if node.target == target)
    assert node.args[1:] == args


def test_calls_that_do_nothing_disappear():
    def forward(self, x):
        y = (x @ self.w).contiguous().to(torch.float64).clone()
        y = F.dropout(y, 0.0)[:, :]
        y = torch.cat([y, torch.empty(0, dtype=torch.float64)])
        return y.sum()

    assert [node.op for node in check(forward).calls] == ["matmul", "sum"]


def test_outputs_of_one_call_are_refs_with_an_index():
    graph = check(lambda self, x: sum(i * part.sum() for i, part in enumerate((x @ self.w).chunk(2, -1))))
    chunk = next(node for node in graph.calls if node.op == "chunk")
    assert len(chunk.outputs) == 2 and chunk.args[2] == 1
    assert {ref.index for node in graph.calls for ref in node.inputs if ref.node == chunk.name} == {0, 1}


def attention(mask: Callable[[torch.Tensor], torch.Tensor], **options) -> tuple[Graph, object]:
    """Capture and check a model whose attention (5 x 5) is masked by `mask(x)`; the graph and its attention call."""

    def forward(self, x):
        q = (x @ self.w).view(1, 4, 1, 4).transpose(1, 2)
        return (F.scaled_dot_product_attention(q, q, q, mask(x), **options) ** 2).sum()

    graph = check(forward)
    return graph, next(node for node in graph.calls if node.kind == "attention")


def lower() -> torch.Tensor:
    positions = torch.arange(4)
    return (positions[None, :] <= positions[:, None])[None, None]


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (lambda x: lower(), [None, 0.0, True]),
        (lambda x: lower().expand(1, 3, 4, 4)[:, :1], [None, 0.0, True]),
        (
            lambda x: torch.zeros(4, 4, dtype=torch.float64).masked_fill(~lower()[0, 0], float("-inf")),
            [None, 0.0, True],
        ),
        (
            lambda x: torch.triu(torch.full((4, 4), torch.finfo(torch.float64).min, dtype=torch.float64), 1),
            [None, 0.0, True],
        ),
        (lambda x: torch.ones(4, 4, dtype=torch.bool), [None, 0.0, False]),
        (lambda x: torch.zeros(4, 4, dtype=torch.float64), [None, 0.0, False]),
    ],
)
def test_masks_made_of_constants_become_a_flag(mask, told):
    graph, node = attention(mask)
    assert list(node.args[3:]) == told
    assert not any(other.op in ("arange", "le", "expand", "triu", "full", "ones", "zeros") for other in graph.calls)


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: lower().flip(-1),
        lambda x: lower() & (torch.arange(4)[:, None] - torch.arange(4) < 3),
        lambda x: lower() | (x > 0),
        lambda x: lower().double(),
        lambda x: (torch.ones(4, 4).bernoulli() > 0.5) | True,
    ],
)
def test_other_masks_stay(mask):
    _, node = attention(mask)
    assert len(node.inputs) == 4


def test_a_known_mask_keeps_scale_and_dropout():
    _, node = attention(lambda x: lower(), dropout_p=0.25, scale=0.7)
    assert list(node.args[3:]) == [None, 0.25, True] and node.kwargs == {"scale": 0.7}
