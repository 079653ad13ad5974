"""Weights as one safetensors file that the original module loads, no weft needed.

    model.load_state_dict(safetensors.torch.load_file(path))

A safetensors file may not hold one memory twice: tied weights are written under each of their names, as the module expects.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.paths import to_file
from weft.runtime.checkpoint import read_whole

if TYPE_CHECKING:
    from weft.runtime.trainer import Trainer

__all__ = ["export"]


def export(source: Trainer | str | Path, path: str | Path) -> Path:
    """Gather weights into one file.

    Args:
        source: a trainer (a collective under torchrun; the first process writes), or the folder of a checkpoint.
        path: the file, by custom `.safetensors`; written beside and then renamed.
    Raises:
        ValueError: nothing to export yet, no checkpoint there, or nothing can be written at `path`: no such folder, say.
        CheckpointDamaged: the checkpoint is not whole.
    """
    path = Path(path)
    if isinstance(source, (str, Path)):
        _write(read_whole(source), path)
        return path
    names = source.names()
    wanted = set(names.values())
    held: dict[str, Tensor] = {}
    for name, value in source.values():
        if source.driver.rank == 0 and name in wanted:
            held[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if source.driver.rank == 0:
        _write({name: held[first] for name, first in names.items()}, path)
    return path


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    distinct = {}
    for name, tensor in tensors.items():
        distinct[name] = tensor.clone() if tensor.data_ptr() in seen and tensor.numel() else tensor.contiguous()
        seen.add(tensor.data_ptr())
    to_file("export:", path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(distinct, str(part), metadata={"format": "pt"})
    part.replace(path)
