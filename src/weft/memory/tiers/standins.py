"""What stands where a parameter was, so that a use of it is seen: in a module, among what autograd has saved, and wherever
else somebody holds on to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.memory.private import hide_from_compiler

__all__ = ["Aliased", "Released", "View", "Watched", "present", "release"]

# Of a released parameter: the fields that show elements (others do not), and the functions that need none (others do).
_WITH_ELEMENTS = frozenset(("data", "T", "mT", "H", "mH", "real", "imag", "__cuda_array_interface__"))
_WITHOUT = {
    "__hash__", "__len__", "_is_view", "data_ptr", "dim", "element_size", "empty_like", "full_like", "get_device", "has_names",
    "is_complex", "is_conj", "is_contiguous", "is_floating_point", "is_inference", "is_neg", "is_pinned", "is_same_size",
    "is_shared", "is_signed", "ndimension", "nelement", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor",
    "new_zeros", "numel", "ones_like", "rand_like", "randint_like", "randn_like", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "result_type", "retain_grad", "size", "storage_offset", "stride",
    "untyped_storage", "zeros_like",
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """What autograd holds in place of a look at a parameter."""

    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Aliased:
    """What others do with what autograd saves: parameters that come and go (`ours`) are given to them as aliases.

    A hook may keep what it gets, as a checkpoint that runs again does. An alias keeps its elements when the parameter, the very
    object, is released.
    """

    pack: Callable[[Tensor], Any]
    ours: Callable[[Any], Any]

    def __call__(self, tensor: Tensor) -> Any:
        return self.pack(tensor if self.ours(tensor) is None else tensor.detach())


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


class Released(nn.Parameter):
    """A parameter while its elements are elsewhere: `bring`, of the instance, gets it before an operator uses them.

    If it is released afterwards all the same, the operator works on what stands there.
    """

    bring: Callable[[nn.Parameter], None]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.__repr__:
            return f"elements on a lower tier, of shape {tuple(args[0].shape)}, {args[0].dtype}"
        if _needs_no_elements(function):
            return super().__torch_function__(function, types, args, kwargs)
        there = True
        for parameter in _released([args, kwargs]):
            parameter.bring(parameter)
            there &= not isinstance(parameter, Released)
        return function(*args, **kwargs) if there else super().__torch_function__(function, types, args, kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        self.bring(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.bring(self)
        return self.__reduce_ex__(protocol)


def release(parameter: nn.Parameter, placeholder: Tensor, bring: Callable[[nn.Parameter], None]) -> None:
    """Put a placeholder under a parameter, and have its elements brought when somebody uses them."""
    parameter.__dict__["bring"] = bring
    parameter.__class__ = Released  # first: whoever is interrupted here leaves no plain parameter with a placeholder
    _put(parameter, placeholder)


def present(parameter: nn.Parameter, elements: Tensor) -> None:
    """Put its elements under a parameter."""
    _put(parameter, elements)
    if isinstance(parameter, Released):
        parameter.__class__ = nn.Parameter
        del parameter.__dict__["bring"]


def _put(parameter: nn.Parameter, elements: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():  # the class would bring the elements first
        parameter.data = elements


def _needs_no_elements(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(function.__self__, "__name__", "data") not in _WITH_ELEMENTS
    return name in _WITHOUT


def _released(value: Any) -> Iterator[Released]:
    """Released parameters in arguments: themselves, or in lists and the like."""
    if isinstance(value, Released):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _released(each)
    elif isinstance(value, Mapping):
        yield from _released(list(value.values()))


hide_from_compiler(Aliased.__call__, Watched.__getitem__)
