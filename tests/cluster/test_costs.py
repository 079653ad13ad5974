"""Costs of collectives: closed formulas, messages run one by one, and properties that hold on any cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.cluster import Cluster, Device, Level, Link, Rate, costs
from weft.cluster.costs import Curve

COLLECTIVES = {
    "all_reduce": costs.all_reduce,
    "all_gather": costs.all_gather,
    "reduce_scatter": costs.reduce_scatter,
    "all_to_all": costs.all_to_all,
    "broadcast": costs.broadcast,
}


def devices(count: int) -> tuple[Device, ...]:
    return tuple(Device(f"d{i}", "toy", 1, {"default": Rate({"float32": 1e9}, 1e9)}) for i in range(count))


def flat(count: int, link: Link) -> Cluster:
    """All devices in one group."""
    return Cluster(devices(count), (Level("all", (tuple(range(count)),), (link,)),))


def two_levels(hosts: int, each: int, inner: Link, outer: Link) -> Cluster:
    groups = tuple(tuple(range(h * each, (h + 1) * each)) for h in range(hosts))
    everyone = Level("network", (tuple(range(hosts * each)),), (outer,))
    return Cluster(devices(hosts * each), (Level("host", groups, (inner,) * hosts), everyone))


links = st.builds(Link, st.floats(0, 1e-3), st.floats(1e6, 1e11))


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """1 to 9 devices, groups of unlike sizes with unlike links, some pairs with a link of their own."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = sum(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))
    shared = st.builds(Link, st.floats(0, 1e-3), st.floats(1e6, 1e11), st.booleans())
    inner = Level("inner", groups, tuple(draw(links) for _ in groups))
    pairs = {}
    if count > 1 and draw(st.booleans()):
        i, j = draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
        pairs[i, j] = draw(links)
    return Cluster(devices(count), (inner, Level("outer", (tuple(range(count)),), (draw(shared),))), pairs)


# -- closed formulas ---------------------------------------------------------------------------------------------------


@given(st.integers(2, 16), st.floats(0, 1e-2), st.floats(1e6, 1e12), st.floats(0, 1e10))
def test_ring_formulas_on_equal_links(p, latency, bandwidth, nbytes):
    cluster = flat(p, Link(latency, bandwidth))
    step = latency + nbytes / p / bandwidth
    for collective, steps in (("all_reduce", 2 * (p - 1)), ("all_gather", p - 1), ("reduce_scatter", p - 1)):
        got = COLLECTIVES[collective](cluster, range(p), nbytes, algorithm="ring")
        assert got == pytest.approx(steps * step, rel=1e-9)
    pairwise = (p - 1) * (latency + nbytes / p**2 / bandwidth)
    assert costs.all_to_all(cluster, range(p), nbytes) == pytest.approx(pairwise, rel=1e-9)


@given(st.integers(2, 16), st.floats(0, 1e-2), st.floats(1e6, 1e12), st.floats(0, 1e10))
def test_tree_formulas_on_equal_links(p, latency, bandwidth, nbytes):
    cluster, rounds = flat(p, Link(latency, bandwidth)), math.ceil(math.log2(p))
    whole = rounds * (latency + nbytes / bandwidth)
    assert costs.broadcast(cluster, range(p), nbytes, algorithm="tree") == pytest.approx(whole, rel=1e-9)
    halving = 2 * (rounds * latency + (p - 1) / p * nbytes / bandwidth)
    got = costs.all_reduce(cluster, range(p), nbytes, algorithm="tree")
    assert got == pytest.approx(min(2 * whole, halving), rel=1e-9)
    got = costs.all_gather(cluster, range(p), nbytes, algorithm="tree")
    assert got == pytest.approx(halving / 2, rel=1e-9)


def test_hierarchical_all_reduce_formula():
    inner, outer = Link(1e-6, 100e9), Link(1e-5, 10e9, shared=True)
    cluster, n = two_levels(4, 8, inner, outer), 1e9
    inside = 2 * 7 * (1e-6 + n / 8 / 100e9)  # reduce-scatter and all-gather in each host
    across = 2 * 3 * (1e-5 + n / 8 / 4 / (10e9 / 8))  # eight rings side by side over one shared port
    got = costs.all_reduce(cluster, range(32), n, algorithm="hierarchical")
    # inside and across may each use the ring; the tree across (2 rounds) is no worse in bytes
    assert got <= inside + across + 1e-12
    assert got == pytest.approx(inside + across, rel=1e-3)
    assert costs.all_reduce(cluster, range(32), n) <= costs.all_reduce(cluster, range(32), n, algorithm="ring")


