"""What all rules that read the Gram matrix share: broken messages are left out, and counted as faulty.

A message that is not finite has a diagonal entry of K that is not (`weft.comm.gram`). It gets weight 0, is named in a
`BrokenMessage` warning, and is one of the f that the rule tolerates, so the rule goes on with n - b messages and f - b suspects,
and takes fewer where its options ask for more than are left        `among`

    distances     |x_i - x_j|^2 = K_ii + K_jj - 2 K_ij      `distances`
"""

from __future__ import annotations

import abc
import warnings
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Combine, Info

__all__ = ["BrokenMessage", "ByGram", "check_enough", "check_faulty", "distances", "without_broken"]


class BrokenMessage(RuntimeWarning):
    """A message was not finite and has been left out."""


class ByGram(Combine):
    """A rule on the inner products of all messages. Methods implement `check` and `row`."""

    needs = "gram"

    @final
    @property
    def faulty(self) -> int:
        """How many faulty messages the rule is asked to tolerate: its field f, or 0 if it has none."""
        return int(getattr(self, "f", 0))

    @abc.abstractmethod
    def check(self, count: int, faulty: int) -> None:
        """Raise ValueError if `count` finite messages of which `faulty` lie are too few for the rule."""

    @abc.abstractmethod
    def row(self, gram: Tensor, faulty: int) -> Tensor:
        """Weights (n,) or (m, n) for n finite messages with inner products (n, n), float64 on the CPU."""

    @final
    def weights(self, info: Info) -> Tensor:
        if info.gram is None:
            raise ValueError(f"{type(self).__name__}: needs the inner products of the messages, Info.gram is None")
        found = info.gram.detach().to("cpu", torch.float64)
        self.check(info.count, self.faulty)
        fine = torch.isfinite(found.diagonal())
        if bool(fine.all()):
            return self.row(found, self.faulty)
        without_broken(type(self).__name__, fine)
        rule = self.left(info)
        assert isinstance(rule, ByGram)
        rule.check(int(fine.sum()), rule.faulty)
        part = rule.row(found[fine][:, fine], rule.faulty)
        whole = torch.zeros(*part.shape[:-1], info.count, dtype=torch.float64)
        whole[..., fine] = part
        return whole


def without_broken(rule: str, fine: Tensor) -> None:
    """Name the messages that are not finite, given the mask (n,) of those that are.

    Raises:
        ValueError: none is finite.
    """
    names = (~fine).nonzero().flatten().tolist()
    if not bool(fine.any()):
        raise ValueError(f"{rule}: none of the {len(fine)} messages is finite; skip this step")
    if names:
        shown = ", ".join(map(str, names))
        warnings.warn(
            f"{rule}: left out {len(names)} of {len(fine)} messages, not finite: number {shown}", BrokenMessage
        )


def check_faulty(rule: str, faulty: int) -> None:
    """f is a count."""
    if not isinstance(faulty, int) or faulty < 0:
        raise ValueError(
            f"{rule}: f must be an integer of 0 or more, got {faulty!r}; it is how many messages may be faulty"
        )


def check_enough(rule: str, count: int, least: int, faulty: int) -> None:
    """n messages, f of which may be faulty, are `least` or more."""
    if count < least:
        raise ValueError(
            f"{rule}: needs n >= {least} messages for f = {faulty}, got {count}; lower f or ask more workers"
        )


def distances(gram: Tensor) -> Tensor:
    """Squared distances (n, n) of messages with inner products (n, n): symmetric, 0 on the diagonal, never negative."""
    square = gram.diagonal()
    found = (square[:, None] + square[None, :] - (gram + gram.T)).clamp_(min=0.0)  # symmetric to the bit: ties are ties
    found.fill_diagonal_(0.0)
    return found
