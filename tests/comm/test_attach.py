"""DDP with an exchange under it, on two processes: rules R1 to R8 of the exchange, and what a user may do wrong."""

from __future__ import annotations

import hashlib
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.comm.codec import Codec
from weft.comm.codecs.low_rank import LowRank
from weft.comm.codecs.plain import Cast
from weft.comm.codecs.quantise import Quantise
from weft.comm.codecs.top_k import TopK
from weft.comm.controller import Controller
from weft.comm.controllers.uniform import Uniform
from weft.comm.ddp import attach
from weft.comm.exchange import Exchange
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection
from weft.comm.topology import AllGather, Ring, ScatterGather, Star
from weft.errors import ExchangeMismatch, PeerLost

SMALL_CAP = 0.005  # MB: several buckets for the small network


def network(depth=3, width=32):
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, 4))


def batch(step, width=32, rank=None):
    g = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if rank is None else rank))
    return torch.randn(8, width, generator=g)


def setting(exchange, cap=SMALL_CAP, momentum=0.0, depth=3, width=32, lr=0.1, dtype=torch.float32, **options):
    ddp = DistributedDataParallel(network(depth, width).to(dtype), bucket_cap_mb=cap, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=lr, momentum=momentum)
    return ddp, optimizer, None if exchange is None else attach(ddp, exchange, optimizer)


def train(ddp, optimizer, steps, start=0, width=32):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        ddp(batch(step, width).to(next(ddp.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def weights(ddp):
    return torch.cat([p.detach().flatten() for p in ddp.module.parameters()])


def digest(tensor):
    return hashlib.blake2b(tensor.numpy().tobytes()).hexdigest()  # Python's own hash differs from process to process


def momentum_correction(ratio=0.05):
    return Exchange(TopK(ratio), MomentumCorrection(momentum=0.9))


EXCHANGES = {
    "top-k": lambda: Exchange(TopK(0.05), ErrorFeedback()),
    "dgc": momentum_correction,
    "low rank": lambda: Exchange(LowRank(2), ErrorFeedback()),
    "fp16": lambda: Exchange(Cast("float16")),
    "bf16, error feedback": lambda: Exchange(Cast("bfloat16"), ErrorFeedback()),
    "quantise at owners": lambda: Exchange(
        Quantise(4), ErrorFeedback(), topology=ScatterGather(memory=ErrorFeedback())
    ),
    "star": lambda: Exchange(TopK(0.1), ErrorFeedback(), topology=Star(1, down=TopK(0.2), memory=ErrorFeedback())),
}


# ---- the identity is plain DDP


def identities(view, dtype):
    found = []
    for exchange in (
        None,
        Exchange(),
        Exchange(topology=AllGather()),
        Exchange(topology=ScatterGather()),
        Exchange(topology=Star(1)),
        Exchange(TopK(0.1), select=nothing),
        Exchange(Cast(), select=nothing),
        Exchange(TopK(0.1), controller=Uniform(None)),
    ):
        ddp, optimizer, handle = setting(exchange, momentum=0.9, gradient_as_bucket_view=view, dtype=dtype)
        train(ddp, optimizer, 3)
        if handle is not None:
            report = handle.exchange.report()
            assert report.steps == 3 and report.exposed_seconds > 0
            handle.remove()
        train(ddp, optimizer, 2, 3)  # plain again
        found.append(weights(ddp))
    return found


def nothing(spec):
    return False


def test_identity_is_bit_identical_to_plain_ddp_over_every_topology(pool):
    for view, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.float64)):
        ranks = pool(2).run(identities, view, dtype)
        for found in ranks:
            assert all(torch.equal(found[0], other) for other in found[1:])
        assert torch.equal(ranks[0][0], ranks[1][0])


# ---- R1, R2, R3, R7, R8: every exchange, many buckets, any bucketing


def same_for_any_bucketing(name):
    found = []
    for cap in (0.001, SMALL_CAP, 25):
        ddp, optimizer, handle = setting(EXCHANGES[name](), cap)
        train(ddp, optimizer, 5)
        found.append(weights(ddp))
        report = handle.exchange.report()
        handle.remove()
    return found, report.nbytes, report.ratio


@pytest.mark.parametrize("name", EXCHANGES)
def test_ranks_are_bit_identical_and_bucketing_does_not_matter(pool, name):
    (mine, nbytes, ratio), (theirs, _, _) = pool(2).run(same_for_any_bucketing, name)
    for found in (*mine, *theirs):
        assert torch.equal(found, mine[0])
    assert nbytes > 0 and ratio > 1.2


def at_cap(make, cap, steps=2):
    ddp, optimizer, handle = setting(make(), cap, depth=24, width=512, lr=0.05)
    train(ddp, optimizer, steps, width=512)
    found = weights(ddp)
    handle.remove()
    return digest(found)


def caps(name):
    return [at_cap(EXCHANGES[name], cap) for cap in (1, 5, 25, 200)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dgc", "low rank"])
def test_bucket_caps_of_1_5_25_and_200_megabytes_give_the_same_bits(pool, name):
    mine, theirs = pool(2).run(caps, name, timeout=200)
    assert len(set(mine)) == 1 and set(mine) == set(theirs)


def torchs_own(rank):
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

    ddp = DistributedDataParallel(network(24, 512), bucket_cap_mb=5)
    state = power.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, power.powerSGD_hook)
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.05), 6, width=512)
    return digest(weights(ddp))


