"""A master and worker processes that train several models in turn, whoever is late.

Problem    M models, each trained on the same batches; job t is one step of model t mod M. Job t + M needs job t, so that codes
           with delay T need M >= T + 1 models.
Method     round t: `policy.assign` says who computes what, orders go to the mailboxes, results come back until `policy.close`
           ends the round; each job it names is decoded, weights @ messages, and its model takes its step      `Farm.run`
           chunk gradients are sums over samples, so that chunks of unequal size add up; the step divides by the batch
Guarantee  the gradients are those of the whole batch, whoever was late (`Uncoded(drop > 0)` apart). A worker that dies, or does
           not come within `limit` seconds while a round waits for it, counts as late for ever; when that is more than the
           policy copes with: `TooManyLate`. Results of closed rounds are thrown away by number.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.comm.combine import Arrival
from weft.comm.straggler.crew import Crew, Order, PerSample, Work, flat, trainable
from weft.comm.straggler.scheme import Past, Scheme, TooManyLate
from weft.comm.wait import Decision, Task

__all__ = ["Farm", "Log", "cross_entropy"]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each sample, (rows,)."""
    return functional.cross_entropy(model(x), y, reduction="none")


@dataclass(frozen=True)
class Log:
    """What happened in a run.

    Attributes:
        seconds: wall seconds, decoding and optimizer steps included.
        losses: of each job, the mean over the batch before its step.
        rounds: wall seconds of each round until it closed, (rounds,).
        late: whose results of a round did not count, bool (rounds, workers).
        times: seconds from a round's begin to the worker's result, (rounds, workers), also where it came too late to count;
            infinity where it never came.
        outdated: results thrown away because their round was closed.
        decoding: seconds of the master's decoding and steps, of `seconds`.
        lost: workers that died or were given up.
    """

    seconds: float
    losses: tuple[float, ...]
    rounds: np.ndarray = field(repr=False)
    late: np.ndarray = field(repr=False)
    times: np.ndarray = field(repr=False)
    outdated: int
    decoding: float
    lost: tuple[int, ...]


