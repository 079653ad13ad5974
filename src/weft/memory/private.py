"""Every function of torch that weft.memory uses and torch does not document, in one place, tried once at import.

    tie          from a StorageImpl (the bytes) to what we know of it, which lives exactly as long as the bytes do
    hollow       a storage that says it has n bytes and has none: views of it can be taken, its bytes cannot be read
    over         a storage over memory that somebody else owns
    swap         exchange the bytes of two storages; tensors, their views and autograd's saved copies follow
    shaped       a tensor over a storage, from its geometry
    QuickMode    a dispatch mode without dynamo's wrapper; `direct` calls an operator below it
    weak         `WeakIdKeyDictionary`: what is known of tensors while they live; `==` of two tensors is an operator
    compiling    torch's ahead-of-time autograd: `Compiling`, and `inductor`, loaded when first asked for
    references   how many have a tensor
    tracing      `sequence_number`, `backward_node`, `in_backward`, `accumulates`: which autograd node a call belongs to
    fakes        `FakeTensorMode`, and `unlogged`, without what torch logs of calls that fakes may not do

What was measured on torch 2.13: `UntypedStorage` objects are kept alive by their StorageImpl, with their `__dict__` and weak
references, so an attribute set on one is found through any tensor over the same bytes, and a weak reference dies with the
bytes and not with the Python object. `_swap_data_ptr_` exchanges pointer, owner and number of bytes. A storage over a null
pointer passes every bounds check of views.

Fallback   where swapping is missing, `SWAPS` is False and `empty_out` / `fill` use `resize_` and a copy (documented, slower;
           views of emptied storages cannot be taken).
           Where ties do not work, nothing can be done: `require()` raises `RuntimeError` naming the torch version.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "SWAPS",
    "TIES",
    "Compiling",
    "FakeTensorMode",
    "Inductor",
    "QuickMode",
    "Tie",
    "WeakIdKeyDictionary",
    "accumulates",
    "alone",
    "at_end_of_backward",
    "backward_node",
    "below",
    "broken_at",
    "bytes_of",
    "compiling",
    "direct",
    "disable_modes",
    "empty_out",
    "faking",
    "fill",
    "hide_from_compiler",
    "hollow",
    "hooks_on_saving",
    "impl_of",
    "in_backward",
    "inductor",
    "is_composite",
    "is_entered",
    "is_innermost",
    "is_wrapper",
    "marked",
    "numpy_of",
    "over",
    "plain_parts",
    "problem",
    "references",
    "require",
    "resize",
    "sequence_number",
    "shaped",
    "storage_of",
    "swap",
    "tie_of",
    "tied",
    "uncast",
    "unlogged",
    "wanted_by",
]

storage_of: Callable[[Tensor], torch.UntypedStorage] = torch.Tensor.untyped_storage
"""The storage of a tensor. The unbound method, so that a guard on `Tensor.untyped_storage` does not see our own calls."""

impl_of: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""Address of a storage's StorageImpl, for the native library."""

numpy_of: Callable[[Tensor], Any] = torch.Tensor.numpy
"""The array over a tensor's bytes, past any guard on `Tensor.numpy`."""

disable_modes = _disable_current_modes
is_wrapper = is_traceable_wrapper_subclass


def alone(storage: torch.UntypedStorage) -> bool:
    """Whether nobody has a storage but this Python object: no tensor of the user's, no saved copy of autograd's."""
    return _USERS is not None and _USERS(storage._cdata) == 1