def test_small_messages_prefer_trees_and_large_ones_rings():
    cluster = two_levels(3, 3, Link(1e-6, 1e10), Link(1e-5, 1e9))
    for collective in ("all_reduce", "all_gather", "broadcast"):
        cost = COLLECTIVES[collective]
        assert cost(cluster, range(9), 1) < cost(cluster, range(9), 1, algorithm="ring")
    assert costs.broadcast(cluster, range(9), 1e9) < costs.broadcast(cluster, range(9), 1e9, algorithm="tree")


# -- messages one by one -----------------------------------------------------------------------------------------------


class Messages:
    """Event by event: a message starts when those it waits for have arrived and its port is free, and holds the port."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.free: dict[object, float] = {}
        self.end = 0.0

    def send(self, src: int, dst: int, nbytes: float, after: float = 0.0, port: object = None) -> float:
        """Arrival time. `port`: what is busy meanwhile, by default the link from src to dst."""
        port = (src, dst) if port is None else port
        start = max(after, self.free.get(port, 0.0))
        arrival = start + self.cluster.link(src, dst).seconds(nbytes)
        self.free[port] = arrival
        self.end = max(self.end, arrival)
        return arrival


def simulated_ring_all_gather(cluster: Cluster, order: Sequence[int], pieces: Sequence[float]) -> float:
    p, run = len(order), Messages(cluster)
    arrived = [0.0] * p  # when the piece that rank i passes on next is there
    for step in range(p - 1):
        arrived = [run.send(order[i - 1], order[i], pieces[(i - 1 - step) % p], arrived[i - 1]) for i in range(p)]
    return run.end


@given(st.integers(2, 7), st.data(), st.floats(0, 1e9))
def test_ring_is_exact_for_equal_pieces_on_unlike_links(p, data, nbytes):
    pairs = {(i, (i + 1) % p): data.draw(links) for i in range(p)}
    cluster = Cluster(devices(p), (Level("all", (tuple(range(p)),), (Link(0, 1e12),)),), pairs)
    got = costs.all_gather(cluster, range(p), nbytes, algorithm="ring")
    assert got == pytest.approx(simulated_ring_all_gather(cluster, range(p), [nbytes / p] * p), rel=1e-9)


@given(st.integers(2, 7), st.data(), st.floats(1, 1e9))
def test_ring_of_uneven_pieces(p, data, nbytes):
    shares = data.draw(st.lists(st.floats(0.01, 10), min_size=p, max_size=p))
    pieces = [nbytes * share / sum(shares) for share in shares]
    equal = flat(p, data.draw(links))
    got = costs.all_gather(equal, range(p), nbytes, shares, algorithm="ring")
    assert got == pytest.approx(simulated_ring_all_gather(equal, range(p), pieces), rel=1e-9)  # exact on equal links
    pairs = {(i, (i + 1) % p): data.draw(links) for i in range(p)}
    unlike = Cluster(devices(p), equal.levels, pairs)
    got = costs.all_gather(unlike, range(p), nbytes, shares, algorithm="ring")
    assert got >= simulated_ring_all_gather(unlike, range(p), pieces) * (1 - 1e-9)  # a bound on unlike ones


@given(st.integers(2, 9), links, st.floats(0, 1e9))
def test_tree_broadcast_as_messages(p, link, nbytes):
    cluster, have = flat(p, link), {0: 0.0}
    run = Messages(cluster)
    for distance in (2**r for r in reversed(range(math.ceil(math.log2(p))))):
        for i in range(0, p - distance, 2 * distance):
            have[i + distance] = run.send(i, i + distance, nbytes, have[i], port=i)
    assert len(have) == p
    assert costs.broadcast(cluster, range(p), nbytes, algorithm="tree") == pytest.approx(run.end, rel=1e-9)


@given(st.integers(2, 7), st.data(), st.floats(0, 1e9))
def test_all_to_all_as_messages(p, data, nbytes):
    pairs = {(i, j): data.draw(links) for i in range(p) for j in range(p) if i != j}
    shares = data.draw(st.lists(st.floats(0.01, 10), min_size=p, max_size=p))
    cluster = Cluster(devices(p), (Level("all", (tuple(range(p)),), (Link(0, 1e12),)),), pairs)
    run, total = Messages(cluster), sum(shares)
    for shift in range(1, p):
        for i in range(p):
            j = (i + shift) % p
            run.send(i, j, nbytes * shares[i] * shares[j] / total**2, port=i)
    assert costs.all_to_all(cluster, range(p), nbytes, shares) == pytest.approx(run.end, rel=1e-9)


@given(st.integers(2, 4), st.integers(2, 4), st.floats(1e6, 1e9))
def test_shared_port_carries_everything_that_leaves_a_host(hosts, each, nbytes):
    outer = Link(0.0, 1e9, shared=True)
    cluster, p = two_levels(hosts, each, Link(0.0, 1e13), outer), hosts * each
    run = Messages(cluster)
    for i in range(p):
        for j in range(p):
            if i // each != j // each:
                run.send(i, j, nbytes / p**2, port=i // each)
    assert costs.all_to_all(cluster, range(p), nbytes) == pytest.approx(run.end, rel=1e-3)
    # the hierarchical all-reduce: `each` rings at once over one port, and the inside costs nothing here
    ports = Messages(cluster)
    arrived = dict.fromkeys(range(p), 0.0)
    for _ in range(2 * (hosts - 1)):
        arrived = {
            (i + each) % p: ports.send(i, (i + each) % p, nbytes / each / hosts, arrived[i], port=i // each)
            for i in range(p)
        }
    got = costs.all_reduce(cluster, range(p), nbytes, algorithm="hierarchical")
    assert got == pytest.approx(ports.end, rel=1e-2)


# -- properties of any cluster -----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(clusters(), st.sampled_from(sorted(COLLECTIVES)), st.floats(0, 1e9), st.floats(1, 4), st.randoms())
def test_properties(cluster, collective, nbytes, factor, random):
    cost, ranks = COLLECTIVES[collective], list(range(len(cluster)))
    seconds = cost(cluster, ranks, nbytes)
    assert 0 <= seconds < math.inf
    assert cost(cluster, ranks, nbytes * factor) >= seconds  # more bytes
    assert cost(cluster, ranks, nbytes, concurrent=3) >= seconds  # more company
    shuffled = random.sample(ranks, len(ranks))
    assert cost(cluster, shuffled, nbytes) == pytest.approx(seconds, rel=1e-9)  # an order of ranks is only a name
    for algorithm in costs.ALGORITHMS:
        assert seconds <= cost(cluster, ranks, nbytes, algorithm=algorithm) * (1 + 1e-9)
    if len(ranks) == 1:
        assert seconds == 0


@settings(max_examples=60)
@given(clusters(), st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]), st.floats(1, 1e9))
def test_no_algorithm_beats_the_bytes_each_device_must_send(cluster, collective, nbytes):
    p = len(cluster)
    ranks = range(p)
    best = [max(cluster.link(i, j).bandwidth for j in ranks if j != i) for i in ranks] if p > 1 else [math.inf]
    factor = (2 if collective == "all_reduce" else 1) * (p - 1) / p
    # in sum over devices: every device sends at its fastest link's speed at best
    assert COLLECTIVES[collective](cluster, ranks, nbytes) >= factor * nbytes / max(best) * (1 - 1e-9)


@given(clusters(), st.floats(0, 1e9))
def test_equal_shares_are_the_default(cluster, nbytes):
    ranks, equal = range(len(cluster)), [1.0] * len(cluster)
    for cost in (costs.all_gather, costs.reduce_scatter):
        for algorithm in ("ring", "tree"):
            assert cost(cluster, ranks, nbytes, equal, algorithm=algorithm) == pytest.approx(
                cost(cluster, ranks, nbytes, algorithm=algorithm), rel=1e-9
            )


def test_uneven_shares_cost_as_the_largest():
    cluster = flat(2, Link(0.0, 1e9))
    assert costs.all_gather(cluster, (0, 1), 4e9, (3, 1), algorithm="ring") == pytest.approx(3.0)
    assert costs.send(cluster, 0, 1, 1e9) == 1.0
    assert costs.send(cluster, 1, 1, 1e9) == 0.0


lines = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=5)


@given(lines, lines, st.floats(0, 100))
def test_curves_are_exact(first, second, n):
    def value(of):
        return max(a + b * n for a, b in of)

    one, two = Curve() | Curve(tuple(first)), Curve() | Curve(tuple(second))
    assert one(n) == pytest.approx(value(first), rel=1e-12)
    assert (one + two)(n) == pytest.approx(value(first) + value(second), rel=1e-12)
    assert (one | two)(n) == pytest.approx(max(value(first), value(second)), rel=1e-12)
    assert one.scaled(3, 0.5)(n) == pytest.approx(3 * value([(a, 0.5 * b) for a, b in first]), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ranks": (0, 1), "nbytes": -1}, "nbytes must be >= 0"),
        ({"ranks": (0, 0), "nbytes": 1}, "ranks must be at least one and differ"),
        ({"ranks": (), "nbytes": 1}, "ranks must be at least one and differ"),
        ({"ranks": (0, 7), "nbytes": 1}, r"ranks must be in 0\.\.2"),
        ({"ranks": (0, 1), "nbytes": 1, "shares": (1, 2, 3)}, "shares must be 2 numbers"),
        ({"ranks": (0, 1), "nbytes": 1, "algorithm": "rings"}, "no algorithm is called 'rings'"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        costs.all_gather(flat(3, Link(0.0, 1.0)), **arguments)
