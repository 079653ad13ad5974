"""Parts that need no processes: the optimizer's recipe, micro-batches, shared memory, pieces and buckets."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime.plans import VOCABULARY, Tiny, batch, plan_of, tiny, zero
from torch import nn
from torch.nn import functional as F

import weft
from weft.cluster import Cluster
from weft.graph import capture
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.layout import Mesh, Replicate, Shard
from weft.placement.parameters import Readings
from weft.planner import Plan
from weft.planner.buckets import buckets_of
from weft.planner.costs import Costs
from weft.runtime.batches import count_samples, count_tokens, split
from weft.runtime.failure import PeerWatch, how_it_ended
from weft.runtime.optimizer import check_elementwise, recipe
from weft.runtime.pieces import hold, holdings
from weft.runtime.shared import SharedTensors, take
from weft.runtime.store import plan_buckets

ELEMENTWISE: dict[str, Any] = {
    "class": torch.optim.SGD,
    "partial": functools.partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.9)),
    "function": lambda parameters: torch.optim.Adam(parameters, lr=0.2, amsgrad=True),
    "function of groups": lambda parameters: torch.optim.SGD([{"params": list(parameters), "lr": 0.5}], momentum=0.9),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_recipe_makes_the_same_optimizer(name: str) -> None:
    model = Tiny()
    wanted = recipe(ELEMENTWISE[name], model)
    want = ELEMENTWISE[name](model.parameters())
    built = wanted.build({name: nn.Parameter(p.detach()[:1].clone()) for name, p in model.named_parameters()})
    assert type(built) is type(want)
    for group, expected in zip(built.param_groups, want.param_groups, strict=True):
        ours = {k: v for k, v in group.items() if k not in ("params", "fused")}  # for `fused` see test_optimizer.py
        assert ours == {k: v for k, v in expected.items() if k not in ("params", "fused")}
        assert [p.shape[1:] for p in group["params"]] == [p.shape[1:] for p in expected["params"]]


def test_groups_of_an_instance_go_by_identity() -> None:
    model = Tiny()
    groups = [{"params": [model.up.weight], "lr": 3.0}, {"params": [model.head.weight, model.up.bias]}]
    wanted = recipe(torch.optim.RMSprop(groups, lr=0.1, alpha=0.5), model)
    assert wanted.names() == [["up.weight"], ["embed.weight", "up.bias"]]
    assert [options["lr"] for options, _ in wanted.groups] == [3.0, 0.1] and wanted.defaults["alpha"] == 0.5


class Averaging(torch.optim.SGD):
    """Divides each gradient by its norm: the result of a piece depends on the rest."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad / p.grad.norm()
        return super().step(closure)


class Mine(torch.optim.SGD):
    """Elementwise, but not one that weft knows."""


def test_only_elementwise_optimizers_update_pieces() -> None:
    model = Tiny()
    for kind in (torch.optim.Adafactor, Averaging):
        wanted = recipe(kind, model)
        check_elementwise(wanted, [])
        with pytest.raises(ValueError, match=f"{kind.__name__} is not elementwise"):
            check_elementwise(wanted, ["up.weight"])
    for kind in (torch.optim.AdamW, Mine, functools.partial(Mine, lr=0.1, momentum=0.9)):
        check_elementwise(recipe(kind, model), ["up.weight"])


def test_an_optimizer_that_runs_the_model_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LBFGS evaluates the model .* closure"):
        recipe(torch.optim.LBFGS, Tiny())


@pytest.mark.parametrize(
    ("given", "says"), [({"plan": "plan.json"}, "Plan.load"), ({"scheduler": 3}, "scheduler must")]
)
def test_what_is_of_another_kind_is_said(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says), weft.run(**{"plan": None, "model": tiny(), **given}):
        pass


def test_a_used_optimizer_is_refused() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch()).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="state from earlier steps"):
        recipe(optimizer, model)


@given(samples=st.integers(1, 20), parts=st.integers(1, 8))
def test_micro_batches_are_the_batch(samples: int, parts: int) -> None:
    x, positions, scale = torch.arange(samples * 2).view(samples, 2), torch.arange(2)[None], torch.tensor(3.0)
    pieces = split([x, positions, scale], parts)
    assert len(pieces) == min(parts, samples)
    assert torch.equal(torch.cat([leaves[0] for leaves, _ in pieces]), x)
    assert sum(share for _, share in pieces) == pytest.approx(1)
    for leaves, share in pieces:
        assert share == pytest.approx(len(leaves[0]) / samples)
        assert torch.equal(leaves[1], positions) and torch.equal(leaves[2], scale)
    assert count_samples([scale, x]) == samples and count_tokens([torch.zeros(2, 2), x]) == 2 * samples


def test_micro_batches_need_one_number_of_samples() -> None:
    with pytest.raises(ValueError, match="5 entries in dim 0 and another has 6"):
        split([torch.zeros(6), torch.zeros(5)], 2)


def test_shared_tensors(tmp_path: Path) -> None:
    box = SharedTensors(tmp_path)
    sent = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(7),
        "c": torch.zeros(0, 4),
        "d": torch.ones(2, dtype=torch.bfloat16),
    }
    got = take(box.put(sent))
    assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in sent.items())
    again = box.put({"a": torch.full((3, 5), 2.0)})
    assert torch.equal(got["a"], torch.full((3, 5), 2.0)), "the same memory, nothing copied"
    assert take(box.put({"big": torch.ones(1000)}))["big"].sum() == 1000
    box.close()
    assert again.nbytes > 0 and not list(tmp_path.iterdir())


