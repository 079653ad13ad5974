"""MoNNA among real processes: equal to averaging without faults, unmoved by liars, not held up by the late and the dead."""

from __future__ import annotations

import os
import socket
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from weft.comm.attacks import ATTACKS, TwoFaced
from weft.comm.mail import Post
from weft.comm.peer import MoNNA, attach_peer
from weft.comm.rules import NearestToOwn
from weft.comm.rules.subset import distances_to, nearest

warnings.filterwarnings("ignore", message="MoNNA: n =")


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def batch(rank, count=30):
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, 4, generator=g)
    truth = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    return x, x @ truth.T


def train(model, optimizer, steps, rank, pause=0.0):
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = batch(rank)
        (model(x) - y).square().mean().backward()
        time.sleep(pause)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def without_faults(beta, decay):
    model = line()
    peer = attach_peer(model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=decay), f=0, beta=beta)
    vector = train(model, peer.optimizer, 20, dist.get_rank())
    report = peer.report()
    assert (report.rounds, report.short, report.dropped) == (20, 0, {})
    assert report.kept == {0: 20, 1: 20, 2: 20}
    assert peer.optimizer.param_groups[0]["weight_decay"] == decay
    peer.remove()
    return vector


@pytest.mark.parametrize("beta, decay", [(0.0, 0.0), (0.9, 0.01)])
def test_without_faults_it_is_momentum_sgd_on_all_the_data(pool, beta, decay):
    vectors = pool(3).run(without_faults, beta, decay)
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])  # bit-equal
    model = line()
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(20):
        model.zero_grad()
        sum((model(x) - y).square().mean() / 3 for x, y in map(batch, range(3))).backward()
        with torch.no_grad():
            for p, m in zip(model.parameters(), momentum, strict=True):
                m.mul_(beta).add_(p.grad + decay * p, alpha=1 - beta)
                p.sub_(0.1 * m)
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(vectors[0], whole, rtol=1e-4, atol=1e-5)


def last_words():
    """Rank 1 sends more than any buffer of the system holds, and closes at once."""
    post, vector = Post(1 << 25), bytes(1 << 25)
    if dist.get_rank() == 1:
        post.send(0, vector)
        post.close()
        return True
    found = post.collect(0, 1, 20)
    post.close()
    return found == {1: vector}


def test_what_was_sent_arrives_though_its_sender_closes(pool):
    """Or the peers of whoever finishes first miss its last round."""
    assert pool(2).run(last_words) == [True, True]


def rounds_ahead(last):
    """Rank 1 sends rounds 1 to `last` before rank 0, which has had round 0, asks for round 1."""
    post, rank = Post(1), dist.get_rank()
    post.send(0, bytes([10]))
    found = [post.collect(0, 1, 20)]
    dist.barrier()  # else rank 1 may be a round more ahead
    for t in range(1, last + 1):
        if rank == 1:
            post.send(t, bytes([10 + t]))
            while post._links[0].connection.busy:
                time.sleep(0.001)
    if rank == 0:
        while post._arrivals < 1 + last:
            time.sleep(0.001)
        found += [post.collect(t, 1, 20) for t in range(1, last + 1)]
    dist.barrier()
    assert post.late == 0
    post.close()
    return found


def test_a_peer_one_round_ahead_replaces_nothing(pool):
    ahead, _ = pool(2).run(rounds_ahead, 2)
    assert ahead == [{1: bytes([10])}, {1: bytes([11])}, {1: bytes([12])}]


def test_of_a_peer_far_ahead_the_oldest_and_the_newest_are_there(pool):
    """The oldest is what is asked for next; those between are replaced."""
    ahead, _ = pool(2).run(rounds_ahead, 4)
    assert ahead == [{1: bytes([sent])} for sent in (10, 11, 14, 14, 14)]


