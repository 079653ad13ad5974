"""MASHA against extragradient written out, its fixed points, its proven rate, and the shortcuts that stall."""

from __future__ import annotations

import math

import pytest
import torch
from tests.slow import slow

from weft.comm.codec import Spec
from weft.comm.codecs import Quantise, RandK, TopK
from weft.comm.exchange import Exchange
from weft.comm.masha import MASHA, Anchor, coin, masha, rate, step_size
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.shift import Shift
from weft.comm.rules import Median, NearestToOwn
from weft.comm.topology import AllGather, Gossip, Peer, ScatterGather, Star
from weft.comm.variational import Adam, Ask, Game, Simulated, descent, extragradient, optimistic

MODES = {
    "rand-k": (1, RandK(0.2), None),
    "quantise": (1, Quantise(3, 64, "max"), None),
    "top-k": (2, TopK(0.2, "exact"), ErrorFeedback),
}


def star(codec, memory=None, workers=4, **options):
    if memory is not None:
        options |= {"memory": memory(), "server": memory()}
    return Simulated(workers, codec, down=codec, wire=torch.float64, **options)


def run(game, simulated, gamma, tau, mode, steps, z=None, seed=0):
    """Points after each step of MASHA."""
    anchors = [Anchor() for _ in game.operators]
    z = {"z": game.start.clone()} if z is None else z
    for number in range(steps):
        refresh = coin(seed, number, tau)
        found = simulated.run(
            [masha(z, a, f, gamma, tau, mode, refresh) for a, f in zip(anchors, game.operators, strict=True)]
        )
        assert all(torch.equal(found[0]["z"], other["z"]) for other in found)
        z = found[0]
        yield z


def small(seed=0, workers=4, size=10, spread=2.0):
    return Game.bilinear(size=size, workers=workers, spread=spread, seed=seed)


def test_without_compression_and_with_a_refresh_every_step_it_is_extragradient():
    game = small()
    gamma, point = 0.2, game.start.clone()

    def mean(at):
        return sum(f({"z": at})["z"] for f in game.operators) / 4

    simulated, anchors, z = star(None), [Anchor() for _ in range(4)], {"z": game.start.clone()}
    for _ in range(20):
        steps = [masha(z, a, f, gamma, 0.0, 1, True) for a, f in zip(anchors, game.operators, strict=True)]
        z = simulated.run(steps)[0]
        half = point - gamma * mean(point)
        # F(half) as F(w) + mean of differences: equal up to the order of the sums.
        point = point - gamma * mean(half)
        torch.testing.assert_close(z["z"], point, rtol=1e-13, atol=1e-13)
    assert game.distance(z) < 0.1


@pytest.mark.parametrize("name", MODES)
def test_the_solution_is_a_fixed_point_of_any_codec(name):
    mode, codec, memory = MODES[name]
    game = small()
    points = run(game, star(codec, memory), 0.1, 0.8, mode, 30, {"z": game.solution.clone()})
    for z in points:
        assert float((z["z"] - game.solution).abs().max()) < 1e-12


@pytest.mark.parametrize("name", MODES)
def test_converges_where_compressing_f_itself_stalls(name):
    mode, codec, memory = MODES[name]
    game = small(spread=3.0)
    *_, z = run(game, star(codec, memory), 0.08, 0.8, mode, 220)
    assert game.distance(z) < 1e-4
    naive = star(codec)
    *_, stalled = naive.iterate(
        100, lambda m, z: extragradient(z, game.operators[m], 0.08, compressed=True), {"z": game.start.clone()}
    )
    assert game.distance(stalled) > 0.02


def test_top_k_without_its_memory_lags_far_behind():
    game = small(size=20, spread=6.0)
    distances = []
    for memory in (ErrorFeedback, None):
        *_, z = run(game, star(TopK(0.1, "exact"), memory), 0.05, 0.9, 2, 300)
        distances.append(game.distance(z))
    assert distances[0] < 1e-3 < 0.05 < distances[1]


