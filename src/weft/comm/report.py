"""What an exchange has sent, lost and cost so far, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from weft.comm.codec import Setting

__all__ = ["Report", "Tally", "TensorReport"]


@final
@dataclass
class Tally:
    """Counters of one tensor; changed by the exchange alone."""

    steps: int = 0
    nbytes: float = 0.0
    codec_seconds: float = 0.0
    error: float = 0.0
    size: float = 0.0

    def measure(self, y: Tensor, sent: Tensor, where: Tensor | None) -> None:
        """Add |y - sent|^2 and |y|^2."""
        size = float(y.square().sum())
        if where is None:
            lost = float((y - sent).square().sum())
        else:  # everything but `where` is lost whole
            there = y[where]
            lost = size - float(there.square().sum()) + float((there - sent).square().sum())
        self.error += max(lost, 0.0)
        self.size += size


@final
@dataclass(frozen=True)
class TensorReport:
    """One tensor, per step.

    Attributes:
        setting: of the codec, in force now; None means uncompressed.
        nbytes: bytes over the busiest rank's link, headers not counted.
        ratio: bytes that plain all-reduce would send, over `nbytes`.
        relative_error: |y - sent| / |y| of what the memory handed to the codec, root mean square over the measured steps; 0
            where nothing is lost.
        codec_seconds: CPU seconds of memory, encoding, decoding and combining on this rank.
        rounded: the gradient is float64, and codec and memory take it as float32.
    """

    setting: Setting
    nbytes: float
    ratio: float
    relative_error: float
    codec_seconds: float
    rounded: bool = False


@final
@dataclass(frozen=True)
class Report:
    """`Exchange.report()`: numbers per step, of this rank.

    Attributes:
        tensors: by name.
        steps: steps exchanged, skipped ones included.
        skipped: steps undone since a gradient was not finite.
        exposed_seconds: wall seconds that the end of the backward pass waited for the exchange.
    """

    tensors: Mapping[str, TensorReport] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    exposed_seconds: float = 0.0

    @property
    def nbytes(self) -> float:
        """Bytes over the busiest rank's link a step."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def ratio(self) -> float:
        """Bytes of plain all-reduce over bytes sent."""
        dense = sum(tensor.ratio * tensor.nbytes for tensor in self.tensors.values())
        return dense / self.nbytes if self.nbytes else 1.0

    @property
    def codec_seconds(self) -> float:
        """CPU seconds a step."""
        return sum(tensor.codec_seconds for tensor in self.tensors.values())

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps ({self.skipped} skipped), {self.nbytes / 1e6:.3f} MB a step (1/{self.ratio:.1f} of plain), "
            f"codec {self.codec_seconds * 1e3:.1f} ms, exposed {self.exposed_seconds * 1e3:.1f} ms"
        ]
        for name, tensor in self.tensors.items():
            lines.append(
                f"  {name}: setting {tensor.setting}, {tensor.nbytes:.0f} bytes (1/{tensor.ratio:.1f}), "
                f"error {tensor.relative_error:.3f}, codec {tensor.codec_seconds * 1e3:.2f} ms"
                + (", float64 taken as float32" if tensor.rounded else "")
            )
        return "\n".join(lines)
