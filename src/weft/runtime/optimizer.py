"""The user's optimizer, rebuilt over the pieces that one process updates.

Problem    the user says how to optimise the whole model: a class, a partial of one, a function of parameters, or an optimizer
           already built on `model.parameters()`. Each process has pieces of those parameters.
Method     let the user's own words make an optimizer over the model's parameters and read off its class, its options and its
           groups, by parameter name (`recipe`); make the same over pieces (`Recipe.build`). Its state is created by
           its first step, on pieces only.
Guarantee  equal to one device if the update is elementwise. Known others are refused for cut parameters, and an optimizer that we
           do not know is tried on a small matrix, whole and in pieces (`check_elementwise`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Recipe", "check_elementwise", "plain_options", "recipe"]

ELEMENTWISE = frozenset(
    {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
)
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
NOT_ELEMENTWISE = {
    "Adafactor": "it keeps row and column statistics of whole matrices",
    "Muon": "it orthogonalises whole matrices",
    "SparseAdam": "it needs sparse gradients",
}


@dataclass(frozen=True)
class Recipe:
    """How to make the user's optimizer over other tensors.

    Attributes:
        kind: class of the optimizer.
        defaults: options that the class takes, with the user's values.
        groups: per parameter group its options and the names of its parameters.
        factory: the user's own class or partial of it, for classes whose options cannot be read off; None for the rest.
    """

    kind: type[Optimizer]
    defaults: Mapping[str, Any]
    groups: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    factory: Callable[..., Optimizer] | None = None

    def build(self, pieces: Mapping[str, Tensor]) -> Optimizer:
        """The optimizer over `pieces`, by parameter name; names that `pieces` lacks are left out.

        Raises:
            ValueError: the class cannot be called with its own options.
        """
        faster = self._fused(pieces)
        groups = [
            {**options, **faster, "params": [pieces[n] for n in names if n in pieces]} for options, names in self.groups
        ]
        try:
            try:
                return self.kind(groups, **{**self.defaults, **faster})  # type: ignore[call-arg]
            except TypeError:
                if self.factory is None:
                    raise
                return self.factory(groups)
        except TypeError as error:
            raise ValueError(
                f"optimizer: {self.kind.__name__} cannot be made again over pieces of the parameters ({error}); pass the class "
                "or a functools.partial of it instead of an instance"
            ) from error

    def _fused(self, pieces: Mapping[str, Tensor]) -> dict[str, bool]:
        """torch's fused update, where it has one and the user's options leave the choice open: one pass over memory instead of
        about ten, a quarter of the time of the loop that torch runs by default on CPU. Its kernels walk bytes in order, so that
        they need contiguous pieces, and keep more digits between the steps of an update, so that half precision is left alone."""
        if self.kind not in FUSED:
            return {}
        options = [self.defaults, *(options for options, _ in self.groups)]
        chosen = any(each.get(name) is not None for each in options for name in ("fused", "foreach"))
        special = any(each.get(name) for each in options for name in ("capturable", "differentiable"))
        plain = all(
            p.dtype in (torch.float32, torch.float64) and p.is_contiguous() and p.device.type in ("cpu", "cuda")
            for p in pieces.values()
        )
        return {"fused": True} if plain and not chosen and not special else {}

    def names(self) -> list[list[str]]:
        return [list(names) for _, names in self.groups]


def recipe(optimizer: Callable[[Iterable[Any]], Optimizer] | Optimizer, model: nn.Module, loss: Any = None) -> Recipe:
    """Read off what the user wants.

    Args:
        optimizer: a class, a function from `model.parameters()` to an optimizer, or an optimizer built on them, before its
            first step.
        model: whose parameters it is about.
        loss: if a module, an instance may hold its parameters too; the graph calls them `loss.<name>`.
    Raises:
        ValueError: it is none of these, it needs a closure, it holds tensors that are not the model's, or it has been stepped.
    """
    built = optimizer
    if not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise ValueError(
                f"optimizer: must be a class, a function or an instance of torch.optim, got {optimizer!r}; give "
                "torch.optim.AdamW or functools.partial(torch.optim.AdamW, lr=1e-3)"
            )
        built = optimizer(list(model.parameters()))
        if not isinstance(built, Optimizer):
            raise ValueError(f"optimizer: calling it must give a torch.optim.Optimizer, got {type(built).__name__}")
    assert isinstance(built, Optimizer)
    closure = inspect.signature(built.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer: {type(built).__name__} evaluates the model within its step (it needs a closure), which a run by a plan "
            "cannot; use one whose step() takes nothing, as AdamW or SGD"
        )
    if any(state.get("step", 1) for state in built.state.values()):  # Adagrad has its state from the start
        raise ValueError(
            "optimizer: it has state from earlier steps; pass a fresh one, and load a checkpoint for its state"
        )
    name_of = {id(p): name for name, p in model.named_parameters()}
    if isinstance(loss, nn.Module):
        name_of.update({id(p): f"loss.{name}" for name, p in loss.named_parameters()})
    groups = []
    for number, group in enumerate(built.param_groups):
        strange = [tuple(p.shape) for p in group["params"] if id(p) not in name_of]
        if strange:
            raise ValueError(
                f"optimizer: group {number} holds {len(strange)} tensors that are not parameters of the model (first: shape "
                f"{strange[0]}); build it on model.parameters() of the model that you run"
            )
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append((copy.deepcopy(options), tuple(name_of[id(p)] for p in group["params"])))
    taken = inspect.signature(type(built).__init__).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    defaults = {key: value for key, value in built.defaults.items() if any_keyword or key in taken}
    groups = [
        ({k: v for k, v in options.items() if k in built.defaults or k == "initial_lr"}, n) for options, n in groups
    ]
    factory = optimizer if inspect.isclass(optimizer) or isinstance(optimizer, functools.partial) else None
    return Recipe(type(built), copy.deepcopy(defaults), tuple(groups), factory)


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as values that can be sent and compared; `fused` is left out, since pieces decide it (`Recipe.build`)."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names", "fused")}
    return {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in options.items()}


def check_elementwise(wanted: Recipe, cut: Iterable[str]) -> None:
    """Refuse an optimizer whose update of a piece differs from the piece of the whole update.

    Args:
        cut: names of parameters that are updated in pieces; nothing is checked without any.
    Raises:
        ValueError: names the optimizer, why, and a parameter that is cut.
    """
    first = next(iter(cut), None)
    kind = wanted.kind.__name__
    if first is None or (kind in ELEMENTWISE and wanted.kind.__module__.startswith("torch.optim")):
        return
    known = wanted.kind.__module__.startswith("torch.optim") and kind in NOT_ELEMENTWISE
    if known or not _agrees_in_pieces(wanted):
        why = NOT_ELEMENTWISE[kind] if known else "its update of a piece differs from that piece of the whole update"
        raise ValueError(
            f"optimizer: {kind} is not elementwise ({why}), and this plan updates {first!r} in pieces; use AdamW or SGD, or "
            "a plan without cut parameters (pure data parallel)"
        )


def _agrees_in_pieces(wanted: Recipe) -> bool:
    """Run the optimizer for three steps on a matrix, whole and as two row pieces."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    results = []
    for ranges in ([(0, 6)], [(0, 2), (2, 6)]):
        pieces = {f"p{i}": nn.Parameter(whole[a:b].clone()) for i, (a, b) in enumerate(ranges)}
        options = wanted.groups[0][0] if wanted.groups else {}
        single = Recipe(wanted.kind, wanted.defaults, ((options, tuple(pieces)),), wanted.factory)
        optimizer = single.build(pieces)
        for gradient in gradients:
            for piece, (a, b) in zip(pieces.values(), ranges, strict=True):
                piece.grad = gradient[a:b].clone()
            optimizer.step()
        results.append(torch.cat([piece.detach() for piece in pieces.values()]))
    return torch.allclose(results[0], results[1], rtol=1e-9, atol=1e-12)