def with_strangers():
    """Two call rank 0 before rank 1 can: one says nothing, one nonsense. They hold up nobody."""
    make, strangers = socket.create_server, []

    def create_server(*args, **options):
        listener = make(*args, **options)
        strangers.extend(socket.create_connection(listener.getsockname()) for _ in range(2))
        strangers[1].sendall(bytes(20))
        return listener

    rank, start = dist.get_rank(), time.monotonic()
    if rank == 0:
        socket.create_server = create_server
    try:
        post = Post(1, seconds=20)
    finally:
        socket.create_server = make
    took = time.monotonic() - start
    post.send(0, bytes([rank]))
    found = post.collect(0, 1, 20)
    post.close()
    for stranger in strangers:
        stranger.close()
    return took < 10, found


def test_strangers_hold_up_nobody(pool):
    assert pool(2).run(with_strangers) == [(True, {1: bytes([1])}), (True, {0: bytes([0])})]


def with_a_liar(value):
    """Rank 2 of 5 sends `value` everywhere, to everybody; or other things to each."""
    rank = dist.get_rank()
    model = line()
    peer = MoNNA(model, torch.optim.SGD(model.parameters(), 0.3), f=1, beta=0.5, timeout=20)
    if rank == 2:
        honest = torch.zeros(1, peer.post.nbytes // 4)
        for step in range(30):
            for other in (0, 1, 3, 4):
                lie = (
                    torch.full_like(honest[0], value)
                    if value != 2.0
                    else TwoFaced().messages(honest, 1, None, other)[0]
                )
                peer.post.send(step, lie.numpy().tobytes(), to=other)
            peer.post.collect(step, 4, 20)
        vector, kept = torch.zeros(15), {}
    else:
        vector = train(model, peer.optimizer, 30, rank)
        kept = peer.report().kept
    dist.barrier()
    peer.remove()
    return vector, kept


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")])
def test_a_liar_has_no_influence(pool, value):
    found = pool(5).run(with_a_liar, value)
    truth = torch.randn(3, 4, generator=torch.Generator().manual_seed(9)).flatten()
    for rank in (0, 1, 3, 4):
        vector, kept = found[rank]
        assert kept.get(2, 0) == 0 and kept[rank] == 30
        assert (vector[:12] - truth).norm() < 0.5 * truth.norm()


def late_and_dead(dies):
    """Rank 3 of 4 sends nothing after a few rounds: it sleeps, or its connections are gone."""
    rank = dist.get_rank()
    model = line()
    peer = MoNNA(model, torch.optim.SGD(model.parameters(), 0.1), f=1, beta=0.5, timeout=10)
    if rank == 3:
        train(model, peer.optimizer, 3, rank)
        if dies:
            peer.remove()
        else:
            time.sleep(1.0)
            train(model, peer.optimizer, 3, rank)  # wakes up and finds newer vectors waiting
        seconds = 0.0
    else:
        begin = time.monotonic()
        train(model, peer.optimizer, 12, rank, pause=0.02)
        seconds = time.monotonic() - begin
    report = peer.report()
    alive = len(peer.post.alive())
    dist.barrier()
    peer.remove()
    return seconds, report, alive


@pytest.mark.parametrize("dies", [True, False])
def test_nobody_waits_for_the_late_and_the_dead(pool, dies):
    found = pool(4).run(late_and_dead, dies)
    for seconds, report, alive in found[:3]:
        assert seconds < 8  # far below the 9 timeouts of 10 s that waiting would take
        assert report.rounds == 12 and report.short == 0
        assert alive == (2 if dies else 3)
    assert dies or found[3][1].rounds == 6


def half_are_gone():
    rank, model = dist.get_rank(), line()
    peer = MoNNA(model, torch.optim.SGD(model.parameters(), 0.1), f=1, beta=0.5, timeout=10)
    if rank >= 2:
        peer.remove()
    else:
        while len(peer.post.alive()) > 1:
            time.sleep(0.001)
        train(model, peer.optimizer, 3, rank)
    report = peer.report()
    dist.barrier()
    peer.remove()
    return report


def test_of_few_vectors_fewer_are_kept(pool):
    """Two of four are there, and one of them may lie: n - 2f would be both."""
    found = pool(4).run(half_are_gone)
    for rank, report in enumerate(found[:2]):
        assert report.short == 3
        assert report.kept == {rank: 3} and report.dropped == {1 - rank: 3}


def alone():
    model = line()
    peer = MoNNA(model, torch.optim.SGD(model.parameters(), 0.1), f=0, beta=0.5, timeout=0.2)
    dist.barrier()
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="heard from no peer"):
            vector = train(model, peer.optimizer, 2, 0)
        assert peer.report().alone == 2 and peer.report().short == 2 and torch.isfinite(vector).all()
    dist.barrier()
    peer.remove()


