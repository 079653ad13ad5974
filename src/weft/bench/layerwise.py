"""L-GreCo's comparisons: tables of real gradients, and training with two simulated workers under each controller.

gradients of a byte-level transformer, summed over steps                `summed_gradients`
bytes and errors of every chooser on the same tables                    `choices`
validation loss after equal steps, with the bytes that were sent        `train`
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from weft.bench.system import Row
from weft.comm.codec import Codec, LinearCodec, Setting, Spec
from weft.comm.codecs import LowRank, Quantise, TopK
from weft.comm.controller import Controller
from weft.comm.controllers import Accordion, LayerwiseBudget, Uniform, greedy_layers, plan_layers
from weft.comm.memories import ErrorFeedback
from weft.tasks import language_model

__all__ = ["FAMILIES", "Family", "Workers", "choices", "over_links", "summed_gradients", "train"]


@dataclass(frozen=True)
class Family:
    """A codec with the settings that a controller may choose from.

    Attributes:
        floor: settings that give no tensor less than a quarter of the default.
        low: Accordion's setting of low compression; its other one is the least of `settings`.
    """

    name: str
    codec: Codec
    settings: tuple[Setting, ...]
    default: Setting
    floor: tuple[Setting, ...]
    low: Setting


DENSITIES = (0.001, 0.0018, 0.0025, 0.0032, 0.0056, 0.01, 0.018, 0.032, 0.056, 0.1)
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FAMILIES = (
    Family("top-k", TopK(0.01, "exact"), DENSITIES, 0.01, DENSITIES[2:], 0.1),
    Family("quantise", Quantise(4, 1024, "range", stochastic=False), tuple(range(2, 9)), 4, tuple(range(2, 9)), 8),
    Family("low-rank", LowRank(4), RANKS, 4, RANKS, 16),
)


def summed_gradients(
    seed: int, warmup: int = 40, summed: int = 20
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], float]:
    """(sums, the gradients one by one, CPU seconds a step) of the matrices of a 6.4 M parameter transformer on real text."""
    task = language_model(layers=8, width=256, heads=4, batch_size=4, seed=seed)
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    each: list[dict[str, Tensor]] = []
    begun = time.process_time()
    for number, (tokens, targets) in enumerate(islice(task.batches(), warmup + summed)):
        optimizer.zero_grad()
        model(tokens, targets).backward()
        if number >= warmup:
            each.append(
                {n: p.grad.clone().view(-1) for n, p in model.named_parameters() if p.dim() > 1 and p.grad is not None}
            )
        optimizer.step()
    seconds = (time.process_time() - begun) / (warmup + summed)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    sums = {n: torch.stack([g[n] for g in each]).sum(0).view(shapes[n]) for n in each[0]}
    return sums, each, seconds


def choices(
    family: Family, sums: dict[str, Tensor], each: Sequence[dict[str, Tensor]], step_seconds: float
) -> Iterator[Row]:
    """What uniform, programme, greedy, Accordion and, for Top-k, one threshold for all, send at which error."""
    specs = {name: Spec(name, tuple(g.shape)) for name, g in sums.items()}
    codec, settings = family.codec, family.settings
    err = [codec.error(g.view(-1), specs[n], settings) for n, g in sums.items()]
    size = [[float(dense(codec, specs[n], s)) for s in settings] for n in sums]
    uniform = [settings.index(family.default)] * len(err)

    def totals(choice: Sequence[int]) -> tuple[float, float]:
        rows = range(len(choice))
        return math.fsum(size[i][choice[i]] for i in rows), math.fsum(err[i][choice[i]] for i in rows)

    uniform_bytes, budget = totals(uniform)
    literal = literal_error(family, sums, specs, uniform)
    yield Row(f"{family.name} uniform", bytes=uniform_bytes, error=1.0, literal_error=literal / budget)

    for label, choose in (("programme", plan_layers), ("greedy", greedy_layers)):
        choice = choose(err, size, budget)
        nbytes, error = totals(choice)
        literal = literal_error(family, sums, specs, choice)
        yield Row(
            f"{family.name} {label}",
            bytes=nbytes,
            error=error / budget,
            saved=uniform_bytes / nbytes,
            literal_error=literal / budget,
        )

    if family.floor != settings:
        allowed = [settings.index(s) for s in family.floor]
        choice = plan_layers(
            [[row[j] for j in allowed] for row in err], [[row[j] for j in allowed] for row in size], budget
        )
        nbytes, error = totals([allowed[j] for j in choice])
        yield Row(
            f"{family.name} programme, floor default/4",
            bytes=nbytes,
            error=error / budget,
            saved=uniform_bytes / nbytes,
        )

    controller = Accordion(family.low, min(settings))  # type: ignore[type-var]
    half = len(each) // 2
    decision: dict[str, Setting] = {}
    for part in (each[:half], each[half:]):
        for gradients in part:
            for name, gradient in gradients.items():
                controller.observe(specs[name], gradient, 0)
        decision = dict(controller.decide(0, specs))
    choice = [settings.index(decision[name]) for name in sums]
    nbytes, error = totals(choice)
    ours = totals(plan_layers(err, size, error))[0]
    yield Row(f"{family.name} accordion", bytes=nbytes, error=error / budget, its_bytes_over_ours=nbytes / ours)

    if isinstance(codec, TopK):
        squares = torch.cat([g.view(-1) for g in sums.values()]).square().double().sort().values.cumsum(0)
        kept = int((squares > budget).sum())
        yield Row("top-k, one threshold for all", bytes=8.0 * kept, error=1.0, saved=uniform_bytes / (8.0 * kept))

    deciding = LayerwiseBudget(settings, family.default)
    deciding.bind(codec)
    for name, total in sums.items():
        deciding.observe(specs[name], total.view(-1), 0)
    deciding.decide(0, specs)
    share = deciding.decision_seconds / (deciding.every * step_seconds)
    yield Row(f"{family.name} decision", cpu_seconds=deciding.decision_seconds, share_of_training=share)


def dense(codec: Codec, spec: Spec, setting: Setting) -> int:
    """Bytes of a message, of the tensor itself where the codec lets it be."""
    return 4 * spec.numel if codec.bypass(spec, setting) else codec.nbytes(spec, setting)


def literal_error(family: Family, sums: dict[str, Tensor], specs: dict[str, Spec], choice: Sequence[int]) -> float:
    """The total squared error of real messages; low rank with four steps of its power iteration, as a warm start has had."""
    total = 0.0
    for (name, gradient), j in zip(sums.items(), choice, strict=True):
        spec, setting = specs[name], family.settings[j]
        if family.codec.bypass(spec, setting):
            continue
        x, state = gradient.view(-1), {"seed": 1, "shared_seed": 1}
        for step in range(4 if isinstance(family.codec, LowRank) else 1):
            message = family.codec.encode(x, spec, state, setting, step)
        total += float((x.double() - family.codec.decode(message, spec, setting).double()).square().sum())
    return total


class Workers:
    """Workers in one process that exchange their gradients through a codec with error feedback, under a controller."""

    def __init__(self, count: int, codec: Codec, controller: Controller):
        self.count, self.codec, self.controller, self.memory = count, codec, controller, ErrorFeedback()
        self.settings: dict[str, Setting] = {}
        self.states: dict[tuple[int, str], dict[str, Any]] = {}
        self.sent = 0.0  # bytes of matrices from one worker
        controller.bind(codec)

    def mean(self, gradients: Sequence[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """What every worker gets of the workers' gradients, matrices through the codec."""
        specs = {n: Spec(n, tuple(g.shape)) for n, g in gradients[0].items() if g.dim() > 1}
        if step % self.controller.every == 0:
            self.settings.update(self.controller.decide(step, specs))
        found = {n: torch.stack([g[n] for g in gradients]).mean(0) for n in gradients[0] if n not in specs}
        for name, spec in specs.items():
            setting = self.settings.get(name, self.codec.default(spec))
            self.sent += dense(self.codec, spec, setting)
            states = [
                self.states.setdefault((worker, name), {"seed": hash((worker, len(self.states))), "shared_seed": 5})
                for worker in range(self.count)
            ]
            wanted = [self.memory.before(g[name].reshape(-1), spec, s) for g, s in zip(gradients, states, strict=True)]
            mean = self._averaged(wanted, spec, states, setting, step)
            self.controller.observe(spec, mean, step)
            found[name] = mean.view(spec.shape)
        return found

    def _averaged(
        self, wanted: Sequence[Tensor], spec: Spec, states: Sequence[dict[str, Any]], setting: Setting, step: int
    ) -> Tensor:
        if self.codec.bypass(spec, setting):
            for y, state in zip(wanted, states, strict=True):
                mean = torch.stack(list(wanted)).mean(0)
                self.memory.after(y, y.clone(), None, state)
            return mean
        if isinstance(self.codec, LinearCodec):
            rounds = [self.codec.rounds(y.clone(), spec, s, setting, step) for y, s in zip(wanted, states, strict=True)]
            sent = [next(r) for r in rounds]
            while True:
                average, ends = torch.stack(sent).mean(0), []
                sent = []
                for r in rounds:
                    try:
                        sent.append(r.send(average.clone()))
                    except StopIteration as end:
                        ends.append(end.value)
                if ends:
                    break
            for y, state in zip(wanted, states, strict=True):
                self.memory.after(y, *self.codec.own(y, ends[0], spec, state, setting), state)
            return ends[0]
        total = torch.zeros(spec.numel)
        for y, state in zip(wanted, states, strict=True):
            message = self.codec.encode(y, spec, state, setting, step)
            self.codec.add_to(total, message, spec, setting, 1 / self.count)
            self.memory.after(y, *self.codec.sent(message, spec, setting), state)
        return total