def ours(rank):
    return at_cap(lambda: Exchange(LowRank(rank), ErrorFeedback()), 5, steps=6)


@pytest.mark.slow
def test_low_rank_with_many_buckets_where_torchs_hook_loses_its_order(pool):
    """torch 2.13's hook on gloo, 5 MB buckets: both processes abort or hang. A torch that has mended it may pass."""
    mine, theirs = pool(2).run(ours, 4, timeout=120)
    assert mine == theirs
    outcomes = pool(2).collect(torchs_own, 4, timeout=60)
    if all(outcome.finished and outcome.error is None for outcome in outcomes):
        pytest.skip("torch's powerSGD_hook got through this time; it fails in most runs")


# ---- R4: a gradient that is not finite


def poisoned(name, bad_step, value):
    ddp, optimizer, handle = setting(EXCHANGES[name]() if name else Exchange(), momentum=0.9 if name == "dgc" else 0.0)
    exchange, skipped = handle.exchange, []
    for step in range(4):
        optimizer.zero_grad()
        before, states = weights(ddp), exchange.state_dict()["states"]
        loss = ddp(batch(step)).square().mean()
        if step == bad_step and dist.get_rank() == 1:
            # the first layer: its bucket is the last, when all others are encoded and their memories have moved on
            ddp.module[0].weight.register_hook(lambda g: g * value)
        loss.backward()
        if step == bad_step:
            assert not all(bool(p.grad.isfinite().all()) for p in ddp.parameters())  # what a loss scaler looks at
        optimizer.step()
        if step == bad_step:
            assert torch.equal(before, weights(ddp))
            for key, state in exchange.state_dict()["states"].items():
                for entry, kept in states.get(key, state).items():
                    assert torch.equal(kept, state[entry]) if isinstance(kept, torch.Tensor) else True
            if dist.get_rank() == 1:
                ddp.module[0].weight._backward_hooks.clear()
        skipped.append(exchange.skipped)
    found = weights(ddp)
    handle.remove()
    return found, skipped


@pytest.mark.parametrize("name", ["dgc", "low rank", "star", "quantise at owners", None])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(pool, name):
    mine, theirs = pool(2).run(poisoned, name, 2, float("nan"))
    assert torch.equal(mine[0], theirs[0]) and bool(mine[0].isfinite().all())
    assert mine[1] == theirs[1] == [0, 0, 1, 1]


