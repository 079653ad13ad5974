"""The choice of an exchange: pure arithmetic, and on two processes over loopback, where no code pays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.cluster import Link
from weft.comm.automatic import Trial, auto, codec_seconds, exposed, usual, wire_seconds
from weft.comm.codec import Spec
from weft.comm.codecs.plain import Cast
from weft.comm.codecs.top_k import TopK
from weft.comm.controllers import LayerwiseBudget, Schedule, Uniform
from weft.comm.ddp import attach
from weft.comm.exchange import Exchange
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection

SPECS = [Spec("w", (1000, 1000)), Spec("b", (1000,))]


def test_what_backward_hides_does_not_count_but_for_the_last_bucket():
    trial = Trial(step=1.0, window=0.4, waited=0.1, buckets=4)
    assert exposed(0.0, 0.2, trial) == 0.05  # hidden, but for a quarter
    assert exposed(0.0, 1.0, trial) == 0.6
    assert exposed(0.3, 0.2, trial) == pytest.approx(0.35)  # no processor is idle


def test_wire_seconds_of_codes_and_of_what_goes_whole():
    link = Link(1e-3, 1e6)
    assert wire_seconds(Exchange(), SPECS, 2, link, 3) == pytest.approx(6e-3 + (4e6 + 4e3) / 1e6)
    assert wire_seconds(Exchange(Cast()), SPECS, 2, link, 1) == pytest.approx(2e-3 + (2e6 + 4e3) / 1e6)
    assert wire_seconds(usual()["low rank 4"], SPECS, 2, link, 1) == pytest.approx(4e-3 + (4 * 2000 * 4 + 4e3) / 1e6)


def test_codec_seconds_are_measured_and_scaled_to_the_model():
    one = codec_seconds(usual()["top-k 1 %"], [Spec("w", (500, 1000))], 2)
    assert one > 0
    assert codec_seconds(Exchange(TopK(0.01)), [Spec("b", (1000,))], 2) == 0.0  # nothing to code


@pytest.mark.parametrize("controller", [Uniform(0.01), Schedule([0.5], 0.01), LayerwiseBudget([0.01, 0.5], 0.01)])
def test_costs_are_those_of_the_setting_that_a_controller_begins_or_ends_with(controller, monkeypatch):
    seen, encode = set(), TopK.encode
    monkeypatch.setattr(TopK, "encode", lambda self, *args: seen.add(args[3]) or encode(self, *args))
    exchange = Exchange(TopK(0.5), ErrorFeedback(), controller=controller)
    assert codec_seconds(exchange, SPECS[:1], 2) > 0 and seen == {0.01}
    assert exchange.wire(SPECS, 2) == Exchange(TopK(0.01)).wire(SPECS, 2)
    assert codec_seconds(Exchange(TopK(0.5), controller=Uniform(None)), SPECS[:1], 2) < 1e-3


def test_a_slow_link_wants_a_code_and_a_fast_one_none():
    slow = Trial(step=4.2, window=0.1, waited=4.0, buckets=1)
    predicted = auto().predict(SPECS, 2, slow, Link(1e-4, 1e6))
    assert auto().choose(predicted) != "plain" and predicted["plain"] == 4.2
    fast = Trial(step=0.2, window=0.1, waited=0.0002, buckets=1)
    assert auto().choose(auto().predict(SPECS, 2, fast, Link(1e-6, 1e11))) == "plain"
    assert auto(margin=0.5).choose({"plain": 1.0, "x": 0.6}) == "plain"


def trained(candidates):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    handle = attach(ddp, auto(Link(1e-3, 1e6), candidates, trial=2, margin=0.0), optimizer)
    chosen = []
    for step in range(6):
        optimizer.zero_grad()
        g = torch.Generator().manual_seed(step)
        ddp(torch.randn(4, 32, generator=g)).square().mean().backward()
        optimizer.step()
        chosen.append(handle.chosen)
    handle.remove()
    found = torch.cat([p.detach().flatten() for p in ddp.parameters()])
    return chosen, found, sorted(handle.predicted), optimizer.param_groups[0]["momentum"]


def free():
    """A velocity memory under which everything still goes whole: the same training, chosen or not."""
    return {"velocity": Exchange(TopK(1.0), MomentumCorrection(0.9))}


def test_the_choice_is_made_once_on_all_ranks_and_training_goes_on(pool):
    (a, mine, names, momentum), (b, theirs, _, _) = pool(2).run(trained, free)
    assert a == b and a[:2] == ["", ""] and all(name in ("plain", "velocity") for name in a[2:])
    assert torch.equal(mine, theirs) and names == ["plain", "velocity"] and momentum == 0.9
    plain = pool(2).run(trained, dict)[0]
    torch.testing.assert_close(mine, plain[1], rtol=1e-5, atol=1e-6)  # the momentum moved along


def forced(keep):
    """The choice is made for it, and so is what its steps are compared with."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    handle = attach(ddp, auto(Link(1e-3, 1e6), free, trial=2), optimizer)
    tryout = handle._tryout
    tryout._choice = _Chooses(tryout._choice)
    for step in range(8):
        if handle.chosen == "velocity" and tryout._choice is not None:
            tryout._plain_step = 1e9 if keep else 0.0
            assert optimizer.param_groups[0]["momentum"] == 0
        optimizer.zero_grad()
        g = torch.Generator().manual_seed(step)
        ddp(torch.randn(4, 32, generator=g)).square().mean().backward()
        optimizer.step()
    found = handle.chosen, optimizer.param_groups[0]["momentum"]
    handle.remove()
    return *found, torch.cat([p.detach().flatten() for p in ddp.parameters()])


