"""Batches: how they reach the model, and what `check_batch` says of one that does not fit."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weft.graph import call, capture, check_batch, flatten_batch, graph_fingerprint, interpret, unflatten_batch

X, Y = torch.randn(4, 3), torch.randn(4, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, scale=1.0):
        return self.linear(x) * scale


class WithLoss(Model):
    def forward(self, x, y, how="tuple"):
        loss = F.mse_loss(self.linear(x), y)
        output = {"tuple": (loss, x), "dict": {"logits": x, "loss": loss}, "scalar": loss}
        return collections.namedtuple("Output", "logits loss")(x, loss) if how == "attribute" else output[how]


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [
        (Model(), (X, Y), F.mse_loss),
        (Model(), [X, Y], F.mse_loss),
        (Model(), (X, 2.0, Y), F.mse_loss),
        (Model(), {"x": X, "y": Y}, lambda out, batch: F.mse_loss(out, batch["y"])),
        (Model(), X, lambda out, batch: (out**2).mean() + batch.sum()),
        (Model(), ({"x": X}, Y), lambda out, y: F.mse_loss(out, y)),
        (WithLoss(), (X, Y), None),
        (WithLoss(), {"x": X, "y": Y}, None),
        *[(WithLoss(), {"x": X, "y": Y, "how": how}, None) for how in ("tuple", "dict", "scalar", "attribute")],
    ],
)
def test_conventions(model, batch, loss):
    if isinstance(batch, tuple) and isinstance(batch[0], dict):
        model = _Unpack(model)
    graph = capture(model, batch, loss)
    leaves, paths, structure = flatten_batch(batch)
    assert [node.target for node in graph.of("input")] == paths
    assert graph.batch == structure == json.loads(json.dumps(structure))
    value = interpret(graph, dict(model.named_parameters()), check_batch(graph, batch))
    torch.testing.assert_close(value, call(model, batch, loss))
    again = flatten_batch(unflatten_batch(structure, leaves))
    assert again[1:] == (paths, structure) and all(a is b for a, b in zip(again[0], leaves, strict=True))


class _Unpack(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((X,), "2 items"),
        ({"x": X}, "must be a tuple"),
        ((X, "y"), "1 must be a tensor"),
        ((X.double(), Y), "0 must be float32"),
        ((X[:3], Y), r"0 must have shape \(4, 3\)"),
        ((X, Y[0]), r"1 must have shape \(4, 2\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(batch, words):
    graph = capture(Model(), (X, Y), F.mse_loss)
    with pytest.raises(ValueError, match=words):
        check_batch(graph, batch)


def test_lists_and_tuples_are_the_same():
    """What a DataLoader makes of samples that are tuples."""
    graph, other = (capture(Model(), batch, F.mse_loss) for batch in ((X, Y), [X, Y]))
    assert all(a is b for a, b in zip(check_batch(graph, [X, Y]), (X, Y), strict=True))
    assert graph_fingerprint(graph) == graph_fingerprint(other)


def test_sizes_may_differ_where_said():
    graph = capture(Model(), (X, Y), F.mse_loss)
    assert [leaf.shape[0] for leaf in check_batch(graph, (X[:1], Y[:1]), vary=(0,))] == [1, 1]
    with pytest.raises(ValueError, match="only dims"):
        check_batch(graph, (X[:, :2], Y), vary=(0,))
    check_batch(graph, (X[:1, :1], Y), vary=None)


def test_keys_may_come_in_any_order_but_all_must_be_there():
    graph = capture(WithLoss(), {"x": X, "y": Y})
    leaves = check_batch(graph, {"y": Y, "x": X})
    assert leaves[0] is X and leaves[1] is Y
    with pytest.raises(ValueError, match=r"missing \['y'\], extra \['z'\]"):
        check_batch(graph, {"x": X, "z": Y})


def test_plain_values_are_part_of_the_program():
    graph = capture(Model(), (X, 2.0, Y), F.mse_loss)
    with pytest.raises(ValueError, match=r"1 was 2.0 when the model was captured"):
        check_batch(graph, (X, 3.0, Y))


@pytest.mark.parametrize(
    ("batch", "loss", "words"),
    [
        ({}, None, "no tensor"),
        ((X[:0], Y[:0]), F.mse_loss, "it is empty: its tensors have no rows"),
        ((X.numpy(), Y), F.mse_loss, "0 is a ndarray"),
        ({1: X}, None, "keys must be strings"),
        ((X,), F.mse_loss, "inputs and a target"),
        ((X, Y), lambda out, y: out, "loss: must return a scalar tensor"),
        ((X, Y), lambda out: out.sum(), r"loss: must take \(output, target\).*got one of \(out\)"),
        (X, None, "without loss= the output must be a scalar"),
    ],
)
def test_batches_and_losses_that_cannot_be_used(batch, loss, words):
    with pytest.raises(ValueError, match=words):
        capture(Model(), batch, loss)
