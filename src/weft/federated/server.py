"""The server of asynchronous federated optimisation as a state machine: results in, aggregations out; no clock and no network.

State      the model theta_n (flat), its version n, and per client the version that it was sent last
Result     client i returns Delta_i, the change of the model that *it was sent*, and waits until its result is used
Aggregate  when the schedule closes the round with results S:                                  `aggregate`
               theta_{n+1} = theta_n + lr * sum over i in S of d_i Delta_i
           Everyone in S is at once sent theta_{n+1}; the others go on with what they have.
           A round that closes with nobody in it is counted (the clock has ticked) and leaves theta as it is.
Robust     with a robust rule that is a row of weights w over S:  sum_i |S| w_i d_i Delta_i, which is the formula above for
           w_i = 1/|S|; where the rule is no row of weights:  (sum_i d_i) times its result.
           While fewer results are here than the rule takes, a round goes on, past its deadline too              `least`
Never      a change that is not finite enters the model: it is counted, and its client gets the model of now and starts again.

The same object runs on a virtual clock (`Asynchronous.simulate`) and on the wall clock (`processes.serve`). Times are in ns.
Source: Fraboni et al., arXiv:2206.10189.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Arrival, Combine, Info
from weft.comm.gram import gram, weighted
from weft.comm.rules.arrivals import Equal
from weft.comm.wait import Wait
from weft.comm.waits import Any, Count, First, nanoseconds
from weft.errors import WeftError
from weft.federated.participation import Participation

__all__ = ["Aggregation", "NothingCame", "Server", "Step", "Trace"]


class NothingCame(WeftError, RuntimeError):
    """No result was aggregated for `limit` seconds; `client`, the slowest, is out for `seconds` and had declared `declared`.

    `here` results wait, of which a round takes at least `least`; `rejected` ones could not be used. `trace` is the run so far.
    """

    def __init__(
        self,
        limit: float,
        client: int,
        seconds: float,
        declared: float,
        here: int,
        clients: int,
        rejected: int = 0,
        least: int = 1,
        trace: Trace | None = None,
    ):
        super().__init__(limit, client, seconds, declared, here, clients, rejected, least, trace)
        self.limit, self.client, self.seconds, self.declared, self.here, self.clients = self.args[:6]
        self.rejected, self.least, self.trace = rejected, least, trace

    def __str__(self) -> str:
        needs = f" (the robust rule takes no fewer than {self.least})" if self.least > 1 else ""
        found = (
            f"no aggregation for {self.limit:g} s: {self.here} of {self.clients} clients have returned a result that waits to be "
            f"used{needs}. "
        )
        if self.rejected:
            found += (
                f"{self.rejected} results came and were rejected, being not finite or not of the agreed form: lower the clients' "
                "rate, or look at what their work gives. "
            )
            if not self.here:
                return found.rstrip()
        said = "declared nothing" if math.isnan(self.declared) else f"declared {self.declared:g} s"
        return found + (
            f"The slowest is client {self.client}, which {said} and has been out for {self.seconds:g} s. "
            "Use a schedule that does not wait for everybody (Clock, Count, Any), leave that client out, or raise `limit`."
        )


@dataclass(frozen=True)
class Aggregation:
    """One step of the server.

    Attributes:
        number: n of theta_n before it; the model after it has version n + 1.
        seconds: when, since the run began.
        who: clients whose results were used, in order; empty if the clock ticked for nobody.
        staleness: for each, n minus the version that it worked on.
        weights: for each, what multiplied its change (without the server's rate).
        loss: of the model after it; NaN where it was not evaluated.
    """

    number: int
    seconds: float
    who: tuple[int, ...]
    staleness: tuple[int, ...]
    weights: tuple[float, ...]
    loss: float = math.nan


@dataclass
class Trace:
    """What happened: the aggregations in order, and per client how many results could not be used, or came too late to count."""

    aggregations: list[Aggregation] = field(default_factory=list)
    rejected: dict[int, int] = field(default_factory=dict)
    late: dict[int, int] = field(default_factory=dict)
    nbytes: int = 0  # received from clients

    def time_to(self, loss: float) -> float:
        """Seconds until the loss is first below `loss`; inf if it never is."""
        return next((a.seconds for a in self.aggregations if a.loss < loss), math.inf)

    def losses(self) -> list[tuple[float, float]]:
        """(seconds, loss) wherever it was evaluated."""
        return [(a.seconds, a.loss) for a in self.aggregations if not math.isnan(a.loss)]


@dataclass(frozen=True)
class Step:
    """What the server wants done: `send` the model to these clients, in order; `aggregation` if one has just happened."""

    send: tuple[int, ...] = ()
    aggregation: Aggregation | None = None


@final
class Server:
    """Events `begin`, `returned`, `tick`; each answers with a `Step`. Tensors handed out as `model` are never written to.

    Args:
        model: flat start vector (d,).
        importance: p_i of the clients, adding up to 1.
        declared: seconds of each client, NaN where it said nothing.
        schedule: any `Wait`.
        weights: the rule that makes d_i; "equal" is one over the mean number of clients that take part in a round.
        robust: a rule that decides whose changes to believe, before the weights.
        server_lr: multiplies every step.
        limit: seconds without an aggregation after which `NothingCame` is raised.
    Raises:
        ValueError: weights that are made from the messages, a robust rule that cannot decide among so many clients, or one
            that takes more results than the schedule waits for.
    """

    def __init__(
        self,
        model: Tensor,
        importance: Sequence[float],
        declared: Sequence[float],
        schedule: Wait,
        weights: Combine | str,
        robust: Combine | None = None,
        server_lr: float = 1.0,
        limit: float = math.inf,
    ):
        self.model, self.version = model, 0
        self.importance, self.declared = tuple(importance), tuple(declared)
        self.schedule, self.robust, self.server_lr = schedule, robust, server_lr
        self.limit = nanoseconds(limit) if limit < math.inf else None
        self.books = Participation(declared)
        clients = len(self.importance)
        times = self.books.times([0.0] * clients)
        self.wait = schedule.sized(clients, declared)
        if isinstance(weights, str):
            weights = Equal(1 / sum(self.wait.shares(times)))
        if not isinstance(weights, Combine) or weights.needs not in ("arrivals", "count"):
            raise ValueError(
                f"weights must be a rule on arrivals, such as Polynomial(), got {weights!r}; one on messages goes into `robust`"
            )
        self.rule = weights
        self.least = 1 if robust is None else least(robust, clients)
        taken = (
            1 if isinstance(schedule, Any) else schedule.count if isinstance(schedule, (Count, First)) else self.least
        )
        if taken < self.least:
            raise ValueError(
                f"the schedule must wait for the {self.least} results that {robust} takes at least, got {schedule}, which waits "
                f"for {taken}; use Count({self.least}) or Clock"
            )
        self.void: dict[int, int] = {}  # of a late client: results of versions before this one do not count
        self.here: dict[int, Tensor] = {}  # results that wait, by client
        self.arrivals: list[Arrival] = []  # what the schedule sees of them, in the order in which they came
        self.sent = [(0, 0)] * clients  # (version, when) of the model each client holds
        self.gone: set[int] = set()
        self.began = self.progress = 0  # of the round; of the last aggregation of anything
        self.rejected = 0  # results, since the last aggregation of anything
        self.asked = False  # the schedule knows that this round's deadline has passed
        self.trace = Trace()

    def begin(self, now: int) -> Step:
        """Send the first model to everybody."""
        self.began = self.progress = now
        return self._sends(range(len(self.importance)), now)

    def due(self) -> int | None:
        """When `tick` is to be called if nothing comes before; None: never."""
        ticks, limit = self._ticks(), None if self.limit is None else self.progress + self.limit
        return min((moment for moment in (ticks, limit) if moment is not None), default=None)

    def returned(self, client: int, change: Tensor | None, now: int) -> Step:
        """A client's result, None if it could not be read; with it the client stands idle until it is sent a model."""
        if client in self.here:
            raise ValueError(
                f"client {client} returned twice for one model; a client starts again when it is sent the next"
            )
        version, when = self.sent[client]
        self.books.measured(client, (now - when) / 1e9)
        if change is None or change.shape != self.model.shape or not bool(torch.isfinite(change).all()):
            self.reject(client)
            return self._sends((client,), now)
        if version < self.void.get(client, 0):
            self.trace.late[client] = self.trace.late.get(client, 0) + 1
            return self._sends((client,), now)
        self.here[client] = change
        self.arrivals.append(Arrival(client, self.version - version, self.books.time(client), self.books.count[client]))
        ticks = self._ticks()
        if ticks is not None and now >= ticks:
            return Step()  # others may return at this very moment: `tick` asks when they all have
        return self._ask(now)

    def reject(self, client: int) -> None:
        """Count a result that cannot be used."""
        self.rejected += 1
        self.trace.rejected[client] = self.trace.rejected.get(client, 0) + 1

    def tick(self, now: int) -> Step:
        """The moment `due` has come.

        Raises:
            NothingCame: nothing was aggregated for `limit` seconds.
        """
        self.asked = True
        step = self._ask(now)
        if self.limit is not None and now >= self.progress + self.limit:
            raise self.nothing(now)
        return step

    def lost(self, client: int) -> None:
        """A client will not return any more. What it has returned already still counts."""
        self.gone.add(client)

    def back(self, client: int, now: int) -> Step:
        """A client that was lost, or had never come, is there again; what it worked on is forgotten."""
        self.gone.discard(client)
        return Step() if client in self.here else self._sends((client,), now)

    def nothing(self, now: int) -> NothingCame:
        """The error that says who is missing."""
        out = [client for client in range(len(self.sent)) if client not in self.here] or list(range(len(self.sent)))
        slowest = max(out, key=lambda client: (now - self.sent[client][1], self.books.longest(client), -client))
        waited = (now - self.progress) / 1e9
        since = (now - self.sent[slowest][1]) / 1e9
        said = self.declared[slowest]
        return NothingCame(
            waited, slowest, since, said, len(self.here), len(self.sent), self.rejected, self.least, self.trace
        )

    def aggregate(self, who: Sequence[int], now: int) -> Aggregation:
        """Step the model by the results of `who`."""
        arrivals = self._weighed(who, now)
        if who:
            stack = torch.stack([self.here.pop(client) for client in who])
            row = self.rule.weights(Info(len(who), arrivals=arrivals))
            if row.shape != (len(who),):
                raise ValueError(f"weights must be one number per message, ({len(who)},), got {tuple(row.shape)}")
            if self.robust is None:
                change = weighted(row, stack)
            else:
                row, change = believed(self.robust, row, stack, arrivals)
            self.model = torch.add(self.model, change, alpha=self.server_lr)
            self.progress, self.rejected = now, 0
        else:
            row = torch.zeros(0)
        done = Aggregation(
            self.version, now / 1e9, tuple(who), tuple(a.staleness for a in arrivals), tuple(row.tolist())
        )
        self.trace.aggregations.append(done)
        self.version += 1
        return done

    def evaluated(self, loss: float) -> Aggregation:
        """Write the loss of the model after the last aggregation into the trace."""
        self.trace.aggregations[-1] = replace(self.trace.aggregations[-1], loss=loss)
        return self.trace.aggregations[-1]

    def _ticks(self) -> int | None:
        """When the schedule wants to be asked though nothing comes, None if never or if it has been."""
        deadline = self.wait.deadline(self.version)
        return None if deadline == math.inf or self.asked else self.began + nanoseconds(deadline)

    def _ask(self, now: int) -> Step:
        """Whether the round is over, and what follows."""
        decision = self.wait.close(self.version, self.arrivals, (now - self.began) / 1e9)
        if decision is None:
            return Step()
        who = [client for client in sorted(self.here) if client not in decision.late]
        if 0 < len(who) < self.least:
            return Step()
        self.arrivals = []
        done = self.aggregate(who, now)
        self.void.update(dict.fromkeys(decision.late, self.version))
        idle = [client for client in sorted(decision.late) if self.here.pop(client, None) is not None]
        deadline = self.wait.deadline(done.number)
        due = self.began + nanoseconds(deadline) if deadline < math.inf else now
        # a clock that is asked a little late keeps its beat, unless it is a whole beat behind
        self.asked = False
        self.began = due if due <= now < 2 * due - self.began else now
        if any(math.isnan(said) for said in self.declared):
            self.wait = self.schedule.sized(
                len(self.sent), [self.books.time(client) for client in range(len(self.sent))]
            )
        return Step(self._sends(who + idle, now).send, done)

    def _weighed(self, who: Sequence[int], now: int) -> tuple[Arrival, ...]:
        """What the weights are made from; books that `who` takes part."""
        for client in who:
            self.books.took_part(client, self.version)
        priors: Sequence[float] = ()
        if not all(self.books.reliable(client) for client in who):
            priors = self.wait.shares(self.books.times([(now - when) / 1e9 for _, when in self.sent]))
        return tuple(
            Arrival(
                client,
                staleness=self.version - self.sent[client][0],
                seconds=self.books.time(client),
                count=self.books.count[client],
                weight=self.importance[client],
                share=self.books.share(client, priors[client] if priors else 1.0),
            )
            for client in who
        )

    def _sends(self, clients: Sequence[int], now: int) -> Step:
        send = tuple(client for client in clients if client not in self.gone)
        for client in send:
            self.sent[client] = (self.version, now)
        return Step(send)


def believed(rule: Combine, row: Tensor, stack: Tensor, arrivals: tuple[Arrival, ...]) -> tuple[Tensor, Tensor]:
    """Weights (n,), as a robust rule leaves them, and the step (d,) that it makes of changes (n, d)."""
    if rule.needs == "elementwise":
        return row, float(row.sum()) * rule.elementwise(stack)
    info = Info(len(stack), gram(stack) if rule.needs == "gram" else None, arrivals=arrivals)
    rule, chosen = rule.resolve(info)
    if chosen.ndim == 1:  # a choice among messages: those that it leaves keep their weights
        row = len(stack) * chosen * row
        return row, rule.finish(weighted(row, stack))
    # A mixture, of which its second stage makes one.
    return row, float(row.sum()) * rule.finish(weighted(chosen, stack))


def least(rule: Combine, clients: int) -> int:
    """The fewest results that a robust rule decides among: found by asking it, for rules before rules need more than each.

    Raises:
        ValueError: it refuses even those of all clients, or is no rule.
    """
    if not isinstance(rule, Combine):
        raise ValueError(f"robust must be a rule, such as MultiKrum(1), got {rule!r}")
    why: ValueError | None = None
    for count in range(1, clients + 1):
        arrivals = tuple(Arrival(client) for client in range(count))
        try:
            believed(rule, torch.ones(count, dtype=torch.float64), torch.zeros(count, 1, dtype=torch.float64), arrivals)
            return count
        except ValueError as error:
            why = error
    raise ValueError(f"robust must be a rule that can decide among {clients} clients, got {rule}: {why}")