def test_what_is_sent_and_kept_adds_up_to_what_was_to_be_sent():
    game, gamma, tau = small(), 0.1, 0.8
    simulated = star(TopK(0.2, "exact"), ErrorFeedback)
    anchors, z = [Anchor() for _ in range(4)], {"z": game.start.clone()}
    kept = torch.zeros(20, dtype=torch.float64)
    for number in range(10):
        wanted = []

        delivered = {}

        def spied(conversation, wanted=wanted, delivered=delivered):
            ask = next(conversation)
            while True:
                if ask.compressed:
                    wanted.append(ask.vector["z"])
                mean = yield ask
                if ask.compressed:
                    delivered["g"] = mean["z"]
                try:
                    ask = conversation.send(mean)
                except StopIteration as end:
                    return end.value

        steps = [
            masha(z, a, f, gamma, tau, 2, coin(0, number, tau)) for a, f in zip(anchors, game.operators, strict=True)
        ]
        z = simulated.run([spied(step) for step in steps])[0]
        errors = [simulated._state(worker, "z")["error"].double() for worker in range(-1, 4)]
        now = errors[0] + sum(errors[1:]) / 4
        torch.testing.assert_close(delivered["g"] + now - kept, sum(wanted) / 4, rtol=1e-6, atol=1e-6)
        kept = now


@pytest.mark.parametrize(
    "codec",
    [RandK(0.25), pytest.param(Quantise(3, 64, "max"), marks=pytest.mark.slow)],
    ids=["rand-k", "quantise"],
)
def test_the_proven_rate_holds_at_the_proven_step_size(codec):
    tau, steps = 0.75, 40
    for seed in range(5):
        game = small(seed, workers=3, size=6, spread=1.5)
        omega = codec.variance(Spec("z", (12,)), codec.default(Spec("z", (12,))))
        gamma = step_size(tau, game.modulus, game.lipschitz, game.local, omega, omega)
        runs = [
            [game.distance(z) ** 2 for z in run(game, star(codec, workers=3, seed=s), gamma, tau, 1, steps, seed=s)]
            for s in range(3)
        ]
        for k in range(steps):
            assert sum(r[k] for r in runs) / 3 <= rate(gamma, game.modulus, k + 1)
        assert sum(r[-1] for r in runs) / 3 < 0.97  # it moves, too


@pytest.mark.parametrize("mode", [1, 2])
def test_a_rate_for_each_player_is_one_rate_in_scaled_coordinates(mode):
    """z = s u turns F into s F(s u): the same steps for u with one rate."""
    game, scale = small(), torch.cat([torch.full((10,), 1.0), torch.full((10,), 2.0)]).double()
    codec = (RandK(0.2), TopK(0.2, "exact"))[mode - 1]

    def split(z):
        return {"x": z[:10], "y": z[10:]}

    def point(f, scales=None):
        scales = torch.ones(20, dtype=torch.float64) if scales is None else scales
        return lambda z: split(scales * f({"z": scales * torch.cat([z["x"], z["y"]])})["z"])

    def walk(operators, gamma, start):
        simulated, anchors, z = star(codec, ErrorFeedback if mode == 2 else None), [Anchor() for _ in range(4)], start
        for number in range(20):
            coins = coin(0, number, 0.7)
            pairs = zip(anchors, operators, strict=True)
            z = simulated.run([masha(z, a, f, gamma, 0.7, mode, coins) for a, f in pairs])[0]
        return torch.cat([z["x"], z["y"]])

    ours = walk([point(f) for f in game.operators], {"x": 0.1, "y": 0.4}, split(game.start))
    scaled = walk([point(f, scale) for f in game.operators], 0.1, split(game.start / scale))
    torch.testing.assert_close(ours, scale * scaled, rtol=1e-10, atol=1e-10)
    assert float((ours - game.start).norm()) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, "betas must be in"),
        ({"betas": (0.9, -0.1)}, "betas must be in"),
        ({"eps": 0.0}, "eps > 0"),
    ],
)
def test_adam_outside_its_range(options, message):
    with pytest.raises(ValueError, match=message):
        Adam(0.1, **options)


