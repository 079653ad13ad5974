"""What topologies cost, and which one is chosen."""

from __future__ import annotations

import pytest

from weft.comm.codecs.plain import Identity
from weft.comm.codecs.top_k import TopK
from weft.comm.rules.elementwise import Median
from weft.comm.rules.mean import Mean
from weft.comm.topology import AllGather, Gossip, Peer, Ring, ScatterGather, Star, choose


def simulated_ring(nbytes, n, alpha, beta):
    """2(n - 1) rounds; in each every rank sends one of n pieces."""
    return sum(alpha + nbytes / n / beta for _ in range(2 * (n - 1)))


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_costs(n):
    alpha, beta, m = 1e-4, 1e8, 4e6
    assert Ring().cost(m, n, alpha, beta) == pytest.approx(simulated_ring(m, n, alpha, beta))
    assert ScatterGather().cost(m, n, alpha, beta) == pytest.approx(simulated_ring(m, n, alpha, beta))
    assert AllGather().cost(m, n, alpha, beta) == pytest.approx(sum(alpha + m / beta for _ in range(n - 1)))
    assert Star().cost(m, n, alpha, beta) == pytest.approx(2 * alpha + 2 * (n - 1) * m / beta)
    assert Peer().wire(m, n) == (n - 1) * m


def test_an_all_gather_of_codes_loses_to_a_dense_ring_from_the_crossover_on():
    dense, coded = 26e6, 0.52e6
    n = round(AllGather.crossover(dense, coded))
    assert AllGather().wire(coded, n - 1) < Ring().wire(dense, n - 1)
    assert AllGather().wire(coded, n + 1) > Ring().wire(dense, n + 1)


def test_the_choice():
    assert choose(Identity(), Mean()) == Ring()
    assert choose(TopK(0.1), Mean()) == AllGather()
    assert choose(Identity(), Median()) == AllGather()  # a median cannot be added on the wire


def test_gossip_weights_must_keep_the_mean():
    ring = Gossip(((0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5)))
    assert ring.degree == 2 and ring.wire(10, 3) == 20
    with pytest.raises(ValueError, match="column"):
        Gossip(((0.5, 0.5), (1.0, 0.0)))
    with pytest.raises(ValueError, match="square"):
        Gossip(((1.0, 0.0),))
    with pytest.raises(ValueError, match=">= 0"):
        Gossip(((2.0, -1.0), (-1.0, 2.0)))
    with pytest.raises(ValueError, match="root"):
        Star(-1)
