"""Tiny models of every family that weft promises to take unmodified: name -> function giving (model, batch, loss)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from weft.graph import Graph, capture
from weft.nn import GPT, GPTOptions, LSTMLanguageModel, LSTMOptions, ResNet, ResNetOptions, UNet, UNetOptions

VOCABULARY = 64
Family = tuple[nn.Module, Any, Callable[..., Any] | None]


def _text(batch: int = 4, length: int = 10) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (batch, length))
    return {"input_ids": tokens, "labels": tokens}


def _images(size: int, batch: int = 4) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.randint(0, 8, (batch,))}


def _transformers() -> Any:
    warnings.filterwarnings("ignore", module="transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def gpt2() -> Family:
    t = _transformers()
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, **sizes)), _text(), None


def llama() -> Family:
    t = _transformers()
    return t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **_DECODER)), _text(), None


def mistral() -> Family:
    t = _transformers()
    return t.MistralForCausalLM(t.MistralConfig(num_key_value_heads=2, sliding_window=6, **_DECODER)), _text(), None


def mixtral() -> Family:
    t = _transformers()
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return t.MixtralForCausalLM(t.MixtralConfig(num_key_value_heads=2, **experts, **_DECODER)), _text(), None


def bert() -> Family:
    t = _transformers()
    return t.BertForMaskedLM(t.BertConfig(**_DECODER)), _text(), None


def t5() -> Family:
    t = _transformers()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=VOCABULARY, **sizes)), _text(), None


def vit() -> Family:
    t = _transformers()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    return t.ViTForImageClassification(t.ViTConfig(num_labels=8, **sizes)), _images(16), None


def whisper() -> Family:
    t = _transformers()
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    model = t.models.whisper.modeling_whisper.WhisperEncoder(t.WhisperConfig(**sizes))
    return model, {"input_features": torch.randn(4, 8, 32)}, lambda output, batch: output[0].pow(2).mean()


def resnet() -> Family:
    t = _transformers()
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 8}
    return t.ResNetForImageClassification(t.ResNetConfig(**sizes)), _images(32), None


def convnext() -> Family:
    t = _transformers()
    sizes = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "patch_size": 2, "num_labels": 8}
    return t.ConvNextForImageClassification(t.ConvNextConfig(**sizes)), _images(32), None


def own_gpt() -> Family:
    model = GPT(GPTOptions(vocabulary=VOCABULARY, width=32, layers=2, heads=4, context=16))
    return model, tuple(torch.randint(0, VOCABULARY, (2, 4, 10))), None


def lstm() -> Family:
    model = LSTMLanguageModel(LSTMOptions(vocabulary=VOCABULARY, width=24, hidden=64, dropout=0.1))
    return model, tuple(torch.randint(0, VOCABULARY, (2, 4, 10))), None


def unet() -> Family:
    return UNet(UNetOptions(widths=(8, 16))), (torch.randn(2, 3, 16, 16), torch.randint(0, 2, (2, 16, 16))), None


def own_resnet() -> Family:
    model = ResNet(ResNetOptions(widths=(8, 16), depths=(3, 2)))
    return model, (torch.randn(4, 3, 16, 16), torch.randint(0, 8, (4,))), None


def mlp() -> Family:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(10, 3))
    return model, (torch.randn(8, 6), torch.randint(0, 3, (8,))), F.cross_entropy


FAMILIES: dict[str, Callable[[], Family]] = {
    "gpt2": gpt2, "llama": llama, "mistral": mistral, "mixtral": mixtral, "bert": bert, "t5": t5, "vit": vit,
    "whisper": whisper, "resnet": resnet, "convnext": convnext, "own-gpt": own_gpt, "lstm": lstm, "unet": unet,
    "own-resnet": own_resnet, "mlp": mlp,
}  # fmt: skip


@functools.cache
def captured(name: str) -> tuple[Family, Graph]:
    """A family's model in training mode, batch and loss, and its graph; made once, so do not change the model."""
    torch.manual_seed(0)
    model, batch, loss = FAMILIES[name]()
    return (model.train(), batch, loss), capture(model, batch, loss)
