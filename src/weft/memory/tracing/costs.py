"""What each operator of a trace costs: seconds from a frozen table, measured or worked out from a device's rates.

Problem    A memory policy compares recompute times. Wall-clock times of a busy machine would change its every decision, and a
           device that is not at hand cannot be timed at all.
Method     A call is described by a `Work`: its signature (operator, shapes, dtypes, strides, whole-number arguments), FLOPs,
           bytes moved and kind. A `CostTable` maps signatures to seconds:
             measured on a running step    median over the calls of one signature in repeated steps        `CostTable.from_steps`
             measured call by call         each signature once more on made-up numbers, median of repeats  `measure_operators`
             from rates                    overhead + max(flops / rate, nbytes / bandwidth)                `CostTable.from_rates`
           The second needs no more memory than its largest operator: it prices a step that does not fit.
Guarantee  A table is a value (JSON): with the same table every decision is the same.
Source     FLOPs of matrix products, convolutions and attention: `torch.utils.flop_counter`; rates: `weft.cluster.Device`.

Seconds on a CPU are those of the calling thread where torch computes with one thread, else wall-clock; on an accelerator
wall-clock with a synchronisation before and after.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from weft.cluster.device import Device
from weft.graph.kinds import forward_name, kind_of
from weft.memory import native
from weft.memory.stored import read, write
from weft.memory.tracing.operators import label, reads_bytes, tensors_of

__all__ = ["CostTable", "Like", "Sample", "Work", "clock", "describe", "gauge", "measure_operators", "sample"]

FORMAT = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class Work:
    """One operator call as its price sees it.

    Attributes:
        signature: equal for calls that cost the same.
        kind: rate it runs at (`weft.cluster.KINDS`).
        flops, nbytes: floating-point operations; bytes of tensors read and written.
        dtype: of the computation ("float32").
    """

    signature: str
    kind: str
    flops: float
    nbytes: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Like:
    """A tensor without its contents: enough to make one for timing an operator."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: str) -> Tensor:
        """A tensor of this geometry: numbers in [0.1, 1), zeros for whole numbers (valid as indices), True for booleans."""
        extent = (
            1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if 0 not in self.shape else 0
        )
        if self.dtype.is_floating_point or self.dtype.is_complex:
            flat = torch.empty(extent, device=device).uniform_(0.1, 1.0).to(self.dtype)
        elif self.dtype is torch.bool:
            flat = torch.ones(extent, dtype=self.dtype, device=device)
        else:
            flat = torch.zeros(extent, dtype=self.dtype, device=device)
        return flat.as_strided(self.shape, self.stride)


