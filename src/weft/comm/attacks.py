"""What faulty or hostile workers send: for tests and benches of the rules in `weft.comm.rules`.

    on messages (`Attack.messages`), knowing what the honest ones send in this very round
        SignFlip          -scale x mean of the honest
        InnerProduct      -epsilon x mean, small (fall of empires)
        LittleIsEnough    mean - z std, entry by entry, z as large as hides
        Mimic             one honest worker's message again
        Gaussian          noise of `scale` times the honest norm
        Infinite          infinity or NaN
        DroppedPackets    an honest message with packets of it lost (zeros)
        TwoFaced          another message for each receiver
    on data (`DataAttack.corrupt`), of workers that then compute honestly
        LabelFlip         class c becomes C - 1 - c
        AugmentationNoise noise added to the images

`ATTACKS` and `DATA_ATTACKS` name them. An attack holds options; what is drawn comes from the generator it is given.
"""

from __future__ import annotations

import abc
import math
import statistics
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = [
    "ATTACKS",
    "DATA_ATTACKS",
    "Attack",
    "AugmentationNoise",
    "DataAttack",
    "DroppedPackets",
    "Gaussian",
    "Infinite",
    "InnerProduct",
    "LabelFlip",
    "LittleIsEnough",
    "Mimic",
    "SignFlip",
    "TwoFaced",
    "hidden_deviation",
]


class Attack(abc.ABC):
    """Faulty messages, made from the honest ones of the same round."""

    @abc.abstractmethod
    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        """What `count` attackers send to `receiver`: (count, d) for honest messages (h, d), h >= 1."""


class DataAttack(abc.ABC):
    """Bad data of a worker that is honest otherwise."""

    @abc.abstractmethod
    def corrupt(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The batch (b, ...), labels (b,) as the faulty worker has them."""


def deviation(honest: Tensor) -> Tensor:
    """The standard deviation of (h, d) entry by entry, 0 for h = 1: `Tensor.std` along the first dim takes ten times as long."""
    apart = honest - honest.mean(0)
    return (apart.square_().sum(0) / max(len(honest) - 1, 1)).sqrt_()


def _same(message: Tensor, count: int) -> Tensor:
    return message.expand(count, -1).clone()


def hidden_deviation(workers: int, faulty: int) -> float:
    """z of "a little is enough": how many standard deviations off the f attackers still have a majority with their likes.

    s = floor(n/2 + 1) - f honest workers must lie even farther out, so that z = Phi^-1((n - f - s)/(n - f)).
    Source: Baruch et al., arXiv:1902.06156, algorithm 3.

    Raises:
        ValueError: not 0 <= f < n/2.
    """
    if not 0 <= 2 * faulty < workers:
        raise ValueError(f"hidden_deviation: f must be below n/2, got f = {faulty}, n = {workers}")
    supporters = workers // 2 + 1 - faulty
    share = (workers - faulty - supporters) / (workers - faulty)
    return statistics.NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))


@final
@dataclass(frozen=True)
class SignFlip(Attack):
    """-scale times the mean of the honest."""

    scale: float = 10.0

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        return _same(-self.scale * honest.mean(0), count)


@final
@dataclass(frozen=True)
class InnerProduct(Attack):
    """-epsilon times the mean of the honest, small enough to look near to them (Xie et al., arXiv:1903.03936)."""

    epsilon: float = 0.1

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        return _same(-self.epsilon * honest.mean(0), count)


@final
@dataclass(frozen=True)
class LittleIsEnough(Attack):
    """mean - z std of the honest, entry by entry; z = None takes `hidden_deviation` of the numbers of workers."""

    z: float | None = None

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        z = self.z if self.z is not None else hidden_deviation(len(honest) + count, count)
        spread = deviation(honest)
        return _same(honest.mean(0) - z * spread, count)


@final
@dataclass(frozen=True)
class Mimic(Attack):
    """All send again what honest worker `target` sends: its data count for more (Karimireddy et al., arXiv:2006.09365)."""

    target: int = 0

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        if not 0 <= self.target < len(honest):
            raise ValueError(f"Mimic: target must be one of the {len(honest)} honest workers, got {self.target}")
        return _same(honest[self.target], count)


@final
@dataclass(frozen=True)
class Gaussian(Attack):
    """Normal noise, each attacker its own, of `scale` times the honest messages' mean norm."""

    scale: float = 100.0

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        noise = torch.randn(count, honest.shape[1], generator=generator, dtype=honest.dtype).to(honest.device)
        size = honest.norm(dim=1).mean() / math.sqrt(honest.shape[1])
        return noise * (self.scale * size)


@final
@dataclass(frozen=True)
class Infinite(Attack):
    """The value in every entry: infinity, or NaN."""

    value: float = math.inf

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        return honest.new_full((count, honest.shape[1]), self.value)


@final
@dataclass(frozen=True)
class DroppedPackets(Attack):
    """An honest worker's message of which each packet is lost with probability `rate`; what is lost reads as zeros.

    Attributes:
        rate: in [0, 1].
        packet: entries in a packet; 362 float32 are the 1,448 bytes that TCP puts in an Ethernet frame.
    """

    rate: float = 0.1
    packet: int = 362

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or self.packet < 1:
            raise ValueError(
                f"DroppedPackets: rate must be in [0, 1] and packet 1 or more, got {self.rate}, {self.packet}"
            )

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        senders = torch.arange(count) % len(honest)
        packets = -(-honest.shape[1] // self.packet)
        arrived = torch.rand(count, packets, generator=generator) >= self.rate
        mask = arrived.repeat_interleave(self.packet, 1)[:, : honest.shape[1]].to(honest.device)
        return honest[senders] * mask


@final
@dataclass(frozen=True)
class TwoFaced(Attack):
    """mean + scale std to receivers of even number and mean - scale std to the others: pulls peers apart."""

    scale: float = 1.0

    def messages(self, honest: Tensor, count: int, generator: torch.Generator, receiver: int = 0) -> Tensor:
        side = self.scale if receiver % 2 == 0 else -self.scale
        spread = deviation(honest)
        return _same(honest.mean(0) + side * spread, count)


@final
@dataclass(frozen=True)
class LabelFlip(DataAttack):
    """Class c is called C - 1 - c."""

    def corrupt(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, classes - 1 - y


@final
@dataclass(frozen=True)
class AugmentationNoise(DataAttack):
    """Normal noise of `scale` times the batch's own standard deviation: augmentation that went too far."""

    scale: float = 3.0

    def corrupt(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return x + self.scale * x.std() * noise, y


ATTACKS: dict[str, type[Attack]] = {
    "sign-flip": SignFlip,
    "inner-product": InnerProduct,
    "little-is-enough": LittleIsEnough,
    "mimic": Mimic,
    "gaussian": Gaussian,
    "infinite": Infinite,
    "dropped-packets": DroppedPackets,
    "two-faced": TwoFaced,
}
DATA_ATTACKS: dict[str, type[DataAttack]] = {"label-flip": LabelFlip, "augmentation-noise": AugmentationNoise}
