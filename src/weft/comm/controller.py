"""Which setting of a codec each tensor gets, and when it changes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

from weft.comm.codec import Codec, Setting, Spec

__all__ = ["Controller"]


class Controller(abc.ABC):
    """Decides on rank 0; the exchange broadcasts the decision, dated by the step from which it holds on every rank.

    Attributes:
        every: steps between decisions, >= 1; the first is for step 0.
        agreed: decisions depend on the step alone, so that every rank makes them itself and nothing is broadcast.
        needs_mean: `observe` is to be called.
    """

    every: int = 1
    agreed: bool = False
    needs_mean: bool = True

    def bind(self, codec: Codec, seconds: Callable[[Spec, Setting], float] | None = None) -> None:
        """Told once by the exchange: its codec, and what a message of a setting costs in seconds, as far as that is known."""
        return

    @abc.abstractmethod
    def observe(self, spec: Spec, mean: Any, step: int) -> None:
        """See the averaged gradient (numel,) of one tensor, bit-equal on all ranks; called where decisions are made."""

    @abc.abstractmethod
    def decide(self, step: int, specs: Mapping[str, Spec]) -> Mapping[str, Setting]:
        """Settings by tensor name from `step` on; names left out keep theirs."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
