"""Models that memory is tested on: name -> factory of (model, batch, loss), the same bits for the same seed.

Dropout is on (the generator is what a memory policy gets wrong first), values are float32, models are in training mode.
`small` sizes take milliseconds; `card` sizes are those of the Coop card's table and of the issue's claims. A call of a factory
leaves torch's generator as it was; whoever compares two runs seeds it before each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.bench.step_traces import CellByCell
from weft.nn import GPT, GPTOptions, ResNet, ResNetOptions, UNet, UNetOptions

__all__ = ["MODELS", "TRANSFORMERS", "CellByCell", "Made", "make", "run", "snapshot"]

Size = Literal["small", "card"]


class Made(NamedTuple):
    """A model in training mode, a batch and its loss, after the convention of `weft.graph.batch` (None: the model returns it)."""

    model: nn.Module
    batch: Any
    loss: Callable[..., Tensor] | None


def make(name: str, size: Size = "small", seed: int = 0) -> Made:
    """The model called `name` (a key of `MODELS`); skips the test if it needs transformers and that is not there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MODELS[name](size)
    made.model.train()
    return made


def run(made: Made, seed: int = 1) -> Tensor:
    """One forward and backward from a seeded generator; gradients are added to those that are there. Returns the loss."""
    from weft.graph import call

    torch.manual_seed(seed)
    value = call(made.model, made.batch, made.loss)
    value.backward()
    return value.detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter, gradient and buffer by name: what has to be bit-equal."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def gpt(size: Size) -> Made:
    """Pre-norm GPT with dropout. Small: in attention too, which torch computes in many operators then.

    Card: 6 layers of 256, batch 8 x 256 tokens, no dropout of attention weights; 270 MiB of activations at the peak (the
    card says 268), 66 MiB with a checkpoint per block (64).
    """
    if size == "card":
        options, rows, length = (
            GPTOptions(vocabulary=2048, context=256, layers=6, heads=8, width=256, dropout=0.1),
            8,
            256,
        )
    else:
        options, rows, length = GPTOptions(vocabulary=61, context=24, layers=3, heads=2, width=32, dropout=0.1), 3, 20
    model = GPT(options)
    if size == "card":
        for block in model.blocks:
            block.attention.dropout = 0.0
    tokens = torch.randint(0, options.vocabulary, (rows, length + 1))
    return Made(model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), None)


def unet(size: Size) -> Made:
    """Encoder and decoder with skips, group norm, SiLU: tensors of very unlike sizes."""
    options, rows, side = (
        (UNetOptions(3, 2, (16, 32, 64, 128)), 6, 64) if size == "card" else (UNetOptions(3, 2, (8, 12, 16)), 2, 16)
    )
    return Made(UNet(options), (torch.randn(rows, 3, side, side), torch.randint(0, 2, (rows, side, side))), None)


def resnet(size: Size) -> Made:
    """Basic blocks with batch norm: running statistics move once per step. Card: one width, tensors of equal size."""
    if size == "card":
        options, rows, side = ResNetOptions(3, 10, (16,), (8,)), 16, 32
    else:
        options, rows, side = ResNetOptions(3, 10, (8, 12), (1, 2)), 4, 12
    return Made(ResNet(options), (torch.randn(rows, 3, side, side), torch.randint(0, 10, (rows,))), None)


def bilstm(size: Size) -> Made:
    """Card: about 5000 operators, 27 MiB at the peak."""
    vocabulary, rows, steps, width, hidden = (100, 56, 81, 64, 64) if size == "card" else (50, 3, 6, 10, 14)
    model = CellByCell(vocabulary, width, hidden, 5, 0.1)
    return Made(model, (torch.randint(0, vocabulary, (rows, steps)), torch.randint(0, 5, (rows,))), None)


def _transformers() -> Any:
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


def swin(size: Size) -> Made:
    """Shifted windows: rolls, permutes, stochastic depth, attention in windows (transformers)."""
    t = _transformers()
    if size == "card":
        sizes = {
            "image_size": 64,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [2, 2, 2],
            "num_heads": [2, 4, 8],
            "window_size": 4,
        }
    else:
        sizes = {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        }
    off = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1, "num_labels": 8}
    model = t.SwinForImageClassification(t.SwinConfig(**sizes, **off))
    side, rows = sizes["image_size"], 8 if size == "card" else 2
    return Made(model, {"pixel_values": torch.randn(rows, 3, side, side), "labels": torch.randint(0, 8, (rows,))}, None)


def bert(size: Size) -> Made:
    """Masked language model with tied embeddings (transformers)."""
    t = _transformers()
    layers, width, heads, rows, length = (4, 128, 4, 8, 128) if size == "card" else (2, 32, 4, 3, 10)
    config = t.BertConfig(
        vocab_size=200, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        max_position_embeddings=length,
    )  # fmt: skip
    tokens = torch.randint(2, 200, (rows, length))
    labels = tokens.masked_fill(torch.rand(rows, length) > 0.3, -100)
    return Made(t.BertForMaskedLM(config), {"input_ids": tokens, "labels": labels}, None)


class Tied(nn.Module):
    """One weight three times (embedding, a layer in the middle, head), views of it, and updates in place."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.inner = nn.Linear(width, vocabulary)
        self.inner.weight = self.embed.weight
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = torch.relu_(self.inner(x))
        half = y[..., ::2]
        x = x + F.dropout(y, 0.2, self.training) @ self.embed.weight
        x = x.mul_(half.mean(-1, keepdim=True) + 1.0).add_(1.0)
        self.seen.add_(x.detach().mean((0, 1)))
        return F.cross_entropy(self.head(torch.tanh(x)).flatten(0, 1), targets.flatten())


def tied(size: Size) -> Made:
    vocabulary, width, rows, length = (512, 128, 16, 128) if size == "card" else (30, 12, 3, 7)
    tokens = torch.randint(0, vocabulary, (rows, length))
    return Made(Tied(vocabulary, width), (tokens, tokens.roll(-1, 1)), None)


class Halting(nn.Module):
    """A layer repeated until its output is large enough, at most `most` times: the number of operators depends on the data."""

    def __init__(self, width: int, most: int):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.most = most

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        size = x.detach().norm().item()
        for _ in range(self.most):
            x = F.dropout(x + torch.relu(self.again(x)), 0.1, self.training)
            if x.detach().norm().item() > 1.5 * size:
                break
        chosen = x[x[:, 0] > 0] if bool((x[:, 0] > 0).any()) else x
        return F.cross_entropy(self.leave(x), targets) + chosen.square().mean()


def halting(size: Size) -> Made:
    width, rows = (128, 256) if size == "card" else (24, 64)  # beside them a generator's state, 5 kB, is little
    return Made(Halting(width, 8), (torch.randn(rows, width), torch.randint(0, 4, (rows,))), None)


MODELS: dict[str, Callable[[Size], Made]] = {
    "gpt": gpt,
    "unet": unet,
    "resnet": resnet,
    "bilstm": bilstm,
    "swin": swin,
    "bert": bert,
    "tied": tied,
    "halting": halting,
}
TRANSFORMERS = ("swin", "bert")