def references(values: Sequence[Tensor], index: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """References to a tensor of a dispatch mode's arguments: to it in C++, to its Python object, and to its storage; and, if it
    is a view, to what it is a view of, whose own reference to the storage is left out (else zeros).

    Given as part of its list, since a variable would be a reference, too.
    """
    base = values[index]._base
    return (
        values[index]._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(values[index]),
        torch._C._storage_Use_Count(storage_of(values[index])._cdata) - (base is not None),  # type: ignore[attr-defined]
    ), (0, 0) if base is None else (base._use_count(), sys.getrefcount(base))  # type: ignore[attr-defined]


_USERS: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_TIE = "_weft_tie"
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


T = TypeVar("T", bound="Tie")


class Tie(weakref.ref):
    """What we know of one StorageImpl: a weak reference to its storage object that the storage object itself carries.

    `tied(Tie, storage, died)` makes one, which calls `died(tie)` when the last tensor, view or saved copy over the bytes is
    gone. Subclasses add slots. `tie_of(tensor)` finds it again.
    """

    __slots__ = ()


def tied(kind: type[T], storage: torch.UntypedStorage, died: Callable[[Any], None]) -> T:
    """A new tie of a storage, in place of one that it may have. No constructor of ours: one is made for every output."""
    storage._weft_tie = tie = kind(storage, died)  # type: ignore[attr-defined, call-arg]
    return tie


def tie_of(tensor: Tensor) -> Any:
    """The tie of the bytes under `tensor`, None if there is none."""
    return getattr(storage_of(tensor), _TIE, None)


# -- bytes ------------------------------------------------------------------------------------------------------------


def over(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """A storage over `nbytes` bytes at `pointer`, which somebody else owns and frees."""
    return torch._C._construct_storage_from_data_pointer(pointer, device, nbytes)


def hollow(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """A storage that claims `nbytes` bytes and has none."""
    return torch._C._construct_storage_from_data_pointer(0, device, nbytes)


def swap(one: torch.UntypedStorage, other: torch.UntypedStorage) -> None:
    """Exchange the bytes (pointer, owner, number) of two storages."""
    one._swap_data_ptr_(other)  # type: ignore[attr-defined]


def resize(storage: torch.UntypedStorage, nbytes: int) -> None:
    """Give a storage another number of bytes; who listens to its `resize_` does not hear of it."""
    torch._C.StorageBase.resize_(storage, nbytes)  # type: ignore[attr-defined]


def empty_out(storage: torch.UntypedStorage) -> None:
    """Give the bytes of a storage back to their owner; every tensor over it stays as it is, without bytes."""
    if SWAPS:
        swap(storage, hollow(storage.nbytes(), storage.device))
    else:
        resize(storage, 0)


def fill(storage: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
    """Put the bytes of `source` under an emptied storage; `source` is used up."""
    if SWAPS:
        swap(storage, source)
        return
    resize(storage, source.nbytes())
    bytes_of(storage).copy_(bytes_of(source))


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A uint8 tensor over all bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def shaped(
    storage: torch.UntypedStorage, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], offset: int
) -> Tensor:
    """A tensor over `storage` with a geometry (`offset` in elements)."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with storages that a sparse or wrapped tensor is made of (of a DTensor the local piece); a plain one itself."""
    if is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout is torch.strided:
        yield tensor


def marked(tensor: Tensor, conjugate: bool, negative: bool) -> Tensor:
    """A tensor that is read as the conjugate, the negative of its bytes."""
    torch._C._set_conj(tensor, conjugate)
    torch._C._set_neg(tensor, negative)
    return tensor


# -- operators --------------------------------------------------------------------------------------------------------


class QuickMode(TorchDispatchMode):
    """A dispatch mode whose handler is called as it is: dynamo does not trace through it, and does not wrap it either.

    Attributes:
        left: by `leave`. Operators may come all the same, and the handler is to let them pass by.
    """

    left = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def leave(self) -> None:
        """For good, at any time and on any thread: to exit takes the innermost mode of this thread off, whosever that is. Those
        entered later stay as they are; on another thread this one stays, too, and is silent."""
        self.left = True
        if is_entered(self):
            entered = _get_current_dispatch_mode_stack()
            later = entered[entered.index(self) + 1 :]
            for mode in reversed(later):
                TorchDispatchMode.__exit__(mode, None, None, None)  # a class's own may do more, such as print
            self.__exit__(None, None, None)
            for mode in later:
                TorchDispatchMode.__enter__(mode)


_get_mode, _FAKE = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE


faking: Callable[[], Any] = partial(_get_mode, _FAKE)
"""The mode of fake tensors that is on, None if none is. It comes after all modes of users, and is theirs to call: DTensor asks
it for shapes in the middle of a real step."""


def is_innermost(mode: TorchDispatchMode) -> bool:
    """Whether a dispatch mode is the one that operators meet first, so that it can be left and entered again."""
    return _get_current_dispatch_mode() is mode


def is_entered(mode: TorchDispatchMode) -> bool:
    """Whether operators of this thread meet a dispatch mode: it has entered it, or is one of autograd's, which take over the
    modes of the thread that asked for the backward pass."""
    return any(entered is mode for entered in _get_current_dispatch_mode_stack())


def hide_from_compiler(*functions: FunctionType) -> None:
    """Dynamo compiles neither these functions nor what they call. (`torch._disable_dynamo` costs a microsecond a call.)"""
    frames = getattr(torch._C._dynamo, "eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        for function in functions:
            frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def direct(func: torch._ops.OpOverload) -> Callable[..., Any]:
    """What `func(...)` calls, without the Python call around it."""
    return getattr(func, "_op", func)


def is_composite(func: Any) -> bool:
    """Whether an operator is written in terms of others and only seen itself where autograd is off (inference mode)."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    except (AttributeError, RuntimeError):
        return False


@contextmanager
def below() -> Iterator[None]:
    """Operators run as they do inside a dispatch mode's handler: no mode, no autograd, no casting."""
    with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction(), uncast():
        yield


def uncast() -> Any:
    """Context in which autocast changes nothing: what is repeated was cast when it first ran."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


# -- tracing: which autograd node a call belongs to -------------------------------------------------------------------

try:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _next_sequence_number = torch._C._autograd._get_sequence_nr
    _current_node = torch._C._current_autograd_node
    _current_task = torch._C._current_graph_task_id
    _executes = torch._C._will_engine_execute_node
    _hooks_on_saving = torch._C._autograd._top_saved_tensors_default_hooks
except (AttributeError, ImportError) as error:
    raise ImportError(
        f"weft.memory cannot trace with torch {torch.__version__}: {error}; it works with torch 2.13"
    ) from error


@contextmanager
def unlogged() -> Iterator[None]:
    """Without torch's log of what fake tensors may not do: it is told otherwise, by an error, a note or a real run."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def sequence_number() -> int:
    """Number of the autograd node made last in this thread, -1 if none was; under a dispatch mode that of the running call's
    own node, if it has one."""
    return _next_sequence_number() - 1


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return _current_task() != -1


def hooks_on_saving() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The hooks that get what autograd saves from now on (`saved_tensors_hooks`, as checkpoints set when they run again)."""
    return _hooks_on_saving(False)


def backward_node() -> int:
    """Number of the autograd node whose backward is running; -1 if none is, or one without a number (where gradients end)."""
    node = _current_node()
    number = -1 if node is None else node._sequence_nr()
    return number if number < 2**63 else -1


def wanted_by() -> tuple[str, int]:
    """Name of the autograd node whose backward is running, and how many gradients it may be asked for; ("", 0) if none runs."""
    node = _current_node()
    return ("", 0) if node is None else (node.name(), sum(edge[0] is not None for edge in node.next_functions))


def accumulates() -> bool:
    """Whether the gradient that a hook of a parameter sees will be added to `p.grad`; `torch.autograd.grad` only returns it."""
    try:
        return _executes(_current_node())
    except RuntimeError:  # what torch answers for a parameter whose gradient is returned
        return False


def at_end_of_backward(callback: Callable[[], None]) -> bool:
    """Have the engine call `callback` when the running backward pass is through; False if none runs or torch cannot."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except (AttributeError, RuntimeError):
        return False
    return True


# -- compiled models --------------------------------------------------------------------------------------------------


class Compiling(NamedTuple):
    """What a backend of torch.compile needs.

    Attributes:
        aot_autograd: makes a backend of compilers for forward and backward graphs and a partition function.
        default_partition: cuts a joint graph where its forward nodes end, and saves what crosses.
        boxed: runs a graph operator by operator, its inputs handed over in a list, each let go after its last reader.
    """

    aot_autograd: Callable[..., Any]
    default_partition: Callable[..., Any]
    boxed: Callable[..., Any]


@cache
def compiling() -> Compiling:
    """Torch's compiler, which takes seconds to import.

    Raises:
        RuntimeError: this torch has another one than weft knows.
    """
    try:
        from functorch.compile import default_partition  # type: ignore[import-untyped]
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import boxed_nop
    except ImportError as error:
        raise RuntimeError(
            f"weft cannot hand graphs to the compiler of torch {torch.__version__}: {error}; it works with torch 2.13. Without "
            "torch.compile, weft.memory.limit keeps the budget"
        ) from error
    return Compiling(aot_autograd, default_partition, boxed_nop)


RESUMED = (
    "torch_dynamo_resume_in_"  # what dynamo calls the rest of a function after a cut: + its name + "_at_" + the line
)


def broken_at(graph: torch.fx.GraphModule) -> str:
    """Where dynamo, which has made this graph, has cut what it compiles in pieces, and why; "" if the graph is the whole."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.user_stack:
        return ""
    whole, last = reason.user_stack[0], reason.user_stack[-1]
    if reason.graph_break:
        return f"{last.filename}:{last.lineno} ({reason.reason.splitlines()[0]})"
    return f"{whole.filename}:{whole.name.rpartition('_at_')[2]}" if whole.name.startswith(RESUMED) else ""


class Inductor(NamedTuple):
    """Torch's generator of fused kernels.

    Attributes:
        compile_fx: its backend of torch.compile: (graph, inputs) -> function.
        partitioner: base class of partition functions that its option `custom_partitioner_fn` takes.
        options: its options as a module with `patch`.
    """

    compile_fx: Callable[..., Any]
    partitioner: Any
    options: Any


@cache
def inductor() -> Inductor:
    """Torch's inductor, which takes seconds to import.

    Raises:
        RuntimeError: this torch has another one than weft knows.
    """
    try:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.custom_graph_pass import CustomPartitionerFn

        config.custom_partitioner_fn  # noqa: B018  the option that we set
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f"weft cannot hand its plans to the inductor of torch {torch.__version__}: {error}; it works with torch 2.13. "
            "compiler='eager' needs no inductor"
        ) from error
    return Inductor(compile_fx, CustomPartitionerFn, config)


# -- what this torch can do -------------------------------------------------------------------------------------------


def _ties_work() -> bool:
    seen: list[int] = []
    leaf = torch.ones(3, requires_grad=True)
    made = leaf * 2
    result = made.exp()  # autograd saves it: its bytes outlive our tensor
    tie = tied(Tie, storage_of(result), lambda _: seen.append(1))
    total = result.sum()
    del result, made
    gc.collect()
    kept = not seen and tie() is not None and getattr(tie(), _TIE, None) is tie
    total.backward()
    del total
    return kept and seen == [1] and tie() is None


def _swaps_work() -> bool:
    tensor = torch.arange(4.0)
    view, storage = tensor[1:3], storage_of(tensor)
    away = hollow(storage.nbytes(), storage.device)
    swap(storage, away)
    looks = tensor[2:].shape == (2,) and tensor.as_strided((2, 2), (1, 1)).shape == (2, 2) and storage.nbytes() == 16
    swap(storage, away)
    twin = over(storage.data_ptr(), storage.device, 16)
    return looks and view.tolist() == [1.0, 2.0] and shaped(twin, torch.float32, (2,), (2,), 1).tolist() == [1.0, 3.0]


def _try(test: Callable[[], bool]) -> bool:
    try:
        return bool(test())
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


TIES = _try(_ties_work)
SWAPS = _try(_swaps_work)


def problem() -> str:
    """What this torch lacks, in a sentence; "" if nothing."""
    if not TIES:
        return (
            f"torch {torch.__version__} does not keep a storage's Python object alive with its bytes, so weft cannot tell when "
            "bytes are given back; weft.memory.limit works with torch 2.13 and later"
        )
    if not SWAPS:
        return (
            f"torch {torch.__version__} cannot exchange the bytes of two storages (UntypedStorage._swap_data_ptr_); they are "
            "copied instead, and only backend='count' works"
        )
    return ""


def require() -> None:
    """Raise `RuntimeError` if bytes cannot be managed with this torch at all."""
    if not TIES:
        raise RuntimeError(problem())
