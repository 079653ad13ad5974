"""Models of weft's own tasks and tests: plain `nn.Module`s that import nothing else of weft.

    GPT                 decoder-only transformer, pre-norm          `GPTOptions`
    LSTMLanguageModel   embedding, LSTM, linear head                `LSTMOptions`
    ResNet              residual network for small images           `ResNetOptions`
    UNet                group norm, skip connections, upsampling    `UNetOptions`

Every `forward(inputs, targets=None)` returns the scalar training loss if targets are given and the prediction otherwise, so
that a model runs under weft, under DDP, or alone, without a wrapper.
"""

from __future__ import annotations

from weft.nn.gpt import GPT, GPTOptions
from weft.nn.lstm import LSTMLanguageModel, LSTMOptions
from weft.nn.resnet import ResNet, ResNetOptions
from weft.nn.unet import UNet, UNetOptions

__all__ = [
    "GPT", "GPTOptions", "LSTMLanguageModel", "LSTMOptions", "ResNet", "ResNetOptions", "UNet", "UNetOptions",
]  # fmt: skip