def test_step_sizes():
    # Without compression C = L; with it the variance of M independent workers is added, and the server's multiplies.
    assert step_size(0.75, 0.0, 2.0, [3.0, 3.0], variance=0.0) == pytest.approx(0.5 / 4)
    assert step_size(0.75, 0.0, 2.0, [3.0, 3.0], variance=4.0) == pytest.approx(0.5 / (2 * math.sqrt(4 + 4 * 18 / 4)))
    assert step_size(0.75, 0.0, 2.0, [3.0, 3.0], 4.0, 3.0) == pytest.approx(0.5 / (4 * math.sqrt(22)))
    assert step_size(0.999, 10.0, 0.001, [0.001], 0.0) == pytest.approx(0.001 / 20)
    with pytest.raises(ValueError, match="tau must be in"):
        step_size(1.0, 0.0, 1.0, [1.0], 0.0)


def test_the_coin():
    drawn = [coin(3, step, 0.8) for step in range(4000)]
    assert 0.17 < sum(drawn) / 4000 < 0.23
    assert drawn != [coin(4, step, 0.8) for step in range(4000)]


def test_the_other_methods():
    game = small()
    last: dict = {}
    for step, gamma, steps in (
        (lambda m, z: extragradient(z, game.operators[m], 0.3), 0.3, 60),
        (lambda m, z: optimistic(z, last, game.operators[m], 0.2), 0.2, 120),
    ):
        *_, z = Simulated(4, wire=torch.float64).iterate(steps, step, {"z": game.start.clone()})
        assert game.distance(z) < 1e-6, gamma
    free = Game.bilinear(size=10, workers=2, curvature=1e-3, spread=2.0)
    *_, z = Simulated(2).iterate(100, lambda m, z: descent(z, free.operators[m], 0.3), {"z": free.start.clone()})
    assert free.distance(z) > 10  # descent-ascent spirals out


def test_coded_refreshes_send_a_quarter_and_still_reach_the_solution():
    game = small(spread=3.0)
    exact, coded = (
        Simulated(4, Quantise(4, 20, "max"), refresh=codec, wire=torch.float64)
        for codec in (None, Quantise(8, 20, stochastic=False))
    )
    distances = []
    for simulated in (exact, coded):
        *_, z = run(game, simulated, 0.15, 0.7, 1, 120)
        distances.append(game.distance(z))
    assert max(distances) < 1e-3
    assert distances[1] < 2 * distances[0]
    assert coded.sent < 0.6 * exact.sent


REFERENCES = Quantise(6, 20, "max", stochastic=False)


def test_refreshes_coded_both_ways_converge_as_exact_ones_do():
    """On every game at about the same rate, down to rounding: no error of a code stays in the references."""
    for game in (
        small(1, spread=3.0),
        small(2, workers=3, size=8, spread=3.0),
        small(3, workers=6, size=15, spread=4.0),
    ):
        workers, rates = len(game.operators), []
        for codec in (None, REFERENCES):
            message = Quantise(4, 20, "max")
            simulated = Simulated(workers, message, down=message, refresh=codec, wire=torch.float64)
            gaps = [game.distance(z) for z in run(game, simulated, 0.15, 0.7, 1, 260)]
            rates.append((gaps[259] / gaps[59]) ** (1 / 200))
        assert max(rates) < 0.96 and rates[1] < rates[0] + 0.01
        assert gaps[-1] < 1e-6
        refreshes = 1 + sum(coin(0, number, 0.7) for number in range(260))
        spec = Spec("z", tuple(game.start.shape))
        assert (
            simulated.received
            == simulated.sent
            == 260 * message.nbytes(spec, 4) + refreshes * REFERENCES.nbytes(spec, 6)
        )


