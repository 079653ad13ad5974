"""What a function is given, looked at before it works with it: errors name the argument, what is wanted, and what it got."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.cluster.device import Tier
from weft.memory.record import Trace
from weft.memory.schedule import Schedule

__all__ = ["device_of", "expect", "shown"]

_WANTED: dict[type, tuple[str, str]] = {  # what it is called, where one comes from
    nn.Module: ("a torch.nn.Module", "give the model itself, not its class or its parameters"),
    torch.optim.Optimizer: (
        "a torch.optim.Optimizer",
        "make one of the model's parameters, as torch.optim.AdamW(model.parameters())",
    ),
    Schedule: ("a weft.memory.Schedule", "plan.schedule is one"),
    Tensor: ("a tensor", "give tensors one by one, as count(*batch)"),
    Tier: ("a weft.memory.Tier", "weft.memory.tiers.measured(folder) makes one of a folder"),
    Trace: ("a weft.memory.Trace", "weft.memory.trace(model, batch) makes one"),
}


def expect(what: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """
    Raises:
        ValueError: `value` is not of this kind, one of `_WANTED`, nor None where it may be left out. `what` it is, for the error.
    """
    if not (isinstance(value, kind) or (optional and value is None)):
        wanted, source = _WANTED[kind]
        raise ValueError(f"{what} must be {wanted}, got {shown(value)}; {source}")


def shown(value: Any) -> str:
    """A value as errors show it: itself if it is short, else its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, (str, int, float)) or value is None else f"a {type(value).__name__}"


def device_of(what: str, value: Any) -> torch.device:
    """A device whose bytes can be counted.

    Raises:
        ValueError: it is none. `what` it is, for the error.
    """
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} must be cpu or cuda, got {value}; tensors elsewhere cannot be counted")
    return found