class _Chooses:
    def __init__(self, choice):
        self.link, self.trial, self.exchanges = choice.link, choice.trial, choice.exchanges

    def predict(self, specs, ranks, trial, link):
        return {"plain": 2.0, "velocity": 1.0}

    def choose(self, predicted):
        return "velocity"


def test_a_choice_that_does_not_keep_its_promise_is_taken_back(pool):
    kept, back = pool(2).run(forced, True), pool(2).run(forced, False)
    assert [rank[:2] for rank in kept] == [("velocity", 0)] * 2
    assert [rank[:2] for rank in back] == [("plain", 0.9)] * 2
    assert torch.equal(kept[0][2], kept[1][2]) and torch.equal(back[0][2], back[1][2])
    torch.testing.assert_close(kept[0][2], back[0][2], rtol=1e-5, atol=1e-6)  # the momentum went there and back


def test_bad_options():
    with pytest.raises(ValueError, match="trial"):
        auto(trial=1)
    with pytest.raises(ValueError, match="margin"):
        auto(margin=1.0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([Exchange()], "must make a dict"),
        ({"plain": Exchange()}, 'other than "plain"'),
        ({1: Exchange()}, "called by words"),
        ({"cast": Cast()}, "'cast' must be a weft.comm.Exchange"),
    ],
    ids=["a list", "plain", "a number", "a codec"],
)
def test_candidates_are_exchanges_by_name(made, said):
    with pytest.raises(ValueError, match=said):
        auto(candidates=lambda: made).exchanges()


class Broken(TopK):
    def encode(self, *args):
        raise ArithmeticError("no digits left")


def broken():
    return {"broken": Exchange(Broken(0.1))}


def not_exchanges():
    return {"cast": Cast()}


def said(candidates):
    try:
        trained(candidates)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_what_fails_while_rank_0_chooses_fails_on_every_rank(pool):
    ours, theirs = pool(2).run(said, broken)
    assert ours == ("ArithmeticError", "no digits left")
    assert theirs == ("RuntimeError", "the choice of an exchange failed on rank 0: ArithmeticError: no digits left")
    found = pool(2).run(said, not_exchanges)
    assert found[0] == found[1] and found[0][0] == "ValueError"
