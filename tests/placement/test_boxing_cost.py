"""Costs of boxings: nothing for a view, memory for what is written, a collective's formula for what moves; the slowest piece."""

from __future__ import annotations

import itertools

import pytest

from weft.cluster import Cluster, Level, Link, costs
from weft.placement.boxing_cost import LOCAL, boxing_cost
from weft.placement.boxing_steps import steps
from weft.placement.layout import Mesh, Partial, Replicate, Shard

R, P = Replicate(), Partial()
SHAPE, ITEM = (24, 48), 4
NBYTES = 24 * 48 * ITEM


def flat(p: int, latency: float = 1e-4, bandwidth: float = 1e9) -> Cluster:
    devices = Cluster.local(processes=p).devices
    return Cluster(devices, (Level("net", (tuple(range(p)),), (Link(latency, bandwidth),)),))


def test_what_moves_nothing_costs_exactly_nothing():
    mesh, cluster = Mesh((3,)), flat(3)
    for src, dst in [(R, R), (R, Shard(0)), (P, P), (R, Partial("max")), (Shard(0, unit=8), Shard(0))]:
        cost = boxing_cost((src,), (dst,), SHAPE, ITEM, mesh, cluster)
        assert (cost.seconds, cost.nbytes) == (0.0, 0), (src, dst)
    for src, dst in itertools.product((Shard(0), R, P), repeat=2):
        assert boxing_cost((src,), (dst,), SHAPE, ITEM, Mesh((1,)), flat(1)).seconds == 0.0


@pytest.mark.parametrize(("src", "dst", "passes"), [
    (R, P, 1), (Shard(0), P, 1 + 2 / 3), (Shard(1), Partial("max"), 1 + 2 / 3), (P, Partial("avg"), 2), (Partial("avg"), P, 2),
], ids=str)  # fmt: skip
def test_what_is_only_written_in_memory_costs_that(src, dst, passes):
    """Zeros in place of the value; zeros and among them the piece, read and written; the value read and written."""
    cluster = flat(3)
    cost = boxing_cost((src,), (dst,), SHAPE, ITEM, Mesh((3,)), cluster)
    assert cost.nbytes == 0
    assert cost.seconds == pytest.approx(passes * NBYTES / cluster[0].rate("elementwise").bandwidth)


@pytest.mark.parametrize(("src", "dst", "collective", "volume"), [
    (Shard(0), R, costs.all_gather, 3), (P, Shard(1), costs.reduce_scatter, 3), (P, R, costs.all_reduce, 6),
    (Shard(0), Shard(1), costs.all_to_all, 3 / 4),
], ids=lambda value: value.__name__ if callable(value) else str(value))  # fmt: skip
def test_an_even_step_costs_what_its_collective_does(src, dst, collective, volume):
    """... and what it copies and adds in memory: pieces of the first dim are received in place."""
    cluster, mesh = flat(4), Mesh((4,))
    cost = boxing_cost((src,), (dst,), SHAPE, ITEM, mesh, cluster)
    summed, copied = {
        costs.all_gather: (0.0, 0.0),
        costs.reduce_scatter: (3 * 3 / 4, 2 * 3 / 4),  # 3 sums of a quarter: two operands read, one written
        costs.all_reduce: (3 * 3 / 4, 0.0),
        costs.all_to_all: (0.0, 1.0),  # a quarter read and written, before and after
    }[collective]
    per_byte = {kind: 1 / cluster[0].rate(kind).bandwidth for kind in ("elementwise", "gather")}
    memory = NBYTES * (summed * per_byte["elementwise"] + copied * per_byte["gather"])
    assert cost.seconds == pytest.approx(collective(cluster, (0, 1, 2, 3), NBYTES) + memory)
    assert cost.nbytes == volume * NBYTES


def test_the_largest_piece_counts():
    cluster = flat(2, latency=0)
    even, uneven = (boxing_cost((Shard(0, w),), (R,), SHAPE, ITEM, Mesh((2,)), cluster) for w in (None, (3, 1)))
    assert uneven.nbytes == even.nbytes
    assert uneven.seconds == pytest.approx(1.5 * even.seconds)


def test_the_slowest_line_counts_and_axes_have_their_own_links():
    devices = Cluster.local(processes=4).devices
    inside, across = Link(1e-6, 1e11), Link(1e-5, 1e9)
    slow = Link(1e-6, 1e10)
    cluster = Cluster(
        devices, (Level("host", ((0, 1), (2, 3)), (inside, slow)), Level("net", ((0, 1, 2, 3),), (across,)))
    )
    mesh = Mesh((2, 2))
    inner = boxing_cost((R, Shard(0)), (R, R), SHAPE, ITEM, mesh, cluster)
    outer = boxing_cost((Shard(0), R), (R, R), SHAPE, ITEM, mesh, cluster)
    assert inner.seconds == pytest.approx(costs.all_gather(cluster, (2, 3), NBYTES))
    assert outer.seconds >= costs.all_gather(cluster, (0, 2), NBYTES)
    assert inner.nbytes == outer.nbytes == 2 * NBYTES


def test_a_sum_over_a_grid_is_reduced_inside_before_it_crosses():
    cluster = Cluster.homogeneous("A100-80GB", 16, hosts=2)
    cost = boxing_cost((P, P), (R, R), (1024, 1024), 4, Mesh((2, 8)), cluster)
    assert [step.kind for step in cost.steps] == ["reduce_scatter", "all_reduce", "all_gather"]
    assert cost.nbytes == 2 * 15 * 4 * 1024**2
    assert cost.seconds < 2 * costs.all_reduce(cluster, tuple(range(16)), 4 * 1024**2)


def test_costs_follow_the_steps_on_every_pair_of_a_grid():
    mesh, cluster = Mesh((2, 2), weights=((2, 1), None)), flat(4)
    kinds = (Shard(0), Shard(1), R, P)
    for src in itertools.product(kinds, kinds):
        for dst in itertools.product(kinds, kinds):
            cost = boxing_cost(src, dst, SHAPE, ITEM, mesh, cluster)
            assert cost.nbytes == ITEM * sum(step.elements for step in steps(src, dst, mesh, SHAPE))
            written = any(step.kind in LOCAL for step in cost.steps)
            assert (cost.seconds > 0) == (cost.nbytes > 0 or written)