def test_what_all_take_for_the_mean_follows_the_mean_of_what_is_subtracted():
    game = small(spread=3.0)
    message = Quantise(4, 20, "max")
    simulated = Simulated(4, message, down=message, refresh=REFERENCES, wire=torch.float64)
    anchors, z, apart = [Anchor() for _ in range(4)], {"z": game.start.clone()}, []
    for number in range(200):
        steps = [
            masha(z, a, f, 0.15, 0.7, 1, coin(0, number, 0.7)) for a, f in zip(anchors, game.operators, strict=True)
        ]
        z = simulated.run(steps)[0]
        assert all(torch.equal(a.mean["z"], anchors[0].mean["z"]) for a in anchors)
        apart.append(float((torch.stack([a.own["z"] for a in anchors]).mean(0) - anchors[0].mean["z"]).norm()))
    assert 0 < apart[-1] < 1e-4 * apart[0]


def test_bytes_are_counted():
    game, simulated = small(), Simulated(4, RandK(0.25), down=RandK(0.5))
    list(run(game, simulated, 0.1, 1 - 1e-9, 1, 3))
    assert simulated.sent == 20 * 4 + 3 * (5 * 4 + 8)  # the first F_m(w), then three messages of 5 entries and a seed
    assert simulated.received == 20 * 4 + 3 * (10 * 4 + 8)


def test_a_vector_that_is_not_finite_skips_the_step_for_all():
    game, simulated = small(), star(TopK(0.2, "exact"), ErrorFeedback)
    points = run(game, simulated, 0.1, 0.8, 2, 2)
    *_, z = points
    before = {key: state["error"].clone() for key, state in simulated._states.items() if "error" in state}

    def broken(at):
        return {"z": at["z"] * math.nan}

    anchors = [Anchor({"z": z["z"]}, {"z": z["z"]}, {"z": z["z"]}) for _ in range(4)]
    operators = [*game.operators[:3], broken]
    steps = [masha(z, a, f, 0.1, 0.8, 2, True) for a, f in zip(anchors, operators, strict=True)]
    assert simulated.run(steps) == [None] * 4
    assert all(torch.equal(anchor.w["z"], z["z"]) for anchor in anchors)
    assert all(torch.equal(simulated._states[key]["error"], error) for key, error in before.items())


def test_workers_that_disagree_on_the_course_are_a_mistake():
    def ask(compressed):
        yield Ask({"z": torch.zeros(2)}, compressed)

    with pytest.raises(RuntimeError, match="compressed average"):
        Simulated(2, RandK(0.5)).run([ask(True), ask(False)])
    with pytest.raises(ValueError, match="2 workers, but 1"):
        Simulated(2).run([ask(True)])


# ---- the optimizer, on real ranks


def players(rank, seed=0):
    """A bilinear game as two parameters and a closure."""
    generator = torch.Generator().manual_seed(seed + 17 * rank)
    a, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 20), (20,), (20,)))
    x, y = (torch.nn.Parameter(torch.ones(4, 5, dtype=torch.float64)) for _ in range(2))

    def loss():
        u, v = x.view(-1), y.view(-1)
        return u @ (0.15 * a) @ v + b @ u + c @ v + 0.5 * (u @ u - v @ v)

    return x, y, loss, (0.15 * a, b, c)


def solution(ranks):
    a, b, c = (torch.stack(parts).mean(0) for parts in zip(*(players(rank)[3] for rank in range(ranks)), strict=True))
    eye = torch.eye(20, dtype=torch.float64)
    return torch.linalg.solve(torch.cat([torch.cat([eye, a], 1), torch.cat([-a.T, eye], 1)]), torch.cat([-b, c]))


def refresh_of(name):

    code = Quantise(8, 64, stochastic=False)
    topologies = {
        "quantise, coded refresh": AllGather(),
        "quantise by star, coded refresh": Star(down=code, memory=ErrorFeedback()),
        "quantise in segments, coded refresh": ScatterGather(memory=ErrorFeedback()),
    }
    return Exchange(code, Shift(1.0), topology=topologies[name]) if name in topologies else None


