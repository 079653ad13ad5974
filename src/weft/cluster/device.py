"""What one device computes and how fast, what one link carries, and what memory there is below a device.

Problem    seconds that a device spends on an operator of known FLOPs and bytes; seconds that a link spends on a message.
Method     roofline per operator kind:  seconds = calls * overhead + max(flops / rate, nbytes / bandwidth)      `Device.seconds`
           alpha-beta per link:         seconds = latency + nbytes / bandwidth                    `Link.seconds`, `Tier.seconds`
Source     Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009; Hockney, "The communication challenge for MPP",
           Parallel Computing 20(3), 1994 (alpha-beta).

Everything here is a frozen value of plain numbers: seconds, bytes, FLOP/s, bytes/s. Nothing imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.errors import WeftError

__all__ = ["KINDS", "SELF_LINK", "TIERS", "ClusterError", "Device", "Link", "Rate", "Tier"]

# Operator kinds with a rate of their own: those of `weft.graph` that cost something, and the optimizer's update.
KINDS = ("matmul", "conv", "attention", "norm", "elementwise", "gather", "recurrent", "optimizer")
FREE = frozenset({"view", "none"})  # kinds that move and compute nothing
TIERS = ("host", "disk")  # what may be below a device


class ClusterError(WeftError, ValueError):
    """A cluster description is wrong. `where` is `file:line` or the place in a dictionary (`devices[2].memory`)."""

    def __init__(self, where: str, problem: str):
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" if self.where else self.problem


@dataclass(frozen=True)
class Rate:
    """How fast a device runs one kind of operator.

    Attributes:
        flops: FLOP/s by dtype name ("float32", "bfloat16", ...), each > 0. A dtype that is not listed runs at the rate of
            float32, or at the lowest listed one where float32 is not listed either.
        bandwidth: bytes per second between the operator and memory, > 0.
        overhead: seconds that each call costs whatever its size, >= 0.
    """

    flops: Mapping[str, float]
    bandwidth: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        if not self.flops:
            raise ClusterError("", "flops must name at least one dtype, for example {float32: 1.0e12}")
        for dtype, value in self.flops.items():
            _positive(f"flops of {dtype}", value, "FLOP/s")
        _positive("bandwidth", self.bandwidth, "bytes per second")
        _not_negative("overhead", self.overhead, "seconds")

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.flops.items())), self.bandwidth, self.overhead))

    def flops_of(self, dtype: str) -> float:
        """FLOP/s for `dtype`, with the fallback described above."""
        found = self.flops.get(dtype)
        if found is None:
            found = self.flops.get("float32")
        return min(self.flops.values()) if found is None else found


@dataclass(frozen=True, slots=True)
class Tier:
    """A lower tier that activations can be copied to: the host's memory, a disk.

    Attributes:
        bandwidth: bytes per second that one device gets over the link to it, > 0; copies there and back share the link.
        latency: seconds that each copy costs besides, >= 0.
        capacity: bytes that one device may put there, > 0; `math.inf` is allowed.
        name: for people ("host", "disk").
        folder: of the disk, where there are several; "" is the folder for temporary files (`TMPDIR`).
        overlap: fraction of a copy's seconds, in [0, 1], that the device need not spend itself; None where it is not known: then
            the device's, or 1.
    """

    bandwidth: float
    latency: float = 0.0
    capacity: float = math.inf
    name: str = "host"
    folder: str = ""
    overlap: float | None = None

    def __post_init__(self) -> None:
        for what, value, unit in (
            ("bandwidth", self.bandwidth, "bytes per second"),
            ("capacity", self.capacity, "bytes"),
        ):
            if isinstance(value, bool) or not value > 0:
                raise ClusterError("", f"{what} must be > 0 {unit}, got {value}")
        _not_negative("latency", self.latency, "seconds")
        if self.overlap is not None and not 0.0 <= self.overlap <= 1.0:
            raise ClusterError("", f"overlap must be in [0, 1], got {self.overlap}")

    @property
    def hidden(self) -> float:
        """`overlap`, 1 where it is not known."""
        return 1.0 if self.overlap is None else self.overlap

    def seconds(self, nbytes: float) -> float:
        """Seconds to copy `nbytes` one way.

        >>> Tier(bandwidth=1e9, latency=1e-4).seconds(1_000_000)
        0.0011
        """
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Device:
    """One device: an accelerator, or a share of a machine's cores.

    Attributes:
        name: unique in its cluster ("gpu0", "alpha-3").
        kind: what it is ("A100-80GB", "cpu-core"); equal kinds need not have equal rates, `same_as` compares those.
        memory: bytes that a training process may use, > 0.
        rates: `Rate` by operator kind (see `KINDS`). "elementwise" or "default" must be there: a kind without a rate of
            its own runs at that of "default", or else "elementwise". "optimizer" prices an update of parameters: nbytes
            counts parameter, gradient and state once per reading and once per writing (AdamW in float32: 7 * 4 bytes an
            element), and calls counts parameter tensors.
        host: machine the device sits in; the default topology groups by it.
        overlap: fraction of communication, in [0, 1], that can hide behind computing. 1 where copy engines do the
            work (GPUs); less where the same cores compute and communicate.
        step: seconds that every training step costs besides its operators and what it sends, whatever their sizes, >= 0: the
            runtime's own Python, on the device's host.
        offload: the tier below it that activations may wait in, named one of `TIERS`; None if there is none. What lies below a
            CPU is a disk: the host's memory is its own.
    """

    name: str
    kind: str
    memory: int
    rates: Mapping[str, Rate]
    host: str = "localhost"
    overlap: float = 1.0
    offload: Tier | None = None
    step: float = 0.0
    _seconds: dict[tuple[str, str], tuple[float, float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.name:
            raise ClusterError("", "a device must have a name")
        _positive("memory", self.memory, "bytes")
        object.__setattr__(self, "memory", int(self.memory))
        if not 0.0 <= self.overlap <= 1.0:
            raise ClusterError("", f"overlap must be in [0, 1], got {self.overlap}")
        _not_negative("step", self.step, "seconds")
        if self.offload is not None and self.offload.name not in TIERS:
            raise ClusterError("", f"to must be {' or '.join(TIERS)}, got {self.offload.name!r}")
        if self.offload is not None and self.offload.name == "host" and self.kind.startswith("cpu"):
            raise ClusterError(
                "", f"the host's memory is that of a {self.kind} itself; offload to: disk, or not at all"
            )
        if "default" not in self.rates and "elementwise" not in self.rates:
            raise ClusterError(
                "", "rates must have an entry 'elementwise' or 'default', which kinds without one fall back on"
            )

    def __hash__(self) -> int:
        rates = tuple(sorted(self.rates))
        return hash((self.name, self.kind, self.memory, self.host, self.overlap, self.offload, self.step, rates))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seconds": {}}

    def rate(self, kind: str) -> Rate:
        """The rate of an operator kind, or the one it falls back on."""
        found = self.rates.get(kind) or self.rates.get("default")
        return found if found is not None else self.rates["elementwise"]

    def seconds(self, kind: str, flops: float, nbytes: float, dtype: str = "float32", calls: int = 1) -> float:
        """Seconds for `calls` operator calls of one kind that together do `flops` FLOPs and move `nbytes` bytes.

            T = calls * overhead + max(flops / rate, nbytes / bandwidth),    T = 0 for the kinds "view" and "none"

        >>> Device("d", "toy", 1, {"default": Rate({"float32": 1e9}, 1e8, 1e-6)}).seconds("matmul", 2e9, 1e8)
        2.000001
        """
        key = (kind, dtype)
        inverse = self._seconds.get(key)
        if inverse is None:
            inverse = self._seconds[key] = self._inverse(kind, dtype)
        overhead, per_flop, per_byte = inverse
        return calls * overhead + max(flops * per_flop, nbytes * per_byte)

    def _inverse(self, kind: str, dtype: str) -> tuple[float, float, float]:
        """(overhead, seconds per FLOP, seconds per byte), worked out once for each kind and dtype."""
        if kind in FREE:
            return 0.0, 0.0, 0.0
        rate = self.rate(kind)
        return rate.overhead, 1.0 / rate.flops_of(dtype), 1.0 / rate.bandwidth

    def same_as(self, other: Device) -> bool:
        """Whether the two are interchangeable: equal in all but their name and host."""
        mine = (self.kind, self.memory, self.overlap, self.offload, self.step, dict(self.rates))
        return mine == (other.kind, other.memory, other.overlap, other.offload, other.step, dict(other.rates))


@dataclass(frozen=True)
class Link:
    """What one device needs to send bytes to another.

    Attributes:
        latency: seconds for a message of no bytes, >= 0 (alpha).
        bandwidth: bytes per second in one direction, > 0 (1 / beta); `math.inf` is allowed.
        shared: the bandwidth is that of the whole host's connection, and is divided among the devices of one host that send
            over it at the same time (one network card for eight GPUs). False: each pair has it for itself.
    """

    latency: float
    bandwidth: float
    shared: bool = False

    def __post_init__(self) -> None:
        _not_negative("latency", self.latency, "seconds")
        if isinstance(self.bandwidth, bool) or not self.bandwidth > 0:
            raise ClusterError("", f"bandwidth must be > 0 bytes per second, got {self.bandwidth}")

    def seconds(self, nbytes: float) -> float:
        """Seconds for one message: latency + nbytes / bandwidth.

        >>> Link(latency=1e-4, bandwidth=1e9).seconds(1_000_000)
        0.0011
        """
        return self.latency + nbytes / self.bandwidth


def _positive(what: str, value: float, unit: str) -> None:
    if isinstance(value, bool) or not (value > 0 and math.isfinite(value)):
        raise ClusterError("", f"{what} must be a finite number > 0 ({unit}), got {value}")


def _not_negative(what: str, value: float, unit: str) -> None:
    if isinstance(value, bool) or not (value >= 0 and math.isfinite(value)):
        raise ClusterError("", f"{what} must be a finite number >= 0 ({unit}), got {value}")


SELF_LINK = Link(0.0, math.inf)  # from a device to itself
