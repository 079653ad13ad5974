"""How n messages become one: the result is W @ messages.

The mean, robust aggregation, the decoding of gradient codes and asynchronous weights are all rows of weights; what differs is
what the weights are made from (`needs`):

    "count"        how many there are                            mean
    "gram"         the inner products of all messages            Krum, geometric median, NNM, Flag, ... (float64, n x n)
    "arrivals"     who has come, when, how often                 gradient codes, FedFix, FedBuff
    "elementwise"  the messages themselves, entry by entry: no row of weights can say a median   `Combine.elementwise`

Some rules do both: NNM before a median, or Bulyan, make m rows from the Gram matrix and then go entry by entry, `Combine.finish`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Literal, final

from torch import Tensor

from weft.comm.gram import gram, weighted

__all__ = ["Arrival", "Combine", "Info", "Needs", "wide"]

Needs = Literal["count", "gram", "arrivals", "elementwise"]


@dataclass(frozen=True)
class Arrival:
    """One message that has come: from whom, for which job or round, how stale.

    Attributes:
        source: rank or client number.
        staleness: aggregations between the model it was computed on and now, >= 0.
        seconds: what the sender needed (measured or declared); 0 if unknown.
        count: how many messages of this source have been combined so far.
        weight: importance p_i of the source; all 1/n where nothing else is said.
        share: expected share of rounds that the source takes part in, in (0, 1]: declared, then measured.
    """

    source: int
    staleness: int = 0
    seconds: float = 0.0
    count: int = 0
    weight: float = 1.0
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Info:
    """What weights may be made from.

    Attributes:
        count: number of messages n.
        gram: (n, n) float64 of inner products, over the whole model; None unless needed. Non-finite rows mark broken messages.
        own: number of the message that is the receiver's own, -1 if none is.
        arrivals: one per message, in their order; empty unless needed.
    """

    count: int
    gram: Tensor | None = None
    own: int = -1
    arrivals: tuple[Arrival, ...] = ()


class Combine(abc.ABC):  # noqa: B024  one of two methods is to be written, which one `needs` says
    """A rule that makes one vector (or m) of n. Frozen options, no state."""

    needs: Needs = "count"

    def weights(self, info: Info) -> Tensor:
        """W, float64 of shape (n,) for one result or (m, n) for m.

        Raises:
            ValueError: n is too small for the rule, or no message is finite.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weights; use `elementwise`")

    def elementwise(self, stack: Tensor) -> Tensor:
        """The result (d,) for messages (n, d), for rules with `needs = "elementwise"`."""
        raise NotImplementedError(f"{type(self).__name__} is a row of weights; use `weights`")

    def finish(self, mixed: Tensor) -> Tensor:
        """What becomes of W @ messages: itself; rules with a second stage entry by entry make (d,) of (m, d) here.

        Where messages may be broken, it is the rule that is left which finishes: see `resolve`.
        """
        return mixed

    def among(self, count: int, broken: int) -> Combine:
        """The rule for the `count` messages that are left where `broken` were not finite: those were of the f it tolerates."""
        if not is_dataclass(self) or all(field.name != "f" for field in fields(self)):
            return self
        return replace(self, f=max(self.f - broken, 0))  # type: ignore[attr-defined]

    @final
    def left(self, info: Info) -> Combine:
        """The rule for the messages that are finite, by their inner products: itself where all are, or nothing is known."""
        broken = 0 if info.gram is None else int((~info.gram.diagonal().isfinite()).sum())
        return self.among(info.count - broken, broken) if broken else self

    @final
    def resolve(self, info: Info) -> tuple[Combine, Tensor]:
        """(the rule that is left, which finishes, and W).

        Raises:
            ValueError: see `weights`.
        """
        row = self.weights(info)
        return self.left(info), row

    def __call__(self, stack: Tensor, own: int = -1) -> Tensor:
        """Combine messages (n, d) that lie in one place: the plain form, for one process and for tests.

        Those of 16 bits are combined in 32, and the result is rounded once.

        Raises:
            ValueError: messages are not floating-point numbers of shape (n, d), or the rule refuses them.
        """
        if stack.dtype.itemsize < 4 or stack.ndim != 2 or not stack.is_floating_point():
            return self(wide(type(self).__name__, stack), own).to(stack.dtype)
        if self.needs == "elementwise":
            return self.elementwise(stack)
        left, row = self.resolve(Info(len(stack), gram(stack) if self.needs == "gram" else None, own))
        return left.finish(weighted(row, stack))


def wide(rule: str, stack: Tensor) -> Tensor:
    """Messages of 16 bits in 32; an error for what are no messages."""
    if stack.ndim != 2 or not stack.is_floating_point():
        raise ValueError(
            f"{rule}: messages must be floating-point numbers of shape (n, d), got {stack.dtype} of shape {tuple(stack.shape)}"
        )
    return stack.float()
