"""What a trace must know of an operator and its schema does not say, or says in many words.

    writes          which arguments it writes in place                                        from the schema
    tensors_of      the tensors among arguments or results, in order
    reads_bytes     False for what looks only at shapes (`zeros_like`)                        `SHAPE_ONLY`
    draws           whether this call takes numbers from a generator                          from the tags
    is_dense        matrix products, convolutions, attention: many operations per byte        torch's table of FLOPs
    is_view         only looks at storages: makes no bytes, reads none, writes none            `_SECRET_VIEWS`
    is_metadata     asks a tensor for its shape, reads nothing, makes nothing                 `METADATA`
    moved_statistics  which running statistics this call moves                                `STATISTICS`
    makes_empty     its result has no content yet: who made it may write it through its address    `EMPTY`
    fills           arguments whose whole content a call gives anew                                 `FILLERS`
    communicates    whether it exchanges data with other processes: cannot be had twice
    wrapped_bytes   plain numbers given where a tensor is expected: torch makes tensors of them for the time of the call
    over_gradient   the variant that may write over the gradient it is given                  `OVER_GRADIENT`

Normalisation with running statistics writes them in training, and its schema is silent about it (`native_batch_norm`) or not
(`_batch_norm_with_update`). A trace leaves these writes out for all of them (`STATISTICS` lists the arguments): the statistics
lie in buffers, which stay where they are, and an executor that repeats the call passes none. Who else reads statistics that
move (the same normalisation, evaluated) is not repeatable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from weft.memory.private import is_composite, storage_of

__all__ = [
    "METADATA", "OVER_GRADIENT", "SHAPE_ONLY", "STATISTICS", "communicates", "draws", "fills", "fits_over_first", "is_dense",
    "is_metadata", "is_view", "label", "makes_empty", "moved_statistics", "over_gradient", "reads_bytes", "statistics_of",
    "tensors_of", "wrapped_bytes", "writes", "written_arguments",
]  # fmt: skip

# operator -> positions of running statistics: written in training, left out of a trace
STATISTICS: dict[str, tuple[int, ...]] = {
    "aten.native_batch_norm": (3, 4),
    "aten.cudnn_batch_norm": (3, 4),
    "aten.miopen_batch_norm": (3, 4),
    "aten._native_batch_norm_legit": (3, 4),
    "aten._batch_norm_with_update": (3, 4),
    "aten.batch_norm_gather_stats": (3, 4),
    "aten.batch_norm_gather_stats_with_counts": (3, 4),
}

# Made to be written: by operators, or through the address, as lengths of packed sequences in torch, buckets of
# DistributedDataParallel and results of C++ extensions are. To make it again would not bring that back.
EMPTY = frozenset(
    f"aten.{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)

# In place, and reading nothing of what was there (`rrelu_with_noise`: of its noise); `out=` is another such way.
FILLERS = frozenset(("aten.rrelu_with_noise",)) | frozenset(
    f"aten.{name}_"
    for name in (
        "bernoulli", "cauchy", "copy", "exponential", "fill", "geometric", "log_normal", "normal", "random", "uniform", "zero",
    )
)  # fmt: skip

# views that their schema does not declare
_SECRET_VIEWS = frozenset(
    ("aten._unsafe_view", "aten.unsafe_split", "aten.unsafe_split_with_sizes", "aten.unsafe_chunk")
)

SHAPE_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
        "new_zeros", "new_ones", "new_full", "new_empty_strided",
    )
)  # fmt: skip

# Not `is_pinned`: it hands the tensor's address to the accelerator's runtime.
METADATA = frozenset(
    [
        f"aten.{name}"
        for name in (
            "size", "stride", "numel", "dim", "storage_offset", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset",
            "is_contiguous", "sym_is_contiguous", "is_non_overlapping_and_dense", "is_strides_like_format", "is_same_size",
            "_assert_tensor_metadata", "_has_compatible_shallow_copy_type", "_version", "is_complex",
            "is_floating_point", "record_stream",
        )
    ]
    + ["prim.device", "prim.layout", "prim.dtype"]
)  # fmt: skip

# Operators that autograd calls with a gradient first, whose kernel reads each element of it (softmax: each row) before it writes
# there -> (overload that writes where it is told, its argument for that). Those that only copy what the functional operator has
# made are left out.
OVER_GRADIENT: dict[str, tuple[str, str]] = {
    **{
        f"aten.{name}_backward.default": ("grad_input", "grad_input")
        for name in (
            "gelu", "silu", "threshold", "leaky_relu", "elu", "hardtanh", "hardsigmoid", "softplus", "sigmoid", "tanh",
        )
    },
    "aten._softmax_backward_data.default": ("out", "grad_input"),
    "aten._log_softmax_backward_data.default": ("out", "out"),
    "aten.mul.Tensor": ("out", "out"),
    "aten.div.Tensor": ("out", "out"),
    "aten.neg.default": ("out", "out"),
}  # fmt: skip

_DENSE = frozenset(str(packet) for packet in flop_registry) | {
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "aten.linear",
    "aten.mkldnn_rnn_layer",
    "aten.mkldnn_rnn_layer_backward",
    "aten._cudnn_rnn",
    "aten._cudnn_rnn_backward",
    "aten.addbmm",
    "aten.mv",
    "aten._int_mm",
    "aten._grouped_mm",
}


@cache
def label(func: Any) -> str:
    """Name of an operator with its overload: `aten.addmm.default`."""
    return str(func)


@cache
def _packet(func: Any) -> str:
    """Name without overload: `aten.addmm`."""
    return str(getattr(func, "overloadpacket", func))


@cache
def statistics_of(func: Any) -> tuple[int, ...]:
    """Positions of running statistics that the operator may write."""
    return STATISTICS.get(_packet(func), ())


@cache
def _training(func: Any) -> int:
    """Position of the argument that says whether running statistics move; -1 if they always do."""
    return next((i for i, a in enumerate(func._schema.arguments) if a.name == "training"), -1)


def moved_statistics(func: Any, args: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the running statistics that this call moves: in training, if it is given any."""
    positions = statistics_of(func)
    if not positions or ((at := _training(func)) >= 0 and not args[at]):
        return ()
    return tuple(i for i in positions if i < len(args) and args[i] is not None)


@cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that the operator writes, by its schema; running statistics left out.

    Schemas of `c10d` say nothing: those whose name ends in `_` write their first argument.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    if communicates(func) and schema.name.startswith("c10d::") and schema.name.endswith("_"):
        return ((0, schema.arguments[0].name),)
    skip = statistics_of(func)
    return tuple(
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write and i not in skip
    )


def writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that this call writes in place."""
    for position, name in written_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        yield from tensors_of((value,))


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Tensors in arguments or results: items, and those in lists, tuples and dicts, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)
        elif isinstance(value, dict):
            yield from tensors_of(value.values())


@cache
def reads_bytes(func: Any) -> bool:
    """Whether the operator needs the contents of its tensors, not only their shapes."""
    return _packet(func) not in SHAPE_ONLY


@cache
def is_metadata(func: Any) -> bool:
    """Whether it only asks for shapes, strides or devices, or leaves a mark for the profiler."""
    name = _packet(func)
    return name in METADATA or name.startswith("profiler.")


@cache
def is_view(func: Any) -> bool:
    """Whether it only looks at storages. What makes no bytes otherwise has effects that its schema does not tell of."""
    return _packet(func) in _SECRET_VIEWS or (bool(getattr(func, "is_view", False)) and not is_composite(func))


@cache
def makes_empty(func: Any) -> bool:
    """Whether its result has no content: what it has later may not come from operators."""
    return _packet(func) in EMPTY


@cache
def _fills(func: Any) -> bool:
    return _packet(func) in FILLERS or (bool(written_arguments(func)) and func._overloadname.endswith("out"))


def fills(func: Any, tensor: Tensor) -> bool:
    """Whether a call that writes a tensor gives all bytes of its storage a content that does not depend on what they were."""
    return _fills(func) and storage_of(tensor).nbytes() == tensor.nbytes and _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether no two elements of a tensor lie at one place, and none between them; its dimensions may lie in any order."""
    if tensor.is_contiguous():
        return True
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous()


@cache
def is_dense(func: Any) -> bool:
    """Whether it does many operations per byte, so that its result is dear to make again."""
    return _packet(func) in _DENSE


def fits_over_first(args: Sequence[Any]) -> bool:
    """Whether an elementwise result has dtype, sizes and strides of the first argument, which has all bytes of its storage."""
    first = args[0]
    dtype, size = first.dtype, first.shape
    if not dtype.is_floating_point or not first.is_contiguous() or storage_of(first).nbytes() != first.nbytes:
        return False
    for value in args[1:]:
        if isinstance(value, Tensor):
            if value.dtype not in (dtype, torch.bool):
                return False
            if value.shape == size:
                if value.stride() != first.stride():
                    return False  # the result might be laid out like this one: channels last
            elif torch.broadcast_shapes(value.shape, size) != size:
                return False
        elif isinstance(value, complex) or (isinstance(value, torch.dtype) and value != dtype):
            return False
    return True


@cache
def over_gradient(func: Any) -> tuple[str, Any, str] | None:
    """(name, operator, argument) of the overload in `OVER_GRADIENT`, None for all others."""
    row = OVER_GRADIENT.get(label(func))
    if row is None or not hasattr(func.overloadpacket, row[0]):
        return None
    found = getattr(func.overloadpacket, row[0])
    return label(found), found, row[1]


@cache
def communicates(func: Any) -> bool:
    """Whether it exchanges data with other processes."""
    return _packet(func).split(".")[0] in ("c10d", "_c10d_functional", "c10d_functional", "symm_mem", "_dtensor")


@cache
def _random_with(func: Any) -> tuple[int, str] | bool:
    """False, True, or the (position, name) of the dropout probability on which it depends."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    for i, a in enumerate(func._schema.arguments):
        if a.name == "dropout_p":
            return i, a.name
    return True


def draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call takes numbers from a generator; attention without dropout does not."""
    found = _random_with(func)
    if isinstance(found, bool):
        return found
    position, name = found
    return bool(args[position] if position < len(args) else kwargs.get(name, 0.0))


@cache
def _tensor_arguments(func: Any) -> tuple[int, ...]:
    schema = getattr(func, "_schema", None)
    return () if schema is None else tuple(i for i, a in enumerate(schema.arguments) if str(a.type) == "Tensor")


def wrapped_bytes(func: Any, args: Sequence[Any]) -> int:
    """Bytes of the tensors that torch makes of plain numbers for this call (`x + 1` passes a tensor of one number)."""
    found = 0
    for position in _tensor_arguments(func):
        value = args[position] if position < len(args) else None
        if isinstance(value, (bool, int, float, complex)):
            found += 1 if isinstance(value, bool) else 16 if isinstance(value, complex) else 8
    return found