@final
class Farm:
    """Train `models` under a policy for late workers.

    Args:
        policy: Uncoded(), GC(s), SRSGC(B, W, lam), MSGC(B, W, lam), or what `fit` gave.
        models: M >= T + 1 modules, trained in place; of one floating type each.
        data: batches, tuples of tensors with rows first; job t uses batch (t // M) mod len(data). Each is cut into the
            policy's chunks, and a worker gets those that it may be asked for.
        optimizer: makes an optimizer of parameters, for each model.
        loss: a function at module level: (model, *items) -> losses of the samples (rows,).
        workers: how many processes; ignored where a crew is given.
        crew: processes to use and leave running, also after one another with other farms; otherwise the farm starts its own
            and ends them in `close`.
        limit: seconds that a round waits for a worker before it is given up.
    Raises:
        ValueError: too few models for the policy's delay, models that share a trainable parameter, a model with batch
            statistics or dropout in training mode, an empty batch, a closed crew, or a policy that does not fit the number of
            workers.

    >>> with Farm(GC(1), [model], [(x, y)], lambda p: torch.optim.SGD(p, 0.1), workers=4) as farm:   # doctest: +SKIP
    ...     log = farm.run(jobs=20)
    """

    def __init__(
        self,
        policy: Scheme,
        models: Sequence[nn.Module],
        data: Sequence[tuple[Tensor, ...]],
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        loss: PerSample = cross_entropy,
        workers: int = 0,
        crew: Crew | None = None,
        limit: float = 60.0,
    ):
        if crew is not None and not crew.members:
            raise ValueError("Farm: the crew is closed; make another one")
        size = len(crew.members) if crew is not None else workers
        self.policy = policy.sized(size)
        blank = np.zeros((self.policy.delay + 1, size), dtype=bool)
        self.policy.tasks(Past(blank, blank))  # makes the code, which may take a second, before a clock runs
        if len(models) <= self.policy.delay:
            raise ValueError(
                f"Farm: {type(policy).__name__} decodes a job {self.policy.delay} rounds late and so needs at least "
                f"{self.policy.delay + 1} models to train in turn, got {len(models)}; add models or take GC"
            )
        self.data = list(data)
        _check_data(self.data)
        if not limit > 0:
            raise ValueError(f"Farm: limit must be seconds > 0, got {limit}")
        for number, model in enumerate(models):
            _check(number, model)
        _check_apart(models)
        self.models, self.loss, self.limit = list(models), loss, limit
        self.optimizers = [optimizer(trainable(model)) for model in models]
        self.jobs = 0  # done so far
        self._own = crew is None
        self.crew = Crew(size) if crew is None else crew
        self._lost: set[int] = set()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, unless the crew was given."""
        if self._own:
            self.crew.close()

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, jobs: int) -> Log:
        """Do so many jobs more, each one step of one model.

        Raises:
            ValueError: jobs is below 1, or the farm or its crew is closed.
            TooManyLate: more workers are gone than the policy copes with; models keep the steps decoded so far.
            RuntimeError: the model or the loss failed on a worker; its traceback is shown.
        """
        if jobs < 1:
            raise ValueError(f"Farm.run: jobs must be >= 1, got {jobs}")
        if not self.crew.members:
            raise ValueError("Farm.run: the processes have been ended by `close`; make another farm")
        if self.crew.loads != self._loaded:  # the workers hold what another farm gave them since
            self._lost |= {worker for worker, member in enumerate(self.crew.members) if not member.alive}
            self._load()
        run = _Run(self, jobs)
        try:
            return run.go()
        finally:
            self.jobs += run.done

    def _load(self) -> None:
        self.crew.load([self._work(worker) for worker in range(len(self.crew.members))], self._lost)
        self._loaded = self.crew.loads

    def _work(self, worker: int) -> Work:
        edges = np.concatenate(([0.0], np.cumsum(self.policy.fractions())))
        chunks = []
        for batch in self.data:
            rows = np.rint(edges * len(batch[0])).astype(int)  # the same cut on every worker: each sample in one chunk
            chunks.append(
                {c: tuple(item[rows[c] : rows[c + 1]].clone() for item in batch) for c in self.policy.holds(worker)}
            )
        return Work([copy.deepcopy(model) for model in self.models], chunks, self.loss)


class _Run:
    """The state of one `Farm.run`."""

    def __init__(self, farm: Farm, jobs: int):
        self.farm, self.policy, self.jobs = farm, farm.policy, jobs
        self.members = farm.crew.members
        self.size = len(self.members)
        self.first = farm.crew.rounds  # the crew's number of our round 0: results of earlier runs are known by theirs
        self.history: list[Decision] = []
        self.parameters: dict[int, np.ndarray] = {}  # of jobs under way
        self.known: list[set[int]] = [set() for _ in range(self.size)]  # jobs whose parameters a worker has
        self.inbox: dict[int, dict[tuple[int, int], np.ndarray]] = {}
        self.losses: dict[int, float] = {}
        self.begins: list[float] = []
        self.times: list[np.ndarray] = []
        self.seconds: list[float] = []
        self.outdated, self.decoding = 0, 0.0

    @property
    def done(self) -> int:
        """Jobs whose model has taken its step."""
        return len(self.losses)

    def go(self) -> Log:
        start = time.perf_counter()
        for round in range(self.jobs + self.policy.delay):
            if self.done == self.jobs:
                break  # the last rounds may have nothing left to do
            decision = self.round(round)
            self.history.append(decision)
            began = time.perf_counter()
            for job, weights in sorted(decision.jobs.items()):
                if job < self.jobs:
                    self.step(job, weights)
            self.decoding += time.perf_counter() - began
        late = np.zeros((len(self.history), self.size), dtype=bool)
        for number, decision in enumerate(self.history):
            late[number, sorted(decision.late)] = True
        return Log(
            seconds=time.perf_counter() - start,
            losses=tuple(self.losses[job] for job in range(self.jobs)),
            rounds=np.array(self.seconds),
            late=late,
            times=np.stack(self.times),
            outdated=self.outdated,
            decoding=self.decoding,
            lost=tuple(sorted(self.farm._lost)),
        )

    def round(self, round: int) -> Decision:
        """Send the orders of a round and wait until the policy closes it."""
        lost = self.farm._lost
        if round < self.jobs:
            self.parameters[round] = flat(trainable(self.farm.models[self.model_of(round)])).numpy()
        assigned = self.policy.assign(round, self.history)
        begin = time.perf_counter()
        self.farm.crew.rounds = self.first + round + 1
        self.begins.append(begin)
        self.times.append(np.full(self.size, math.inf))
        idle, asked = [], set()
        for worker, member in enumerate(self.members):
            orders = self.orders(worker, assigned.get(worker, ()))
            if worker not in lost and orders:
                member.post(("round", self.first + round, orders))
                asked.add(worker)
            elif worker not in lost:
                idle.append(worker)
        arrivals: list[Arrival] = [] if asked else [Arrival(worker) for worker in idle]
        while True:
            now = time.perf_counter() - begin
            decision = self.policy.close(round, arrivals, now, self.history)
            here = {arrival.source for arrival in arrivals}
            missing = asked - here - lost
            if decision is None and not missing:
                decision = self.policy.close(round, arrivals, math.inf, self.history)
                if decision is None:
                    raise self.too_many(round, here)
            if decision is not None:
                self.seconds.append(time.perf_counter() - begin)
                return decision
            if now >= self.farm.limit:
                for worker in missing:
                    self.members[worker].stop()  # a worker that may answer any time later is of no use to anybody
                    lost.add(worker)
                continue
            wake = self.policy.wake(arrivals)
            until = min(wake if wake > now else math.inf, self.farm.limit) - now
            by_pipe = {self.members[worker].pipe: worker for worker in range(self.size) if worker not in lost}
            for pipe in wait(list(by_pipe), until):
                if (arrival := self.receive(round, by_pipe[pipe])) is None:
                    continue
                if not arrivals:  # those without work are there as soon as anybody is
                    arrivals += [Arrival(worker, seconds=arrival.seconds) for worker in idle]
                arrivals.append(arrival)
                break  # the policy is asked after every single arrival

    def receive(self, round: int, worker: int) -> Arrival | None:
        """Read one answer; None if it is of a closed round, or the end of the process."""
        member = self.members[worker]
        answer = member.read(0.0)
        if answer is None:
            if not member.alive:
                self.farm._lost.add(worker)
            return None
        kind, number, content = answer
        then = number - self.first
        if kind == "error" and then >= 0:
            raise RuntimeError(f"worker {worker} failed in round {then}:\n{content}")
        if kind != "done" or not 0 <= then <= round:
            self.outdated += 1
            return None  # of an earlier run
        self.known[worker] |= content.keys()
        seconds = time.perf_counter() - self.begins[then]
        if self.times[then][worker] == math.inf:
            self.times[then][worker] = seconds
        if then < round:
            self.outdated += 1
            return None
        for job, message in content.items():
            if job in self.parameters:  # not decoded yet
                self.inbox.setdefault(job, {})[round, worker] = message
        return Arrival(worker, seconds=seconds)

    def orders(self, worker: int, tasks: Sequence[Task]) -> list[Order]:
        """The messages that a worker is asked for; jobs beyond the last and jobs that are done cost nothing."""
        by_job: dict[int, list[tuple[int, float]]] = {}
        for task in tasks:
            if task.job in self.parameters:
                by_job.setdefault(task.job, []).append((task.chunk, task.coefficient))
        return [
            Order(
                job,
                self.model_of(job),
                self.batch_of(job),
                None if job in self.known[worker] else self.parameters[job],
                tuple(parts),
            )
            for job, parts in by_job.items()
        ]

    def step(self, job: int, weights: Mapping[tuple[int, int], float]) -> None:
        """Decode a job, weights @ messages, and let its model take its step."""
        messages = self.inbox.pop(job)
        stack = np.stack([messages[key] for key in weights])
        decoded = np.fromiter(weights.values(), dtype=np.float64) @ stack
        model = self.model_of(job)
        rows, place = len(self.farm.data[self.batch_of(job)][0]), 0
        mean = torch.from_numpy(decoded / rows)
        for parameter in trainable(self.farm.models[model]):
            part = mean[place : place + parameter.numel()].view_as(parameter)
            parameter.grad = part.to(parameter.dtype)
            place += parameter.numel()
        self.farm.optimizers[model].step()
        self.losses[job] = float(mean[place])
        del self.parameters[job]

    def model_of(self, job: int) -> int:
        return (self.farm.jobs + job) % len(self.farm.models)

    def batch_of(self, job: int) -> int:
        return (self.farm.jobs + job) // len(self.farm.models) % len(self.farm.data)

    def too_many(self, round: int, here: set[int]) -> TooManyLate:
        gone = tuple(worker for worker in range(self.size) if worker not in here)
        job = next((job for job in range(self.jobs) if job not in self.losses), round)
        return TooManyLate(type(self.policy).__name__, round, job, gone, self.policy.copes())


def _check_data(data: Sequence[tuple[Tensor, ...]]) -> None:
    """Refuse batches without rows: their mean loss is no number."""
    if not data:
        raise ValueError("Farm: data must be batches, got none")
    for number, batch in enumerate(data):
        rows = [len(item) for item in batch]
        if len(set(rows)) != 1 or not rows[0]:
            raise ValueError(
                f"Farm: data must be batches, non-empty tuples of tensors with equally many rows, got {rows} in batch {number}"
            )


def _check(number: int, model: nn.Module) -> None:
    """Refuse what would make a gradient depend on how samples are cut into chunks, or on who computes it."""
    found = {parameter.dtype for parameter in trainable(model)}
    if len(found) != 1 or not found <= {torch.float16, torch.float32, torch.float64}:
        raise ValueError(
            f"Farm: model {number} must have trainable parameters of one type, float16, float32 or float64, as numpy has "
            f"them, got {sorted(map(str, found))}"
        )
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
        ):
            kind = "batch norm" if isinstance(module, nn.modules.batchnorm._BatchNorm) else "running statistics"
            raise ValueError(
                f"Farm: model {number} has {kind} at {name!r}, whose statistics depend on the chunk; freeze it with .eval() or "
                "use group norm"
            )
        # recurrent and attention layers, ours and others', keep the probability as a number in `dropout`
        drop = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0)
        if isinstance(drop, (int, float)) and drop > 0:
            raise ValueError(
                f"Farm: model {number} has dropout at {name!r}; workers that repeat a chunk would draw other masks; set it to 0 "
                "or .eval()"
            )


def _check_apart(models: Sequence[nn.Module]) -> None:
    """Refuse models that train one parameter: a job would not see the steps of the others that are under way."""
    owner: dict[int, int] = {}
    for number, model in enumerate(models):
        for parameter in trainable(model):
            other = owner.setdefault(id(parameter), number)
            if other != number:
                raise ValueError(
                    f"Farm: models {other} and {number} share a trainable parameter; models that take turns must be different "
                    "ones, such as copy.deepcopy(model)"
                )
