"""States of torch's random generators, as tensors to be written with a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["random_state", "restore_random"]


def random_state() -> dict[str, Tensor]:
    """States of torch's generators, CPU and accelerators."""
    found = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.update({f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return found


def restore_random(extra: Mapping[str, Tensor]) -> None:
    """Set the generators whose state is in `extra`."""
    for name, state in extra.items():
        if name == "random.cpu":
            torch.set_rng_state(state)
        elif name.startswith("random.cuda.") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state, int(name.rpartition(".")[2]))
