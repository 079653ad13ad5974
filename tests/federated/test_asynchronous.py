"""Asynchronous federated optimisation on a virtual clock: where it converges to, who gets which weight, what is refused."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from tests.federated.problems import IMPORTANCE, SPEEDS, Point, Pull, centres, clients, half_square
from torch import nn

from weft.comm.combine import Combine, Info
from weft.comm.rules.arrivals import Polynomial
from weft.comm.rules.elementwise import Median, TrimmedMean
from weft.comm.rules.krum import MultiKrum
from weft.comm.rules.mean import Mean
from weft.comm.rules.mixing import NNM
from weft.comm.rules.subset import NearestToOwn
from weft.comm.waits import All, Any, Clock, Count, First
from weft.federated import Asynchronous, Client, LocalSGD, NothingCame
from weft.federated.local import flatten

SCHEDULES = (All(), Any(), Clock(0.2), Clock(0.5), Clock("auto"), Count(3))


def label(schedule) -> str:
    return str(schedule).split(", part")[0]


def still(start, client, job):
    """Work that changes nothing."""
    return torch.zeros_like(start)


def setting(schedule, weights="unbiased", work=None, people=None, **options) -> Asynchronous:
    people = clients() if people is None else people
    work = Pull(0.01, len(people)) if work is None else work
    return Asynchronous(Point(), people, half_square, schedule, weights, work, evaluate=lambda model: 0.0, **options)


def of(model) -> Asynchronous:
    return Asynchronous(model, clients(), half_square, work=still)


def q_of_equal(schedule, seconds) -> torch.Tensor:
    """The table of the paper, worked out here: how often each client takes part, as a share of all."""
    t = torch.tensor(seconds, dtype=torch.float64)
    if isinstance(schedule, All):
        q = torch.ones(len(seconds), dtype=torch.float64)
    elif isinstance(schedule, Any):
        q = 1 / t
    else:
        q = 1 / torch.ceil(t / schedule.dt - 1e-9)
    return q / q.sum()


# -- where it converges to


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_unbiased_weights_find_the_wanted_optimum(schedule):
    model, _ = setting(schedule).simulate(600 if isinstance(schedule, All) else 300)
    wanted = torch.tensor(IMPORTANCE, dtype=torch.float64) @ centres()
    assert (model.theta - wanted).norm() < 0.01 * centres().norm()


@pytest.mark.parametrize("schedule", [All(), Any(), Clock(0.2), Clock(0.5)], ids=label)
def test_equal_weights_end_where_the_table_says(schedule):
    model, _ = setting(schedule, "equal").simulate(600 if isinstance(schedule, All) else 300)
    predicted = q_of_equal(schedule, SPEEDS) @ centres()
    assert (model.theta - predicted).norm() < 0.01 * centres().norm()
    if not isinstance(schedule, All):
        assert (predicted - centres().mean(0)).norm() > 0.1 * centres().norm()  # the bias is there to be seen


def test_local_sgd_has_the_same_fixed_point():
    """K gradient steps of rate r pull by 1 - (1 - r)^K."""
    work = LocalSGD(steps=3, lr=0.01, momentum=0.0, batch_size=None)
    model, trace = setting(Clock(0.5), work=work).simulate(100)
    by_hand, _ = setting(Clock(0.5), work=Pull(1 - 0.99**3)).simulate(100)
    assert torch.allclose(model.theta, by_hand.theta, rtol=1e-12)
    assert len(trace.aggregations) == 200


def test_stale_weights_are_biased_against_the_slow():
    weights = {}
    _, trace = setting(Any(), Polynomial(), work=still).simulate(50)
    for done in trace.aggregations:
        weights.setdefault(done.who[0], []).append(done.weights[0])
    mean = [sum(weights[i]) / len(weights[i]) for i in range(6)]
    assert mean == sorted(mean, reverse=True)


# -- the weights themselves


def mean_weights(schedule, weights, people, aggregations) -> torch.Tensor:
    """Mean over aggregations of w_i = d_i 1[i takes part], as shares of their sum."""
    total, seen = torch.zeros(len(people), dtype=torch.float64), 0

    def stop(done) -> bool:
        nonlocal seen
        seen += 1
        for client, weight in zip(done.who, done.weights, strict=True):
            total[client] += weight
        return seen >= aggregations

    setting(schedule, weights, still, people, every=1e9).simulate(10.0 * aggregations, stop)
    return total / total.sum()


MANY = [pytest.param(2_000, id="2,000"), pytest.param(10_000, id="10,000", marks=pytest.mark.slow)]


@pytest.mark.parametrize("aggregations", MANY)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_mean_weights_are_the_importance(schedule, aggregations):
    found = mean_weights(schedule, "unbiased", clients(), aggregations)
    assert found.tolist() == pytest.approx(IMPORTANCE, rel=0.01)


@pytest.mark.parametrize("schedule", [Any(), Clock(0.2), Clock(0.5), Count(3)], ids=label)
def test_equal_mean_weights_are_not(schedule):
    found = mean_weights(schedule, "equal", clients(importance=None), 500)
    assert (found * 6 - 1).abs().max() > 0.2
    assert mean_weights(All(), "equal", clients(importance=None), 10).tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("aggregations", MANY)
@pytest.mark.parametrize("schedule", [Any(), Clock(0.3), Count(3)], ids=label)
@pytest.mark.parametrize("declared", [None, pytest.param(0.5, marks=pytest.mark.slow)])
def test_speeds_that_vary_and_were_not_declared_are_counted(schedule, declared, aggregations):
    found = mean_weights(schedule, "unbiased", clients(jitter=0.3, declared=declared), aggregations)
    assert found.tolist() == pytest.approx(IMPORTANCE, rel=0.1 if aggregations < 10_000 else 0.03)


def test_weights_are_not_renormalised():
    """In a tick where few take part the weights add up to less than in one where many do."""
    _, trace = setting(Clock(0.2), work=still).simulate(20)
    sums = {round(sum(done.weights), 9) for done in trace.aggregations}
    assert len(sums) > 3
    assert sum(sum(done.weights) for done in trace.aggregations) / len(trace.aggregations) == pytest.approx(1, rel=0.05)


# -- who holds which model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def learners(seconds, jitter=0.0) -> list[Client]:
    random = torch.Generator().manual_seed(2)
    data = [
        (torch.randn(9, 3, generator=random), torch.randint(2, (9,), generator=random)) for _ in range(len(seconds))
    ]
    return [Client(pair, seconds=t, declared=t, jitter=jitter) for pair, t in zip(data, seconds, strict=True)]


def models(schedule, people, **options) -> list[torch.Tensor]:
    """Every model of a run that had an aggregation, in order."""
    seen: list[torch.Tensor] = []
    work = LocalSGD(steps=3, lr=0.1, batch_size=4)
    run = Asynchronous(
        network(), people, nn.functional.cross_entropy, schedule, "unbiased", work,
        evaluate=lambda model: float(seen.append(flatten(model)) or 0.0), **options,
    )  # fmt: skip
    run.simulate(12.0)
    return seen


def test_equal_speeds_make_synchronous_schedules_one_bit_for_bit():
    people = learners([1.0] * 5)
    reference = models(All(), people)
    assert len(reference) == 12
    for schedule in (Count(5), Clock(1.0), Clock(1.5), First(5)):
        found = models(schedule, people)
        assert len(found) >= 8
        assert all(torch.equal(a, b) for a, b in zip(reference, found, strict=False)), schedule


def test_a_clock_as_slow_as_the_slowest_is_fedavg():
    people = learners([0.3, 0.7, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(models(All(), people), models(Clock(1.0), people), strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_a_change_belongs_to_the_model_that_was_sent(schedule):
    """staleness s at aggregation n: the job began with theta_{n - s}, and nobody holds a model newer than its start."""
    started: dict[tuple[int, int], torch.Tensor] = {}

    def work(start, client, job):
        started[client, job] = start.clone()
        return 0.1 * (centres()[client] - start)

    versions, jobs, checked = {0: torch.zeros(2, dtype=torch.float64)}, [0] * 6, 0
    run = dataclasses.replace(
        setting(schedule, work=work), evaluate=lambda model: float(now.append(flatten(model)) or 0.0)
    )
    now: list[torch.Tensor] = []

    def stop(done) -> bool:
        nonlocal checked
        for client, staleness in zip(done.who, done.staleness, strict=True):
            assert staleness >= 0
            assert torch.equal(started[client, jobs[client]], versions[done.number - staleness])
            jobs[client] += 1
            checked += 1
        versions[done.number + 1] = now[-1]
        return False

    for number in range(1, 300):  # ticks for nobody leave the model as it is
        versions[number] = versions[0]
    if isinstance(schedule, Clock):
        assert SPEEDS[0] <= 0.2  # with these speeds every tick has somebody
    run.simulate(15.0, stop)
    assert checked > 50


def test_who_did_nothing_adds_exactly_nothing():
    def work(start, client, job):
        return start - start if client == 0 else 0.3 * (centres()[client] - start)

    idle_only = [*(0.0 if i else 1.0 for i in range(6))]
    model, _ = setting(Clock(0.2), work=work, people=clients(importance=idle_only)).simulate(20)
    assert torch.equal(model.theta, torch.zeros(2, dtype=torch.float64))


def test_runs_are_determined_by_the_seed():
    people = learners([0.3, 0.7, 1.0], jitter=0.3)
    first, again, other = (models(Clock(0.25), people, seed=seed) for seed in (0, 0, 1))
    assert len(first) == len(again) and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1], other[-1])


def test_at_one_time_clients_come_in_order():
    _, trace = setting(Any(), people=clients([1.0] * 6), work=still).simulate(2)
    assert [done.who for done in trace.aggregations] == [(i,) for i in range(6)] * 2
    assert [done.staleness for done in trace.aggregations[:6]] == [(i,) for i in range(6)]
    _, trace = setting(Count(2), people=clients([1.0] * 6), work=still).simulate(1)
    assert [done.who for done in trace.aggregations] == [(0, 1), (2, 3), (4, 5)]


# -- clients that fail


@pytest.mark.parametrize("schedule", [Any(), Clock(0.5), Clock("auto"), Count(3), First(5)], ids=label)
def test_a_client_that_never_returns_blocks_nobody(schedule):
    people = clients()
    people[3] = dataclasses.replace(people[3], seconds=math.inf, declared=None)
    _, trace = setting(schedule, people=people, limit=5.0).simulate(30)
    assert {client for done in trace.aggregations for client in done.who} == {0, 1, 2, 4, 5}
    assert trace.aggregations[-1].seconds > 28


def test_all_waits_for_it_and_says_for_whom():
    people = clients()
    people[3] = dataclasses.replace(people[3], seconds=math.inf, declared=0.7)
    with pytest.raises(
        NothingCame, match=r"no aggregation for 5 s: 5 of 6 .* client 3, which declared 0.7 s .* out for 5 s"
    ):
        setting(All(), people=people, limit=5.0).simulate(30)
    with pytest.raises(NothingCame, match="slowest is client 3"):  # without a limit: nothing can happen any more
        setting(All(), people=people).simulate(30)


@pytest.mark.parametrize("schedule", [*SCHEDULES, First(2)], ids=label)
def test_nobody_ever_returns(schedule):
    people = [Client(declared=float(i + 1), seconds=math.inf) for i in range(4)]
    with pytest.raises(NothingCame, match="slowest is client 3, which declared 4 s") as found:
        setting(schedule, people=people, work=Pull(0.1, 4), limit=50.0).simulate(1000)
    assert found.value.client == 3
    assert found.value.limit <= 50.0


def test_a_client_that_gets_stuck_later():
    people = clients()
    people[5] = dataclasses.replace(people[5], seconds=lambda job: 1.0 if job < 3 else math.inf)
    with pytest.raises(NothingCame) as found:
        setting(All(), people=people, limit=5.0).simulate(30)
    assert (found.value.client, found.value.seconds) == (5, 5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_changes_that_are_not_finite_are_rejected(bad):
    def work(start, client, job):
        if client == 2 and job % 2 == 0:
            return torch.full_like(start, bad)
        return 0.01 * (centres()[client] - start)

    model, trace = setting(Clock(0.5), work=work).simulate(50)
    assert trace.rejected.keys() == {2}
    jobs = sum(2 in done.who for done in trace.aggregations)
    assert (
        abs(trace.rejected[2] - jobs) <= 1
    )  # after each rejection it gets the model of now, and its next result counts
    assert torch.isfinite(model.theta).all()
    only = [Client(seconds=1.0) for _ in range(2)]
    with pytest.raises(NothingCame):
        setting(Any(), people=only, work=lambda start, client, job: start * bad, limit=9.0).simulate(50)


def test_a_clock_that_is_asked_late_keeps_its_beat():
    """By a little; whole beats that were missed are not made up for."""
    server, second = setting(Clock(1.0)).server(), 10**9
    server.begin(0)
    for now, due in ((second, 2.0), (int(2.4 * second), 3.0), (int(3.9 * second), 4.0), (int(6.5 * second), 7.5)):
        assert server.tick(now).aggregation is not None
        assert server.due() == due * second


def test_who_is_too_late_for_the_first_is_left_out():
    _, trace = setting(First(4), "equal", work=still).simulate(20)
    assert {client for done in trace.aggregations for client in done.who} == {0, 1, 2, 3}
    assert trace.late.keys() == {4, 5}
    assert all(done.staleness == (0,) * 4 for done in trace.aggregations)


# -- rules and codecs on the way


def test_the_mean_as_a_robust_rule_changes_nothing():
    plain, _ = setting(Clock(0.5)).simulate(10)
    through, _ = setting(Clock(0.5), robust=Mean()).simulate(10)
    assert torch.allclose(plain.theta, through.theta, rtol=1e-12)


@pytest.mark.parametrize("robust", [MultiKrum(1, m=2, spare=1), Median(), NNM(1, TrimmedMean(1))], ids=str)
def test_a_liar_is_not_believed(robust):
    def work(start, client, job):
        return 1e6 * torch.ones_like(start) if client == 5 else 0.05 * (1.0 + 0.01 * client - start)

    model, trace = setting(Count(4), robust=robust, work=work).simulate(60)
    assert torch.allclose(model.theta, torch.ones(2, dtype=torch.float64), atol=0.05)
    ruined, _ = setting(Count(4), work=work).simulate(60)
    assert ruined.theta.abs().max() > 1e3
    if isinstance(robust, MultiKrum):  # unbiased weights come after the choice
        for done in trace.aggregations:
            chosen = [i for i, weight in zip(done.who, done.weights, strict=True) if weight]
            assert len(chosen) == 2 and 5 not in chosen


def test_changes_travel_through_a_codec_with_memory():
    from weft.comm.codecs.top_k import TopK
    from weft.comm.memories.error_feedback import ErrorFeedback

    def loss(people, **options):
        work = LocalSGD(steps=5, lr=0.1, batch_size=9)
        run = Asynchronous(network(), people, nn.functional.cross_entropy, Clock(0.5), work=work, **options)
        _, trace = run.simulate(40)
        return trace.losses()[-1][1], trace.nbytes

    people = learners(SPEEDS)
    whole, many = loss(people)
    coded, few = loss(people, codec=TopK(0.25), memory=ErrorFeedback())
    assert few < 0.8 * many
    assert coded < whole + 0.1


def test_a_robust_rule_waits_for_as_many_as_it_takes():
    """Ticks of a fast clock bring one or two of seven clients; Multi-Krum with f = 1 takes five."""
    people = clients(seconds=(0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5), importance=None, jitter=0.5)
    _, trace = setting(Clock(0.1), people=people, work=still, robust=MultiKrum(1)).simulate(30)
    sizes = [len(done.who) for done in trace.aggregations if done.who]
    assert len(sizes) > 10 and min(sizes) >= 5
    assert {client for done in trace.aggregations for client in done.who} == set(range(7))


def test_a_robust_rule_that_never_gets_enough_says_so():
    people = clients()
    people[3:] = [dataclasses.replace(client, seconds=math.inf, declared=None) for client in people[3:]]
    with pytest.raises(NothingCame, match=r"3 of 6 clients .* takes no fewer than 5") as found:
        setting(Clock(0.5), people=people, robust=MultiKrum(1), limit=5.0).simulate(30)
    assert found.value.least == 5


def test_an_error_says_how_many_results_were_rejected():
    run = setting(Clock(1.0), work=lambda start, client, job: start * math.nan, limit=5.0)
    with pytest.raises(NothingCame, match=r"\d+ results came and were rejected, being not finite") as found:
        run.simulate(30)
    again = pickle.loads(pickle.dumps(found.value))
    assert "slowest" not in str(again)
    assert again.rejected == sum(again.trace.rejected.values()) > 10


# -- what is refused


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: setting(Clock(0.5), people=clients(importance=(0.5, 0.5, 0.1, 0, 0, 0))), "must add up to 1, got 1.1"),
        (lambda: setting(Clock(0.5), people=clients(importance=(1.2, -0.2, 0, 0, 0, 0))), "must be >= 0 .* client 1"),
        (
            lambda: setting(Clock(0.5), people=[Client(importance=1.0), Client()]),
            "for all clients or none, got None for client 1",
        ),
        (lambda: setting(Clock(0.5), people=[]), "at least one, got none"),
        (lambda: setting(Count(7)), "at most the number of workers 6, got 7"),
        (lambda: setting(All(), "fair"), 'must be "unbiased", "equal" or a rule'),
        (lambda: setting("clok"), "did you mean clock"),
        (lambda: setting("count"), "known are all, any, clock"),
        (lambda: setting(All(), server_lr=0.0), "server_lr must be > 0"),
        (lambda: setting(All(), Median()), r"rule on arrivals, such as Polynomial\(\), got Median"),
        (lambda: setting(All(), MultiKrum(1)), "rule on arrivals.* got MultiKrum"),
        (lambda: setting(All(), lambda info: None), "rule on arrivals.* got <function"),
        (lambda: setting(All(), robust=lambda stack: None), "robust must be a rule"),
        (lambda: setting(All(), robust=NearestToOwn(1)), "decide among 6 clients, got NearestToOwn.*own message"),
        (lambda: setting(All(), robust=MultiKrum(2)), "decide among 6 clients, got MultiKrum"),
        (lambda: setting(Any(), robust=MultiKrum(1)), r"wait for the 5 results .* got Any\(\), which waits for 1"),
        (lambda: setting(Count(4), robust=MultiKrum(1)), "wait for the 5 results .* which waits for 4"),
        (lambda: setting(First(4), robust=NNM(1, MultiKrum(1))), "wait for the 5 results .* which waits for 4"),
        (lambda: of(nn.Linear(2, 2).requires_grad_(False)), "trained parameters, all of one dtype, got none"),
        (lambda: of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())), r"\['torch.float32', 'torch.float64'\]"),
        (
            lambda: setting(All(), people=[Client((torch.zeros(0, 2), torch.zeros(0)))], work=LocalSGD()).simulate(1.0),
            "client 0 must have as many inputs as targets, at least one, got 0 and 0",
        ),
        (lambda: setting(All(), work=lambda *_: torch.zeros(3)).simulate(1.0), r"a vector \(2,\), got shape \(3,\)"),
        (lambda: setting(All(), work=lambda *_: None).simulate(1.0), r"a vector \(2,\), got None"),
        (lambda: setting(All(), limit=0.0), "limit must be seconds > 0"),
        (lambda: setting(All()).simulate(0.0), "seconds must be > 0 and finite"),
        (lambda: Client(seconds=0.0), "seconds must be > 0"),
        (lambda: Client(jitter=-1.0), "jitter must be >= 0"),
        (lambda: Client(declared=0.0), "declared must be seconds > 0"),
        (
            lambda: setting(All(), work=LocalSGD(), people=[Client()]).simulate(1.0),
            "must have data, got none for client 0",
        ),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_importance_may_be_off_by_a_rounding_error():
    setting(All(), people=clients(importance=(0.1, 0.2, 0.05, 0.3, 0.15, 0.2 + 9e-7)))


def test_weights_of_a_wrong_shape():
    class Both(Combine):
        needs = "arrivals"

        def weights(self, info: Info) -> torch.Tensor:
            return torch.ones(2, info.count, dtype=torch.float64)

    with pytest.raises(ValueError, match=r"one number per message, \(1,\), got \(2, 1\)"):
        setting(Any(), Both()).simulate(5.0)
