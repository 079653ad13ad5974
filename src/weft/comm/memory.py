"""What a worker keeps of what it did not send."""

from __future__ import annotations

import abc
from typing import ClassVar, final

from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State

__all__ = ["Memory", "NoMemory", "VelocityMemory"]


class Memory(abc.ABC):
    """Holds options; its state lies in the `state` dictionary of each tensor, flat float32 tensors (numel,).

    Entries of `state` are replaced by new tensors and never written into (see codec.py: a bad step is undone), except that
    `after` may write into what `before` put there in the same step. x itself must not be kept: its memory is used again.

    Attributes:
        additive: what all ranks together owe is the mean of their tensors in `state`, so that a checkpoint may go on on another
            number of ranks (see regroup.py).
    """

    additive: bool = False

    def sized(self, ranks: int) -> Memory:
        """The same memory as one of so many ranks, which an exchange knows once it is open: as a rule itself."""
        return self

    def suits(self, codec: Codec, spec: Spec, setting: Setting) -> bool:
        """Whether what is kept of a tensor stays bounded under this code; an exchange refuses to go on where it does not."""
        return codec.shrinks(spec, setting)

    @abc.abstractmethod
    def before(self, x: Tensor, spec: Spec, state: State) -> Tensor:
        """What to encode, given this step's gradient x (numel,), which it may overwrite."""

    @abc.abstractmethod
    def after(self, y: Tensor, sent: Tensor, where: Tensor | None, state: State) -> None:
        """Take note of what was sent of y: (numel,) if `where` is None, else (k,) at positions `where` (k,), int64."""

    def dense(self, mean: Tensor, spec: Spec, state: State) -> Tensor:
        """What a tensor that goes uncompressed delivers, given the mean of all ranks' gradients: by default that mean."""
        return mean

    def delivered(self, mean: Tensor, spec: Spec, state: State) -> Tensor:
        """What a coded tensor delivers on every rank, given the combined result: by default that (`Shift` adds its reference)."""
        return mean


class VelocityMemory(Memory):
    """What is exchanged is a velocity: the optimizer must add no momentum, and clipping comes before.

    Attributes:
        momentum: m in [0, 1), taken out of the optimizer.
        nesterov: the Nesterov form.
        buffer: the entry of `state` that continues the optimizer's momentum buffer.
    """

    momentum: float
    nesterov: bool
    buffer: ClassVar[str]

    def carry_decay(self, gradient: Tensor, weight: Tensor, buffer: Tensor, decay: float, sign: float = 1.0) -> None:
        """Add to a gradient what momentum makes of the weight decay of earlier steps; the optimizer adds this step's.

        b <- m b + decay w is the decay's part of momentum SGD's buffer, the same on every rank as the weights are. Without it the
        decay would be 1/(1 - m) times too weak beside velocities. It is not part of what is exchanged (Lin et al.'s optimizer).

        Args:
            gradient: what the exchange delivered, changed in place. weight: of the same shape.
            buffer: b of the last step, zero at the start; b of this one afterwards.
            decay: the optimizer's weight_decay.
            sign: of the gradient in the update, times its scale.
        """
        buffer.mul_(self.momentum)
        if not self.nesterov:
            gradient.add_(buffer, alpha=sign)
        buffer.add_(weight, alpha=decay)
        if self.nesterov:
            gradient.add_(buffer, alpha=sign * self.momentum)


@final
class NoMemory(Memory):
    """What is not sent is lost."""

    additive = True

    def suits(self, codec: Codec, spec: Spec, setting: Setting) -> bool:
        return True

    def before(self, x: Tensor, spec: Spec, state: State) -> Tensor:
        return x

    def after(self, y: Tensor, sent: Tensor, where: Tensor | None, state: State) -> None:
        return None
