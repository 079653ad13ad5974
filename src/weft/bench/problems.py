"""What the comparisons train and plan: a GPT on real text, a network with a very wide softmax head, GPT-2 for planning."""

from __future__ import annotations

from functools import partial
from typing import Any

from weft.bench.pair import Problem

__all__ = ["gpt2", "gpt_on_text", "wide_head"]


def gpt_on_text(
    layers: int = 6, width: int = 384, heads: int = 6, batch: int = 8, tokens: int = 128, count: int = 8, seed: int = 0,
    lr: float = 3e-4,
) -> Problem:  # fmt: skip
    """A byte-level GPT (10.7 million parameters by default) on the source text of Python's standard library."""
    import torch

    from weft.nn import GPT, GPTOptions

    options = GPTOptions(vocabulary=256, context=tokens, layers=layers, heads=heads, width=width, tied=False)

    batches = _text_batches(batch, tokens, count, seed)
    return Problem(partial(GPT, options), batches, partial(torch.optim.AdamW, lr=lr), seed)


def _text_batches(batch: int, tokens: int, count: int, seed: int) -> list[tuple[Any, ...]]:
    """The first `count` batches of (tokens, next tokens), each (batch, tokens), of the language model task."""
    from itertools import islice

    from weft.tasks import language_model

    return list(islice(language_model(context=tokens, batch_size=batch, seed=seed).batches(), count))


def wide_head(classes: int = 100_000, features: int = 128, batch: int = 64, count: int = 4, seed: int = 0) -> Problem:
    """A small backbone before a linear softmax head over `classes` classes: face or item recognition in miniature."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Recogniser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(64, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
            self.head = nn.Linear(features, classes, bias=False)

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.backbone(x)), targets)

    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(batch, 64, generator=generator), torch.randint(classes, (batch,), generator=generator))
        for _ in range(count)
    ]
    return Problem(Recogniser, batches, partial(torch.optim.AdamW, lr=1e-3), seed)


def gpt2(batch: int = 8, tokens: int = 1024) -> tuple[Any, tuple[Any, ...]]:
    """(model, batch): GPT-2 small on the meta device, which takes no memory: for planning only."""
    import torch

    from weft.nn import GPT, GPTOptions

    with torch.device("meta"):
        model = GPT(GPTOptions(vocabulary=50257, context=1024, layers=12, heads=12, width=768, dropout=0.1, tied=True))
    rows = torch.zeros(batch, tokens, dtype=torch.long)
    return model, (rows, rows.clone())
