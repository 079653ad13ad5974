"""Models of `weft.nn`: shapes, losses, causality, options refused, and that each can fit a batch."""

from __future__ import annotations

import pytest
import torch

from weft.nn import (
    GPT,
    GPTOptions,
    LSTMLanguageModel,
    LSTMOptions,
    ResNet,
    ResNetOptions,
    UNet,
    UNetOptions,
)

TINY = GPTOptions(vocabulary=11, context=8, layers=2, heads=2, width=8)


def tokens(vocabulary=11, batch=3, length=8):
    return torch.randint(0, vocabulary, (batch, length))


def cases() -> list:
    torch.manual_seed(0)
    image = torch.randn(3, 3, 8, 8)
    yield "gpt", GPT(TINY), tokens(), tokens(), (3, 8, 11)
    yield (
        "gpt separate",
        GPT(GPTOptions(11, 8, 2, 2, 8, fused=False, tied=False, bias=False)),
        tokens(),
        tokens(),
        (3, 8, 11),
    )
    yield "lstm", LSTMLanguageModel(LSTMOptions(11, 6, 7, 2)), tokens(), tokens(), (3, 8, 11)
    yield "resnet", ResNet(ResNetOptions(3, 5, (4, 8), (1, 2))), image, torch.tensor([0, 4, 2]), (3, 5)
    yield "unet", UNet(UNetOptions(3, 5, (4, 8, 12), 2)), image, torch.randint(0, 5, (3, 8, 8)), (3, 5, 8, 8)


@pytest.mark.parametrize(
    ("name", "model", "inputs", "targets", "shape"), list(cases()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_prediction_loss_and_fit(name, model, inputs, targets, shape):
    assert model(inputs).shape == shape
    before = model(inputs, targets)
    assert before.shape == ()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(inputs, targets).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(inputs, targets) < before


@pytest.mark.parametrize("model", [GPT(TINY), LSTMLanguageModel(LSTMOptions(11, 6, 7, 1))], ids=["gpt", "lstm"])
def test_language_models_see_no_future(model):
    first, second = tokens(), tokens()
    second[:, :5] = first[:, :5]
    with torch.no_grad():
        assert torch.allclose(model(first)[:, :5], model(second)[:, :5], atol=1e-6)


def test_fused_and_separate_attention_are_one_function():
    torch.manual_seed(0)
    fused, separate = GPT(TINY), GPT(GPTOptions(**{**vars(TINY), "fused": False}))
    state = {}
    for name, value in fused.state_dict().items():
        if ".qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[name.replace("qkv", part)] = piece
        else:
            state[name] = value
    separate.load_state_dict(state)
    x = tokens()
    assert torch.allclose(fused(x), separate(x), atol=1e-6)


def test_tied_head_is_one_parameter():
    model = GPT(TINY)
    assert model.head.weight is model.embed.weight
    assert model.head.weight.std() < 0.03  # not overwritten by nn.Linear's own initialisation


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: GPTOptions(width=10, heads=4), "multiple of heads"),
        (lambda: GPTOptions(dropout=1.0), "dropout must be in"),
        (lambda: GPTOptions(layers=0), "layers must be at least 1"),
        (lambda: LSTMOptions(hidden=0), "hidden must be at least 1"),
        (lambda: ResNetOptions(widths=(4,), depths=(1, 2)), "one entry >= 1 per stage"),
        (lambda: UNetOptions(widths=(6, 8), groups=4), "groups must divide every width"),
        (lambda: GPT(TINY)(tokens(length=9)), "exceeds the context of 8"),
        (lambda: UNet(UNetOptions())(torch.zeros(1, 3, 6, 8)), "multiples of 4"),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
