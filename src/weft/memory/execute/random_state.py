"""Generators: what a random operator drew, so that it can draw it again.

An operator draws from the generator it is given, else from the default one of its device. Before it runs the first time the
generator's state is kept (5,056 bytes on the CPU, 16 on CUDA; in host memory, outside any budget); a repetition puts it back,
runs, and restores the present state. torch hands a state out as a tensor: for a moment it is one more on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, final

import torch

from weft.memory.private import numpy_of

__all__ = ["Drawn", "about_to_draw", "state_nbytes"]


@final
class Drawn:
    """A generator and the state that it had."""

    __slots__ = ("generator", "state")

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.state = _state(generator)

    def rewind(self) -> None:
        """The generator is as it was then."""
        self.generator.set_state(torch.frombuffer(self.state, dtype=torch.uint8))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """The generator is as it was then; afterwards as it is now."""
        now = _state(self.generator)
        self.rewind()
        try:
            yield
        finally:
            self.generator.set_state(torch.frombuffer(now, dtype=torch.uint8))


def _state(generator: torch.Generator) -> bytearray:
    return bytearray(numpy_of(generator.get_state()))


@cache
def state_nbytes(device: torch.device) -> int:
    """Bytes of the state of a generator of `device`. They lie in host memory."""
    return int(torch.get_rng_state().nbytes) if device.type == "cpu" else 16


def about_to_draw(args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Drawn:
    """What a random operator on `device` is about to draw from, as it is now."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator):
            return Drawn(value)
    return Drawn(default_generator(device))


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that operators on `device` draw from by default."""
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
