"""Run a user's step and leave no trace of it: everything that it changed is put back.

What is put back: contents of parameters, buffers, inputs, optimizer state and any other tensor that was there before and was
written in place (copied right before the first write, so a step that writes little costs little); gradients; plain
attributes of modules (caches and counters); the optimizer's state and options; random generators of torch, Python and numpy.
"""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Untouched"]


class Untouched:
    """Context manager: what happens inside to a model and an optimizer has not happened afterwards.

    Tensors written in place are put back if the block reports each such write beforehand with `before_write(storage)`, as
    `Recorder` does. `rewind()` puts everything back inside the block, to run a step again from the same point.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.optimizer = model, optimizer
        self._copies: dict[int, tuple[Any, Tensor]] = {}  # id of a storage -> the storage and its bytes

    def __enter__(self) -> Untouched:
        self._attributes = [_Attributes(module) for module in self.model.modules()]
        self._gradients = [(p, p.grad) for p in self.model.parameters()]
        self._random = _RandomState()
        if self.optimizer is not None:
            self._state = {p: dict(state) for p, state in self.optimizer.state.items()}
            self._groups = [dict(group) for group in self.optimizer.param_groups]
        return self

    def __exit__(self, *problem: Any) -> None:
        self.rewind()
        self._copies.clear()

    def before_write(self, storage: Any) -> None:
        """Keep a copy of the bytes of a storage that is about to be written, unless there is one."""
        if id(storage) not in self._copies:
            self._copies[id(storage)] = (storage, _bytes_of(storage).clone())

    def rewind(self) -> None:
        """Put everything back as it was on entering."""
        with torch.no_grad():
            for storage, copy in self._copies.values():
                # Another size: its owner has emptied it, as FSDP does with gathered weights.
                if storage.nbytes() == copy.numel():
                    _bytes_of(storage).copy_(copy)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for attributes in self._attributes:
            attributes.restore()
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update({p: dict(state) for p, state in self._state.items()})
            for group, options in zip(self.optimizer.param_groups, self._groups, strict=True):
                group.clear()
                group.update(options)
        self._random.restore()


def _bytes_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Attributes:
    """The attributes of a module, and what its lists and dicts hold: parameters, buffers, caches, the flat weights of an LSTM."""

    def __init__(self, module: nn.Module):
        self.module, self.values = module, dict(vars(module))
        self.contents = {name: copy.copy(v) for name, v in self.values.items() if isinstance(v, (list, dict, set))}

    def restore(self) -> None:
        now = vars(self.module)
        for name in [name for name in now if name not in self.values]:
            del now[name]
        now.update(self.values)
        for name, content in self.contents.items():
            held = self.values[name]
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)


class _RandomState:
    """State of every generator that a step may draw from."""

    def __init__(self) -> None:
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.cuda = (
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        )
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
