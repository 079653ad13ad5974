"""What goes on the wire in place of a tensor.

A `Codec` holds options, never state: what it must remember between steps (a warm start) lies in the `state` dictionary that
the exchange keeps for it under the tensor's name. Message sizes are fixed by (spec, setting), so that receivers preallocate and
no round of lengths is needed. A *setting* is what a controller may change from step to step: a density, a bit width, a rank;
the setting None sends the tensor uncompressed, with any codec.

State is replaced, not overwritten: `encode` and the memory put *new* tensors into `state` and leave those of earlier steps as
they are. A step with a non-finite gradient on any rank is then undone for nothing, by putting the old entries back. The exchange
provides two entries, `state["seed"]` (an int, different on every rank) and `state["shared_seed"]` (an int, the same on all).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Generator, Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Codec", "LinearCodec", "Setting", "Spec", "State"]

Setting = Hashable
State = MutableMapping[str, Any]  # of one tensor on one rank; tensors and plain values only, so that it can be saved


@dataclass(frozen=True)
class Spec:
    """The tensor that is exchanged: its name in the model, shape and dtype. Codecs get it flat, in `Codec.precision`.

    `part` says which part of the tensor of that name it is, as one would index it, where groups exchange one each: random numbers
    differ from part to part. `copies` is how many groups exchange this same part, each by itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    part: str = ""
    copies: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Codec(abc.ABC):
    """A code for tensors, lossy or not."""

    unbiased: bool = False  # E decode(encode(x)) = x
    # What it makes of finite numbers may not be finite (fewer bits of exponent, products): the exchange looks.
    narrows: bool = True

    @abc.abstractmethod
    def default(self, spec: Spec) -> Setting:
        """The setting in force where no controller says otherwise."""

    @abc.abstractmethod
    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor of a message: the same on every rank, known before the data."""

    @abc.abstractmethod
    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        """Code a flat tensor (numel,), which stays as it is. Randomness comes from `state["seed"]` and the step, never global."""

    @abc.abstractmethod
    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        """The flat tensor (numel,) that a message stands for, in `precision`."""

    def precision(self, spec: Spec) -> torch.dtype:
        """In which an exchange gives the tensor to `encode`, and adds up what `decode` gives."""
        return torch.float32

    def sent(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> tuple[Tensor, Tensor | None]:
        """What a message says, as (values, where): values (numel,) and None, or values (k,) at the positions `where` (k,), int64.

        Codecs that send few entries override it; memories and sums then touch those entries only.
        """
        return self.decode(message, spec, setting), None

    def add_to(self, out: Tensor, message: Sequence[Tensor], spec: Spec, setting: Setting, weight: float = 1.0) -> None:
        """out += weight * decode(message), for an `out` (numel,) in `precision`."""
        values, where = self.sent(message, spec, setting)
        if where is None:
            out.add_(values, alpha=weight)
        else:
            out.index_add_(0, where, values, alpha=weight)

    def bypass(self, spec: Spec, setting: Setting) -> bool:
        """Whether the tensor is better sent uncompressed with this setting (rule R8: a plain fallback for every tensor)."""
        return False

    @final
    def in_force(self, spec: Spec, setting: Setting) -> Setting:
        """What becomes of a setting: itself, or None where the tensor goes uncompressed."""
        return None if setting is None or self.bypass(spec, setting) else setting

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """The guaranteed c in [0, 1] of E|x - decode(encode(x))|^2 <= (1 - c) |x|^2; 0 promises nothing."""
        return 0.0

    def variance(self, spec: Spec, setting: Setting) -> float:
        """The guaranteed omega of E|decode(encode(x)) - x|^2 <= omega |x|^2 for unbiased codecs; inf promises nothing."""
        return math.inf

    def shrinks(self, spec: Spec, setting: Setting, rate: float = 1.0) -> bool:
        """Whether x - rate decode(encode(x)) is shorter than x, in the mean: whether what a memory keeps stays bounded.

        With an unbiased code it is (1 - rate)^2 + rate^2 omega of |x|^2, below 1 for rate (1 + omega) < 2. A biased one has to
        see to it by itself.
        """
        return not self.unbiased or rate * (1 + self.variance(spec, setting)) < 2

    def nbytes(self, spec: Spec, setting: Setting) -> int:
        """Bytes of one message on the wire."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.message(spec, setting))

    def error(self, x: Tensor, spec: Spec, settings: Sequence[Setting]) -> list[float]:
        """|x - decode(encode(x))|^2 for each setting; codecs with a shortcut override it (`TopK`: one sort for all)."""
        found = []
        for setting in settings:
            message = self.encode(x, spec, {"seed": 0, "shared_seed": 0}, setting, 0)
            found.append(float((x.double() - self.decode(message, spec, setting).double()).square().sum()))
        return found


class LinearCodec(Codec):
    """A codec whose messages are averaged on the wire by all-reduce, in one or several rounds."""

    num_rounds: int = 1  # for predictions of cost
    # One round, in which every entry goes by itself: a piece's message is the message's piece.
    elementwise: bool = False

    @abc.abstractmethod
    def rounds(
        self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int
    ) -> Generator[Tensor, Tensor, Tensor]:
        """Yields a flat tensor to be averaged over ranks, receives the average, returns the decoded average of all x (numel,)."""

    def own(self, x: Tensor, mean: Tensor, spec: Spec, state: State, setting: Setting) -> tuple[Tensor, Tensor | None]:
        """What of this rank's x counts as sent, for its memory, as (values, where) like `sent`; by default the average itself."""
        return mean, None
