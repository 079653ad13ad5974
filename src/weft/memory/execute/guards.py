"""Ways to a tensor's bytes that do not pass the dispatcher: numpy, DLPack, `data_ptr`, storages.

While a limit is active these methods of `torch.Tensor` first bring the bytes back and keep them where they are for as long as
they live, since nobody can tell how long the address is used. They are replaced on the class, and put back afterwards: a function
mode would do the same and cost a microsecond at every attribute of every tensor. Printing a tensor switches dispatch modes off
while it reads, so that it is announced here too.

A C++ extension that takes a tensor's pointer without going through an operator is not seen by anything. Register it with
`torch.library`, or touch `tensor.data_ptr()` before the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from weft.memory.private import hide_from_compiler

__all__ = ["POINTERS", "Guards"]

POINTERS = (
    "numpy",
    "data_ptr",
    "untyped_storage",
    "tolist",
    "__dlpack__",
    "__array__",
    "__cuda_array_interface__",
    "__repr__",
)


@final
class Guards:
    """Calls `expose(tensor)` before anybody gets at the bytes of a tensor. `start` and `stop` once each."""

    def __init__(self, expose: Callable[[Tensor], None]):
        self.expose = expose
        self._own: dict[str, Any] = {}  # what stood on the class itself
        self._added: list[str] = []  # what it inherited

    def start(self) -> None:
        for name in POINTERS:
            if name in torch.Tensor.__dict__:
                self._own[name] = torch.Tensor.__dict__[name]
            elif hasattr(torch.Tensor, name):
                self._added.append(name)
            else:
                continue
            setattr(torch.Tensor, name, self._guarded(getattr(torch.Tensor, name)))
        self._to_dlpack = torch.utils.dlpack.to_dlpack
        torch.utils.dlpack.to_dlpack = torch.to_dlpack = self._guarded(self._to_dlpack)

    def stop(self) -> None:
        for name, found in self._own.items():
            setattr(torch.Tensor, name, found)
        for name in self._added:
            delattr(torch.Tensor, name)
        torch.utils.dlpack.to_dlpack = torch.to_dlpack = self._to_dlpack

    def _guarded(self, found: Any) -> Any:
        expose = self.expose
        if isinstance(found, property):

            def get(tensor: Tensor) -> Any:
                expose(tensor)
                return found.fget(tensor)

            hide_from_compiler(get)
            return property(get)

        @functools.wraps(found)
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(tensor, Tensor):
                expose(tensor)
            return found(tensor, *args, **kwargs)

        hide_from_compiler(call)
        return call
