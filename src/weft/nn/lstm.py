"""A recurrent language model: embedding, stacked LSTM, linear head over the vocabulary.

Source: Zaremba, Sutskever and Vinyals, "Recurrent neural network regularization", arXiv:1409.2329 (dropout only between
layers, never along time).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LSTMLanguageModel", "LSTMOptions"]


@dataclass(frozen=True)
class LSTMOptions:
    """Sizes of an `LSTMLanguageModel`: token ids, embedding width, LSTM width and depth, dropout probability in [0, 1)."""

    vocabulary: int = 256
    width: int = 128
    hidden: int = 256
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"LSTMOptions: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LSTMOptions: dropout must be in [0, 1), got {self.dropout}")


class LSTMLanguageModel(nn.Module):
    """Predicts every next token of a sequence from those before it; the state starts at zero for each sequence."""

    def __init__(self, options: LSTMOptions | None = None):
        super().__init__()
        self.options = options = options or LSTMOptions()
        self.embed = nn.Embedding(options.vocabulary, options.width)
        self.dropout = nn.Dropout(options.dropout)
        between = options.dropout if options.layers > 1 else 0.0  # nn.LSTM warns of dropout after a single layer
        self.lstm = nn.LSTM(options.width, options.hidden, options.layers, batch_first=True, dropout=between)
        self.head = nn.Linear(options.hidden, options.vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for `tokens` (B, T), or the mean cross-entropy to `targets` (B, T)."""
        output, _ = self.lstm(self.dropout(self.embed(tokens)))
        logits = self.head(self.dropout(output))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
