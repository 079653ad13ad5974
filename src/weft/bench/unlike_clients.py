"""Digits on twenty clients of unlike data and speed: the workload of the catalogue entry `fedfix-async`.

    problem     1,797 images of 8 x 8, 360 held out; a net 64-32-10; twenty clients with the same number of images each, their mix
                of classes drawn from a Dirichlet distribution (0.1)                                         `digits`
    speeds      spread evenly from 1 - X % to 1 second a job ("F-X": F-80 is 0.2 .. 1, F-0 all equal)        `speeds`
    a run       one scheme at one local rate for so much virtual time                                        `train`
    tuning      the rate of a grid that has the lowest loss when the time is up, as the authors' code runs every rate to the
                end of one budget; the same grid, draws of the problem and budget for all schemes            `tune`
    measuring   at that rate, on other draws; the first draw's loss over time is drawn                      `tuned`
    fixed point the mean of the model in the long run on quadratics, whose optimum and bias are known        `long_run_mean`

Time is virtual: it does not depend on this machine.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.bench.digits import digit_images
from weft.bench.system import Row
from weft.comm.combine import Combine
from weft.comm.wait import Wait
from weft.federated import Aggregation, Asynchronous, Client, LocalSGD, NothingCame, Trace
from weft.federated.local import flatten

__all__ = [
    "GRID",
    "TARGET",
    "Problem",
    "Run",
    "Scheme",
    "by_speed",
    "digits",
    "long_run_mean",
    "speeds",
    "train",
    "tune",
    "tuned",
]

CLIENTS, HELD_OUT, HIDDEN = 20, 360, 32
CONCENTRATION = 0.1
TARGET = 1.0  # federated loss
GRID = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.17, 0.3, 0.5)  # local rates; every scheme is tuned over all
BUDGET = 80.0  # virtual seconds of a run
LOST = 20.0  # a loss from which no run is seen to reach the target in time; chance is 2.3
DRAWS = 3  # of the problem, for tuning and for measuring
FINALISTS = 3  # rates of the first draw that are tried on the others


@dataclass(frozen=True)
class Scheme:
    """A schedule and the weights that go with it."""

    name: str
    schedule: Wait
    weights: Combine | str


@dataclass(frozen=True, eq=False)
class Problem:
    """Clients' data, the images held out, the start model and the seconds of a job of each client."""

    data: list[tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    model: nn.Module
    seconds: tuple[float, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class Run:
    """One run: inf and NaN where it diverged."""

    trace: Trace
    model: nn.Module | None
    rate: float
    end: float
    accuracy: float = 0.0  # on the images held out

    @property
    def time(self) -> float:
        """Virtual seconds to the target."""
        return self.trace.time_to(TARGET)

    @property
    def loss(self) -> float:
        losses = self.trace.losses()
        return losses[-1][1] if losses and self.model is not None else math.inf

    @property
    def unrest(self) -> float:
        """Largest loss over mean loss in the last quarter of the time; inf where the run did not get there."""
        late = [loss for when, loss in self.trace.losses() if when > 0.75 * self.end]
        return max(late) / (sum(late) / len(late)) if late and self.model is not None else math.inf

    @property
    def over_trend(self) -> float:
        """Largest loss over the exponential fitted to the losses of the last quarter; inf where the run did not get there."""
        late = [(when, math.log(loss)) for when, loss in self.trace.losses() if when > 0.75 * self.end and loss > 0]
        if len(late) < 3 or self.model is None:
            return math.inf
        when, logs = np.array(late).T
        return float(np.exp((logs - np.polyval(np.polyfit(when, logs, 1), when)).max()))


def speeds(spread: float) -> tuple[float, ...]:
    """Seconds of a job, slowest 1: `spread` 0.8 is F-80."""
    return tuple(1 - spread + spread * i / (CLIENTS - 1) for i in range(CLIENTS))


def digits(seed: int, spread: float = 0.8, sort_by_label: bool = False) -> Problem:
    """The problem. With `sort_by_label` the slow clients are those that hold the last classes.

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the images, is not installed.
    """
    images, labels = digit_images()
    random = np.random.default_rng(seed)
    order = random.permutation(len(images))
    images, labels = images[order] / 16, labels[order]
    pools: list[list[Any]] = [list(np.flatnonzero(labels[HELD_OUT:] == c) + HELD_OUT) for c in range(10)]
    size = (len(images) - HELD_OUT) // CLIENTS
    mine: list[list[int]] = []
    for _ in range(CLIENTS):
        mix = random.dirichlet([CONCENTRATION] * 10)
        own: list[int] = []
        for _ in range(size):
            left = np.array([bool(pool) for pool in pools])
            odds = (mix + 1e-9) * left  # a class that has run out is replaced in the client's own proportions
            own.append(int(pools[random.choice(10, p=odds / odds.sum())].pop()))
        mine.append(own)
    if sort_by_label:
        mine.sort(key=lambda own: float(labels[own].mean()))
    seconds = speeds(spread) if sort_by_label else tuple(random.permutation(speeds(spread)).tolist())
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    return Problem([(x[own], y[own]) for own in mine], (x[:HELD_OUT], y[:HELD_OUT]), model, seconds, seed)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch; fewer operations than `nn.functional.cross_entropy` under vmap."""
    return (output.logsumexp(-1) - output.gather(-1, target.unsqueeze(-1)).squeeze(-1)).mean()


def train(
    problem: Problem,
    scheme: Scheme,
    rate: float,
    seconds: float,
    tuning: bool = False,
    jitter: float = 0.0,
) -> Run:
    """Train for so many virtual seconds, K = 10 local steps of batch 64 a job; `tuning`: until it is lost."""
    clients = [
        Client(data, seconds=t, declared=t, jitter=jitter)
        for data, t in zip(problem.data, problem.seconds, strict=True)
    ]
    x, y = torch.cat([pair[0] for pair in problem.data]), torch.cat([pair[1] for pair in problem.data])
    setting = Asynchronous(
        problem.model,
        clients,
        cross_entropy,
        scheme.schedule,
        scheme.weights,
        LocalSGD(steps=10, lr=rate, momentum=0.9, batch_size=64),
        evaluate=lambda model: float(cross_entropy(model(x), y)),  # equal sizes and importance: sum_i p_i F_i
        every=0.1,
        limit=5.0,
        seed=problem.seed,
    )
    seen = Trace()

    def stop(done: Aggregation) -> bool:
        seen.aggregations.append(done)
        return done.loss > (LOST if tuning else 1e6)

    try:
        trained = setting.simulate(seconds, stop)
    except NothingCame:  # every change is NaN
        return Run(seen, None, rate, seconds)
    if trained.trace.losses()[-1][1] > (LOST if tuning else 1e6):
        return Run(trained.trace, None, rate, seconds)
    with torch.no_grad():
        right = trained.model(problem.held_out[0]).argmax(-1) == problem.held_out[1]
    return Run(trained.trace, trained.model, rate, seconds, float(right.float().mean()))


def tune(problems: Sequence[Problem], scheme: Scheme) -> float:
    """The rate with the lowest median loss when the time is up; all rates run on the first draw, its best three on the others."""

    def final(problem: Problem, rate: float) -> float:
        return train(problem, scheme, rate, BUDGET, tuning=True).loss

    first = {rate: final(problems[0], rate) for rate in GRID}
    finalists = sorted(GRID, key=lambda rate: first[rate])[:FINALISTS]
    return min(
        finalists, key=lambda rate: statistics.median([first[rate], *(final(other, rate) for other in problems[1:])])
    )


def tuned(name: str, scheme: Scheme, seed: int, spread: float = 0.8, rate: float | None = None) -> Row:
    """Medians over draws at the tuned rate (or at `rate`); at most 1e9, which stands for what diverged or never got there."""
    tuning = rate is None
    if rate is None:
        rate = tune([digits(1000 + DRAWS * seed + draw, spread) for draw in range(DRAWS)], scheme)
    runs = [train(digits(DRAWS * seed + draw, spread), scheme, rate, BUDGET) for draw in range(DRAWS)]
    measures = {
        "seconds_to_loss_1": [run.time for run in runs], "final_loss": [run.loss for run in runs],
        "unrest": [run.unrest for run in runs], "over_trend": [run.over_trend for run in runs],
        "accuracy": [run.accuracy for run in runs],
    }  # fmt: skip
    print(f"fedfix-async: {name}: rate {rate:g}, {measures}", file=sys.stderr, flush=True)
    row = Row(name, rate=rate, **{what: min(statistics.median(found), 1e9) for what, found in measures.items()})
    return row.drawn(thinned(runs[0].trace.losses(), BUDGET)) if tuning and spread > 0 else row


def thinned(losses: Sequence[tuple[float, float]], end: float, count: int = 160) -> list[tuple[float, float]]:
    """At most `count` of the points (seconds, loss) until `end`: the last of each interval, as far as it can be drawn."""
    last = {int(count * when / end): (when, loss) for when, loss in losses if 0 < loss < LOST and when < end}
    return list(last.values())


def by_speed(problem: Problem, model: nn.Module | None) -> list[float]:
    """Mean loss of the four clients in each fifth of the speeds, the fastest first; inf where the run diverged."""
    if model is None:
        return [math.inf] * 5
    order = sorted(range(CLIENTS), key=lambda i: problem.seconds[i])
    with torch.no_grad():
        losses = [float(cross_entropy(model(problem.data[i][0]), problem.data[i][1])) for i in order]
    fifth = CLIENTS // 5
    return [sum(losses[i : i + fifth]) / fifth for i in range(0, CLIENTS, fifth)]


class _Point(nn.Module):
    """F_i = 1/2 |theta - a_i|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta - x


def long_run_mean(schedule: Wait, weights: Combine | str, seed: int, seconds: float) -> tuple[Tensor, Tensor, Tensor]:
    """Twenty quadratic clients at F-80 with importance that differs: the mean of theta over the last half, the a_i, the p_i."""
    random = np.random.default_rng(seed)
    centres = torch.tensor(random.normal(size=(CLIENTS, 3)))
    importance = random.uniform(0.5, 1.5, CLIENTS)
    importance /= importance.sum()
    clients = [
        Client((centre[None], torch.zeros(1)), float(p), t, declared=t)
        for centre, p, t in zip(centres, importance, speeds(0.8), strict=True)
    ]
    seen: list[Tensor] = []

    def note(model: nn.Module) -> float:
        seen.append(flatten(model))
        return 0.0

    setting = Asynchronous(
        _Point(),
        clients,
        lambda output, target: 0.5 * output.square().sum(-1).mean(),
        schedule,
        weights,
        lambda start, client, job: 0.01 * (centres[client] - start),  # K gradient steps of a small rate, in closed form
        evaluate=note,
    )
    setting.simulate(seconds)
    return torch.stack(seen[len(seen) // 2 :]).mean(0), centres, torch.tensor(importance)
