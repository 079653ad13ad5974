"""Language modelling on text, byte by byte: a vocabulary of 256, no tokeniser, any file.

The default corpus is on every machine that runs this: the source of Python's own standard library, its files in sorted
order, up to 8 MiB. The last tenth is held out. A training row is a window at a random place; test rows are the windows of
the held-out part one after the other.
"""

from __future__ import annotations

import functools
import gzip
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.nn import GPT, GPTOptions, LSTMLanguageModel, LSTMOptions
from weft.tasks.task import Split, Task, bits_per_token

__all__ = ["language_model", "read_text", "standard_library", "windows"]

CORPUS_LIMIT = 8 * 2**20
HELD_OUT = 0.1
# Folders of the standard library that are not it, or are mostly tables and tests.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "lib2to3"}


def language_model(
    data: str | Path | None = None,
    *,
    model: Literal["gpt", "lstm"] = "gpt",
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    context: int = 128,
    dropout: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
) -> Task:
    """Predict every next byte of a text. Batches are (tokens, targets), each (batch_size, context) of int64.

    Args:
        data: a file of text in any encoding, plain or packed (.gz, .xz); default the standard library's source.
        model: "gpt", or "lstm" with `width` as embedding and 2 `width` as state.
        layers, width, heads, dropout: sizes of the model; `heads` is the GPT's alone.
        context: bytes per row.
    Raises:
        ValueError: the file is missing or too short, or sizes that do not fit.
    """
    text = standard_library() if data is None else read_text(data)
    name = "standard-library" if data is None else Path(data).name
    if model == "gpt":
        factory: Callable[[], nn.Module] = partial(GPT, GPTOptions(256, context, layers, heads, width, dropout=dropout))
    elif model == "lstm":
        factory = partial(LSTMLanguageModel, LSTMOptions(256, width, 2 * width, layers, dropout))
    else:
        raise ValueError(f"language_model: model must be 'gpt' or 'lstm', got {model!r}")
    stream = partial(_pairs, text, context)
    windows(text, context, "test", 1, seed)  # says now if the text is too short
    return Task(f"language-model/{name}", factory, stream, None, bits_per_token, batch_size, context, seed)


def windows(text: bytes, length: int, split: Split, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches (rows, length + 1) of int64 byte values from the split's part of a text: `batch_size` rows, fewer at the end
    of the test part.

    Raises:
        ValueError: the part has no window of that length.
    """
    cut = len(text) - int(len(text) * HELD_OUT)
    part = text[:cut] if split == "train" else text[cut:]
    if len(part) < length + 1:
        needed = int((length + 2) / HELD_OUT)
        raise ValueError(
            f"the text has {len(text)} bytes, too few for a {split} window of {length + 1}: give at least {needed} or a "
            "shorter context"
        )
    values = torch.frombuffer(bytearray(part), dtype=torch.uint8)
    return _at_random(values, length, batch_size, seed) if split == "train" else _in_order(values, length, batch_size)


def _at_random(values: Tensor, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(values) - length, (batch_size, 1), generator=generator)
        yield values[starts + offsets].long()


def _in_order(values: Tensor, length: int, batch_size: int) -> Iterator[Tensor]:
    rows = values.unfold(0, length + 1, length)
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size].long()


def _pairs(text: bytes, context: int, split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in windows(text, context, split, batch_size, seed):
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@functools.lru_cache(maxsize=4)
def standard_library(limit: int = CORPUS_LIMIT) -> bytes:
    """Source of this Python's standard library, files in order of their path, at most `limit` bytes.

    Raises:
        ValueError: this Python came without its library's source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    parts, size = [], 0
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        part = path.read_bytes()
        parts.append(part[: limit - size])
        size += len(parts[-1])
        if size >= limit:
            break
    if not size:
        raise ValueError(f"no source of the standard library in {root}; name a text file instead (--data FILE)")
    return b"".join(parts)


def read_text(path: str | Path) -> bytes:
    """Bytes of a text file, unpacked if its name ends in .gz or .xz.

    Raises:
        ValueError: no such file, or it cannot be read.
    """
    path = Path(path)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
            return data
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"cannot read the text {path}: {error}") from error
