"""Which setting of a codec each tensor gets, and when it changes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weft.comm.codec import Codec, Setting, Spec

__all__ = ["Controller", "Total", "alone"]

Numbers = Mapping[str, Sequence[float] | None]  # by tensor name; None where nothing is known of it
Total = Callable[[Numbers], dict[str, list[float]]]


def alone(numbers: Numbers) -> dict[str, list[float]]:
    """The numbers of whole tensors, made of those of a group's parts, where there is one group: what is known of them."""
    return {name: list(row) for name, row in numbers.items() if row is not None}


class Controller(abc.ABC):
    """Decides on rank 0; the exchange broadcasts the decision, dated by the step from which it holds on every rank.

    Attributes:
        every: steps between decisions, >= 1; the first is for step 0.
        agreed: decisions depend on the step alone, so that every rank makes them itself and nothing is broadcast.
        additive: decisions depend on numbers that add up over the parts of a tensor, which `decide` passes through `total`. Then
            groups that exchange parts of a model decide as one group would of the whole: rank 0 of each, by the same numbers.
        needs_gradient: `observe` is to be called.
        options: names of the attributes that are options, for a class that is no dataclass: they must be the same on all ranks
            and in a checkpoint.
    """

    every: int = 1
    agreed: bool = False
    additive: bool = False
    needs_gradient: bool = True
    options: tuple[str, ...] = ()

    def bind(self, codec: Codec, seconds: Callable[[Spec, Setting], float] | None = None) -> None:
        """Told once by the exchange: its codec, and what a message of a setting costs in seconds, as far as that is known."""
        return

    def initial(self, spec: Spec, default: Setting) -> Setting:
        """In force until the first decision, and what costs are predicted with, given the codec's default: that."""
        return default

    @abc.abstractmethod
    def observe(self, spec: Spec, gradient: Any, step: int) -> None:
        """See the deciding rank's own gradient (numel,) of one tensor, as it was before the memory and the codec.

        Not the average that is delivered: it lacks what the setting in force drops, and would confirm that setting. A tensor
        sent at a density of 0.1 % looks as if it had no other entries.
        """

    @abc.abstractmethod
    def decide(self, step: int, specs: Mapping[str, Spec], total: Total = alone) -> Mapping[str, Setting]:
        """Settings by tensor name from `step` on; names left out keep theirs.

        Args:
            specs: of the group's tensors, which may be parts.
            total: adds up numbers over parts; an `additive` controller calls it once, whatever it has seen.
        """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
