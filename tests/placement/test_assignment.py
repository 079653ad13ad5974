"""Assignments: written and read back, checked on construction, and carried over to other batch sizes."""

from __future__ import annotations

import json

import pytest
import torch
from random_plans import random_assignment
from test_localize import assert_equals_one_device, attention

from weft.errors import UnknownOperators
from weft.graph import capture
from weft.placement.assignment import Assignment, ParameterPlacement, refit, replicated
from weft.placement.axes import find_cuts, signatures
from weft.placement.layout import Mesh, Partial, Replicate, Shard


def test_an_assignment_survives_json():
    model, batch = attention()
    graph = capture(model, batch)
    mesh = Mesh((2, 2), ("data", "tensor"), ((3, 1), None))
    assignment = random_assignment(graph, mesh, find_cuts(graph, 4), 1)
    assert Assignment.from_dict(json.loads(json.dumps(assignment.to_dict()))) == assignment


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_refit_to_another_batch_size_equals_one_device(rows):
    """Also one row on two devices: the second gets nothing."""
    torch.manual_seed(0)
    model, batch = attention()
    graph = capture(model, batch)
    mesh = Mesh((2,))
    other = tuple(torch.randint(0, 11, (rows, 5)) for _ in batch)
    resized = capture(model, other)
    for seed in range(6):
        assignment = random_assignment(graph, mesh, find_cuts(graph), seed)
        assert_equals_one_device(refit(assignment, graph, resized), resized, model, other)


def test_refit_of_data_parallel_stays_data_parallel():
    model, batch = attention()
    graph = capture(model, batch)
    cuts, everywhere = find_cuts(graph), replicated(graph, Mesh((2,)))
    by_batch = {
        node.name: next(
            (s,) for s in reversed(signatures(graph, node, 2, cuts)) if s.outputs[0] == cuts.shard((node.name, 0), 0)
        )
        for node in graph.calls
        if node.op in ("layer_norm", "gelu")
    }
    assignment = Assignment(
        everywhere.mesh, {**everywhere.signatures, **by_batch}, everywhere.parameters, everywhere.buffers
    )
    resized = capture(model, tuple(x[:3] for x in batch))
    for before, after in zip(graph.calls, resized.calls, strict=True):
        again = refit(assignment, graph, resized).signatures[after.name]
        assert again == assignment.signatures[before.name] or before.name not in by_batch


def test_refit_refuses_another_model():
    model, batch = attention()
    graph = capture(model, batch)
    other = capture(torch.nn.Linear(2, 1), (torch.randn(3, 2), torch.randn(3, 1)), torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match="other operators than the planned one"):
        refit(replicated(graph, Mesh((2,))), graph, other)


def test_zero_stages_are_placements():
    whole, cut = (Replicate(), Shard(1)), Shard(0)
    one, two, three = (ParameterPlacement.zero(whole, {0: cut}, stage) for stage in (1, 2, 3))
    assert (one.stored, one.gradient, one.state) == (whole, whole, (cut, Shard(1)))
    assert (two.stored, two.gradient, two.state) == (whole, (cut, Shard(1)), (cut, Shard(1)))
    assert three.stored == (cut, Shard(1))
    with pytest.raises(ValueError, match="where the parameter is Replicate"):
        ParameterPlacement.zero(whole, {1: cut}, 3)
    with pytest.raises(ValueError, match="cannot be stored as P"):
        ParameterPlacement(whole, (Partial(), Shard(1)), whole, whole)


@torch.library.custom_op("weft_test::running_product", mutates_args=())
def running_product(x: torch.Tensor) -> torch.Tensor:
    """Along dim 0: can be split along dim 1, as probing finds."""
    return x.flip(0).cumprod(0)


@torch.library.custom_op("weft_test::sorted_all", mutates_args=())
def sorted_all(x: torch.Tensor) -> torch.Tensor:
    """Mixes everything with everything: cannot be split at all."""
    return x.flatten().sort().values.view(x.shape) * x.sum()


for operator in (running_product, sorted_all):
    operator.register_fake(torch.empty_like)


class Mysterious(torch.nn.Module):
    def __init__(self, *operators):
        super().__init__()
        self.operators = operators

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for operator in self.operators:
            x = operator(x * 2)
        return x.sum()


def test_operators_that_cannot_be_split_are_reported_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    graph = capture(Mysterious(sorted_all, running_product, sorted_all), (torch.randn(4, 3),))
    with pytest.raises(UnknownOperators) as raised:
        find_cuts(graph)
    assert [target for _, target, _, _ in raised.value.operators] == ["weft_test.sorted_all.default"] * 2
    assert "allow_replicated=['weft_test.sorted_all.default']" in str(raised.value) and "[4, 3]" in str(raised.value)
    assert find_cuts(graph, allow_replicated=["weft_test.sorted_all.default"]).rows


def test_an_operator_without_a_row_is_probed(tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    graph = capture(Mysterious(running_product), (torch.randn(4, 3),))
    node = next(node for node in graph.calls if node.target.startswith("weft_test"))
    assert {str(s) for s in signatures(graph, node, 2, find_cuts(graph))} == {"R -> R", "S(1) -> S(1)"}
    with pytest.raises(UnknownOperators):
        find_cuts(graph, probe=False)
