"""Pick the exchange whose predicted step is shortest, plain data parallel included.

Problem    A code saves seconds on the wire and costs seconds of the processor. Which wins depends on the link, the machine, and
           how much of the wire the backward pass hides; a code that looks good on paper often loses on a fast link.
Method     `attach(ddp, auto(link))` runs plain data parallel for `trial` steps and measures the step S, the window W from the
           first bucket to the end of the backward pass, and the seconds E that plain waits after it. Then, for every candidate:
               codec seconds    measured on tensors of the model's shapes at their settings, with memory  `codec_seconds`
               wire seconds     its topology's cost on the link, latency once per bucket         `wire_seconds`
               exposed          codec + max(wire / buckets, wire - W)                            `exposed`
           (no processor is assumed idle, and the last bucket is never hidden.) Of E only what the wire explains can be saved:
           the rest is waiting for a slower rank. Rank 0 chooses; all ranks take over its choice, try it for `trial` steps, and go
           back to plain if its steps are not shorter.
Guarantee  A candidate is taken only if it is predicted to save more than `margin` of the step measured with plain, and kept only
           if it has been measured to save anything: in doubt, plain.
Source     ours; costs as in Patarasuk and Yuan 2009 and the topologies' own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
import torch.distributed as dist

from weft.cluster import Link
from weft.comm.agree import announce, decided
from weft.comm.codec import LinearCodec, Spec, State
from weft.comm.codecs.low_rank import LowRank
from weft.comm.codecs.plain import Cast
from weft.comm.codecs.top_k import TopK
from weft.comm.exchange import Exchange
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.topology import AllGather, Peer, Ring
from weft.comm.wired import Wired

__all__ = ["Auto", "Trial", "Tryout", "auto", "codec_seconds", "exposed", "measure_link", "tried", "wire_seconds"]

PROBES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes of all-reduces that measure a link
ENOUGH = 0.05  # seconds that such an all-reduce should take: shorter ones pass in the burst of a token bucket
SAMPLED = 4_000_000  # entries on which codec seconds are measured; the rest is scaled


def usual() -> dict[str, Exchange]:
    """What is tried where nothing is said: exchanges that train as plain does with any optimizer."""
    return {
        "bfloat16": Exchange(Cast("bfloat16")),
        "low rank 4": Exchange(LowRank(4), ErrorFeedback()),
        "top-k 1 %": Exchange(TopK(0.01), ErrorFeedback()),
    }


@final
@dataclass(frozen=True)
class Trial:
    """What steps of plain data parallel took, in seconds.

    Attributes:
        step: from the end of one backward pass to that of the next, S.
        window: from the first bucket to the end of the backward pass, W.
        waited: for the exchange after the end of the backward pass, E.
        buckets: how many a step has.
    """

    step: float
    window: float
    waited: float
    buckets: int


@final
@dataclass(frozen=True, eq=False)
class Auto:
    """What `auto` returns; `attach` decides. `candidates` makes the exchanges to choose from, by name."""

    link: Link | None = None
    candidates: Callable[[], dict[str, Exchange]] = field(default=usual)
    trial: int = 6
    margin: float = 0.05

    def __post_init__(self) -> None:
        if self.trial < 2:
            raise ValueError(f"auto: trial must be >= 2 steps, got {self.trial}: the first one warms up")
        if not 0 <= self.margin < 1:
            raise ValueError(f"auto: margin must be in [0, 1), got {self.margin}")

    def exchanges(self) -> dict[str, Exchange]:
        """What `candidates` makes.

        Raises:
            ValueError: it is not exchanges by name, or one is called "plain".
        """
        made = self.candidates()
        if not isinstance(made, Mapping):
            raise ValueError(f"auto: candidates must make a dict of exchanges by name, got {made!r:.80}")
        for name, exchange in made.items():
            if not isinstance(name, str) or name == "plain":
                raise ValueError(
                    f'auto: candidates are called by words other than "plain", which is no exchange; got {name!r}'
                )
            if not isinstance(exchange, Exchange):
                raise ValueError(f"auto: candidate {name!r} must be a weft.comm.Exchange, got {exchange!r:.80}")
        return dict(made)

    def predict(self, specs: Sequence[Spec], ranks: int, trial: Trial, link: Link) -> dict[str, float]:
        """Predicted step seconds of every candidate, and of "plain" (measured)."""
        found = {"plain": trial.step}
        plain = Exchange(select=lambda spec: False)
        saved = min(trial.waited, exposed(0.0, wire_seconds(plain, specs, ranks, link, trial.buckets), trial))
        for name, exchange in self.exchanges().items():
            seconds = exposed(
                codec_seconds(exchange, specs, ranks), wire_seconds(exchange, specs, ranks, link, trial.buckets), trial
            )
            found[name] = trial.step - saved + seconds
        return found

    def choose(self, predicted: dict[str, float]) -> str:
        """The name of the shortest step; "plain" unless the gain is worth it."""
        best = min(predicted, key=lambda name: (predicted[name], name))
        return best if predicted[best] < (1 - self.margin) * predicted["plain"] else "plain"


@final
class Tryout:
    """An `Auto` at work: plain steps, the choice, steps with what was chosen, and plain again where those are no shorter.

    Args:
        choice: None where there is nothing to choose.
        specs: of the model's tensors.
    Raises:
        ValueError: the candidates are no exchanges by name.
    Attributes:
        chosen: the name of the choice once it is made, else "".
        predicted: step seconds by name.
    """

    def __init__(self, choice: Auto | None, specs: Sequence[Spec]):
        self.chosen, self.predicted = "", dict[str, float]()
        if choice is not None:
            choice.exchanges()  # refused here, where every rank comes by, and not by rank 0 alone later
        self._choice, self._specs = choice, specs
        self._began = self._ended = self._plain_step = 0.0
        self._buckets, self._steps = 0, list[tuple[float, float, float]]()  # of each step, see `Trial`

    def began(self, wired: Wired) -> Exchange | None:
        """A backward pass begins, and nothing is on the wire: the exchange to go on with, None for the same as before."""
        found = None
        if self._choice is not None and len(self._steps) >= self._choice.trial:
            of_steps = self._steps[1:]  # the first has no beginning
            medians = [statistics.median(kind) for kind in zip(*of_steps, strict=True)]
            self._steps.clear()
            found = (self._confirm if self.chosen else self._decide)(self._choice, medians, wired)
        self._began = time.perf_counter()
        return found

    def ended(self, waited: float, buckets: int) -> None:
        """The results of a backward pass are there, `waited` seconds after its own end."""
        now = time.perf_counter()
        if self._choice is not None:
            self._steps.append((now - self._ended, now - waited - self._began, waited))
        self._ended, self._buckets = now, buckets

    def _decide(self, choice: Auto, medians: Sequence[float], wired: Wired) -> Exchange | None:
        trial = Trial(*medians, buckets=max(self._buckets, 1))
        link = choice.link if choice.link is not None else measure_link(wired.group)

        def decide() -> tuple[str, dict[str, float]]:
            predicted = choice.predict(self._specs, wired.ranks, trial, link)
            return choice.choose(predicted), predicted

        self.chosen, self.predicted = decided("the choice of an exchange", decide, wired.group, wired.device)
        self._plain_step = trial.step
        if self.chosen == "plain":
            self._choice = None
            return None
        return choice.exchanges()[self.chosen]

    def _confirm(self, choice: Auto, medians: Sequence[float], wired: Wired) -> Exchange | None:
        self._choice = None
        if announce(medians[0] < self._plain_step, wired.group, wired.device):
            return None
        self.chosen = "plain"
        return Exchange()


def auto(
    link: Link | None = None,
    candidates: Callable[[], dict[str, Exchange]] | None = None,
    *,
    trial: int = 6,
    margin: float = 0.05,
) -> Auto:
    """For `attach(ddp, auto(link))`: plain data parallel, or the candidate that is predicted to make steps shortest.

    Args:
        link: between the ranks (latency in seconds, bandwidth in bytes per second); None to measure it.
        candidates: makes exchanges by name; None for bfloat16, low rank 4 and top-k of 1 %. They differ in what they do to
            training: name those whose loss of precision you accept.
        trial: steps of plain data parallel that are measured before the choice, >= 2.
        margin: fraction of the plain step that must be saved.

    >>> auto(Link(latency=1e-4, bandwidth=1.25e7)).margin
    0.05
    """
    return Auto(link, candidates if candidates is not None else usual, trial, margin)


def exposed(codec: float, wire: float, trial: Trial) -> float:
    """Seconds that a step gets longer by.

    >>> exposed(0.05, 0.02, Trial(step=1.0, window=0.5, waited=0.2, buckets=2))
    0.060000000000000005
    """
    return codec + max(wire / trial.buckets, wire - trial.window)


def wire_seconds(exchange: Exchange, specs: Sequence[Spec], ranks: int, link: Link, buckets: int) -> float:
    """Seconds on the wire for all tensors of a step: bytes as one message, latencies once per bucket and round."""
    hops, nbytes = exchange.wire(specs, ranks)
    return hops * link.latency * buckets + nbytes / link.bandwidth


def codec_seconds(exchange: Exchange, specs: Sequence[Spec], ranks: int) -> float:
    """CPU seconds a step of memory, encoding, decoding and combining; see `tried`."""
    return tried(exchange, specs, ranks)[0]


def tried(exchange: Exchange, specs: Sequence[Spec], ranks: int) -> tuple[float, float]:
    """Codec and memory on random tensors of the given shapes: CPU seconds a step on this machine, bytes kept between steps."""
    chosen = [spec for spec in specs if exchange.selects(spec)]
    total = sum(spec.numel for spec in chosen)
    some, size = [], 0
    for spec in sorted(chosen, key=lambda spec: -spec.numel):
        if not some or size + spec.numel <= SAMPLED:
            some.append(spec)
            size += spec.numel
    if not some:
        return 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    states: dict[str, State] = {spec.name: {"seed": 0, "shared_seed": 0} for spec in some}
    found = []
    for step in range(3):
        seconds = 0.0
        for spec in some:
            x = torch.randn(spec.numel, generator=generator)
            began = time.thread_time()
            _one(exchange, spec, x, states[spec.name], step, ranks)
            seconds += time.thread_time() - began
        found.append(seconds)
    kept = sum(value.nbytes for state in states.values() for value in state.values() if isinstance(value, torch.Tensor))
    return min(found[1:]) * total / size, kept * total / size


def _one(exchange: Exchange, spec: Spec, x: torch.Tensor, state: State, step: int, ranks: int) -> None:
    codec, setting = exchange.codec, exchange.setting_of(spec)
    if setting is None:
        return
    y = exchange.memory.before(x, spec, state)
    if isinstance(codec, LinearCodec) and isinstance(exchange.topology, Ring):
        talk = codec.rounds(y, spec, state, setting, step)
        part = next(talk)
        while True:
            try:
                part = talk.send(part.clone())
            except StopIteration as stop:
                mean = stop.value
                break
        sent, where = codec.own(y, mean, spec, state, setting)
        exchange.memory.after(y, sent, where, state)
    else:
        message = codec.encode(y, spec, state, setting, step)
        message = tuple(part.clone() for part in message)
        sent, where = codec.sent(message, spec, setting)
        exchange.memory.after(y, sent, where, state)
        mean = torch.zeros(spec.numel)
        decoded = ranks if isinstance(exchange.topology, AllGather | Peer) else 2
        for _ in range(decoded):
            codec.add_to(mean, message, spec, setting, 1 / ranks)
    x.copy_(exchange.memory.delivered(mean, spec, state))


def measure_link(group: dist.ProcessGroup) -> Link:
    """Latency and bandwidth between the ranks of a group, by small all-reduces; every rank calls it."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return Link(0.0, 1e12)

    def seconds(nbytes: int) -> float:
        """The best of three, of the slowest rank: in doubt a link is fast, and plain good enough."""
        x, found = torch.zeros(nbytes // 4), []
        for _ in range(4):
            began = time.perf_counter()
            dist.all_reduce(x, group=group)
            found.append(time.perf_counter() - began)
        best = torch.tensor([min(found[1:])])
        dist.all_reduce(best, dist.ReduceOp.MAX, group=group)  # so that all ranks go on or stop together
        return float(best)

    small, nbytes, large = seconds(8), 8, 0.0
    for nbytes in PROBES:
        large = seconds(nbytes)
        if large >= ENOUGH:
            break
    wire = max(large - small, 1e-6)
    return Link(small / (2 * (ranks - 1)), 2 * (ranks - 1) / ranks * nbytes / wire)
