"""Recorded steps of five networks: what policies of recomputation are compared on, the same on every machine.

    GPT       6 layers of 256, batch 8 x 256, dropout: tensors of two or three sizes, dear matrix products
    BiLSTM    cell by cell: five thousand small operators
    U-Net     tensors of very unlike sizes
    ResNet    tensors of equal size, batch norm
    Swin      windows, rolls, stochastic depth: 676 operators (recording it needs transformers)

The files in `systems/memory/traces` hold operators, lifetimes, and CPU seconds measured once; parameters, inputs and gradients
count nothing in what `load` gives, as in the papers. `python -m weft.bench.step_traces` records them anew on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from weft.memory import Trace

__all__ = ["NETWORKS", "CellByCell", "load", "record"]


def load(network: str) -> Trace:
    """The recorded step of a key of `NETWORKS`, activations and workspace only."""
    from weft.memory import Trace

    file = resources.files("weft.bench.systems.memory") / "traces" / f"{network.lower()}.json.z"
    with resources.as_file(file) as path:
        whole = Trace.load(path)
    return whole.without("parameter", "gradient", "optimizer", "buffer", "input")


def record(folder: Path) -> None:
    """Trace every network, with operators measured here, into `folder`."""
    from weft.memory import trace

    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model, batch = make()
        trace(model.train(), batch).save(folder / f"{name.lower()}.json.z")


def _gpt() -> tuple[nn.Module, Any]:
    from weft.bench.recompute import gpt_with_dropout

    return gpt_with_dropout(0)


def _unet() -> tuple[nn.Module, Any]:
    from weft.nn import UNet, UNetOptions

    return UNet(UNetOptions(3, 2, (16, 32, 64, 128))), (torch.randn(6, 3, 64, 64), torch.randint(0, 2, (6, 64, 64)))


def _resnet() -> tuple[nn.Module, Any]:
    from weft.nn import ResNet, ResNetOptions

    return ResNet(ResNetOptions(3, 10, (16,), (8,))), (torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))


def _swin() -> tuple[nn.Module, Any]:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8]}
    chance = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1}
    model = SwinForImageClassification(SwinConfig(**sizes, **chance, window_size=4, num_labels=8))
    return model, {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 8, (8,))}


def _bilstm() -> tuple[nn.Module, Any]:
    model = CellByCell(vocabulary=100, width=64, hidden=64, classes=5, dropout=0.1)
    return model, (torch.randint(0, 100, (56, 81)), torch.randint(0, 5, (56,)))


class CellByCell(nn.Module):
    """A bidirectional LSTM written out gate by gate and step by step: thousands of small operators.

    Letters: B batch, T steps, D input width, H hidden width. `forward` takes token numbers (B, T) and targets (B,).
    """

    def __init__(self, vocabulary: int, width: int, hidden: int, classes: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.forth = nn.Linear(width + hidden, 4 * hidden)
        self.back = nn.Linear(width + hidden, 4 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, classes)
        self.hidden = hidden

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x_BTD = self.dropout(self.embed(tokens))
        steps = x_BTD.unbind(1)
        forth = self._sweep(self.forth, steps)
        back = self._sweep(self.back, steps[::-1])[::-1]
        y_B2H = torch.stack([torch.cat(pair, dim=1) for pair in zip(forth, back, strict=True)]).mean(0)
        return F.cross_entropy(self.head(self.dropout(y_B2H)), targets)

    def _sweep(self, gates: nn.Linear, steps: Any) -> list[Tensor]:
        hidden = cell = steps[0].new_zeros(steps[0].shape[0], self.hidden)
        outputs = []
        for x in steps:
            i, f, g, o = gates(torch.cat((x, hidden), dim=1)).chunk(4, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            outputs.append(hidden)
        return outputs


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "GPT": _gpt,
    "BiLSTM": _bilstm,
    "U-Net": _unet,
    "ResNet": _resnet,
    "Swin": _swin,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    record(Path(__file__).parent / "systems" / "memory" / "traces")
