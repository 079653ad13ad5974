"""How many bytes an optimizer's state will take that its first step is still to make, asked of fake tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

from weft.memory.private import storage_of
from weft.memory.tracing.fakes import Fakes

__all__ = ["state_to_come"]


def state_to_come(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the next step of an optimizer makes and keeps; 0 if only a real step can tell (`LBFGS`).

    Nothing of the optimizer is changed, and none of its hooks runs.
    """
    device = next((str(p.device) for group in optimizer.param_groups for p in group["params"]), "cpu")
    try:
        fakes = Fakes(device)
        twin: Any = fakes.optimizer(optimizer)
        twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        twin.state = defaultdict(dict)
        with fakes.mode:
            for group in twin.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            type(optimizer).step(twin)
    except Exception:  # whatever it is, the real step tells
        return 0
    return max(0, _nbytes(twin, device) - _nbytes(optimizer, device))


def _nbytes(optimizer: torch.optim.Optimizer, device: str) -> int:
    """Of the state that is there, on this device."""
    storages = {
        id(storage): storage.nbytes()
        for entries in optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor) and str(value.device) == device
        for storage in (storage_of(value),)
    }
    return sum(storages.values())
