"""Tiny models of the families that weft takes unmodified: name -> function giving a `Specimen`.

Sizes are odd where an architecture allows it, and dropout is off: its numbers depend on who draws them. Values are float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from weft.graph import Graph, capture, flatten_batch
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
from weft.placement.assignment import Assignment
from weft.placement.axes import find_cuts
from weft.placement.comms import Comms, run_threads
from weft.placement.layout import Replicate, Shard, take
from weft.placement.localize import localize

__all__ = ["ZOO", "Specimen", "one_device", "specimen", "worst_error"]

VOCABULARY = 60
ROWS, LENGTH = 4, 9
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "attention_dropout": 0.0,
}


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model in training mode with one batch and its loss (None if the model returns it)."""

    name: str
    model: nn.Module
    batch: Any
    loss: Callable[..., Tensor] | None = None

    def graph(self) -> Graph:
        """The captured model, with casts to float32 as casts to float64."""
        with Exactly():
            return capture(self.model, self.batch, self.loss)

    def value(self) -> Tensor:
        """The loss on one device, differentiable."""
        if isinstance(self.batch, dict):
            output = self.model(**self.batch)
            return output.loss if self.loss is None else self.loss(output, self.batch)
        return self.model(*self.batch) if self.loss is None else self.loss(self.model(*self.batch[:-1]), self.batch[-1])