def exchange_of(name):

    return {
        "plain": lambda: Exchange(),
        "rand-k": lambda: Exchange(RandK(0.3), topology=AllGather()),
        "quantise by star": lambda: Exchange(Quantise(4, 64, "max"), topology=Star(down=Quantise(4, 64, "max"))),
        "quantise, coded refresh": lambda: Exchange(Quantise(4, 64, "max"), topology=AllGather()),
        "quantise by star, coded refresh": lambda: Exchange(
            Quantise(4, 64, "max"), topology=Star(down=Quantise(4, 64, "max"))
        ),
        "quantise in segments, coded refresh": lambda: Exchange(Quantise(4, 64, "max"), topology=ScatterGather()),
        "top-k": lambda: Exchange(
            TopK(0.3, "exact"), ErrorFeedback(), topology=Star(down=TopK(0.3, "exact"), memory=ErrorFeedback())
        ),
        "top-k in segments": lambda: Exchange(
            TopK(0.3, "exact"), ErrorFeedback(), topology=ScatterGather(memory=ErrorFeedback())
        ),
    }[name]()


def train(name, mode, steps, inner="sgd", stop=None, lr=0.1):
    """The point after `steps` steps; with `stop`, through a checkpoint after that many."""
    rank = torch.distributed.get_rank()
    x, y, loss, _ = players(rank)
    optimizer = MASHA(
        [x], [("y", y)], exchange_of(name), lr=lr, tau=0.7, mode=mode, inner=inner, refresh=refresh_of(name)
    )
    for number in range(steps):
        if number == stop:
            state = optimizer.state_dict()
            optimizer.close()
            optimizer = MASHA(
                [x], [("y", y)], exchange_of(name), lr=lr, tau=0.7, mode=mode, inner=inner, refresh=refresh_of(name)
            )
            optimizer.load_state_dict(state)
        value = optimizer.step(loss)
    refreshes = optimizer.refreshes
    optimizer.close()
    return torch.cat([x.detach().view(-1), y.detach().view(-1)]), float(value), refreshes


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        slow("plain", 1),
        slow("rand-k", 1),
        ("quantise, coded refresh", 1),
        ("quantise by star", 1),
        ("quantise by star, coded refresh", 1),
        slow("quantise in segments, coded refresh", 1),
        slow("top-k", 2),
        ("top-k in segments", 2),
    ],
)
def test_real_ranks_reach_the_solution_bit_by_bit_alike(pool, name, mode):
    found = pool(2).run(train, name, mode, 160)
    assert all(torch.equal(found[0][0], other[0]) for other in found)
    assert float((found[0][0] - solution(2)).norm()) < 1e-3 * float(solution(2).norm())
    assert 160 * 0.3 / 2 < found[0][2] < 160 * 0.3 * 2


def test_real_ranks_do_what_simulated_workers_do(pool):
    (real, _, _), _ = pool(2).run(train, "plain", 1, 12)
    operators = []
    for rank in range(2):
        a, b, c = players(rank)[3]
        operators.append(
            lambda z, a=a, b=b, c=c: {
                "z": torch.cat([a @ z["z"][20:] + b + z["z"][:20], z["z"][20:] - a.T @ z["z"][:20] - c])
            }
        )
    game = Game(tuple(operators), torch.ones(40, dtype=torch.float64), solution(2), 1.0, 1.0, (1.0, 1.0))
    *_, z = run(game, Simulated(2, wire=torch.float64), 0.1, 0.7, 1, 12)
    torch.testing.assert_close(z["z"], real, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "mode", "inner"),
    [("top-k", 2, "sgd"), ("top-k", 2, "adam"), ("quantise by star, coded refresh", 1, "sgd")],
)
def test_resuming_gives_the_same_bits(pool, name, mode, inner):
    straight, resumed = (pool(2).run(train, name, mode, 14, inner, stop, 0.05)[0] for stop in (None, 7))
    assert torch.equal(straight[0], resumed[0])
    assert straight[2] == resumed[2]


