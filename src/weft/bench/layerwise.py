"""L-GreCo's comparisons: tables of real gradients, and training with two simulated workers under each controller.

gradients of a byte-level transformer, summed over steps                `summed_gradients`
bytes and errors of every chooser on the same tables                    `choices`
validation loss after equal steps, with the bytes that were sent        `trained`
seconds of a step on a cable, uniform and programme in turns            `over_links`
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from weft.bench.system import Row
from weft.bench.turns import there_and_back, watch
from weft.comm.codec import Codec, LinearCodec, Setting, Spec
from weft.comm.codecs import LowRank, Quantise, TopK
from weft.comm.controller import Controller
from weft.comm.controllers import Accordion, LayerwiseBudget, Uniform, greedy_layers, plan_layers
from weft.comm.controllers.layerwise import Choose
from weft.comm.memories import ErrorFeedback
from weft.tasks import Task, language_model

__all__ = ["FAMILIES", "Family", "Workers", "choices", "over_links", "summed_gradients", "train", "trained"]


@dataclass(frozen=True)
class Family:
    """A codec with the settings that a controller may choose from.

    Attributes:
        wide: settings without a floor, shown beside; for Top-k `settings` give no tensor less than a quarter of the default.
        low: Accordion's setting of low compression; its other one is the least of `settings`.
    """

    name: str
    codec: Codec
    settings: tuple[Setting, ...]
    default: Setting
    wide: tuple[Setting, ...]
    low: Setting

    def controller(self, label: str, every: int = 1000) -> Controller:
        """By its name in the rows: "uniform", "programme" or "programme, no floor"."""
        if label == "uniform":
            return Uniform(self.default)
        settings = {"programme": self.settings, "programme, no floor": self.wide}[label]
        return LayerwiseBudget(settings, self.default, every=every)


DENSITIES = (0.001, 0.0018, 0.0025, 0.0032, 0.0056, 0.01, 0.018, 0.032, 0.056, 0.1)
BITS = tuple(range(2, 9))
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FAMILIES = (
    Family("top-k", TopK(0.01), DENSITIES[2:], 0.01, DENSITIES, 0.1),
    Family("quantise", Quantise(4, 1024, "range", stochastic=False), BITS, 4, BITS, 8),
    Family("low-rank", LowRank(4), RANKS, 4, RANKS, 16),
)
CHOOSERS: dict[str, Choose] = {"programme": plan_layers, "greedy": greedy_layers}
SEEDS = 3  # trainings whose losses are averaged


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
    codec, settings = family.codec, family.wide
    err = [codec.error(g.view(-1), specs[n], settings) for n, g in sums.items()]
    size = [[float(dense(codec, specs[n], s)) for s in settings] for n in sums]
    uniform = [settings.index(family.default)] * len(err)
    allowed = [settings.index(s) for s in family.settings]
    errors, sizes = ([[row[j] for j in allowed] for row in table] for table in (err, size))

    def totals(choice: Sequence[int]) -> tuple[float, float]:
        rows = range(len(choice))
        return math.fsum(size[i][choice[i]] for i in rows), math.fsum(err[i][choice[i]] for i in rows)

    uniform_bytes, budget = totals(uniform)
    literal = literal_error(family, sums, specs, uniform)
    yield Row(f"{family.name} uniform", bytes=uniform_bytes, error=1.0, literal_error=literal / budget)

    found = {label: [allowed[j] for j in choose(errors, sizes, budget)] for label, choose in CHOOSERS.items()}
    if family.wide != family.settings:
        found["programme, no floor"] = plan_layers(err, size, budget)
    for label, choice in found.items():
        nbytes, error = totals(choice)
        literal = literal_error(family, sums, specs, choice)
        yield Row(
            f"{family.name} {label}",
            bytes=nbytes,
            error=error / budget,
            saved=uniform_bytes / nbytes,
            literal_error=literal / budget,
        )

    controller = Accordion(family.low, min(family.settings))  # type: ignore[type-var]
    half = len(each) // 2
    decision: dict[str, Setting] = {}
    for part in (each[:half], each[half:]):
        for gradients in part:
            for name, gradient in gradients.items():
                controller.observe(specs[name], gradient, 0)
        decision = dict(controller.decide(0, specs))
    choice = [settings.index(decision[name]) for name in sums]
    nbytes, error = totals(choice)
    ours = totals([allowed[j] for j in plan_layers(errors, sizes, error)])[0]
    yield Row(f"{family.name} accordion", bytes=nbytes, error=error / budget, its_bytes_over_ours=nbytes / ours)

    if isinstance(codec, TopK):
        squares = torch.cat([g.view(-1) for g in sums.values()]).square().double().sort().values.cumsum(0)
        kept = int((squares > budget).sum())
        yield Row("top-k, one threshold for all", bytes=8.0 * kept, error=1.0, saved=uniform_bytes / (8.0 * kept))

    deciding = LayerwiseBudget(family.settings, family.default)
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
        spec, setting = specs[name], family.wide[j]
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
            self.controller.observe(spec, gradients[0][name].reshape(-1), step)
            setting = self.settings.get(name, self.codec.default(spec))
            self.sent += dense(self.codec, spec, setting)
            states = [
                self.states.setdefault((worker, name), {"seed": hash((worker, len(self.states))), "shared_seed": 5})
                for worker in range(self.count)
            ]
            wanted = [self.memory.before(g[name].reshape(-1), spec, s) for g, s in zip(gradients, states, strict=True)]
            mean = self._averaged(wanted, spec, states, setting, step)
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


def train(family: Family | None, label: str, seed: int, steps: int = 400, every: int = 40) -> dict[str, float]:
    """What two workers reach that train a small byte-level transformer, `label` as in `controller`.

    The same batches, weights and steps for all, without a family uncompressed. Until `every` steps are over all are uniform; then
    the programme decides again every so many. Error feedback holds an entry of Top-k back for 1/density = 100 steps in the mean:
    a training must be some times as long, or its loss is about the delay of the first gradients. So the loss after a quarter of
    the steps stands beside the loss at the end.

    Returns:
        validation losses in nats a byte, `loss` and `loss_at_quarter`, and `bytes_per_step` of the matrices of one worker.
    """
    task = language_model(layers=2, width=64, heads=4, context=64, batch_size=8, seed=seed)
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    workers = None if family is None else Workers(2, family.codec, family.controller(label, every))
    losses = []
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
        if step + 1 in (max(1, steps // 4), steps):
            losses.append(validation_loss(model, task))
    matrices = 4 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return {
        "loss": losses[-1],
        "loss_at_quarter": losses[0],
        "bytes_per_step": matrices if workers is None else workers.sent / steps,
    }


def validation_loss(model: torch.nn.Module, task: Task) -> float:
    """Mean loss on the same 384 windows of text that no training has seen."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(x, y)) for x, y in islice(task.batches(split="test", batch_size=64), 6)]
    model.train()
    return statistics.mean(losses)


