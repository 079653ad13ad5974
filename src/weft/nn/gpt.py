"""A decoder-only transformer (GPT-2's shape): learned positions, pre-norm blocks, GELU, causal attention.

Shape letters: B batch, T tokens, D width, H heads, K = D / H width of a head, V vocabulary.

    x = embed(token) + embed(position)
    x = x + attention(norm(x));  x = x + mlp(norm(x))      for every layer
    logits = norm(x) W^T

Source: Radford et al., "Language models are unsupervised multitask learners", 2019; initialisation as there: normal with
deviation 0.02, projections that add to the residual stream scaled by 1/sqrt(2 layers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "GPTOptions"]


@dataclass(frozen=True)
class GPTOptions:
    """Sizes of a `GPT`.

    Attributes:
        vocabulary: number of token ids, V.
        context: longest sequence, in tokens.
        layers, heads, width: depth, attention heads, and D; heads must divide the width.
        hidden: width of the MLP; 0 means 4 D.
        dropout: probability, in [0, 1), after embeddings, attention weights and both residual branches.
        bias: whether linear layers and norms have biases.
        fused: one linear layer for queries, keys and values instead of three.
        tied: the head uses the token embedding's weight.
    """

    vocabulary: int = 256
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    hidden: int = 0
    dropout: float = 0.0
    bias: bool = True
    fused: bool = True
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTOptions: {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"GPTOptions: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.hidden < 0:
            raise ValueError(f"GPTOptions: hidden must be >= 0, got {self.hidden}; 0 means 4 times the width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTOptions: dropout must be in [0, 1), got {self.dropout}")


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D)."""

    def __init__(self, options: GPTOptions):
        super().__init__()
        width = options.width
        self.heads, self.dropout, self.fused = options.heads, options.dropout, options.fused
        if options.fused:
            self.qkv = nn.Linear(width, 3 * width, bias=options.bias)
        else:
            self.query = nn.Linear(width, width, bias=options.bias)
            self.key = nn.Linear(width, width, bias=options.bias)
            self.value = nn.Linear(width, width, bias=options.bias)
        self.project = nn.Linear(width, width, bias=options.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        if self.fused:
            parts = self.qkv(x_BTD).split(width, dim=2)
        else:
            parts = (self.query(x_BTD), self.key(x_BTD), self.value(x_BTD))
        q, k, v = (part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.project(y_BHTK.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """One pre-norm transformer layer, (B, T, D) to (B, T, D)."""

    def __init__(self, options: GPTOptions):
        super().__init__()
        hidden = options.hidden or 4 * options.width
        self.norm_attention = nn.LayerNorm(options.width, bias=options.bias)
        self.attention = Attention(options)
        self.norm_mlp = nn.LayerNorm(options.width, bias=options.bias)
        self.expand = nn.Linear(options.width, hidden, bias=options.bias)
        self.contract = nn.Linear(hidden, options.width, bias=options.bias)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_attention(x_BTD)))
        return x_BTD + self.dropout(self.contract(F.gelu(self.expand(self.norm_mlp(x_BTD)))))


class GPT(nn.Module):
    """Decoder-only transformer.

    >>> model = GPT(GPTOptions(vocabulary=64, context=16, layers=1, heads=2, width=8))
    >>> tokens = torch.zeros(2, 16, dtype=torch.long)
    >>> model(tokens).shape, model(tokens, tokens).shape
    (torch.Size([2, 16, 64]), torch.Size([]))
    """

    def __init__(self, options: GPTOptions | None = None):
        super().__init__()
        self.options = options = options or GPTOptions()
        self.embed = nn.Embedding(options.vocabulary, options.width)
        self.position = nn.Embedding(options.context, options.width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width, bias=options.bias)
        self.head = nn.Linear(options.width, options.vocabulary, bias=False)
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("project.weight", "contract.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * options.layers))
        if options.tied:
            self.head.weight = self.embed.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T), or the mean cross-entropy to `targets` (B, T).

        Raises:
            ValueError: T exceeds `options.context`.
        """
        if tokens.shape[1] > self.options.context:
            raise ValueError(
                f"GPT: a sequence of {tokens.shape[1]} tokens exceeds the context of {self.options.context}"
            )
        position_T = torch.arange(tokens.shape[1], device=tokens.device)
        x_BTD = self.dropout(self.embed(tokens) + self.position(position_T))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.head(self.norm(x_BTD))
        if targets is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten())