class Exactly(TorchFunctionMode):
    """Casts to float32 become casts to float64: transformers computes norms, softmax and losses in float32 whatever the
    dtype of the model, and rounding would hide errors below 1e-7. Covers the model on one device and its capture.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return function(*args, **kwargs)


def one_device(specimen: Specimen) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients by parameter name and buffers by name after one step's forward and backward on a fresh copy."""
    with torch.random.fork_rng(devices=[]), Exactly():
        fresh = Specimen(specimen.name, copy.deepcopy(specimen.model), specimen.batch, specimen.loss)
        if hasattr(fresh.model, "set_experts_implementation"):
            fresh.model.set_experts_implementation("eager")  # torch's grouped_mm knows no float64; the graph has none
        loss = fresh.value()
        loss.backward()
    gradients = {name: p.grad for name, p in fresh.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(fresh.model.named_buffers())


def specimen(name: str, seed: int = 0) -> Specimen:
    """The tiny model called `name`, in float64, seeded; skips the test if it needs transformers and that is not there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, batch, loss = ZOO[name]()
    model = model.double().train()
    to_double = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
    batch = {k: to_double(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(map(to_double, batch))
    return Specimen(name, model, batch, loss)


def _hf() -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def _tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCABULARY, (ROWS, length))


def _text() -> dict[str, Tensor]:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens.clone()}


def _images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, size, size), "labels": torch.randint(0, 8, (ROWS,))}


def gpt2():
    t = _hf()
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1}
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes, **off)), _text(), None


def llama():
    t = _hf()
    return t.LlamaForCausalLM(t.LlamaConfig(**DECODER, num_key_value_heads=2)), _text(), None


def mistral():
    t = _hf()
    return t.MistralForCausalLM(t.MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=6)), _text(), None


def mixtral():
    t = _hf()
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return t.MixtralForCausalLM(t.MixtralConfig(**DECODER, **experts, num_key_value_heads=2)), _text(), None


def bert():
    t = _hf()
    sizes = {k: v for k, v in DECODER.items() if k not in ("attention_dropout", "pad_token_id")}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
    batch = _text()
    masked = torch.rand(batch["labels"].shape) < 0.4
    batch["labels"] = batch["labels"].masked_fill(~masked, -100)
    return t.BertForMaskedLM(t.BertConfig(**sizes, **off)), batch, None


def t5():
    t = _hf()
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4}
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
    return model, {"input_ids": _tokens(), "labels": _tokens(7)}, None


def vit():
    t = _hf()
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 12, "patch_size": 4, "num_labels": 8}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return t.ViTForImageClassification(t.ViTConfig(**sizes, **image, **off)), _images(12), None


def whisper_encoder():
    t = _hf()
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 44}
    audio = {"num_mel_bins": 6, "max_source_positions": 10}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}
    model = t.models.whisper.modeling_whisper.WhisperEncoder(t.WhisperConfig(**sizes, **audio, **off))
    return model, {"input_features": torch.randn(ROWS, 6, 20)}, _square_of_states


def _square_of_states(output: Any, batch: Any) -> Tensor:
    return (output.last_hidden_state * torch.linspace(0.1, 1, 32).to(output.last_hidden_state)).pow(2).mean()


def resnet():
    t = _hf()
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 8}
    return t.ResNetForImageClassification(t.ResNetConfig(**sizes)), _images(20), None


def convnext():
    t = _hf()
    sizes = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "patch_size": 2, "num_labels": 8}
    return t.ConvNextForImageClassification(t.ConvNextConfig(**sizes, layer_scale_init_value=0.5)), _images(12), None


def clip():
    t = _hf()
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 1}
    image = {**sizes, "image_size": 12, "patch_size": 4}
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=image, projection_dim=16))
    return model, {"input_ids": _tokens(), "pixel_values": torch.randn(ROWS, 3, 12, 12), "return_loss": True}, None


class GraphAttention(nn.Module):
    """Nodes x (n, f) attend to their neighbours along edges (2, m): softmax over the edges that end in a node."""

    def __init__(self, features: int, heads: int, width: int, classes: int):
        super().__init__()
        self.project, self.head = nn.Linear(features, heads * width), nn.Linear(heads * width, classes)
        self.source, self.target = (nn.Parameter(torch.randn(heads, width)) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        (source, target), values = edges.unbind(0), self.project(x).view(len(x), *self.source.shape)
        scores = (values[source] * self.source).sum(-1) + (values[target] * self.target).sum(-1)
        scores = nn.functional.leaky_relu(scores, 0.2)
        lowest = torch.full((len(x), scores.shape[1]), -1e9, dtype=x.dtype)
        highest = lowest.scatter_reduce(0, target[:, None].expand_as(scores), scores, "amax")
        weights = (scores - highest[target]).exp()
        total = torch.zeros_like(lowest).index_add(0, target, weights)
        weighted = values[source] * (weights / total[target])[..., None]
        return self.head(nn.functional.elu(torch.zeros_like(values).index_add(0, target, weighted)).flatten(1))


def graph_attention():
    batch = (torch.randn(10, 8), torch.randint(0, 10, (2, 30)), torch.randint(0, 3, (10,)))
    return GraphAttention(8, 2, 6, 3), batch, nn.functional.cross_entropy


def our_gpt():
    options = GPTOptions(vocabulary=VOCABULARY, context=16, layers=2, heads=4, width=32)
    return GPT(options), (_tokens(), _tokens()), None


def our_lstm():
    return LSTMLanguageModel(LSTMOptions(VOCABULARY, 16, 20, 2)), (_tokens(), _tokens()), None


def our_resnet():
    images = torch.randn(ROWS, 3, 10, 10)
    return ResNet(ResNetOptions(3, 8, (8, 12), (1, 2))), (images, torch.randint(0, 8, (ROWS,))), None


def our_unet():
    images = torch.randn(ROWS, 3, 12, 20)
    return UNet(UNetOptions(3, 5, (8, 12, 16))), (images, torch.randint(0, 5, (ROWS, 12, 20))), None


ZOO: dict[str, Callable[[], tuple[nn.Module, Any, Callable[..., Tensor] | None]]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Mistral": mistral,
    "Mixtral": mixtral,
    "BERT": bert,
    "T5": t5,
    "ViT": vit,
    "Whisper encoder": whisper_encoder,
    "ResNet": resnet,
    "ConvNeXt": convnext,
    "CLIP": clip,
    "Graph attention network": graph_attention,
    "weft.nn.GPT": our_gpt,
    "weft.nn.LSTMLanguageModel": our_lstm,
    "weft.nn.ResNet": our_resnet,
    "weft.nn.UNet": our_unet,
}


def worst_error(specimen: Specimen, graph: Graph, assignment: Assignment) -> tuple[float, str]:
    """Largest relative error of loss, gradients and buffers against one device, and where, with devices run as threads.

    A gradient's error is relative to its largest entry, or to 1e-4 of the largest gradient of the model where it is smaller
    (a bias before a softmax has gradient 0 but for rounding).
    """
    loss, gradients, buffers = one_device(specimen)
    mesh, results = assignment.mesh, _run_devices(specimen, graph, assignment)
    errors = {"loss": max(float((whole - loss).abs() / loss.abs()) for whole, _, _ in results)}
    floor = 1e-4 * max(float(g.abs().max()) for g in gradients.values())
    for name, placement in assignment.parameters.items():
        whole = gradients.get(name, torch.zeros(graph.parameters[name].outputs[0].shape, dtype=loss.dtype))
        summed = [axis for axis, p in enumerate(placement.used) if not isinstance(p, Shard)]
        for position in mesh.positions():
            piece = take(whole, placement.used, mesh, position)
            total = torch.zeros_like(piece)
            for there, (_, local, _) in zip(mesh.positions(), results, strict=True):
                if name in local and all(
                    a == b for k, (a, b) in enumerate(zip(there, position, strict=True)) if k not in summed
                ):
                    total += local[name]
            if piece.numel():
                errors[name] = max(
                    errors.get(name, 0.0), float((total - piece).abs().max()) / max(float(whole.abs().max()), floor)
                )
    least = 1e-6 * max((float(b.double().abs().max()) for b in buffers.values() if b.numel()), default=1.0)
    for node in graph.of("buffer"):  # (a running mean of what a norm has centred is 0 but for rounding)
        placements = assignment.buffers.get(node.target, (Replicate(),) * mesh.ndim)
        for position, (_, _, local) in zip(mesh.positions(), results, strict=True):
            piece = take(buffers[node.target], placements, mesh, position)
            if piece.numel():
                difference = float((local[node.target].double() - piece.double()).abs().max())
                errors[node.target] = max(
                    errors.get(node.target, 0.0), difference / max(float(piece.double().abs().max()), least)
                )
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where


def _run_devices(specimen: Specimen, graph: Graph, assignment: Assignment) -> list[Any]:
    """Global loss, gradients of leaves and buffers of every device of the mesh, in the order of its positions."""
    model, mesh = specimen.model, assignment.mesh
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    leaves = flatten_batch(specimen.batch)[0]
    everywhere = (Replicate(),) * mesh.ndim
    cuts = find_cuts(graph, finest=mesh.size)

    def device(comms: Comms) -> Any:
        local = localize(graph, assignment, mesh.at(comms.coordinates), comms, cuts=cuts)
        with torch.no_grad():
            for name, leaf in local.leaves.items():
                leaf.copy_(take(state[name], assignment.parameters[name].used, mesh, comms.coordinates))
            for name, buffer in local.local_buffers.items():
                buffer.copy_(take(state[name], assignment.buffers.get(name, everywhere), mesh, comms.coordinates))
        loss = local(*leaves)
        loss.backward(torch.full_like(loss, local.seed))
        gradients = {name: leaf.grad for name, leaf in local.leaves.items() if leaf.grad is not None}
        return local.whole_loss(loss.detach()), gradients, local.local_buffers

    return run_threads(mesh, device)