def test_adam_inside_goes_to_the_solution_too(pool):
    near, far = (pool(2).run(train, "rand-k", 1, steps, "adam", None, 0.02)[0][0] for steps in (250, 1))
    assert float((near - solution(2)).norm()) < 0.1 * float((far - solution(2)).norm())


def rates(inner, mode):
    """What becomes of two players of which one is given no rate, or another one than the other."""
    rank = torch.distributed.get_rank()
    found = []
    for changed in (0.0, 0.02):
        x, y, loss, _ = players(rank)
        name = "rand-k" if mode == 1 else "top-k"
        optimizer = MASHA([x], [y], exchange_of(name), lr=0.1, tau=0.7, mode=mode, inner=inner)
        optimizer.param_groups[1]["lr"] = changed
        for _ in range(6):
            optimizer.step(loss)
        optimizer.close()
        found.append([float((p - 1).abs().max()) for p in (x, y)])
    return found


@pytest.mark.parametrize(("inner", "mode"), [("sgd", 1), ("adam", 1), ("sgd", 2), ("adam", 2)])
def test_each_player_moves_by_its_own_rate(pool, inner, mode):
    (frozen, slow), _ = pool(2).run(rates, inner, mode)
    assert frozen[1] == 0 < 0.05 < frozen[0]
    assert 0 < slow[1] < slow[0]


def noisy(steps):
    """The random numbers that a closure draws at the points of each step."""
    x = torch.nn.Parameter(torch.ones(4, 5))
    drawn = []

    def loss():
        drawn[-1].append(float(torch.rand(())))
        return x.square().sum()

    optimizer = MASHA([x], [], Exchange(RandK(0.3)), lr=0.1, tau=0.7, paired=True)
    for _ in range(steps):
        drawn.append([])
        optimizer.step(loss)
    optimizer.close()
    return drawn


def test_dropout_is_the_same_at_all_points_of_a_step_and_another_one_in_the_next(pool):
    for drawn in pool(2).run(noisy, 4):
        assert all(len(step) >= 2 and len(set(step)) == 1 for step in drawn)
        assert len({step[0] for step in drawn}) == 4


def train_with_a_bad_step(rank):
    x, y, loss, _ = players(rank)
    optimizer = MASHA([x], [y], exchange_of("top-k"), lr=0.1, tau=0.7, mode=2)
    optimizer.step(loss)
    before = x.detach().clone(), {key: value.clone() for key, value in optimizer.state[x].items()}
    optimizer.step((lambda: loss() * math.nan) if rank == 1 else loss)
    kept = torch.equal(before[0], x) and all(torch.equal(v, optimizer.state[x][k]) for k, v in before[1].items())
    optimizer.step(loss)
    moved, skipped = not torch.equal(before[0], x), optimizer.skipped
    optimizer.close()
    return kept, moved, skipped


def bad_step():
    return train_with_a_bad_step(torch.distributed.get_rank())


def test_a_bad_step_on_one_rank_is_left_out_on_all(pool):
    assert pool(2).run(bad_step) == [(True, True, 1)] * 2


