"""Federated optimisation with clients of unlike speed, simulated on a virtual clock or served to real processes.

Problem    minimise sum_i p_i F_i(theta), F_i the mean loss on client i's data, where client i needs t_i seconds for its K local
           steps and nobody should wait for the slowest.
Method     the server steps by the changes that have come when its schedule closes a round, each times a weight d_i   `Server`
               schedule   All: FedAvg   Any: asynchronous FedAvg   Count(c): FedBuff   Clock(dt): FedFix
               weights    "unbiased": d_i = p_i / (share of rounds that i takes part in);  "equal";  or a rule of yours
Guarantee  with "unbiased" the mean of d_i 1[i takes part] is p_i, which makes the limit the optimum that was asked for; "equal"
           ends at the optimum of sum_i q_i F_i with q_i proportional to how often i takes part. Both need a local rate that is
           small enough for K and the largest delay: tune it for each schedule.
Source     Fraboni, Vidal, Kameni, Lorenzi, arXiv:2206.10189 (FedFix). `Clock("auto")`, counted shares and robust rules are ours.

Simulated time never depends on the host: a job's result is computed when somebody needs it, together with all other jobs that
are open then, and comes when its client's clock says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from weft.comm.codec import Codec, State
from weft.comm.combine import Combine
from weft.comm.memory import Memory
from weft.comm.rules.arrivals import Unbiased
from weft.comm.wait import Wait
from weft.comm.waits import WAITS, Clock, nanoseconds
from weft.federated.local import LocalSGD, Loss, Trainer, flatten, specs, unflatten
from weft.federated.messages import Coder
from weft.federated.server import Aggregation, Server, Step, Trace
from weft.federated.virtual_clock import VirtualClock
from weft.names import pick

__all__ = ["Asynchronous", "Client", "Trained", "Work"]

NAMED = {name: WAITS[name] for name in ("all", "any", "clock")}  # the others want a number

Work = Callable[[Tensor, int, int], Tensor]  # (model that was sent (d,), client, number of the job) -> change (d,)


@final
@dataclass(frozen=True, eq=False)
class Client:
    """One client.

    Attributes:
        data: inputs and targets, (n, ...) each; None where its process has them, or where `work` needs none.
        importance: p_i >= 0, of all clients or of none; none: all the same.
        seconds: what a job takes on the virtual clock: > 0, inf if the client never returns, or a function of the job's number.
        jitter: that time is multiplied by a log-normal factor of mean 1 and this standard deviation of its logarithm, >= 0.
        declared: what it tells the server it needs, > 0; None: nothing, and the server measures.
    """

    data: tuple[Tensor, Tensor] | None = None
    importance: float | None = None
    seconds: float | Callable[[int], float] = 1.0
    jitter: float = 0.0
    declared: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.seconds) and not self.seconds > 0:
            raise ValueError(f"Client: seconds must be > 0, got {self.seconds}; inf is a client that never returns")
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"Client: jitter must be >= 0, got {self.jitter}; 0.2 is a spread of about 20 %")
        if self.declared is not None and not 0 < self.declared < math.inf:
            raise ValueError(
                f"Client: declared must be seconds > 0 or None, got {self.declared}; None lets the server measure"
            )

    def takes(self, job: int, random: tuple[int, int, int]) -> float:
        """Virtual seconds of its `job`-th job; `random` seeds the jitter."""
        seconds = self.seconds(job) if callable(self.seconds) else self.seconds
        if not seconds > 0:
            raise ValueError(f"Client: seconds must be > 0, got {seconds} for job {job}")
        if self.jitter == 0:
            return seconds
        return seconds * math.exp(self.jitter * np.random.default_rng(random).standard_normal() - self.jitter**2 / 2)


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """What a run gives: a copy of the model, trained, and its trace."""

    model: nn.Module
    trace: Trace

    def __iter__(self):
        return iter((self.model, self.trace))


@final
@dataclass(frozen=True, eq=False)
class Asynchronous:
    """A server and its clients: `simulate` on a virtual clock, `processes.serve` and `processes.spawn` for real.

    Args:
        model: what to train; it is left as it is, runs return trained copies.
        clients: at least one.
        loss: (output, target) -> mean over the batch, as in `torch.nn.functional.cross_entropy`.
        schedule: a `Wait` of weft.comm.waits, or its name ("all", "any", "clock").
        weights: "unbiased", "equal", or a `Combine` whose weights multiply the changes (with needs = "arrivals" it sees client,
            staleness, seconds, participations and importance).
        work: `LocalSGD(...)`, or a function that does a client's work.
        server_lr: multiplies every step, > 0.
        robust: a rule (`MultiKrum`, a median, ...) that decides whose changes to believe, before the weights. A round waits
            until as many results are there as it takes; `Any`, and `Count` of fewer, are refused.
        codec, memory: how changes travel.
        evaluate: model -> loss for the trace; by default sum_i p_i F_i if the clients' data are here.
        every: least seconds between two evaluations.
        limit: seconds without an aggregation after which a run ends in `NothingCame`.
        seed: of batches, jitter and codecs.
    Raises:
        ValueError: importance negative or not adding up to 1 (within 1e-6), nothing to train or mixed dtypes, an impossible
            schedule, rule, rate or limit.
    """

    model: nn.Module
    clients: Sequence[Client]
    loss: Loss
    schedule: Wait | str = Clock("auto")  # noqa: RUF009 - frozen
    weights: Combine | str = "unbiased"
    work: LocalSGD | Work = LocalSGD()  # noqa: RUF009 - frozen
    server_lr: float = 1.0
    robust: Combine | None = None
    codec: Codec | None = None
    memory: Memory | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    every: float = 0.0
    limit: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.clients:
            raise ValueError("Asynchronous: clients must be at least one, got none")
        if isinstance(self.weights, str) and self.weights not in ("unbiased", "equal"):
            raise ValueError(f'Asynchronous: weights must be "unbiased", "equal" or a rule, got {self.weights!r}')
        if not 0 < self.server_lr < math.inf:
            raise ValueError(
                f"Asynchronous: server_lr must be > 0, got {self.server_lr}; 1 adds the weighted changes as they are"
            )
        if not self.limit > 0:
            raise ValueError(f"Asynchronous: limit must be seconds > 0, got {self.limit}; inf waits for ever")
        self.importance()
        self.coder()  # refuses a model without trained parameters
        self.server()  # and an impossible schedule

    def importance(self) -> tuple[float, ...]:
        """p_i of all clients."""
        said = [client.importance for client in self.clients]
        if all(p is None for p in said):
            return (1 / len(said),) * len(said)
        wrong = [i for i, p in enumerate(said) if p is None or not 0 <= p < math.inf]
        if wrong:
            raise ValueError(
                f"importance must be >= 0 and given for all clients or none, got {said[wrong[0]]} for client {wrong[0]}"
            )
        if abs(sum(said) - 1) > 1e-6:
            raise ValueError(f"importance must add up to 1, got {sum(said):.8g}; divide each by that")
        return tuple(said)

    def server(self) -> Server:
        """A server at its beginning."""
        declared = [math.nan if client.declared is None else client.declared for client in self.clients]
        weights = Unbiased() if self.weights == "unbiased" else self.weights
        schedule = pick(self.schedule, NAMED, "schedule")() if isinstance(self.schedule, str) else self.schedule
        start = flatten(self.model)
        return Server(start, self.importance(), declared, schedule, weights, self.robust, self.server_lr, self.limit)

    def coder(self) -> Coder:
        """What messages look like."""
        return Coder(specs(self.model), self.codec, self.memory, self.seed)

    def trainer(self) -> Trainer | None:
        """Does the clients' work, None where a function of the user's does."""
        work = self.work if isinstance(self.work, LocalSGD) else LocalSGD(steps=0)
        data = [client.data for client in self.clients]
        if isinstance(self.work, LocalSGD) or all(pair is not None for pair in data):
            return Trainer(self.model, self.loss, data, work, self.seed)
        return None

    def judge(self) -> Callable[[Server, float], float]:
        """(server, seconds) -> the loss to note in the trace, NaN if it is not time for an evaluation or nobody can say."""
        model, last, p = copy.deepcopy(self.model).eval(), -math.inf, self.importance()
        trainer = self.trainer() if self.evaluate is None and all(c.data is not None for c in self.clients) else None

        def judge(server: Server, seconds: float) -> float:
            nonlocal last
            if seconds < last + self.every or (self.evaluate is None and trainer is None):
                return math.nan
            last = seconds
            if self.evaluate is not None:
                with torch.no_grad():
                    return float(self.evaluate(unflatten(server.model, model)))
            return sum(p[i] * trainer.loss_of(server.model, i) for i in range(len(p)) if p[i])

        return judge

    def trained(self, server: Server) -> Trained:
        return Trained(unflatten(server.model, copy.deepcopy(self.model)), server.trace)

    def simulate(self, seconds: float, stop: Callable[[Aggregation], bool] | None = None) -> Trained:
        """Run for so many virtual seconds, or until `stop` says so after an aggregation.

        Raises:
            NothingCame: no aggregation for `limit` seconds, or none at all, or none can come any more.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"simulate: seconds must be > 0 and finite, got {seconds}")
        missing = [i for i, client in enumerate(self.clients) if client.data is None]
        if isinstance(self.work, LocalSGD) and missing:
            raise ValueError(f"simulate: every client must have data, got none for client {missing[0]}")
        return _Simulation(self, nanoseconds(seconds), stop).run()