def scaled():
    found = []
    for scale in (1.0, 1024.0):
        ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_CAP)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        handle = attach(ddp, Exchange(TopK(0.05), ErrorFeedback()), optimizer, scaler=scaler)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(ddp(batch(step)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        error = handle.exchange.state_dict()["states"]["0.weight"]["error"]
        found.append((weights(ddp), error))
        if scale > 1:  # an overflow: the scaler sees it, takes no step and halves its scale
            optimizer.zero_grad()
            before = weights(ddp)
            (scaler.scale(ddp(batch(9)).square().mean()) * (1e38 if dist.get_rank() else 1)).mul(1e30).backward()
            scaler.step(optimizer)
            scaler.update()
            assert (
                scaler.get_scale() == scale / 2 and torch.equal(before, weights(ddp)) and handle.exchange.skipped == 1
            )
        handle.remove()
    return found


def test_a_loss_scaler_does_not_reach_the_memory(pool):
    for plain, with_scale in pool(2).run(scaled):
        assert torch.equal(plain[0], with_scale[0]) and torch.equal(plain[1], with_scale[1])  # a power of two is exact


# ---- R5: accumulation


def accumulated():
    found = []
    for parts in (1, 2):
        ddp, optimizer, handle = setting(EXCHANGES["dgc"](), momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            pieces = batch(step).chunk(parts)
            for number, piece in enumerate(pieces):
                if number < parts - 1:
                    with ddp.no_sync():
                        (ddp(piece).square().mean() / parts).backward()
                else:
                    (ddp(piece).square().mean() / parts).backward()
            optimizer.step()
        assert handle.step == 3
        found.append(weights(ddp))
        handle.remove()
    return found


def test_memory_sees_one_gradient_per_synchronised_step(pool):
    for whole, parts in pool(2).run(accumulated):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


# ---- R6: clipping and momentum


def clipped(clip, scale=1.0, unscale=False, fused=False):
    ddp, optimizer, _ = setting(None, momentum=0.9)
    if fused:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    handle = attach(ddp, momentum_correction(0.5), optimizer, scaler=scaler)
    assert optimizer.param_groups[0]["momentum"] == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(ddp(batch(step)).square().mean()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
    handle.remove()
    assert optimizer.param_groups[0]["momentum"] == 0.9
    return [str(w.message) for w in caught if "velocities" in str(w.message)]


def test_clipping_a_velocity_is_warned_of_once(pool):
    for said in pool(2).run(clipped, True):
        assert len(said) == 1 and "Clip inside the memory" in said[0]
    assert pool(2).run(clipped, False) == [[], []]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_clipping_beside_a_scaler_is_told_from_its_unscaling(pool, unscale, fused):
    """`unscale_`, then clip, is how it is done; clipping what is scaled still makes the step shorter."""
    assert pool(2).run(clipped, False, 1024.0, unscale, fused) == [[], []]
    for said in pool(2).run(clipped, True, 1024.0, unscale, fused):
        assert len(said) == 1 and "Clip inside the memory" in said[0]


def momentum_moves(nesterov, decay):
    """Everything sent (ratio 1) with momentum correction is momentum SGD, with buffers handed over both ways."""
    found = []
    for exchange in (None, Exchange(TopK(1.0), MomentumCorrection(0.9, nesterov=nesterov))):
        ddp, optimizer, _ = setting(None, momentum=0.9)
        optimizer.param_groups[0].update(nesterov=nesterov, weight_decay=decay)
        train(ddp, optimizer, 2)
        handle = attach(ddp, exchange, optimizer) if exchange is not None else None
        train(ddp, optimizer, 3, 2)
        if handle is not None:
            handle.remove()
        train(ddp, optimizer, 2, 5)
        found.append(weights(ddp))
    return found


@pytest.mark.parametrize(("nesterov", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_momentum_moves_into_the_memory_and_back(pool, nesterov, decay):
    (plain, mine), (_, theirs) = pool(2).run(momentum_moves, nesterov, decay)
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


# ---- R8: dense and back


class Steps(Controller):
    """Settings by step, decided on rank 0 alone: the other ranks must be told."""

    def __init__(self, settings):
        self.settings, self.seen = settings, 0

    def observe(self, spec, mean, step):
        assert dist.get_rank() == 0
        self.seen += 1

    def decide(self, step, specs):
        assert dist.get_rank() == 0
        return dict.fromkeys(specs, self.settings[step])


def dense_and_back(kind):
    controller = Steps([0.1, 1.0, None, 0.1])
    memory = ErrorFeedback() if kind == "error feedback" else MomentumCorrection()
    ddp, optimizer, handle = setting(Exchange(TopK(), memory, controller=controller), momentum=0)
    owed = []
    for step in range(4):
        train(ddp, optimizer, 1, step)
        state = handle.exchange.state_dict()["states"]["2.weight"]
        owed.append(float(state["error" if kind == "error feedback" else "velocity"].abs().sum()))
    assert controller.seen == (16 if dist.get_rank() == 0 else 0)
    assert handle.exchange.report().tensors["2.weight"].setting == 0.1
    found = weights(ddp)
    handle.remove()
    return found, owed


@pytest.mark.parametrize("kind", ["error feedback", "momentum correction"])
def test_a_tensor_may_go_dense_for_a_while_and_its_memory_is_paid_out(pool, kind):
    (mine, owed), (theirs, _) = pool(2).run(dense_and_back, kind)
    assert torch.equal(mine, theirs)
    assert owed[0] > 0 and owed[1] == owed[2] == 0 and owed[3] > 0


# ---- checkpoints


def resumed(name):
    found = []
    for interrupted in (False, True):
        momentum = 0.9 if name == "dgc" else 0.0
        ddp, optimizer, handle = setting(EXCHANGES[name](), momentum=momentum)
        train(ddp, optimizer, 3)
        if interrupted:
            saved = handle.exchange.state_dict(), ddp.module.state_dict()
            handle.remove()
            ddp, optimizer, _ = setting(None, 25, momentum=momentum)  # another bucketing
            ddp.module.load_state_dict(saved[1])
            exchange = EXCHANGES[name]()
            exchange.load_state_dict(saved[0])
            handle = attach(ddp, exchange, optimizer)
            assert handle.step == 3
        train(ddp, optimizer, 3, 3)
        found.append(weights(ddp))
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["dgc", "low rank", "star", "quantise at owners"])
def test_resuming_gives_the_same_bits(pool, name):
    for whole, interrupted in pool(2).run(resumed, name):
        assert torch.equal(whole, interrupted)


def wrong_checkpoints():
    said = []
    ddp, optimizer, handle = setting(EXCHANGES["top-k"]())
    train(ddp, optimizer, 1)
    saved = handle.exchange.state_dict()
    handle.remove()
    for exchange, state, options in (
        (Exchange(TopK(0.01), ErrorFeedback()), saved, {}),
        (EXCHANGES["top-k"](), saved, {"depth": 2}),
        (EXCHANGES["top-k"](), {**saved, "rank": 1 - saved["rank"]}, {}),
        (EXCHANGES["top-k"](), {**saved, "ranks": 3}, {}),
    ):
        exchange.load_state_dict(state)
        with pytest.raises(ExchangeMismatch) as caught:
            setting(exchange, **options)
        said.append(str(caught.value))
        exchange.close()
    with pytest.raises(ExchangeMismatch, match="format"):
        Exchange().load_state_dict({"format": 99})
    return said


def test_a_checkpoint_of_another_exchange_is_refused(pool):
    for said in pool(2).run(wrong_checkpoints):
        for sentence, word in zip(
            said, ("options", "0.weight|2.weight|4.weight|6.weight", "ranks", "numbers of ranks"), strict=True
        ):
            assert any(w in sentence for w in word.split("|")), sentence


# ---- ranks that disagree or die


def disagree(what):
    rank = dist.get_rank()
    with pytest.raises(ExchangeMismatch) as caught:
        if what == "ratio":
            setting(Exchange(TopK(0.1 if rank else 0.2), ErrorFeedback()))
        elif what == "memory":
            setting(Exchange(TopK(0.1), ErrorFeedback() if rank else None))
        else:
            setting(Exchange(TopK(0.1), ErrorFeedback(), topology=AllGather() if rank else Star()))
    return str(caught.value)


@pytest.mark.parametrize("what", ["ratio", "memory", "topology"])
def test_ranks_with_other_options_are_named_on_every_rank(pool, what):
    for rank, said in enumerate(pool(2).run(disagree, what)):
        assert f"rank {rank}" in said and f"rank {1 - rank}" in said


def dies(name):
    exchange = EXCHANGES[name]() if name else Exchange()
    exchange.timeout = 8.0
    ddp, optimizer, _handle = setting(exchange)
    train(ddp, optimizer, 2)  # DDP rebuilds its buckets at the second, with a collective of its own
    if dist.get_rank() == 1:
        os._exit(3)
    began = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        train(ddp, optimizer, 2, 2)
    assert time.monotonic() - began < 15
    with pytest.raises(PeerLost):  # and stays failed
        exchange.reduce({"w": torch.ones(4)}, 9).wait()
    return str(caught.value)


@pytest.mark.parametrize("name", ["low rank", None])
def test_a_rank_that_dies_is_a_named_error_on_the_others(pool, name):
    survivor = pool(2).collect(dies, name, timeout=60)[0]
    assert survivor.finished and survivor.error is None, survivor.trace
    assert "lost another rank" in survivor.value


class Broken(Codec):
    """Fails on rank 1 at step 1."""

    def default(self, spec):
        return 0

    def message(self, spec, setting):
        return (((spec.numel,), torch.float32),)

    def encode(self, x, spec, state, setting, step):
        if step == 1 and dist.get_rank() == 1:
            raise ZeroDivisionError("a bug of the codec")
        return (x,)

    def decode(self, message, spec, setting):
        return message[0]


def breaks():
    ddp, optimizer, _ = setting(Exchange(Broken(), timeout=20.0))
    train(ddp, optimizer, 1)
    with pytest.raises(ZeroDivisionError if dist.get_rank() == 1 else PeerLost):
        train(ddp, optimizer, 1, 1)
    return True


def test_an_error_of_a_codec_on_one_rank_ends_the_exchange_on_all(pool):
    outcomes = pool(2).collect(breaks)
    assert [outcome.value for outcome in outcomes] == [True, True], [outcome.trace for outcome in outcomes]


# ---- what a user may do wrong


def mistakes():
    def fails(error, match, *args, exchange=None, model=None, optimizer=None, **options):
        ddp = DistributedDataParallel(model if model is not None else network())
        with pytest.raises(error, match=match):
            attach(ddp, exchange, optimizer(ddp) if optimizer is not None else None)

    def sgd(**options):
        return lambda ddp: torch.optim.SGD(ddp.parameters(), lr=0.1, **options)

    fails(
        TypeError,
        "sparse=False",
        exchange=Exchange(),
        model=nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 1)),
    )
    fails(ValueError, "optimizer must be given", exchange=momentum_correction())
    fails(ValueError, "SGD", exchange=momentum_correction(), optimizer=lambda ddp: torch.optim.Adam(ddp.parameters()))
    fails(ValueError, "momentum must be in one place", exchange=momentum_correction(), optimizer=sgd(momentum=0.5))
    fails(ValueError, "nesterov", exchange=momentum_correction(), optimizer=sgd(momentum=0.9, nesterov=True))
    fails(ValueError, "dampening", exchange=momentum_correction(), optimizer=sgd(momentum=0.9, dampening=0.1))
    ddp, optimizer, handle = setting(momentum_correction(), momentum=0.9)
    with pytest.raises(ValueError, match="already has an exchange"):
        attach(ddp, Exchange())
    train(ddp, optimizer, 1)
    optimizer.param_groups[0]["momentum"] = 0.8  # a scheduler that cycles momentum
    with pytest.raises(ValueError, match="momentum must be 0"):
        train(ddp, optimizer, 1, 1)
    handle.remove()
    handle.remove()  # nothing more to do
    train(ddp, optimizer, 1, 1)
    again = attach(ddp, Exchange(Cast()))
    train(ddp, optimizer, 1, 2)
    again.remove()
    with pytest.raises(TypeError, match="must be a DistributedDataParallel"):
        attach(network(), Exchange())
    return True


def test_mistakes_are_named(pool):
    assert pool(2).run(mistakes) == [True, True]


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="adds messages on the wire"):
        Exchange(TopK(0.1), topology=Ring())
    with pytest.raises(ValueError, match="timeout"):
        Exchange(timeout=0)
    with pytest.raises(ValueError, match="topology must be"):
        Exchange(topology="ring of fire")