def minibatches():
    """Least squares on minibatches with snapshots over all rows: differences on the same rows, so no noise remains at the end."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(32, 6, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(6, 2))
    targets = rows @ torch.arange(12.0).view(6, 2) + torch.randn(32, 2, generator=generator)
    optimizer = MASHA([weight], (), Exchange(Quantise(6, 64, "max")), lr=0.15, tau=0.8, paired=True)

    def loss(at=slice(None)):
        return (rows[at] @ weight - targets[at]).square().mean()

    for _ in range(400):
        at = torch.randint(32, (8,), generator=generator)
        optimizer.step(lambda at=at: loss(at), full=loss)
    gradient = torch.autograd.grad(loss(), weight)[0]
    torch.distributed.all_reduce(gradient)
    optimizer.close()
    return float(gradient.norm())


@pytest.mark.slow
def test_minibatches_with_full_snapshots_have_no_noise_floor(pool):
    assert pool(2).run(minibatches)[0] < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.0}, "tau must be in"),
        ({"tau": 0.0}, "tau must be in"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"mode": 3}, "mode must be 1"),
        ({"inner": "lion"}, "'sgd' or 'adam', got 'lion'"),
        ({"exchange": Exchange(TopK(0.1))}, "unbiased codec, got TopK"),
        ({"exchange": Exchange(RandK(0.1), ErrorFeedback())}, "without a memory"),
        ({"exchange": Exchange(RandK(0.1), ErrorFeedback()), "mode": 2}, "contraction as codec, got RandK"),
        ({"exchange": Exchange(TopK(0.1)), "mode": 2}, "needs ErrorFeedback"),
        ({"refresh": Exchange(Quantise(8))}, r"memory Shift\(1.0\)"),
        ({"refresh": Exchange(Quantise(8), Shift(1.0), topology=ScatterGather())}, "codes the way back and needs"),
        ({"refresh": Exchange(Quantise(8), Shift(1.0), topology=Star(down=Quantise(8)))}, r"Star\(..., memory=Error"),
        ({"exchange": Exchange(topology=Peer(), combine=NearestToOwn())}, "same mean, got topology Peer"),
        ({"exchange": Exchange(topology=Gossip(((0.5, 0.5), (0.5, 0.5))))}, "same mean, got topology Gossip"),
        ({"exchange": Exchange(RandK(0.1), combine=Median())}, "combine must be Mean.* got Median"),
        ({"refresh": Exchange(Quantise(8), Shift(1.0), combine=Median())}, "combine must be Mean.* got Median"),
        ({"refresh": Exchange(topology=Gossip(((0.5, 0.5), (0.5, 0.5))))}, "same mean, got topology Gossip"),
        ({"params_min": []}, "no parameters"),
        ({"params_min": [1.0]}, "tensors or"),
        ({"params_min": [torch.zeros(2)]}, "min.0 takes no gradient"),
    ],
)
def test_bad_options_are_named(change, message):
    x = torch.nn.Parameter(torch.ones(30, 30))
    options = {"params_min": [x], "params_max": [], "exchange": Exchange(RandK(0.1)), "lr": 0.1, **change}
    if options["params_min"] == []:
        options["params_max"] = []
    with pytest.raises(ValueError, match=message):
        MASHA(**options)


def test_one_parameter_cannot_play_both_sides():
    x = torch.nn.Parameter(torch.ones(30, 30))
    with pytest.raises(ValueError, match=r"min.0 and max.weight are one parameter"):
        MASHA([x], [("weight", x)], Exchange(RandK(0.1)), lr=0.1)


def test_a_closure_that_fails_leaves_the_parameters():
    x = torch.nn.Parameter(torch.ones(30, 30))
    optimizer = MASHA([x], [], Exchange(RandK(0.1)), lr=0.1)

    def fails():
        x.data.zero_()
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(fails)
    assert torch.equal(x, torch.ones(30, 30))


def test_closures_that_do_not_fit_are_named():
    x, y = (torch.nn.Parameter(torch.ones(30, 30)) for _ in range(2))
    optimizer = MASHA([x], [y], Exchange(RandK(0.1)), lr=0.1)
    assert optimizer.tau == pytest.approx(0.9, abs=0.01)  # 90 of 900 entries, and the seed
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"does not depend on max\.0"):
        optimizer.step(lambda: x.sum())
    with pytest.raises(ValueError, match=r"no gradient for min\.0"):
        optimizer.step(lambda: torch.zeros(()))
    total = (x + y).sum()
    for loss, said in ((1.0, "1.0"), (None, "None"), (x, r"shape \(30, 30\)"), ((total, total, total), "shape")):
        with pytest.raises(ValueError, match=f"a tensor of one entry, or a pair of them, got {said}"):
            optimizer.step(lambda loss=loss: loss)
    with pytest.raises(ValueError, match="all parameters must be given to the constructor"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict({"state": {}})
