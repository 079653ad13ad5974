"""A client's change on its way to the server: through a memory and a codec, tensor by tensor, or as it is.

    client   y = memory.before(change);  message = encode(y);  memory.after(y, what the message says)        `Coder.encode`
    server   change' = decode(message)                                                                       `Coder.decode`

Matrices go through the codec, vectors (biases, norms) as they are: they are a thousandth of the bytes. What a memory keeps is
kept per client, in the dictionaries that the caller holds. A change that is not finite is not coded, so that it cannot poison
the memory: it has no message.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.memory import Memory, NoMemory, VelocityMemory

__all__ = ["Coder"]


@final
class Coder:
    """Codes flat changes (d,) of a model with tensors `specs`; without a codec a message is the change itself."""

    def __init__(self, specs: Sequence[Spec], codec: Codec | None = None, memory: Memory | None = None, seed: int = 0):
        if isinstance(memory, VelocityMemory):
            raise ValueError(
                f"memory must not carry momentum, got {type(memory).__name__}: clients send changes, not gradients; "
                "use ErrorFeedback, and momentum in LocalSGD"
            )
        self.specs, self.codec, self.memory, self.seed = list(specs), codec, memory or NoMemory(), seed
        self.dtype = self.specs[0].dtype
        self.settings = [self._setting(spec) for spec in self.specs]

    def encode(self, change: Tensor, client: int, job: int, states: dict[str, State]) -> tuple[Tensor, ...] | None:
        """The message of a change (d,), None if it cannot be coded, not being finite; `states`: of this client, by tensor.

        Raises:
            ValueError: it is no vector (d,).
        """
        length = sum(spec.numel for spec in self.specs)
        if not isinstance(change, Tensor) or change.shape != (length,):
            said = f"shape {tuple(change.shape)}" if isinstance(change, Tensor) else repr(change)
            raise ValueError(f"a client's work must give the change of the model, a vector ({length},), got {said}")
        change = change.detach().to(self.dtype)  # the bytes of another type would be read as this one
        if self.codec is None:
            return (change,)  # the server looks at what it adds
        if not bool(torch.isfinite(change).all()):
            return None
        message: list[Tensor] = []
        for spec, setting, x in zip(self.specs, self.settings, self._split(change), strict=True):
            if setting is None:
                message.append(x)
                continue
            state = states.setdefault(
                spec.name, {"seed": self._draw(spec, client), "shared_seed": self._draw(spec, -1)}
            )
            y = self.memory.before(x.to(self.codec.precision(spec)).clone(), spec, state)
            coded = self.codec.encode(y, spec, state, setting, job)
            sent, where = self.codec.sent(coded, spec, setting)
            self.memory.after(y, sent, where, state)
            message += coded
        return tuple(message)

    def decode(self, message: Sequence[Tensor]) -> Tensor:
        """The change (d,) that a message stands for."""
        if self.codec is None:
            return message[0]
        rest, pieces = list(message), []
        for spec, setting in zip(self.specs, self.settings, strict=True):
            if setting is None:
                pieces.append(rest.pop(0))
            else:
                count = len(self.codec.message(spec, setting))
                pieces.append(self.codec.decode(rest[:count], spec, setting).to(self.dtype))
                del rest[:count]
        return torch.cat(pieces)

    def layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a message, known before any data: what a server expects of an honest client."""
        if self.codec is None:
            return [((sum(spec.numel for spec in self.specs),), self.dtype)]
        found: list[tuple[tuple[int, ...], torch.dtype]] = []
        for spec, setting in zip(self.specs, self.settings, strict=True):
            found += [((spec.numel,), self.dtype)] if setting is None else self.codec.message(spec, setting)
        return found

    def fingerprint(self) -> str:
        """Equal where messages mean the same: the same tensors through the same codec."""
        tensors = [(spec.name, tuple(spec.shape), str(spec.dtype)) for spec in self.specs]
        said = (tensors, type(self.codec).__name__, [(tuple(shape), str(dtype)) for shape, dtype in self.layout()])
        return hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()

    def nbytes(self) -> int:
        """Bytes of one message."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout())

    def _setting(self, spec: Spec) -> Setting:
        if self.codec is None or len(spec.shape) < 2:
            return None
        return self.codec.in_force(spec, self.codec.default(spec))

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.split([spec.numel for spec in self.specs])

    def _draw(self, spec: Spec, client: int) -> int:
        return zlib.crc32(f"{self.seed} {spec.name} {client}".encode())