def test_a_lone_peer_goes_on_and_says_so(pool):
    pool(2).run(alone)


def unlike_models():
    model = nn.Linear(4, 3 + dist.get_rank())
    with pytest.raises(ValueError, match=r"ranks \[1\] have other parameters than rank 0: 2 tensors, 20 values"):
        MoNNA(model, torch.optim.SGD(model.parameters(), 0.1), f=0)


def test_other_shapes_are_refused_on_every_rank(pool):
    pool(2).run(unlike_models)


def odds_and_ends():
    """Buffers are averaged but do not decide; a gradient that is not finite is skipped; every second step; state comes back."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    peer = MoNNA(model, optimizer, f=0, beta=0.5, period=2)
    model[1].running_mean.fill_(rank * 1e6)
    for step in range(4):
        model(batch(rank)[0]).square().mean().backward()
        if step == 1 and rank == 1:
            model[0].weight.grad[0, 0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    report = peer.report()
    assert report.rounds == 2 and report.skipped == (rank == 1)
    assert report.moved < 1  # parameters only: the running means are 10^6 apart
    state = peer.state_dict()
    peer.remove()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # plain SGD again
    torch.testing.assert_close([p.detach() for p in model.parameters()], [b - 0.1 for b in before])
    again = MoNNA(model, optimizer, f=0, beta=0.5)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again._momentum, state["momentum"], strict=True))
    with pytest.raises(ValueError, match="other parameters"):
        again.load_state_dict({"momentum": [torch.zeros(2)], "steps": 0, "rounds": 0})
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: 0.0)
    again.remove()
    return model[1].running_mean


def test_buffers_skips_period_and_state(pool):
    first, second = pool(2).run(odds_and_ends)
    assert abs(float(first.mean()) - 0.9**4 * 0.5e6) < 10  # 10^6 and 0, averaged; each forward pass keeps 0.9 of it
    torch.testing.assert_close(first, second)


def a_step_that_raises(again):
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    peer = attach_peer(model, optimizer, f=0, beta=0.0)

    def fail(*_):
        handle.remove()
        raise RuntimeError("out of memory")

    handle = optimizer.register_step_pre_hook(fail)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    if again:
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5))
    peer.remove()
    return optimizer.param_groups[0]["weight_decay"]


@pytest.mark.parametrize("again", [True, False])
def test_weight_decay_survives_a_step_that_raises(pool, again):
    assert pool(2).run(a_step_that_raises, again) == [0.5, 0.5]


def turned(maximize):
    """Up the negative loss is down the loss, decay included; what is frozen stays, decay or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1, maximize=maximize)
    peer = attach_peer(model, optimizer, f=0, beta=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        (-loss if maximize else loss).backward()
        optimizer.step()
    peer.remove()
    assert torch.equal(model[0].weight, before)
    return model[1].weight.detach()


def test_frozen_parameters_and_maximisation(pool):
    up, down = pool(2).run(turned, True), pool(2).run(turned, False)
    torch.testing.assert_close(up[0], down[0])


def refusals():
    model = line()
    plain = torch.optim.SGD(model.parameters(), 0.1)
    wrong = {
        "f must be": {"f": -1},
        "more than 2f": {"f": 1},
        "beta must": {"f": 0, "beta": 1.0},
        "period must": {"f": 0, "period": 0},
        "keep must": {"f": 0, "keep": 0},
        "timeout must": {"f": 0, "timeout": 0},
        "clip must": {"f": 0, "clip": 0.0},
    }
    for said, options in wrong.items():
        with pytest.raises(ValueError, match=said):
            attach_peer(model, plain, **options)
    with pytest.raises(ValueError, match="momentum"):
        attach_peer(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), f=0)
    with pytest.raises(ValueError, match="betas"):
        attach_peer(model, torch.optim.Adam(model.parameters()), f=0)
    ddp = nn.parallel.DistributedDataParallel(line())
    with pytest.raises(ValueError, match=r"model\.module"):
        attach_peer(ddp, plain, f=0)


