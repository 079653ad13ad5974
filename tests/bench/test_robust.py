"""The simulations behind `robust-aggregation`, `flag-aggregator` and `monna` compute what they say."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from weft.bench import byzfl_rules
from weft.bench.robust import LENGTH, Digits, Server, accuracy, gradients, start
from weft.bench.robust_peers import ENTRYWISE, MIXES, Peers, nearest_to_own, rules_for, trimmed
from weft.bench.robust_speed import flag_by_svd, messages
from weft.comm.attacks import LabelFlip, SignFlip, TwoFaced
from weft.comm.rules import Bulyan, Flag, Krum, Mean, Median, MultiKrum, NearestToOwn, TrimmedMean

pytest.importorskip("sklearn")


def test_gradients_are_autograds():
    g = torch.Generator().manual_seed(0)
    flat = torch.stack([start(0), start(1)])
    x, y = torch.rand(2, 3, 5, 64, generator=g), torch.randint(10, (2, 3, 5), generator=g)
    found = gradients(flat, x, y)
    assert found.shape == (2, 3, LENGTH)
    for copy in range(2):
        for worker in range(3):
            w = flat[copy].clone().requires_grad_()
            first, b1, second, b2 = w.split([64 * 64, 64, 640, 10])
            hidden = (x[copy, worker] @ first.view(64, 64) + b1).relu()
            torch.nn.functional.cross_entropy(hidden @ second.view(64, 10) + b2, y[copy, worker]).backward()
            torch.testing.assert_close(found[copy, worker], w.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.3, 5.0, math.inf])
def test_data_are_shared_out_once(alpha):
    digits = Digits.shared_out(15, alpha, 0)
    assert len(digits.y) + len(digits.test_y) == 1797
    members = torch.cat(digits.shares)
    assert len(digits.shares) == 15 and len(members.unique()) == len(digits.y) <= len(members) <= len(digits.y) + 15
    batches = digits.batches(3, 4, 0)
    assert batches.shape == (3, 15, 4)
    assert all(set(batches[:, w].flatten().tolist()) <= set(s.tolist()) for w, s in enumerate(digits.shares))


def test_training_learns_and_attackers_matter():
    server = Server(steps=20, momentum=0.5, seeds=(0,))
    (fine,) = server.run([Mean()], 0, None)
    broken, kept = server.run([Mean(), TrimmedMean(3)], 3, SignFlip())
    assert fine[0] > 0.7 and broken[0] < 0.4 and kept[0] > 0.6
    assert server.run([Mean()], 3, LabelFlip()) != [fine]
    assert float(accuracy(torch.full((1, LENGTH), torch.nan), Digits.shared_out(15, math.inf, 0))) == 0.0


def test_peer_rules_are_the_librarys():
    g = torch.Generator().manual_seed(0)
    x, got = torch.randn(1, 9, 40, generator=g), torch.ones(1, 9, 9, dtype=torch.float64)
    peers = Peers(workers=9, seeds=(0,))
    for own in range(9):
        torch.testing.assert_close(peers._combine("monna", x, got, 2)[0, own], NearestToOwn(2)(x[0], own))
    torch.testing.assert_close(peers._combine("trimmed_mean", x, got, 2)[0, 0], TrimmedMean(2)(x[0]))
    torch.testing.assert_close(trimmed(x[0], 3), TrimmedMean(3)(x[0]))
    some = got.clone()
    some[0, :, 4] = 0  # nobody but itself has heard from 4
    some[0, 4, 4], some[0, 4, 0] = 1, 0
    weights = nearest_to_own(torch.cdist(x, x).double() ** 2, some, got, 2)
    assert torch.all(weights[0, [0, 1, 2, 3, 5, 6, 7, 8], 4] == 0) and weights[0, 4, 4] > 0


@pytest.mark.parametrize("f", [0, 1, 2])
def test_server_rules_among_peers_are_the_librarys(f):
    """Every peer combines what it has got itself, which is another set for each."""
    peers, g = Peers(workers=14, seeds=(0, 1)), torch.Generator().manual_seed(f)
    x = torch.randn(2, 14, 40, generator=g)
    x[:, 13] *= 30
    got = peers._received(2, 14 - f, f, g)
    library = {"krum": Krum(f, spare=1), "multi_krum": MultiKrum(f, spare=1), "median": Median(), "bulyan": Bulyan(f)}
    for name, rule in library.items():
        found = peers._combine(name, x, got, f)
        for seed in range(2):
            for own in range(14 - f):
                expected = rule(x[seed, got[seed, own] > 0])
                torch.testing.assert_close(found[seed, own], expected, rtol=1e-5, atol=1e-6)


def test_rules_run_where_they_have_enough_vectors():
    assert set(rules_for(2)) == {*MIXES, *ENTRYWISE}
    assert set(rules_for(3)) == {*MIXES, *ENTRYWISE} - {"bulyan"}


def test_peers_receive_the_first_and_all_lies():
    peers = Peers(seeds=(0, 1))
    got = peers._received(2, 13, 2, torch.Generator().manual_seed(0))
    assert torch.all(got.sum(-1) == 13) and torch.all(got[..., 13:] == 1)
    assert torch.all(got.diagonal(dim1=1, dim2=2) == 1)


def test_every_peer_rule_runs():
    found = Peers(steps=2, beta=0.9, seeds=(0,)).run(rules_for(2), 2, TwoFaced())
    assert set(found) == {*MIXES, *ENTRYWISE}
    assert all(worst <= mean for runs in found.values() for mean, worst in runs)


def test_peers_learn_among_liars():
    found = Peers(steps=20, beta=0.5, seeds=(0,)).run(["monna", "averaging"], 2, SignFlip())
    assert found["monna"][0][0] > 0.6 and found["averaging"][0][0] < 0.3


def test_the_literal_flag_is_the_librarys():
    stack = messages(9, 2, 500, 0).double()
    torch.testing.assert_close(flag_by_svd(stack, 5), Flag()(stack), rtol=1e-7, atol=1e-9)


def test_a_missing_baseline_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "byzfl", raising=False)
    monkeypatch.setattr(byzfl_rules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps byzfl==0\.0\.11"):
        byzfl_rules.load()
