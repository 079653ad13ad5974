"""Any architecture of the `transformers` package by name, with random weights: `hf:gpt2`, `hf:llama`, `hf:vit`.

Nothing is downloaded. `build` makes the configuration from the package's own defaults, made tiny unless said otherwise, and
`kind_of` finds which training task the architecture has: predict the next byte, fill in masked bytes, continue a text
(encoder-decoder), or classify images. Data are those of our other tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft import names
from weft.tasks.images import Images, image_batches, load_images
from weft.tasks.task import Split, Task, mean_loss
from weft.tasks.text import read_text, standard_library, windows

__all__ = ["huggingface"]

MASKED = 0.15  # share of bytes that a masked language model fills in (Devlin et al., arXiv:1810.04805)
MASK = 1  # a byte that text does not contain stands for the mask; 0 is the padding
KINDS = {  # task -> class that builds the model, first fit wins
    "next": "AutoModelForCausalLM",
    "continue": "AutoModelForSeq2SeqLM",
    "fill": "AutoModelForMaskedLM",
    "image": "AutoModelForImageClassification",
}
# Sizes for every name under which architectures know them; only those that a configuration has are used.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "vocab_size": 256,
    "image_size": 32,
    "patch_size": 4,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_stages": 2,
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def huggingface(
    architecture: str,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    tiny: bool | None = None,
    settings: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    context: int = 64,
    batch_size: int = 8,
    seed: int = 0,
) -> Task:
    """A task for the architecture that `transformers` calls `architecture` ("gpt2", "llama", "bert", "t5", "vit", ...).

    Batches are dictionaries of keyword arguments; the model returns its loss.

    Args:
        config: a `config.json` or its content; default the architecture's own defaults.
        tiny: shrink every size to a few dozens, so that it runs anywhere; default True without `config`.
        settings: fields of the configuration set last, such as {"n_layer": 4}.
        data: text file, or images as in `image_classification`.
        context: bytes per row of text.
    Raises:
        ImportError: `transformers` is not installed.
        ValueError: unknown architecture, one without a task of ours, or a configuration that does not build.
    """
    hf = _transformers()
    made = _config(hf, architecture, config, config is None if tiny is None else tiny, dict(settings or {}))
    kind = _kind_of(hf, architecture, made)
    images = load_images(data or "shapes") if kind == "image" else None
    if images is not None:
        _set(made, num_labels=images.classes, num_channels=images.train[0].shape[1])
    else:
        _check_vocabulary(architecture, made)
    factory = partial(_build, architecture, made, KINDS[kind])
    if images is not None:
        stream: Any = partial(_image_batches, images, getattr(made, "image_size", None))
        name, tokens = images.name, 0
    else:
        text = standard_library() if data is None else read_text(data)
        stream = partial(_text_batches, kind, text, context)
        name, tokens = "standard-library" if data is None else Path(data).name, context
        windows(text, context, "test", 1, seed)
    return Task(f"hf:{architecture}/{name}", factory, stream, None, mean_loss, batch_size, tokens, seed)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("hf:NAME needs the transformers package: pip install 'weft[hf]'") from error
    return transformers


def _config(hf: Any, architecture: str, config: Any, tiny: bool, settings: dict[str, Any]) -> Any:
    known = hf.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    key = names.pick(architecture, {name: name for name in known}, "architecture of transformers")
    kind = hf.AutoConfig.for_model(key).__class__
    fields: dict[str, Any] = {}
    if config is not None:
        try:
            fields = dict(config) if isinstance(config, Mapping) else json.loads(Path(config).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"hf:{architecture}: cannot read the configuration {config}: {error}") from error
    default = kind()
    if tiny:
        fields.update({name: size for name, size in TINY.items() if _has_size(default, name)})
        fields.update({name: 0 for name in SPECIAL if hasattr(default, name)})
    unknown = [name for name in settings if not hasattr(default, name)]
    if unknown:
        near = names.nearest(unknown[0], default.to_dict())
        hint = f"did you mean {' or '.join(near)}?" if near else f"see {kind.__name__}"
        raise ValueError(f"hf:{architecture}: its configuration has no {unknown[0]!r}; {hint}")
    fields.update(settings)
    try:
        made = kind(**{name: value for name, value in fields.items() if name != "model_type"})
    except Exception as error:  # whatever the architecture's own checks raise
        raise ValueError(f"hf:{architecture}: {kind.__name__} refuses {fields}: {error}") from error
    if made.is_encoder_decoder and getattr(made, "decoder_start_token_id", None) is None:
        made.decoder_start_token_id = getattr(made, "pad_token_id", None) or 0
    return made


def _has_size(config: Any, name: str) -> bool:
    """The configuration stores this size itself, under this very name and in this form (some names are mere synonyms)."""
    stored = config.to_dict().get(name)
    if name in config.attribute_map:
        return False
    if stored is None:
        return name in ("head_dim", "num_key_value_heads") and hasattr(config, name)
    return isinstance(stored, list) == isinstance(TINY[name], list)


def _set(config: Any, **fields: Any) -> None:
    for name, value in fields.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _kind_of(hf: Any, architecture: str, config: Any) -> str:
    for kind, auto in KINDS.items():
        if type(config) in getattr(hf, auto)._model_mapping and not (
            kind == "next" and (config.is_encoder_decoder or _is_encoder(hf, config))
        ):
            return kind
    raise ValueError(
        f"hf:{architecture} predicts no text and classifies no images, so weft has no data for it; train it with batches of your "
        "own (weft train MODULE:FUNCTION)"
    )


def _is_encoder(hf: Any, config: Any) -> bool:
    """Encoders such as BERT also have a decoder head; their own task is to fill in."""
    return type(config) in hf.AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)


def _check_vocabulary(architecture: str, config: Any) -> None:
    if config.get_text_config().vocab_size < 256:
        size = config.get_text_config().vocab_size
        raise ValueError(f"hf:{architecture}: vocab_size must be at least 256, since text comes in bytes; got {size}")


def _build(architecture: str, config: Any, auto: str) -> nn.Module:
    try:
        model: nn.Module = getattr(_transformers(), auto).from_config(config)
    except Exception as error:  # whatever the architecture's own constructor raises
        raise ValueError(
            f"hf:{architecture} does not build from this configuration ({error}); set the fields that it minds, as in "
            f"hf:{architecture},hidden_size=64, or give a config.json"
        ) from error
    return model


def _text_batches(
    kind: str, text: bytes, context: int, split: Split, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The loss of a "next" model shifts its labels itself; a "continue" model reads one half and writes the other."""
    generator = torch.Generator().manual_seed(seed)
    for rows in windows(text, context - 1, split, batch_size, seed):
        if kind == "next":
            yield {"input_ids": rows, "labels": rows.clone()}
        elif kind == "continue":
            half = context // 2
            yield {"input_ids": rows[:, :half].contiguous(), "labels": rows[:, half:].contiguous()}
        else:
            masked = torch.rand(rows.shape, generator=generator) < MASKED
            masked[:, 0] = True  # never a row without a target
            yield {"input_ids": rows.masked_fill(masked, MASK), "labels": rows.masked_fill(~masked, -100)}


def _image_batches(
    images: Images, size: int | None, split: Split, batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    for x, y in image_batches(images, split, batch_size, seed):
        if isinstance(size, int) and size != x.shape[-1]:
            x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        yield {"pixel_values": x, "labels": y}
