"""Graphs go to JSON and come back equal; the fingerprint knows models, not batch sizes."""

from __future__ import annotations

import json

import pytest
import torch
from tests.graph.families import FAMILIES, captured
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from weft.graph import capture, from_json, graph_fingerprint, interpret, load, save, to_json


@pytest.mark.parametrize("name", FAMILIES)
def test_json_round_trip(name):
    _, graph = captured(name)
    again = from_json(json.loads(json.dumps(to_json(graph))))
    assert again == graph
    assert again.constants.keys() == graph.constants.keys()
    assert graph_fingerprint(again) == graph_fingerprint(graph)
    for key, value in graph.constants.items():
        assert again.constants[key].dtype == value.dtype and torch.equal(again.constants[key], value)


def test_constants_infinities_and_torch_values_survive(tmp_path):
    numbers = torch.tensor([1.5, float("inf"), -0.0], dtype=torch.bfloat16)

    def forward(x, target):
        y = x.masked_fill(x > 2, float("-inf")).to(torch.float64) + numbers + torch.tensor(3)
        return (y.nan_to_num(0, 1, -1) * torch.zeros(3, dtype=torch.float64).add(2.0)).sum() + target.sum()

    class Model(nn.Module):
        def forward(self, x, target):
            return forward(x, target)

    batch = (torch.tensor([1.0, 2.0, 3.0]), torch.ones(1))
    graph = capture(Model(), batch)
    save(graph, tmp_path / "graph.json")
    again = load(tmp_path / "graph.json")
    assert again == graph
    torch.testing.assert_close(interpret(again, {}, batch), forward(*batch))


def test_files_that_are_no_graph_are_named(tmp_path):
    _, graph = captured("mlp")
    text = json.dumps(to_json(graph))
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="not a graph file"):
        from_json({"format": "something else"})
    damaged = to_json(graph)
    del damaged["nodes"][3]["outputs"]
    with pytest.raises(ValueError, match="damaged"):
        from_json(damaged)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "resnet", "t5", "lstm", "unet"])
def test_fingerprint_is_the_same_for_other_batch_sizes(name):
    (model, batch, loss), graph = captured(name)
    longer = tree_map(lambda t: torch.cat([t, t[:1]]), batch)
    single = tree_map(lambda t: t[:1], batch)
    names = [node.name for node in graph.nodes]
    for other in (capture(model, longer, loss), capture(model, single, loss)):
        assert graph_fingerprint(other) == graph_fingerprint(graph)
        assert [node.name for node in other.nodes] == names


def test_fingerprint_differs_between_models():
    batch = (torch.ones(2, 4), torch.ones(2, 4))
    linear = lambda *, bias=True: nn.Linear(4, 4, bias=bias)
    models = [
        nn.Sequential(linear(), nn.ReLU(), linear()),
        nn.Sequential(linear(), nn.GELU(), linear()),
        nn.Sequential(linear(), nn.ReLU(), linear(bias=False)),
        nn.Sequential(linear(), linear(), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)),
        nn.Sequential(linear(), nn.Softmax(0)),
        nn.Sequential(linear(), nn.Softmax(1)),
    ]
    tied = nn.Sequential(linear(), nn.ReLU(), linear())
    tied[2].weight = tied[0].weight
    frozen = nn.Sequential(linear(), nn.ReLU(), linear())
    frozen[0].weight.requires_grad_(False)
    prints = [graph_fingerprint(capture(model, batch, F.mse_loss)) for model in [*models, tied, frozen]]
    assert len(set(prints)) == len(prints)


def test_the_table_names_every_call_once():
    _, graph = captured("gpt2")
    text = str(graph)
    lines = text.splitlines()
    assert (
        lines[0].startswith(f"graph in training mode: {len(graph.calls)} calls") and "input_ids i64[4, 10]" in lines[1]
    )
    assert any(line.startswith("[*2] 35 calls, 2 times") for line in lines)
    assert sum(" = " in line for line in lines) == len(graph.calls) - 35
    assert "transformer.h.0.attn.c_attn" in text and "transformer.h.1.attn.c_attn" not in text
    assert max(map(len, lines)) < 240
