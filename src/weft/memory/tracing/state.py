"""How many bytes an optimizer's state takes, and will take: asked of a copy that steps on fake tensors or, where it looks at its
numbers (Adafactor), on each parameter's like in turn. Nothing of the optimizer is changed, and none of its hooks runs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from weft.memory.private import storage_of
from weft.memory.tracing.fakes import Fakes

__all__ = ["state_now", "state_to_come"]


def state_now(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that there is, on the device of the parameters."""
    return _nbytes(optimizer, _device(optimizer))


def state_to_come(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the next step of an optimizer makes and keeps; 0 if only a real step can tell (`LBFGS`)."""
    device = _device(optimizer)
    fakes = Fakes(device)
    try:
        twin = fakes.optimizer(optimizer)
        with fakes.mode:
            for group in twin.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
    except (RuntimeError, ValueError):  # parameters that are more, or less, than bytes: DTensors, lazy ones
        return 0
    try:
        try:
            with fakes.mode:
                _step(twin)
            after = _nbytes(twin, device)
        except DataDependentOutputException:
            after = sum(
                _after_a_step_on(p, at, optimizer) for at, g in enumerate(optimizer.param_groups) for p in g["params"]
            )
    except Exception:  # anybody's code: it wants a closure, or what its constructor made (Adagrad), or real tensors
        return 0
    return max(0, after - _nbytes(optimizer, device))


def _after_a_step_on(parameter: Tensor, at: int, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that one parameter of the group `at` has after a step."""
    like = torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    like.grad = torch.zeros_like(like)
    twin: Any = copy.copy(optimizer)
    twin.param_groups = [
        {**group, "params": [like] if n == at else []} for n, group in enumerate(optimizer.param_groups)
    ]
    for key in ("fused", "foreach", "capturable"):  # for accelerators
        if key in twin.param_groups[at]:
            twin.param_groups[at][key] = False
    twin.state = defaultdict(dict)
    _step(twin)
    return _nbytes(twin, "cpu")


def _step(twin: torch.optim.Optimizer) -> None:
    """A step without the hooks that others hang on steps."""
    step = type(twin).step
    getattr(step, "__wrapped__", step)(twin)


def _device(optimizer: torch.optim.Optimizer) -> str:
    return next((str(p.device) for group in optimizer.param_groups for p in group["params"]), "cpu")


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
