"""What stands where a parameter was, so that a use of it is seen: in a module, and among what autograd has saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["View", "Watched"]


@dataclass(frozen=True)
class View:
    """What autograd holds in place of a look at a parameter."""

    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Watched(dict):
    """A module's `_parameters`: reading one from it says so."""

    def __init__(self, parameters: Mapping[str, Any], seen: Callable[[nn.Parameter], None]):
        super().__init__(parameters)
        self._seen = seen

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if found is not None:
            self._seen(found)
        return found
