"""Run any elementwise optimizer of torch on flat pieces of parameters.

Problem    an optimizer whose update of an element depends on that element alone (its value, gradient, state) may be run piece by
           piece, with the state of one piece in memory at a time. Which optimizers are such, and what state they keep, is known
           to none but themselves.
Method     ask them: run a copy of the optimizer on a small tensor, whole and in pieces, and compare      `Elementwise.probe`
           what its state holds after a step is either of the piece's shape (an *array*, which is streamed) or a plain number
           (a *small* state, such as Adam's `step`, which stays in memory).
Guarantee  pieces cut as in `layout` give the bits that the whole tensor gives (torch's kernels run the same code on them).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Elementwise", "Piece", "is_small"]

ELSEWHERE = "tiers hold parameters as flat pieces: train with it in memory, or with an elementwise optimizer"


@dataclass
class Piece:
    """A flat piece of a parameter to be updated in place.

    Attributes:
        value, gradient: 1-D, of equal length, on one device.
        state: what the optimizer keeps for it, as in `Optimizer.state`; None before its first update. Replaced by the update.
    """

    value: Tensor
    gradient: Tensor
    state: dict[str, Any] | None = field(default=None)


class Elementwise:
    """An optimizer class that is run on pieces.

    Args:
        kind: the class (`torch.optim.AdamW`).
        defaults: its options.
    Raises:
        ValueError: the optimizer is not elementwise, or keeps a state that is neither an array nor a number.
    """

    def __init__(self, kind: type[torch.optim.Optimizer], defaults: Mapping[str, Any]):
        self.kind = kind
        known = inspect.signature(kind.__init__).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        self.defaults = {k: v for k, v in defaults.items() if open_ended or k in known}
        self._workers: dict[torch.device, torch.optim.Optimizer] = {}

    def arrays(
        self, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[tuple[str, torch.dtype], ...]:
        """Name and dtype of the arrays that the optimizer keeps per element, after checking that it is elementwise.

        Args:
            options: of the group, as in `param_groups`.
            dtype: of its parameters.
            device: where it will run.
        """
        whole, _ = self._try((6, 8), (48,), options, torch.float32, device)
        pieces, _ = self._try((48,), (16, 32), options, torch.float32, device)
        # So few elements are not cut as `layout` cuts: the last bits may differ.
        if not torch.allclose(whole, pieces, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"{self.kind.__name__} is not elementwise: on pieces of a parameter it gives other values than on the whole, and "
                f"{ELSEWHERE}"
            )
        _, state = self._try((48,), (16, 32), options, dtype, device)
        found = []
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == (32,):
                found.append((key, value.dtype))
            elif not is_small(value):
                raise ValueError(
                    f"{self.kind.__name__} keeps {key} = {type(value).__name__} for a parameter, which is neither a tensor of "
                    f"its shape nor a number; {ELSEWHERE}"
                )
        return tuple(found)

    def _try(
        self,
        shape: tuple[int, ...],
        cuts: tuple[int, ...],
        options: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Three steps on fixed numbers, cut into pieces; the values, and the state of the last piece."""
        numbers = torch.linspace(-2, 2, 48 * 4, dtype=torch.float64).cos().mul(3).view(4, 48).to(device, dtype)
        parts = [numbers[0].clone().view(shape)] if len(shape) > 1 else list(numbers[0].clone().split(cuts))
        try:
            worker = self._make(parts, options)
            before = _beside(worker)
            for turn in range(1, 4):
                rows = [numbers[turn].view(shape)] if len(shape) > 1 else list(numbers[turn].split(cuts))
                for part, row in zip(parts, rows, strict=True):
                    part.grad = row.clone()
                _step(worker)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.kind.__name__} cannot be run on flat pieces of parameters ({error}); {ELSEWHERE}"
            ) from error
        counted = sorted(key for key, value in _beside(worker).items() if key not in before or before[key] != value)
        if counted:
            raise ValueError(
                f"{self.kind.__name__} changes {counted[0]!r} at each step in its group or in itself, where no piece finds it "
                "again: tiers keep only what an optimizer keeps for a parameter (Optimizer.state); train with it in memory, or "
                "with an optimizer that counts in its state, as torch.optim's do"
            )
        return torch.cat([part.flatten() for part in parts]), dict(worker.state[parts[-1]])

    def _make(self, values: Sequence[Tensor], options: Mapping[str, Any]) -> torch.optim.Optimizer:
        return self.kind([{**options, "params": list(values)}], **self.defaults)

    def update(self, pieces: Sequence[Piece], options: Mapping[str, Any]) -> None:
        """One step on pieces of one device; new states are left in them.

        Args:
            options: of the group, as they are now (a schedule may have changed the learning rate).
        """
        fresh = [piece for piece in pieces if piece.state is None]
        seasoned = [piece for piece in pieces if piece.state is not None]
        if fresh:  # the optimizer itself makes the initial state, some at construction
            self._run(self._make([piece.value for piece in fresh], options), fresh)
        if not seasoned:
            return
        device = seasoned[0].value.device
        worker = self._workers.get(device)
        if worker is None:
            worker = self._workers[device] = self._make([seasoned[0].value], options)
        worker.state.clear()
        worker.param_groups[0] = {**options, "params": [piece.value for piece in seasoned]}
        for piece in seasoned:
            worker.state[piece.value] = piece.state
        self._run(worker, seasoned)
        worker.param_groups[0]["params"] = []
        worker.state.clear()

    def _run(self, worker: torch.optim.Optimizer, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            piece.value.grad = piece.gradient
        _step(worker)
        for piece in pieces:
            piece.value.grad = None
            piece.state = dict(worker.state[piece.value])


def _beside(worker: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer holds besides its state, as far as it can be compared: plain options, and public attributes."""
    found = {key: value for key, value in vars(worker).items() if not key.startswith("_")} | worker.param_groups[0]
    return {
        key: value.item() if isinstance(value, Tensor) and not value.is_meta else value
        for key, value in found.items()
        if is_small(value)
    }


def _step(worker: torch.optim.Optimizer) -> None:
    """The optimizer's step without torch's hooks: a piece is no step to those who count them."""
    step = type(worker).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(worker)


def is_small(value: Any) -> bool:
    """Whether a state is kept in memory and written to the manifest: a number, or a tensor of no dims."""
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
