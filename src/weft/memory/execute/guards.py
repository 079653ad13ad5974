"""Ways to a tensor's bytes that do not pass the dispatcher: numpy, DLPack, `data_ptr`, storages.

While a limit is active these methods of `torch.Tensor` first bring the bytes back and keep them where they are for as long as
they live, since nobody can tell how long the address is used. They are replaced on the class, and put back afterwards: a function
mode would do the same and cost a microsecond at every attribute of every tensor. Printing a tensor switches dispatch modes off
while it reads, so that it is announced here too.

Some functions of torch are made of several operators and look at small integer tensors in between, without asking anybody:
lengths and batch sizes of packed sequences, places where a tensor is split, a generator's state (`READERS`). While one of them
runs, these tensors must not go; nor those that the backward pass will look at in the same way. A generator's state is not made by
an operator either: `torch.utils.checkpoint` keeps one for each of its blocks, and they count.

A storage that is resized (`untyped_storage().resize_`: ZeRO-3 of weft and of FSDP, which free gathered weights and fill them
again) is announced before: its bytes change in a way that no operator tells of.

A C++ extension that reads a tensor by its address without going through an operator is not seen by anything. Register it with
`torch.library`, or touch `tensor.data_ptr()` before the call. What it writes stays if it made room for it (`Hold.unfilled`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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
READERS: tuple[tuple[Any, str], ...] = (
    (torch._VF, "lstm"),
    (torch._VF, "gru"),
    (torch._VF, "rnn_tanh"),
    (torch._VF, "rnn_relu"),
    (torch._VF, "_pack_padded_sequence"),
    (torch._VF, "_pad_packed_sequence"),
    (torch, "ctc_loss"),
    (torch, "tensor_split"),
    (torch.Tensor, "tensor_split"),
    (torch, "get_rng_state"),
    (torch, "set_rng_state"),
    (torch.random, "set_rng_state"),
)


@final
class Guards:
    """Calls `expose(tensor)` before anybody gets at the bytes of a tensor, `count(tensor)` with those that no operator makes, and
    `resize(storage, nbytes)` before a storage is given so many bytes. `start` and `stop` once each."""

    def __init__(
        self,
        expose: Callable[[Tensor], None],
        count: Callable[[Tensor], None],
        resize: Callable[[torch.UntypedStorage, int], None],
    ):
        self.expose, self.count, self.resize = expose, count, resize
        self._own: dict[str, Any] = {}  # what stood on the class itself
        self._added: list[str] = []  # what it inherited
        self._replaced: list[tuple[Any, str, Any]] = []

    def start(self) -> None:
        for name in POINTERS:
            if name in torch.Tensor.__dict__:
                self._own[name] = torch.Tensor.__dict__[name]
            elif hasattr(torch.Tensor, name):
                self._added.append(name)
            else:
                continue
            setattr(torch.Tensor, name, self._guarded(getattr(torch.Tensor, name)))
        for owner, name, wrapped in (
            *((owner, name, self._reader) for owner, name in READERS),
            (torch.UntypedStorage, "resize_", self._resizing),
        ):
            self._replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, wrapped(getattr(owner, name)))
        self._to_dlpack = torch.utils.dlpack.to_dlpack
        torch.utils.dlpack.to_dlpack = torch.to_dlpack = self._guarded(self._to_dlpack)

    def stop(self) -> None:
        for name, found in self._own.items():
            setattr(torch.Tensor, name, found)
        for name in self._added:
            delattr(torch.Tensor, name)
        for owner, name, found in reversed(self._replaced):
            if found is None:
                delattr(owner, name)
            else:
                setattr(owner, name, found)
        self._replaced.clear()
        torch.utils.dlpack.to_dlpack = torch.to_dlpack = self._to_dlpack

    def _reader(self, found: Any) -> Any:
        def expose(values: Any) -> None:
            for value in tree_leaves(values):
                if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
                    self.expose(value)

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            expose((args, kwargs))
            result = found(*args, **kwargs)
            if found.__name__ == "_pack_padded_sequence":
                expose(result)
            elif found.__name__ == "get_rng_state":
                self.count(result)
            return result

        hide_from_compiler(call)
        return call

    def _resizing(self, found: Any) -> Any:
        resize = self.resize

        @functools.wraps(found)
        def call(storage: torch.UntypedStorage, nbytes: int) -> Any:
            resize(storage, int(nbytes))
            return found(storage, nbytes)

        hide_from_compiler(call)
        return call

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