@given(
    rows=st.integers(0, 9), columns=st.integers(1, 4), shape=st.sampled_from([(2,), (3,), (2, 2), (1, 3)]),
    dims=st.tuples(st.integers(0, 1), st.integers(0, 1)), weighted=st.booleans(),
)  # fmt: skip
def test_pieces_partition_the_parameter(rows: int, columns: int, shape: Any, dims: Any, weighted: bool) -> None:
    """Over all devices every element is kept exactly once, in the place that `offsets` says."""
    weights = tuple(tuple(float(i + 1) for i in range(p)) if weighted else None for p in shape)
    mesh = Mesh(shape, weights=weights)
    placement = ParameterPlacement.zero((Replicate(),) * mesh.ndim, {a: Shard(dims[a]) for a in range(mesh.ndim)}, 2)
    whole = torch.arange(rows * columns).view(rows, columns)
    seen = []
    for position in mesh.positions():
        h = hold("w", whole.shape, torch.float32, True, placement, mesh, position)
        piece = h.take(whole)
        assert tuple(piece.shape) == h.piece_shape()
        (a, b), (c, d) = h.offsets() or ()
        assert torch.equal(piece, whole[a:b, c:d])
        seen.append(piece.flatten())
    assert sorted(torch.cat(seen).tolist()) == list(range(rows * columns))


def test_buckets_hold_everything_once_in_the_order_of_backward() -> None:
    graph = capture(tiny(), batch())
    mesh = Mesh((2,))
    for stage in range(4):
        held = holdings(graph, Assignment(mesh, {}, zero(graph, mesh, stage)), 0)
        buckets = plan_buckets(held, Readings.of(graph))
        names = [h.name for bucket in buckets for h in bucket]
        assert sorted(names) == sorted(graph.parameters)
        assert names.index("embed.weight") > names.index("down.weight")
        assert all(len({h.scatter_axes for h in bucket}) == 1 for bucket in buckets)


class Adapted(nn.Module):
    """Blocks of a frozen matrix and a trained one, each as large as what shares a gather, after a small embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 500)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"frozen": nn.Linear(500, 500), "ours": nn.Linear(500, 500, bias=False)}) for _ in range(3)
        )
        for layer in self.layers:
            layer["frozen"].requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + F.gelu(layer["frozen"](x)) + layer["ours"](x)
        return x.square().mean()


@pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
@pytest.mark.parametrize("strategy", ["dp", "zero-1", "zero-3", "tp"])
def test_the_planner_prices_the_buckets_that_the_runtime_starts(strategy: str, weights: Any) -> None:
    model, tokens = Adapted(), torch.randint(VOCABULARY, (6, 3))
    mesh = Mesh((2, 2), weights=(weights, None))
    strategies = ("zero-3" if strategy == "tp" else "dp", strategy)
    plan = Plan.manual(model, (tokens,), cluster=Cluster.local(processes=4), mesh=mesh, strategy=strategies)
    assert plan.graph is not None
    readings = Readings.of(plan.graph)
    priced = {each.names for each in buckets_of(plan.graph, plan.assignment, Costs(plan.cluster, mesh), readings)}
    for rank in range(4):
        started = plan_buckets(holdings(plan.graph, plan.assignment, rank), readings)
        owed = [each for each in started if any(h.scatter_axes or (h.sum_axes and h.trainable) for h in each)]
        assert {tuple(h.name for h in each) for each in owed} == priced


def test_repeated_blocks_are_gathered_one_by_one() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(600, 600), nn.GELU()) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x.square().mean()

    plan = plan_of(Deep(), (torch.randn(4, 600),), (2,), 3)
    assert plan.graph is not None
    buckets = plan_buckets(holdings(plan.graph, plan.assignment, 0), Readings.of(plan.graph))
    assert [{h.name.split(".")[1] for h in bucket} for bucket in buckets] == [{"3"}, {"2"}, {"1"}, {"0"}]


@pytest.mark.parametrize("size", [2, 3])  # of three, one never comes
def test_a_closed_watch_has_no_thread_and_has_said_so_last(size: int) -> None:
    """Also where it is closed in the middle of a heartbeat."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    beating, go_on = threading.Event(), threading.Event()

    def step() -> int:
        if threading.current_thread() is not threading.main_thread():
            beating.set()
            go_on.wait(10)
        return 0

    watches = [PeerWatch(store, 0, size, step), PeerWatch(store, 1, size, lambda: 0)]
    for watch in watches:
        watch.start(lambda: None)
    if size == 2:
        assert beating.wait(10)
    later = threading.Timer(0.1, go_on.set)
    later.start()
    for watch in reversed(watches):
        watch.close()
    assert not any(thread.name == "weft-watch" for thread in threading.enumerate())
    assert [store.get(f"weft/beat/{rank}") for rank in range(2)] == [b"done"] * 2
    later.join()


def test_how_a_process_ended() -> None:
    assert how_it_ended(-15) == "was killed by SIGTERM"
    assert how_it_ended(3) == "exited with code 3"
    assert how_it_ended(None) == "stopped answering"
