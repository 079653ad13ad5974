"""Fake tensors in place of real ones: a step of a model runs without its bytes, for a device that one may not have.

Problem    Which operators would run, and what they would allocate, if the model were on `device`.
Method     torch's fake tensors: shapes, dtypes, strides, devices and storages without bytes; autograd runs as ever. Parameters
           and buffers are exchanged for fake ones with the same storages (tied ones stay tied, views stay views).
           torch without CUDA cannot run autograd on fake CUDA tensors (it asks for a device guard that is not compiled in,
           and the process dies). There, fake CPU tensors are used and the calls in which eager torch chooses another
           operator on CUDA are exchanged for what it chooses there:                                          `AsCuda`
           Where a fake result has other strides than the CPU's kernel gives it, later calls would differ, and some calls
           that the CPU can do are refused for fakes:                                                            `AsKernels`
Limits     Autograd writes views in place with other operators where tensors are fake: two fewer for each such write.
           `AsCuda` knows attention, dropout and batch norm (`CHOICES`), and optimizers update all parameters at once as on
           CUDA (`at_once`). Any other operator is taken to allocate on CUDA what it does on the CPU; its workspace is unknown;
           `autocast("cuda")` has no effect on the stand-ins.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weft.memory.private import FakeTensorMode, disable_modes
from weft.memory.tracing.costs import sample

__all__ = ["AsCuda", "AsKernels", "Fakes", "at_once", "emulates_cuda", "result_nbytes"]


def emulates_cuda(device: str) -> bool:
    """Whether a CUDA device has to be imitated with fake CPU tensors."""
    return device.startswith("cuda") and not torch.cuda.is_available()


class Fakes:
    """Fake copies of tensors, one for each, on one device. Copies share storages where the originals do."""

    def __init__(self, device: str):
        self.device = "cpu" if emulates_cuda(device) else device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[tuple[int, torch.dtype], tuple[Any, Tensor]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The fake copy of a tensor: a leaf, a parameter if it is one."""
        found = self._tensors.get(id(tensor))
        if found is None:
            found = self._tensors[id(tensor)] = (tensor, self._make(tensor))
        return found[1]

    def _make(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            if tensor.layout is not torch.strided:
                raise ValueError(f"trace: a {tensor.layout} tensor cannot be made fake; use fake=False")
            storage = tensor.untyped_storage()
            key = (id(storage), tensor.dtype)
            if key not in self._storages:
                with self.mode:
                    flat = torch.empty(
                        storage.nbytes() // tensor.element_size(), dtype=tensor.dtype, device=self.device
                    )
                self._storages[key] = (storage, flat)
            with self.mode:
                fake = (
                    self._storages[key][1].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).detach()
                )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def nested(self, value: Any) -> Any:
        """A batch with fake tensors in place of its own."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, Mapping):
            return {key: self.nested(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.nested(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Parameters and buffers of the model are fake ones within the block."""
        own = [
            (module, name, tensor)
            for module in model.modules()
            for found in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for name, tensor in found
        ]
        try:
            for module, name, tensor in own:
                setattr(module, name, self.of(tensor))
            yield
        finally:
            for module, name, tensor in own:
                setattr(module, name, tensor)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """A copy of an optimizer that updates the fake parameters, without state."""
        twin = copy.copy(optimizer)
        vars(twin).pop("step", None)  # a learning-rate scheduler's wrapper, which would step the original
        twin.param_groups = [
            {**group, "params": [self.of(p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        twin.state = defaultdict(dict)
        return twin


# Operators whose CPU kernels return contiguous tensors where fake results are strided like an operand.
CONTIGUOUS = frozenset(
    {
        torch.ops.aten.native_layer_norm_backward.default,
    }
)


# Operators with an output whose size only the kernel knows (oneDNN's LSTM returns its workspace): run once on made-up numbers.
PROBED = frozenset({torch.ops.aten.mkldnn_rnn_layer.default})

# Operators whose fake results are one tensor twice where kernels return two.
DISTINCT = frozenset({torch.ops.aten.mkldnn_rnn_layer_backward.default})


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """A mixture of experts' product for any dtype, (K, N) or (G, K, N) matrices for (M, K) or (G, M, K) rows: torch checks fakes
    for what CUDA can do (bfloat16). The last dimension is padded to 16 bytes (ATen/native/GroupedMMUtils.h)."""
    flat = a.dim() == b.dim() == 2
    size = ([] if a.dim() != b.dim() else [len(offs) if flat else len(a)]) + [a.size(-2), b.size(-1)]
    dtype = out_dtype or a.dtype
    aligned = 16 // dtype.itemsize
    padded = -(-size[-1] // aligned) * aligned
    return torch.empty_strided(size, [size[-2] * padded, padded, 1][-len(size) :], dtype=dtype, device=a.device)


# Losses whose kernels reduce within the buffer of their summands, so that the storage of the one number keeps all its bytes.
WHOLE = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("mse_loss", "smooth_l1_loss", "binary_cross_entropy", "soft_margin_loss")
)


def result_nbytes(func: Any, args: Sequence[Any], result: Tensor) -> int:
    """Bytes of the storage that a kernel makes for a result of which only the fake is there."""
    nbytes = result.untyped_storage().nbytes()
    if func in WHOLE:
        nbytes = max(nbytes, torch.broadcast_shapes(args[0].shape, args[1].shape).numel() * result.element_size())
    return nbytes


# Operators whose fakes torch refuses though kernels run
REFUSED: dict[Any, Callable[..., Tensor]] = {torch.ops.aten._grouped_mm.default: _grouped_mm}


class AsKernels(TorchDispatchMode):
    """Gives fake results the strides and sizes that the CPU's kernels give real ones. To be entered after the fake mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REFUSED:
            return REFUSED[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if func in PROBED:
            with disable_modes():
                real = sample(func, args, kwargs).call("cpu")
            return tuple(
                fake if fake.shape == like.shape else torch.empty_like(like, device=fake.device)
                for fake, like in zip(result, real, strict=True)
            )
        if func in WHOLE and result.dim() == 0:
            buffer = torch.empty(result_nbytes(func, args, result), dtype=torch.uint8, device=result.device)
            return buffer.view(result.dtype).as_strided((), ())
        if func in DISTINCT:
            return tuple(torch.empty_like(t) if t is not None else None for t in result)
        if func not in CONTIGUOUS:
            return result
        return tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and not t.is_contiguous() else t
            for t in result
        )


# -- what eager torch chooses on CUDA ---------------------------------------------------------------------------------


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """One kernel, with dropout and a mask too: flash attention for half precision without a mask, else memory-efficient."""
    if query.dim() != 4:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    bias = attn_mask
    if bias is not None:
        if bias.dtype is torch.bool:
            bias = torch.where(bias, 0.0, -torch.inf).to(query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    logsumexp = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, logsumexp, dropout_p, is_causal, scale=scale
    )[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One kernel with a mask of one byte per element."""
    if inplace or not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, training)[0]


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """cuDNN's, in training with a weight; its reserve is taken to be empty, as it is for contiguous images."""
    if not training or weight is None or bias is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.ops.aten.cudnn_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


# function -> what stands for it on CUDA
CHOICES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
    torch.dropout: lambda input, p, train: _dropout(input, p, train),
    F.batch_norm: _batch_norm,
}


class AsCuda(TorchFunctionMode):
    """Calls that mean other operators on CUDA are made as those."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CHOICES.get(function, function)(*args, **(kwargs or {}))


def at_once(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer update all parameters together where nothing is said, as it does on CUDA."""
    for group in optimizer.param_groups:
        if (
            "foreach" in group
            and group["foreach"] is None
            and not group.get("fused")
            and not group.get("differentiable")
        ):
            group["foreach"] = True
