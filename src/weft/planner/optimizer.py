"""What an optimizer costs: words of state per parameter, bytes its update moves, and whether pieces may be updated alone.

memory of state      words * bytes of the parameter
bytes of an update   (3 + 2 words) * bytes of the parameter: read it and its gradient, write it, read and write the state
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.names import pick

__all__ = ["OptimizerCost"]

_FLOPS_PER_ELEMENT = 12.0  # AdamW's update; far below what the bytes cost anywhere


@dataclass(frozen=True)
class OptimizerCost:
    """An optimizer as the cost model sees it.

    Attributes:
        name: of the class (`AdamW`).
        words: state tensors of the parameter's size.
        elementwise: the update of an element depends on that element only, so that a shard can be updated where it lies.
            Parameters of other optimizers are never sharded.
    """

    name: str
    words: float
    elementwise: bool = True

    def state_bytes(self, nbytes: float) -> float:
        """Bytes of state for `nbytes` of parameters."""
        return self.words * nbytes

    def moved_bytes(self, nbytes: float) -> float:
        """Bytes that one update of `nbytes` of parameters reads and writes."""
        return (3 + 2 * self.words) * nbytes

    def flops(self, numel: float) -> float:
        return _FLOPS_PER_ELEMENT * numel

    @classmethod
    def of(cls, optimizer: Any) -> OptimizerCost:
        """The cost of an optimizer given as class, instance, factory, name, or `OptimizerCost`.

        Classes that are not in the table count as two elementwise words, like Adam; pass an `OptimizerCost` to say better.

        Raises:
            ValueError: it is none of these, or a name that neither the table nor torch.optim has.
        """
        if isinstance(optimizer, OptimizerCost):
            return optimizer
        if not (isinstance(optimizer, str) or callable(optimizer) or hasattr(optimizer, "param_groups")):
            raise ValueError(
                f"optimizer: must be a class, instance, function or name of torch.optim, got {optimizer!r}"
            )
        function = getattr(optimizer, "func", optimizer)  # functools.partial(SGD, momentum=0.9)
        options = {**getattr(optimizer, "keywords", {}), **getattr(optimizer, "defaults", {})}
        if isinstance(function, str):
            name = _named(function)
        elif isinstance(function, type):
            name = function.__name__
        else:
            name = (
                type(function).__name__
                if hasattr(function, "param_groups")
                else getattr(function, "__name__", str(function))
            )
        words, elementwise = _TABLE.get(name.lower(), (2.0, True))
        if name.lower() == "sgd":
            words = 1.0 if options.get("momentum", 0.0) else 0.0
        if options.get("amsgrad"):
            words += 1.0
        return cls(name, words, elementwise)


def _named(name: str) -> str:
    """The name, if there is such an optimizer."""
    import torch

    theirs = [each for each, kind in vars(torch.optim).items() if isinstance(kind, type) and each != "Optimizer"]
    known = {each.lower(): each for each in (*_TABLE, *theirs)}
    pick(name, dict.fromkeys(known.values()), "optimizer")
    return name


_TABLE: dict[str, tuple[float, bool]] = {
    "sgd": (0.0, True), "adam": (2.0, True), "adamw": (2.0, True), "nadam": (2.0, True), "radam": (2.0, True),
    "adamax": (2.0, True), "adadelta": (2.0, True), "asgd": (1.0, True), "adagrad": (1.0, True), "rmsprop": (1.0, True),
    "rprop": (2.0, True), "lion": (1.0, True), "adafactor": (0.1, False), "muon": (1.0, False), "lbfgs": (20.0, False),
    "lamb": (2.0, False), "lars": (1.0, False), "shampoo": (3.0, False),
}  # fmt: skip