class _Unlike:
    """Stands for a sparse tensor, which is not made up: the operator keeps the price of its rates."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One call of a signature with `Like` in place of tensors, to be made again on made-up numbers."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def arguments(self, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with made-up tensors on a device."""
        kwargs = {name: _filled(value, device) for name, value in self.kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = device
        return _filled(self.args, device), kwargs

    def call(self, device: str) -> Any:
        """Result of the call on made-up numbers."""
        args, kwargs = self.arguments(device)
        return self.func(*args, **kwargs)


# -- describing a call ------------------------------------------------------------------------------------------------

# floating-point operations per element of the result where they are many; 1 otherwise
_PER_ELEMENT = {
    name: flops
    for flops, names in (
        (20.0, "exp log tanh sigmoid gelu silu mish erf sin cos pow softplus log_sigmoid expm1 log1p tan atan"),
        (
            10.0,
            "bernoulli uniform normal native_dropout rand randn rand_like randn_like exponential multinomial randperm",
        ),
        (
            8.0,
            "native_layer_norm native_group_norm native_batch_norm _softmax _log_softmax upsample_bilinear2d _fused_rms_norm",
        ),
        (4.0, "sqrt rsqrt div reciprocal hardswish leaky_relu elu max_pool2d_with_indices"),
    )
    for name in names.split()
}


@cache
def _named(func: Any) -> tuple[str, str]:
    """Name, without what tells in-place and backward variants apart, and kind: of aten.addmm.out ("addmm", "matmul")."""
    name = label(func).split(".")[1] if "." in label(func) else label(func)
    return forward_name(name), "optimizer" if name.startswith(("_fused_ad", "_fused_sgd")) else kind_of(name)


def describe(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Work:
    """What a call amounts to. `result` gives the shapes of its outputs."""
    inputs, outputs = list(tensors_of((*args, *kwargs.values()))), list(tensors_of((result,)))
    plain, kind = _named(func)
    read = sum(map(_bytes, inputs)) if reads_bytes(func) else 0
    written = sum(map(_bytes, outputs)) if outputs else read // 2  # foreach operators return nothing
    floats = [t.dtype for t in (*outputs, *inputs) if t.dtype.is_floating_point]
    dtype = str(floats[0]).removeprefix("torch.") if floats else "float32"
    elements = max(
        [t.numel() for t in outputs] + [sum(t.numel() for t in inputs) if kind == "norm" or not outputs else 0]
    )
    flops = _counted(func, args, kwargs, result)
    if flops is None:
        flops = elements * _PER_ELEMENT.get(plain, 1.0)
    return Work(_signature(func, args, kwargs), kind, flops, float(read + written), dtype)


def _bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take, those of an expanded one once."""
    distinct = 1
    if tensor.layout is not torch.strided:
        return 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * tensor.element_size()


def _counted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> float | None:
    """FLOPs by torch's own table, or ours for what it lacks."""
    packet = getattr(func, "overloadpacket", None)
    if packet in flop_registry:
        try:
            return float(flop_registry[packet](*args, **kwargs, out_val=result))
        except (TypeError, AssertionError, IndexError, ValueError):
            return None  # an overload whose arguments the table does not know
    name = str(packet)
    if name == "aten._scaled_dot_product_flash_attention_for_cpu":
        return _attention(*args[:3], products=2, causal=_flag(args, kwargs, 4, "is_causal"))
    if name == "aten._scaled_dot_product_flash_attention_for_cpu_backward":
        return _attention(*args[1:4], products=5, causal=_flag(args, kwargs, 7, "is_causal"))
    if name == "aten.mkldnn_rnn_layer":  # input, four weights: 2 FLOPs per weight, row and step
        return 2.0 * args[0].shape[0] * args[0].shape[1] * sum(w.numel() for w in args[1:3])
    return None


def _attention(q: Tensor, k: Tensor, v: Tensor, *, products: int, causal: bool) -> float:
    """`products` matrix products of rows x keys x width; a causal kernel skips the half above the diagonal."""
    rows = q.numel() // q.shape[-1]
    return products * rows * k.shape[-2] * (q.shape[-1] + v.shape[-1]) * (0.5 if causal else 1.0)


def _flag(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> bool:
    return bool(args[position] if position < len(args) else kwargs.get(name, False))


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "bool": "b"}


def _signature(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [_word(a) for a in args] + [f"{k}={_word(v)}" for k, v in kwargs.items()]
    return f"{label(func)}({', '.join(parts)})"


def _word(value: Any) -> str:
    if isinstance(value, Tensor):
        head = str(value.dtype).removeprefix("torch.")
        for name, short in _SHORT.items():
            if head.startswith(name):
                head = short + head.removeprefix(name)
                break
        shape = ",".join(map(str, value.shape))
        if value.layout is not torch.strided or value.is_contiguous():
            return f"{head}[{shape}]"
        return f"{head}[{shape}]/{','.join(map(str, value.stride()))}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_word, value))}]"
    if isinstance(value, float):
        return "." if value else "0."  # a probability or a scale: only whether it is there matters
    if isinstance(value, (bool, int, str, type(None))):
        return str(value)
    return "?"


def sample(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sample:
    """The call without the contents of its tensors."""
    return Sample(func, tuple(map(_hollow, args)), {k: _hollow(v) for k, v in kwargs.items()})


def _hollow(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return _Unlike()
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_hollow, value)) if type(value) in (list, tuple) else list(map(_hollow, value))
    return None if isinstance(value, torch.Generator) else value


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CostTable:
    """Seconds and workspace bytes by signature.

    Attributes:
        device: for what they hold.
        seconds: by signature.
        workspace: bytes by signature, where known.
        measured: whether the seconds were measured.
    """

    device: str
    seconds: Mapping[str, float]
    workspace: Mapping[str, int] = field(default_factory=dict)
    measured: bool = False

    @classmethod
    def from_rates(cls, works: Sequence[Work], device: Device) -> CostTable:
        """Seconds by the device's roofline: overhead + max(flops / rate, nbytes / bandwidth)."""
        seconds = {w.signature: device.seconds(w.kind, w.flops, w.nbytes, w.dtype) for w in works}
        return cls(device.name, seconds)

    @classmethod
    def from_steps(cls, steps: Sequence[tuple[Sequence[Work], Sequence[float]]], device: str) -> CostTable:
        """Medians by signature over steps, each given by its operators and what they took, in seconds."""
        found: dict[str, list[float]] = {}
        for works, seconds in steps:
            for work, spent in zip(works, seconds, strict=True):
                found.setdefault(work.signature, []).append(spent)
        return cls(device, {signature: statistics.median(values) for signature, values in found.items()}, measured=True)

    def over(self, other: CostTable) -> CostTable:
        """This table, with entries of the other where this one has none."""
        return CostTable(
            self.device, {**other.seconds, **self.seconds}, {**other.workspace, **self.workspace}, self.measured
        )

    def of(self, work: Work) -> float:
        """Seconds of a call.

        Raises:
            ValueError: the table has no such signature.
        """
        found = self.seconds.get(work.signature)
        if found is None:
            raise ValueError(
                f"CostTable: no price of {work.signature} for {self.device}; measure the model's own step, or fill in with "
                "table.over(CostTable.from_rates(works, device))"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write JSON, compressed if the name ends in `.z`, in a folder that is there."""
        write({"format": FORMAT, **asdict(self)}, path, "costs.save:")

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read what `save` wrote.

        Raises:
            Unreadable: there is no such file, it holds no table, or one of another format.
        """

        def made(data: Mapping[str, Any]) -> CostTable:
            if data.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}; measure again with this version of weft")
            return cls(data["device"], dict(data["seconds"]), dict(data["workspace"]), data["measured"])

        return read(path, made, "weft.memory.CostTable")


# -- measuring --------------------------------------------------------------------------------------------------------


def clock(device: str = "cpu") -> Callable[[], float]:
    """Seconds now on the clock that suits a device; see the head of this file."""
    if device.startswith("cuda"):

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


class _CudaGauge:
    """Most bytes and bytes left since a mark, as torch's caching allocator counts them (rounded to 512)."""

    def mark(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def since(self) -> tuple[int, int]:
        return torch.cuda.max_memory_allocated() - self._before, torch.cuda.memory_allocated() - self._before


def gauge(device: str = "cpu") -> Any:
    """What measures workspace on a device: see `Recorder`. None where nothing does (no compiler for the native counter)."""
    if device.startswith("cuda"):
        return _CudaGauge()
    return None if native.problem() is not None else native.ledger()


def measure_operators(
    samples: Mapping[str, Sample], device: str = "cpu", *, repeats: int = 5, effort: float = 3.0
) -> CostTable:
    """Time each call on made-up numbers, one after the other. What cannot be called so is left out of the table.

    Args:
        samples: by signature, from a trace.
        device: where to run them.
        repeats: calls after a first one that is not counted; dear calls are made fewer times.
        effort: seconds that repeats may take in all, roughly.
    """
    now, counter, seconds, workspace = clock(device), gauge(device), {}, {}
    share = effort / max(len(samples), 1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for signature, what in samples.items():
            try:
                times, extra = _time(what, device, now, repeats, share, counter)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError):
                continue  # needs real contents: the caller has rates to fall back on
            seconds[signature] = statistics.median(times)
            if extra is not None:
                workspace[signature] = extra
    return CostTable(device, seconds, workspace, measured=True)


def _time(
    what: Sample, device: str, now: Callable[[], float], repeats: int, share: float, counter: Any
) -> tuple[list[float], int | None]:
    args, kwargs = what.arguments(device)
    there = {id(t.untyped_storage()) for t in tensors_of((*args, *kwargs.values()))}
    if counter is not None:
        counter.mark()
    start = now()
    result = what.func(*args, **kwargs)
    first = now() - start
    extra = None
    if counter is not None:
        made = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors_of((result,))}
        extra = max(0, counter.since()[0] - sum(n for key, n in made.items() if key not in there))
    del result
    times = []
    for _ in range(max(1, min(repeats, int(share / max(first, 1e-9))))):
        start = now()
        what.func(*args, **kwargs)
        times.append(now() - start)
    return times, extra


def _filled(value: Any, device: str) -> Any:
    if isinstance(value, Like):
        return value.make(device)
    if isinstance(value, _Unlike):
        raise TypeError("a sparse operand cannot be made up")
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(v, device) for v in value)
    return value