@final
class _Simulation:
    """One run on a virtual clock."""

    def __init__(self, setting: Asynchronous, end: int, stop: Callable[[Aggregation], bool] | None):
        self.setting, self.end, self.stop = setting, end, stop
        self.clock, self.server, self.coder = VirtualClock(), setting.server(), setting.coder()
        self.trainer, self.judge, self.nbytes = setting.trainer(), setting.judge(), self.coder.nbytes()
        self.jobs = [0] * len(setting.clients)  # begun, by client
        self.open: dict[int, Tensor] = {}  # client -> the model it works on, its result not computed yet
        self.results: dict[int, Tensor] = {}  # client -> its change, not returned yet
        self.states: list[dict[str, State]] = [{} for _ in setting.clients]

    def run(self) -> Trained:
        self.act(self.server.begin(0))
        while True:
            event, due = self.clock.peek(), self.server.due()
            if event is None and due is None:
                raise self.server.nothing(self.clock.now)
            if due is None or (event is not None and event <= due):  # who returns as the clock ticks is in time
                if event > self.end:
                    break
                now, client = self.clock.pop()
                step = self.server.returned(client, self.result(client), now)
            else:
                if due > self.end:
                    break
                self.clock.advance(due)
                step = self.server.tick(due)
            if self.act(step):
                break
        if not any(aggregation.who for aggregation in self.server.trace.aggregations):
            raise self.server.nothing(self.end)
        return self.setting.trained(self.server)

    def act(self, step: Step) -> bool:
        """Send models, note the loss; whether to stop."""
        for client in step.send:
            job = self.jobs[client]
            self.jobs[client] += 1
            takes = self.setting.clients[client].takes(job, (self.setting.seed, client, job))
            if takes < math.inf:
                when = self.clock.now + nanoseconds(takes)
                self.clock.at(when, client)
                if when <= self.end:  # a result that nobody will see is not computed
                    self.open[client] = self.server.model
        if step.aggregation is None or not step.aggregation.who:
            return False
        loss = self.judge(self.server, step.aggregation.seconds)
        done = self.server.evaluated(loss) if not math.isnan(loss) else step.aggregation
        return self.stop is not None and self.stop(done)

    def result(self, client: int) -> Tensor | None:
        """A client's change as the server reads it, None if it is not finite."""
        if client not in self.results:
            who = sorted(self.open)
            starts = torch.stack([self.open[i] for i in who])
            jobs = [self.jobs[i] - 1 for i in who]
            if isinstance(self.setting.work, LocalSGD):
                changes = list(self.trainer.changes(starts, who, jobs))
            else:
                changes = [self.setting.work(start, i, job) for start, i, job in zip(starts, who, jobs, strict=True)]
            self.results.update(zip(who, changes, strict=True))
            self.open.clear()
        message = self.coder.encode(self.results.pop(client), client, self.jobs[client] - 1, self.states[client])
        self.server.trace.nbytes += self.nbytes
        return None if message is None else self.coder.decode(message)
