"""Whole applications: data, model, loss and metric together. The only package that knows data sets.

    language-model          a byte-level GPT (or LSTM) on text              `language_model`
    image-classification    a residual network on small images              `image_classification`
    hf:NAME                 a HuggingFace architecture, random weights      `huggingface`

`build("language-model", batch_size=8)` and `build("hf:llama")` make a `Task`: a frozen value with a model factory and
deterministic batches. Library packages never import this one; they take model, batches and loss as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft import names
from weft.tasks.huggingface import huggingface
from weft.tasks.images import image_classification
from weft.tasks.task import Metric, Task
from weft.tasks.text import language_model

__all__ = ["TASKS", "Metric", "Task", "build", "huggingface", "image_classification", "language_model"]

TASKS: dict[str, Callable[..., Task]] = {
    "language-model": language_model,
    "image-classification": image_classification,
}


def build(name: str, **options: Any) -> Task:
    """The task called `name`, with the options of its function (`batch_size`, `seed`, `data`, ...).

    `hf:NAME` is a HuggingFace architecture; sizes of its configuration may follow: `hf:gpt2,n_layer=4,n_embd=128`.

    Raises:
        ValueError: no such task (the nearest names are given), or an option that it does not take.

    >>> build("language-model", batch_size=4).batch[0].shape
    torch.Size([4, 128])
    """
    if name.startswith("hf:"):
        architecture, *settings = name.removeprefix("hf:").split(",")
        return huggingface(architecture, settings={**_settings(settings), **options.pop("settings", {})}, **options)
    make = names.pick(name, TASKS, "task (besides hf:NAME)")
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"task {name}: {error}; it takes what `help(weft.tasks.{make.__name__})` lists") from error


def _settings(items: list[str]) -> dict[str, Any]:
    """`["n_layer=4", "act=relu"]` as a dictionary; numbers become numbers."""
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"hf: {item!r} is not a setting; write NAME=VALUE, as in hf:gpt2,n_layer=4")
        settings[key.strip()] = _value(text.strip())
    return settings


def _value(text: str) -> Any:
    if text in ("true", "True", "false", "False"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
