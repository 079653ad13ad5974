"""Every legal assignment gives the loss and the gradients of one device."""

from __future__ import annotations

import pytest
import torch
from random_plans import random_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from weft.graph import Graph, capture, flatten_batch
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.axes import find_cuts, signatures
from weft.placement.comms import Comms, run_threads
from weft.placement.layout import Mesh, Partial, Replicate, Shard, take
from weft.placement.localize import localize


class Attention(nn.Module):
    """A block with fused q, k, v, causal attention and an MLP; odd sizes: 3 heads of 4, 5 positions."""

    def __init__(self, heads: int = 3, head_dim: int = 4, vocabulary: int = 11):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 7)
        self.down = nn.Linear(7, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm(x)).split(width, -1)
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.head(x).view(b * t, -1), targets.view(-1), ignore_index=3)


class Convolutional(nn.Module):
    """Convolutions with batch norm, group norm, pooling and a mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1, bias=False)  # a bias before batch norm has gradient 0
        self.bn = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 6, 3, stride=2, groups=3)
        self.gn = nn.GroupNorm(3, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        x = F.max_pool2d(F.silu(self.gn(self.b(x))), 2)
        return F.cross_entropy(self.head(x.mean((2, 3))), y)


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention().double(), (torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (4, 5)))


def convolutional() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Convolutional().double(), (torch.randn(5, 3, 9, 9, dtype=torch.float64), torch.randint(0, 5, (5,)))


def run_local(
    graph: Graph, assignment: Assignment, model: nn.Module, batch: tuple[Tensor, ...]
) -> list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Loss, gradients of leaves and buffers of every device of the mesh, run as threads."""
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    mesh = assignment.mesh

    def device(comms: Comms) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        rank = mesh.at(comms.coordinates)
        local = localize(graph, assignment, rank, comms)
        with torch.no_grad():
            for name, leaf in local.leaves.items():
                leaf.copy_(take(state[name], assignment.parameters[name].used, mesh, comms.coordinates))
            for node in graph.of("buffer"):
                placements = assignment.buffers.get(node.target, ())
                held = local.local_buffers[node.target]
                held.copy_(
                    take(state[node.target], placements, mesh, comms.coordinates) if placements else state[node.target]
                )
        loss = local(*flatten_batch(batch)[0])
        loss.backward(torch.full_like(loss, local.seed))
        whole = local.whole_loss(loss.detach())
        return (
            whole,
            {name: leaf.grad for name, leaf in local.leaves.items() if leaf.grad is not None},
            local.local_buffers,
        )

    return run_threads(mesh, device)


def assert_equals_one_device(assignment: Assignment, graph: Graph, model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    mesh = assignment.mesh
    results = run_local(graph, assignment, model, batch)
    loss = model(*batch)  # after the local run: it moves the buffers
    model.zero_grad()
    loss.backward()
    for whole, _, _ in results:
        torch.testing.assert_close(whole, loss.detach(), rtol=1e-10, atol=1e-12)
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, placement in assignment.parameters.items():
        for position in mesh.positions():
            owed = [axis for axis, p in enumerate(placement.used) if not isinstance(p, Shard)]
            alike = [
                other
                for there, (_, other, _) in zip(mesh.positions(), results, strict=True)
                if all(there[axis] == position[axis] for axis in range(mesh.ndim) if axis not in owed)
            ]
            piece = take(gradients[name], placement.used, mesh, position)
            total = sum((other[name] for other in alike if name in other), torch.zeros_like(piece))
            scale = gradients[name].abs().max().clamp_min(1e-12)
            assert (total - piece).abs().max() <= 1e-10 * scale if piece.numel() else True, name


@pytest.mark.parametrize("build", [attention, convolutional])
@pytest.mark.parametrize(
    "mesh",
    [Mesh((2,)), Mesh((3,)), Mesh((2,), weights=((3, 1),)), Mesh((2, 2))],
    ids=["2", "3", "3to1", "2x2"],
)
def test_random_legal_plans_equal_one_device(build, mesh):
    torch.manual_seed(0)
    model, batch = build()
    model.train()
    graph = capture(model, batch)
    cuts = find_cuts(graph, finest=mesh.size)
    for seed in range(25):  # 2 models x 4 meshes x 25 = 200 plans
        assignment = random_assignment(graph, mesh, cuts, seed)
        assert_equals_one_device(assignment, graph, model, batch)


@pytest.mark.parametrize("build", [pytest.param(attention, marks=pytest.mark.slow), convolutional])
def test_three_mesh_axes_equal_one_device(build):
    torch.manual_seed(0)
    model, batch = build()
    model.train()
    graph, mesh = capture(model, batch), Mesh((2, 2, 2))
    cuts = find_cuts(graph, finest=mesh.size)
    for seed in range(5):
        assert_equals_one_device(random_assignment(graph, mesh, cuts, seed), graph, model, batch)


def test_a_wrong_signature_is_noticed():
    torch.manual_seed(0)
    model, batch = attention()
    mesh = Mesh((2,))
    graph = capture(model, batch)
    assignment = random_assignment(graph, mesh, find_cuts(graph), 0)
    layer_norm = next(node for node in graph.calls if node.op == "layer_norm")
    right = assignment.signatures[layer_norm.name][0]
    wrong = type(right)((Partial(), *right.inputs[1:]), (Partial(),))  # a norm of a partial sum is not a partial sum
    broken = Assignment(
        mesh, {**assignment.signatures, layer_norm.name: (wrong,)}, assignment.parameters, assignment.buffers
    )
    with pytest.raises(AssertionError):
        assert_equals_one_device(broken, graph, model, batch)


def test_fused_projection_is_cut_by_heads():
    model, batch = attention()
    graph = capture(model, batch)
    cuts = find_cuts(graph)
    weight = graph.parameters["qkv.weight"]
    assert cuts.shard((weight.name, 0), 0) == Shard(0, None, unit=4, blocks=3)


class Noisy(nn.Module):
    """Dropout of a parameter: its gradient shows the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (F.dropout(self.weight, 0.5) * x).sum()


def masks(placement: Shard | Replicate, seeds: list[int]) -> list[list[Tensor]]:
    """Per device, the dropout mask of each step."""
    model, batch, mesh = Noisy(), (torch.ones(16),), Mesh((2,))
    graph = capture(model, batch)
    cuts = find_cuts(graph)
    chosen = {
        node.name: next((s,) for s in signatures(graph, node, 2, cuts) if s.inputs[0] == placement)
        for node in graph.calls
    }
    assignment = Assignment(mesh, chosen, {"weight": ParameterPlacement.same((placement,))})

    def device(comms: Comms) -> list[Tensor]:
        local = localize(graph, assignment, mesh.at(comms.coordinates), comms)
        leaf = local.leaves["weight"]
        with torch.no_grad():
            leaf.fill_(1.0)
        found = []
        for seed in seeds:
            local.new_step(seed)
            leaf.grad = None
            local(*batch).sum().backward()
            found.append(leaf.grad > 0)
        return found

    return run_threads(mesh, device)


def test_dropout_is_equal_where_replicated_and_independent_where_sharded():
    whole, cut = masks(Replicate(), [1, 2, 1]), masks(Shard(0), [1, 2, 1])
    for found in (whole, cut):
        for of_device in found:
            assert torch.equal(of_device[0], of_device[2]), "the same step draws the same"
            assert not torch.equal(of_device[0], of_device[1]), "another step draws anew"
    assert torch.equal(whole[0][0], whole[1][0])
    assert cut[0][0].shape == (4, 16) and not torch.equal(cut[0][0], cut[1][0])