def trained(family: Family | None, label: str, seed: int) -> Row:
    """Means of `train` over SEEDS seeds; `loss_error` is the standard error of the loss."""
    found = [train(family, label, SEEDS * seed + number) for number in range(SEEDS)]
    means = {kind: statistics.mean(one[kind] for one in found) for kind in found[0]}
    error = statistics.stdev(one["loss"] for one in found) / math.sqrt(SEEDS)
    return Row(label if family is None else f"{family.name} {label}, trained", loss_error=error, **means)


def steps_in_turns(seed: int, rounds: int = 15, warmup: int = 12, every: int = 8) -> dict[str, dict[str, list[float]]]:
    """One rank of two: wall and CPU seconds of every step of the 6.4 M parameter transformer, by family and label.

    All methods take one step in each round, in the opposite order every other round: what else the machine does meets all alike.
    The programme decides within the warm-up, from `every` steps; the decision's own cost is a claim of its own.
    """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from weft.comm.ddp import attach
    from weft.comm.exchange import Exchange

    task = language_model(layers=8, width=256, heads=4, context=64, batch_size=1, seed=seed)
    methods = {}
    for family in FAMILIES:
        for label in ("uniform", "programme"):
            ddp = DistributedDataParallel(copy.deepcopy(task.model))
            optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
            controller = family.controller(label, every)
            handle = attach(ddp, Exchange(family.codec, ErrorFeedback(), controller=controller, measure=0), optimizer)
            methods[f"{family.name} {label}"] = ddp, optimizer, controller, handle
    seconds: dict[str, dict[str, list[float]]] = {name: {"step_seconds": [], "cpu_seconds": []} for name in methods}
    batches = task.batches(seed=seed + dist.get_rank())
    for number, (tokens, targets) in enumerate(islice(batches, warmup + rounds)):
        for name in there_and_back(list(methods), number):
            ddp, optimizer, controller, _ = methods[name]
            if number == warmup and isinstance(controller, LayerwiseBudget):
                controller.every = 1_000_000
            dist.barrier()
            with watch() as taken:
                optimizer.zero_grad()
                ddp(tokens, targets).backward()
                optimizer.step()
            if number >= warmup:
                seconds[name]["step_seconds"].append(taken.wall)
                seconds[name]["cpu_seconds"].append(taken.cpu)
    for _, _, _, handle in methods.values():
        handle.remove()
    return seconds


def over_links(seed: int, rate: float = 100e6) -> Iterator[Row]:
    """Median seconds of a step of two ranks on a cable of `rate` bits a second, of the slower rank."""
    from weft.bench.links import Wire, on_links

    ranks = on_links("weft.bench.layerwise:steps_in_turns", 2, Wire(rate), {"seed": seed}, timeout=400)
    for name, kinds in ranks[0].items():
        slower = {kind: map(max, zip(*(rank[name][kind] for rank in ranks), strict=True)) for kind in kinds}
        medians = {kind: statistics.median(values) for kind, values in slower.items()}
        yield Row(f"{name} at {rate / 1e6:g} Mbit/s", **medians)
