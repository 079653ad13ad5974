"""Send the k largest entries of a tensor, found exactly or by a sampled threshold.

Problem    send k = ceil(ratio d) pairs (value, index) of a tensor of d entries, the largest in magnitude. An exact search
           over every entry costs as much as the bytes it saves on a fast link.
Method     sampled threshold:                                                             `sample_select`
               look at every s-th entry (s odd, start by the draw's seed), take as threshold what 1.2 ratio of the sample reach
               more than k above it: exact search among those;  fewer than 0.8 k: lower it by 0.8 and look again
           then at most k are sent, the largest; a message that found fewer is padded with zeros at a sent position, so that
           its size is always the same
Guarantee  exact: |x - C(x)|^2 <= (1 - k/d) |x|^2, the d - k smallest being dropped;  sampled: the same with the number
           found, >= 0.8 k                                                                `TopK.contraction`
Source     Lin et al., Deep Gradient Compression, arXiv:1712.01887; the bound: Stich et al., arXiv:1809.07599. Their code
           keeps the first k by index of those above the threshold, which favours early rows; here they are trimmed by size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from weft.comm.codec import Codec, Setting, Spec, State
from weft.comm.codecs.draws import draw_seed

BLOCK = 1 << 18  # entries compared at a time: 1.3 MB of buffers
AIM = 1.2  # of k: how many the sampled threshold lets through on average; few messages then come short, and few look again

__all__ = ["Selected", "TopK", "density", "kept", "sample_select"]


def density(setting: Setting, who: str) -> float:
    """A setting read as the fraction of entries sent.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if isinstance(setting, bool) or not isinstance(setting, int | float) or not 0 < setting <= 1:
        raise ValueError(f"{who}: ratio must be in (0, 1], got {setting!r}; 0.01 sends one entry in a hundred")
    return float(setting)


def kept(ratio: float, total: int) -> int:
    """k = ceil(ratio total), at least 1; a product that misses an integer by rounding counts as that integer.

    >>> kept(0.07, 100), kept(0.001, 10)
    (7, 1)
    """
    return max(1, min(total, math.ceil(ratio * total * (1 - 1e-12))))


class Selected(NamedTuple):
    """What a selection found.

    Attributes:
        index: positions int64 (at most k,).
        found: how many entries lay above the threshold before trimming.
        exact: whether the k largest are certain to be the ones: an exact search ran.
    """

    index: Tensor
    found: int
    exact: bool


def sample_select(
    x: Tensor, count: int, ratio: float, seed: int, sample: float = 0.01,
    least: float = 0.8, attempts: int = 10,
) -> Selected:  # fmt: skip
    """The `count` largest in magnitude of x (d,), nearly: all entries above a sampled threshold, trimmed by size.

    Args:
        x: float (d,).
        count: k, 1 <= k <= d.
        ratio: k/d before rounding up.
        seed: start of the sample.
        sample: least fraction of entries looked at; more are taken until two of them are above the threshold.
        least: of k: where fewer are found, the threshold is lowered by as much.
        attempts: how often the threshold may be lowered; then an exact search over everything.
    """
    total = len(x)
    samples = max(math.ceil(sample * total), math.ceil(2 / ratio))
    stride = max(1, total // samples)
    stride -= stride % 2 == 0  # an even step would see only some columns of the usual widths
    seen = x[seed % stride :: stride]
    threshold = _kth_largest(seen, min(len(seen), max(1, math.ceil(AIM * ratio * len(seen)))))
    for _ in range(attempts + 1):
        index = _at_least(x, threshold)
        found = len(index)
        if found >= least * count:
            break
        threshold *= least
    else:
        return Selected(_largest(x, count), found, True)
    if found <= count:
        return Selected(index, found, found == count)
    return Selected(_trimmed(x, index, count), found, True)


def _largest(x: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest in magnitude of x (d,), int64; among equals, whichever."""
    if x.device.type != "cpu":
        return x.abs().topk(count, sorted=False).indices
    return _trimmed(x, _at_least(x, _kth_largest(x, count)), count)


def _trimmed(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Those of the positions `index` where the `count` largest in magnitude of x lie; among equals, whichever."""
    if x.device.type != "cpu":
        return index.index_select(0, x.index_select(0, index).abs().topk(count, sorted=False).indices)
    places, drop = index.numpy(), len(index) - count
    if not drop:
        return index
    size = np.abs(x.numpy().take(places))
    chosen = np.flatnonzero(size >= np.partition(size, drop)[drop])
    if len(chosen) > count:  # equals at the threshold, of which not all go
        chosen = np.argpartition(size, drop)[drop:]
    return torch.from_numpy(places.take(chosen))


def _kth_largest(x: Tensor, k: int) -> float:
    """The k-th largest magnitude of x (d,); on a CPU by numpy's partition, in a fifth of the time of torch's top-k."""
    if x.device.type != "cpu":
        return float(x.abs().topk(k).values[-1])
    size = np.abs(x.numpy())
    size.partition(len(size) - k)
    return float(size[len(size) - k])


def _at_least(x: Tensor, threshold: float) -> Tensor:
    """Positions where |x| >= threshold, int64, in order.

    On a CPU by numpy, which searches flags in a fifth of the time torch takes, and block by block into the same two buffers, as
    making and fetching megabytes of memory costs more than comparing them.
    """
    if x.device.type != "cpu":
        return (x.abs() >= threshold).nonzero().view(-1)
    flat, width = x.numpy(), min(BLOCK, len(x))
    size, flags = np.empty(width, flat.dtype), np.empty(width, np.bool_)
    found = []
    for start in range(0, len(flat), width):
        part = flat[start : start + width]
        np.abs(part, out=size[: len(part)])
        np.greater_equal(size[: len(part)], threshold, out=flags[: len(part)])
        found.append(flags[: len(part)].nonzero()[0])
        if start:
            found[-1] += start
    return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found))