def train(family: Family | None, label: str, seed: int, steps: int = 120, every: int = 20) -> Row:
    """Two workers train a small byte-level transformer; validation loss and bytes under one controller.

    The same batches, weights and steps for all; `label` is "dense", "uniform", "programme" or "programme, floor default/4".
    """
    task = language_model(layers=3, width=128, heads=4, context=64, batch_size=16, seed=seed)
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    workers = None
    if family is not None:
        controllers: dict[str, Controller] = {
            "uniform": Uniform(family.default),
            "programme": LayerwiseBudget(family.settings, family.default, every=every),
            "programme, floor default/4": LayerwiseBudget(family.floor, family.default, every=every),
        }
        workers = Workers(2, family.codec, controllers[label])
    for step, (tokens, targets) in enumerate(islice(task.batches(), steps)):
        gradients = []
        for half in range(2):
            optimizer.zero_grad()
            model(tokens[half::2], targets[half::2]).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if workers is None:
            mean = {n: (g + gradients[1][n]) / 2 for n, g in gradients[0].items()}
        else:
            mean = workers.mean(gradients, step)
        for name, parameter in model.named_parameters():
            parameter.grad = mean[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [float(model(x, y)) for x, y in islice(task.batches(split="test", batch_size=64), 12)]
    name = label if family is None else f"{family.name} {label}, trained"
    matrices = 4 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    nbytes = matrices if workers is None else workers.sent / steps
    return Row(name, loss=sum(losses) / len(losses), bytes_per_step=nbytes)


def step_seconds(family: int, label: str, seed: int, steps: int = 12, warmup: int = 5) -> dict[str, float]:
    """One rank of two: seconds of a step of the 6.4 M parameter transformer, after the first decision at step 3."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from weft.comm.ddp import attach
    from weft.comm.exchange import Exchange

    chosen = FAMILIES[family]
    task = language_model(layers=8, width=256, heads=4, context=64, batch_size=1, seed=seed)
    ddp = DistributedDataParallel(task.model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    controller: Controller = Uniform(chosen.default)
    if label == "programme":
        controller = LayerwiseBudget(chosen.settings, chosen.default, every=3)
    exchange = Exchange(chosen.codec, ErrorFeedback(), controller=controller, measure=0)
    handle = attach(ddp, exchange, optimizer)
    seconds = []
    batches = task.batches(seed=seed + dist.get_rank())
    for number, (tokens, targets) in enumerate(islice(batches, warmup + steps)):
        if number == warmup and isinstance(controller, LayerwiseBudget):
            controller.every = 1_000_000  # one decision is enough: its cost is a claim of its own
        dist.barrier()
        begun = time.perf_counter()
        optimizer.zero_grad()
        ddp(tokens, targets).backward()
        optimizer.step()
        if number >= warmup:
            seconds.append(time.perf_counter() - begun)
    handle.remove()
    return {"step_seconds": sorted(seconds)[len(seconds) // 2]}


def over_links(seed: int, rate: float = 100e6) -> Iterator[Row]:
    """Median step seconds of two ranks on a cable of `rate` bits a second, uniform against programme."""
    from weft.bench.links import Wire, on_links

    for number, family in enumerate(FAMILIES):
        for label in ("uniform", "programme"):
            options = {"family": number, "label": label, "seed": seed}
            found = on_links("weft.bench.layerwise:step_seconds", 2, Wire(rate), options, timeout=200)
            seconds = max(one["step_seconds"] for one in found)
            yield Row(f"{family.name} {label} at {rate / 1e6:g} Mbit/s", step_seconds=seconds)