def test_what_cannot_be_is_refused(pool):
    pool(2).run(refusals)


def warned():
    model = line()
    with pytest.warns(UserWarning, match="about 11 f = 11"):
        MoNNA(model, torch.optim.SGD(model.parameters(), 0.1), f=1).remove()


def test_few_peers_are_warned(pool):
    pool(3).run(warned)


def killed():
    rank = dist.get_rank()
    model = line()
    peer = MoNNA(model, torch.optim.SGD(model.parameters(), 0.1), f=1, timeout=10)
    train(model, peer.optimizer, 2, rank)
    if rank == 2:
        os._exit(1)  # a process that dies
    train(model, peer.optimizer, 5, rank)
    report = peer.report()
    peer.remove()
    return report.rounds, report.short


def test_a_process_that_dies_is_survived(pool):
    outcomes = pool(3).collect(killed)
    assert [outcome.value for outcome in outcomes[:2]] == [(7, 0), (7, 0)]


# ---- the rule itself, in one process


def test_nearest_set_by_brute_force():
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        one_nearest_set(g)


def one_nearest_set(g):
    n, f = int(torch.randint(3, 16, (1,), generator=g)), int(torch.randint(0, 3, (1,), generator=g))
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    own = int(torch.randint(n, (1,), generator=g))
    keep = max(n - f, 1)
    away = [float((row - x[own]).norm()) for row in x]
    expected = sorted(sorted(range(n), key=lambda i: (i != own, away[i], i))[:keep])
    assert sorted(nearest(distances_to(x[own], x), own, keep)) == expected
    torch.testing.assert_close(NearestToOwn(f)(x, own), x[expected].mean(0))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_spread_shrinks_under_attack(name):
    """(alpha, lambda)-reduction: a round leaves alpha < 1 of the honest peers' variance, whatever the attackers send."""
    g = torch.Generator().manual_seed(1)
    count, f = 15, 2
    worst = 0.0
    for _ in range(6):
        honest = torch.randn(count - f, 50, generator=g, dtype=torch.float64)
        after = []
        for receiver in range(count - f):
            lies = ATTACKS[name]().messages(honest, f, g, receiver)
            others = [i for i in torch.randperm(count - f, generator=g).tolist() if i != receiver][: count - 2 * f - 1]
            stack = torch.cat([honest[[receiver, *others]], lies])  # own + the first n - f - 1, all liars among them
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                after.append(NearestToOwn(f)(stack, 0))
        after = torch.stack(after)
        before = (honest - honest.mean(0)).square().sum(1).mean()
        worst = max(worst, float((after - after.mean(0)).square().sum(1).mean() / before))
    assert worst < 1.0


def test_the_own_vector_is_kept_also_among_copies_of_it():
    x = torch.ones(6, 3)
    assert nearest(distances_to(x[4], x), 4, 2) == [4, 0]
    x[4] = torch.nan
    assert nearest(distances_to(x[4], x), 4, 3) == [4]
    with pytest.raises(ValueError, match="own message is not finite"):
        NearestToOwn(1)(x, 4)


def test_f_too_small_by_one_shows():
    x = torch.randn(9, 5)
    x[7:] = 1e6
    assert NearestToOwn(2)(x, 0).abs().max() < 10
    assert NearestToOwn(1)(x, 0).abs().max() > 1e3