@final
@dataclass(frozen=True)
class TopK(Codec):
    """Keep the largest entries: 8 bytes each (float32 value, int32 index), or 6 with `values=torch.float16`.

    A setting is a ratio in (0, 1]; at 1 the tensor goes dense (`bypass`). Half-precision values are sent relative to the
    largest, so that neither tiny nor huge gradients are lost.

    Attributes:
        ratio: fraction of entries sent where no controller says otherwise.
        selection: "sampled" (threshold, see above) or "exact"; tensors of at most 2/ratio entries are always searched exactly.
        values: torch.float32 or torch.float16 on the wire.
        sample: fraction of entries looked at for the threshold.
    """

    ratio: float = 0.01
    selection: Literal["sampled", "exact"] = "sampled"
    values: torch.dtype = torch.float32
    sample: float = 0.01

    def __post_init__(self) -> None:
        density(self.ratio, "TopK")
        if self.selection not in ("sampled", "exact"):
            raise ValueError(f"TopK: selection must be 'sampled' or 'exact', got {self.selection!r}")
        if self.values not in (torch.float32, torch.float16):
            raise ValueError(f"TopK: values must be torch.float32 or torch.float16, got {self.values}")
        if not 0 < self.sample <= 1:
            raise ValueError(f"TopK: sample must be in (0, 1], got {self.sample}; 0.01 looks at one entry in a hundred")

    def default(self, spec: Spec) -> Setting:
        return self.ratio

    def bypass(self, spec: Spec, setting: Setting) -> bool:
        """At ratio 1 every entry is sent, and the tensor goes dense instead: as values alone, by all-reduce."""
        return density(setting, "TopK") >= 1

    def message(self, spec: Spec, setting: Setting) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        count = kept(density(setting, "TopK"), _indexable(spec))
        pairs = (((count,), self.values), ((count,), torch.int32))
        return pairs if self.values == torch.float32 else (*pairs, ((1,), torch.float32))

    def encode(self, x: Tensor, spec: Spec, state: State, setting: Setting, step: int) -> tuple[Tensor, ...]:
        ratio = density(setting, "TopK")
        count = kept(ratio, _indexable(spec))
        index = self.select(x, ratio, draw_seed(state, step)).index
        values = _at(x, index)
        short = count - len(index)
        if short:  # a zero at a position that is sent anyway changes neither the sum nor what a memory forgets
            index = torch.cat((index, index[:1].expand(short)))
            values = torch.cat((values, values.new_zeros(short)))
        if self.values == torch.float32:
            return values.to(torch.float32), _narrow(index)
        largest = values.abs().amax().to(torch.float32).view(1)
        scaled = values / torch.where(largest > 0, largest, 1)
        return scaled.to(self.values), _narrow(index), largest

    def select(self, x: Tensor, ratio: float, seed: int) -> Selected:
        """The positions to send of a flat tensor (d,)."""
        count = kept(ratio, len(x))
        if self.selection == "exact" or len(x) <= 2 / ratio or count == len(x):
            return Selected(_largest(x, count), count, True)
        return sample_select(x, count, ratio, seed, self.sample)

    def decode(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> Tensor:
        out = torch.zeros(spec.numel, dtype=torch.float32, device=message[0].device)
        self.add_to(out, message, spec, setting)
        return out

    def sent(self, message: Sequence[Tensor], spec: Spec, setting: Setting) -> tuple[Tensor, Tensor]:
        """Values float32 (k,) and positions int64 (k,); a padded message repeats a position, with value 0."""
        values = message[0].to(torch.float32)
        if self.values != torch.float32:
            values = values * message[2]
        return values, message[1].to(torch.int64)

    def add_to(self, out: Tensor, message: Sequence[Tensor], spec: Spec, setting: Setting, weight: float = 1.0) -> None:
        values = message[0] if self.values == torch.float32 else message[0].to(torch.float32) * message[2]
        out.index_add_(0, message[1], values, alpha=weight)

    def contraction(self, spec: Spec, setting: Setting) -> float:
        """c of |x - C(x)|^2 <= (1 - c) |x|^2, for every x."""
        ratio, total = density(setting, "TopK"), spec.numel
        count = kept(ratio, total)
        if self.selection == "sampled" and total > 2 / ratio:
            count = max(1, math.ceil(0.8 * count))
        rounding = 0.0 if self.values == torch.float32 else 2.0**-20
        return count / total * (1 - rounding)

    def error(self, x: Tensor, spec: Spec, settings: Sequence[Setting]) -> list[float]:
        """The exact search's squared error for every setting, by one sort; a sampled threshold comes a little above it."""
        if not settings:
            return []
        tails = x.abs().sort().values.double().square().cumsum(0)
        dropped = [spec.numel - kept(density(setting, "TopK"), spec.numel) for setting in settings]
        return [float(tails[count - 1]) if count else 0.0 for count in dropped]


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; on a CPU by numpy, whose calls cost less: with tensors of some 100,000 entries it is calls that take the time."""
    return torch.from_numpy(x.numpy().take(index.numpy())) if x.device.type == "cpu" else x.index_select(0, index)


def _narrow(index: Tensor) -> Tensor:
    """Positions as int32."""
    if index.device.type == "cpu":
        return torch.from_numpy(index.numpy().astype(np.int32))
    return index.to(torch.int32)


def _indexable(spec: Spec) -> int:
    if spec.numel >= 2**31:
        raise ValueError(f"TopK: {spec.name} has {spec.numel} entries, more than int32 indices reach; split it")
    return spec.numel
