"""Captured graphs compute what the model computes, and capturing leaves the model alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.graph.families import FAMILIES, captured
from torch import nn
from torch.nn import functional as F

from weft.graph import Ref, TensorSpec, call, capture, flatten_batch, interpret


def step(model: nn.Module, run: Any) -> tuple[torch.Tensor, dict[str, Any], dict[str, torch.Tensor]]:
    """Loss, gradients and buffers after one run with a fixed seed."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = run()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_computes_the_models_loss_gradients_and_buffers(name):
    (model, batch, loss), graph = captured(name)
    model, other = copy.deepcopy(model), copy.deepcopy(model)
    mine = step(model, lambda: call(model, batch, loss))
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    theirs = step(other, lambda: interpret(graph, tensors, flatten_batch(batch)[0]))

    torch.testing.assert_close(theirs[0], mine[0], rtol=1e-5, atol=1e-6)
    for key, gradient in mine[1].items():
        if gradient is None:
            assert theirs[1][key] is None, key
        else:
            torch.testing.assert_close(
                theirs[1][key], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
    for key, buffer in mine[2].items():
        torch.testing.assert_close(theirs[2][key], buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "mistral", "lstm"])
def test_capture_leaves_model_and_random_state_alone(name):
    model, batch, loss = FAMILIES[name]()
    model.eval()
    next(iter(model.children())).train()
    modes = [module.training for module in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {key: value.clone() for key, value in tensors.items()}
    state = torch.random.get_rng_state()
    graph = capture(model, batch, loss)
    assert graph.train
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(tensors)
    for key, value in after.items():
        assert value is tensors[key], f"{key} is another tensor after capture"
        assert torch.equal(value, values[key]), f"{key} changed"


def test_a_failed_capture_leaves_the_model_alone_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.eval()
    before = list(model.parameters())
    with pytest.raises(ValueError):
        capture(model, torch.ones(2, 5))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert not model.training and not model[1].training


def test_models_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got function"):
        capture(lambda x: x.sum(), torch.ones(2))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(3)), (torch.ones(2, 4), torch.ones(2, 3)), F.mse_loss)


def test_a_model_on_the_meta_device_gives_the_same_graph():
    with torch.device("meta"):
        model, batch, loss = FAMILIES["gpt2"]()
    real, real_batch, _ = FAMILIES["gpt2"]()
    assert capture(model, batch, loss) == capture(real, real_batch, loss) == capture(model, real_batch, loss)
    assert next(model.parameters()).is_meta


def test_tied_parameters_are_one_node_with_an_alias():
    model, batch, loss = FAMILIES["gpt2"]()
    graph = capture(model, batch, loss)
    assert graph.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in graph.parameters
    readers = graph.consumers()[Ref(graph.parameters["transformer.wte.weight"].name)]
    assert {node.op for node, _ in readers} == {"embedding", "linear"}


def test_a_tensor_given_twice_is_two_inputs():
    tokens = torch.randint(0, 5, (3, 4))
    graph = capture(_Tagger(), {"tokens": tokens, "tags": tokens})
    assert [(node.target, node.outputs) for node in graph.of("input")] == [
        ("tokens", (TensorSpec((3, 4), torch.int64),)),
        ("tags", (TensorSpec((3, 4), torch.int64),)),
    ]
    readers = graph.consumers()
    assert all(Ref(node.name) in readers for node in graph.of("input"))


def test_frozen_parameters_need_no_gradients_nor_work_for_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 1))
    free = capture(model, (torch.ones(3, 4), torch.ones(3, 1)), F.mse_loss).calls
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    frozen = capture(model, (torch.ones(3, 4), torch.ones(3, 1)), F.mse_loss)
    assert [node.outputs[0].requires_grad for node in frozen.calls] == [False, False, True, True]
    assert [node.cost.flops_backward > 0 for node in frozen.calls] == [False, False, True, True]
    assert not any(any(node.cost.keeps_inputs) for node in frozen.calls[:2])
    assert frozen.calls[2].cost.flops_backward < free[2].cost.flops_backward
    assert frozen.calls[2].cost.keeps_inputs == (True, False, False)  # the weight is only kept for the input's gradient


def test_modules_and_lines_are_known():
    graph = capture(
        _Tagger(), {"tokens": torch.zeros(2, 3, dtype=torch.int64), "tags": torch.zeros(2, 3, dtype=torch.int64)}
    )
    modules = {node.op: node.module for node in graph.calls}
    assert modules["embedding"] == "embed" and modules["cross_entropy_loss"] == ""
    source = Path(__file__).read_text().splitlines()
    where = {node.op: node.where for node in graph.calls}
    assert where["linear"].startswith("test_capture.py:")
    assert "self.head(" in source[int(where["linear"].split(":")[1]) - 1]


def test_evaluation_mode_drops_dropout_and_needs_no_loss():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    graph = capture(model, torch.ones(4, 3), train=False)
    assert [node.op for node in graph.calls] == ["linear", "batch_norm"]
    assert not any(node.mutates for node in graph.calls)
    assert graph.spec(graph.loss).shape == (4, 3) and not graph.train
    assert model.training


def test_frozen_batch_norms_of_a_model_in_training_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model[1].eval()
    graph = capture(model, (torch.ones(4, 3), torch.ones(4, 3)), F.mse_loss)
    assert not any(node.mutates for node in graph.calls)


def test_a_loss_modules_weights_are_constants():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    model = nn.Linear(4, 3)
    batch = (torch.randn(5, 4), torch.randint(0, 3, (5,)))
    graph = capture(model, batch, loss)
    assert set(graph.parameters) == {"weight", "bias"} and not graph.of("buffer")
    assert torch.equal(graph.constants["loss.weight"], loss.weight)
    value = interpret(graph, dict(model.named_parameters()), batch)
    torch.testing.assert_close(value, loss(model(batch[0]), batch[1]))


def test_unused_tensors_stay_in_the_graph_and_dead_calls_do_not():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 2)
            self.register_buffer("steps", torch.zeros(3))

        def forward(self, x, extra):
            torch.relu(self.unused(x))
            return self.used(x).sum()

    graph = capture(Model(), (torch.ones(3, 2), torch.ones(1)))
    assert [node.op for node in graph.calls] == ["linear", "sum"]
    assert set(graph.parameters) == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
    assert [node.target for node in graph.of("buffer")] == ["steps"]
    assert [node.target for node in graph.of("input")] == ["0", "1"]


def test_a_twelve_layer_gpt2_on_the_meta_device_folds_into_one_block():
    import transformers

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    tokens = torch.zeros(8, 1024, dtype=torch.int64)
    graph = capture(model, {"input_ids": tokens, "labels": tokens})
    (repeat,) = graph.repeats
    assert repeat.count == 12
    assert graph.calls[repeat.start].module == "transformer.h.0.ln_1"
    parameters = sum(node.outputs[0].numel for node in graph.of("parameter"))
    assert parameters == sum(p.numel() for p in model.parameters())


class _Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens, tags):
        logits = self.head(self.embed(tokens))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tags.flatten())}
