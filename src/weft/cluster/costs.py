"""Seconds that messages and collectives take, over links that may be unlike.

Problem    p devices, device i reaches j over link(i, j) = (latency a, bandwidth b). How long does a collective on n bytes
           take?
Method     every algorithm here is a sequence of steps in which some devices send one message each; a step lasts as long
           as its slowest message, so that
               T(n) = sum over steps of  max over its links of (a + f n / b),     f = fraction of n in one message,
           which is convex and piecewise linear in n: a `Curve`. It is worked out once for (collective, ranks); a call
           evaluates max(a_k + b_k n), one line on equal links. Where several algorithms exist the fastest one counts.

               collective       ring                            tree (rounds of doubling distance)
               all-gather       (p-1) steps of n/p              ceil(log2 p) rounds of 1, 2, 4 .. pieces of n/p
               reduce-scatter   (p-1) steps of n/p              the same backwards
               all-reduce       both, one after the other       ditto; or reduce and broadcast, 2 ceil(log2 p) rounds of n
               broadcast        scatter by halves, then ring    ceil(log2 p) rounds of n
               all-to-all       each device sends p-1 pieces of n/p^2, one after the other

           hierarchical: all-reduce = reduce-scatter in each group, all-reduce across groups of n/k by k devices a group,
           all-gather in each group; all-gather, reduce-scatter and broadcast likewise; recursively over the levels.
           Rings visit devices group by group (`Cluster.ordered`), so the slowest link bounds the ring. A shared link (see
           `Link`) is divided among the messages that leave one group over it in the same step.
           Uneven shards (`shares`): every piece counts as large as the largest one.
Guarantee  for a ring of equal pieces T is exact also without barriers between steps (tests/cluster/test_costs.py runs the
           messages one by one); for uneven pieces on unlike links it is an upper bound.
Source     Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005;
           Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.

Everything returns seconds; `nbytes` is the size of the whole (unsharded) tensor; a single rank costs nothing. The curves
live in the cluster object, so a planner may call these functions 10^5 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, gcd, log2

from weft.cluster.device import Link
from weft.cluster.topology import Cluster

__all__ = ["ALGORITHMS", "all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter", "ring_link", "send"]

Ranks = tuple[int, ...]


def send(cluster: Cluster, src: int, dst: int, nbytes: float) -> float:
    """Seconds for one message of `nbytes` bytes from device `src` to device `dst`; 0 within a device."""
    return 0.0 if src == dst else cluster.link(src, dst).seconds(_checked(nbytes))


def all_reduce(
    cluster: Cluster, ranks: Sequence[int], nbytes: float, *, concurrent: int = 1, algorithm: str | None = None
) -> float:
    """Seconds until each of `ranks` holds the sum of their `nbytes`-byte tensors.

    Ring over p equal links: 2(p - 1) latency + 2(p - 1)/p nbytes/bandwidth.

    Args:
        cluster: where.
        ranks: the devices that take part, in any order, each once.
        nbytes: size of one device's tensor in bytes, >= 0.
        concurrent: how many such collectives of other devices run at the same time over the same shared links.
        algorithm: one of `ALGORITHMS`; by default the fastest.
    Raises:
        ValueError: negative `nbytes`, a rank twice, or an unknown algorithm.

    >>> from weft.cluster import Level, Link
    >>> four = Cluster(Cluster.local(processes=4).devices, (Level("net", ((0, 1, 2, 3),), (Link(1e-4, 1e9),)),))
    >>> round(all_reduce(four, (0, 1, 2, 3), 4_000_000, algorithm="ring"), 6)
    0.0066
    """
    return _cost(cluster, "all_reduce", ranks, nbytes, None, concurrent, algorithm)


def ring_link(
    cluster: Cluster, ranks: Sequence[int] | None = None, nbytes: float = 1 << 24, concurrent: int = 1
) -> Link:
    """The link on which a ring of some devices (None: all) costs what an all-reduce costs on the cluster, at 8 and at `nbytes`
    bytes: those of a model, not of a message. `concurrent`: as for `all_reduce`.

    >>> link = ring_link(Cluster.local(processes=2))
    >>> link.latency > 0 and link.bandwidth > 0
    True
    """
    members = tuple(ranks) if ranks is not None else tuple(range(len(cluster)))
    n = len(members)
    if n == 1:
        return Link(0.0, 1e12)
    small, large = (all_reduce(cluster, members, size, concurrent=concurrent) for size in (8, nbytes))
    return Link(small / (2 * (n - 1)), 2 * (n - 1) / n * (nbytes - 8) / max(large - small, 1e-12))


def all_gather(
    cluster: Cluster,
    ranks: Sequence[int],
    nbytes: float,
    shares: Sequence[float] | None = None,
    *,
    concurrent: int = 1,
    algorithm: str | None = None,
) -> float:
    """Seconds until each of `ranks` holds all pieces of a tensor of `nbytes` bytes in all.

    `shares`: relative size of each rank's piece in the order of `ranks` (uneven shards); by default equal. Else as `all_reduce`.
    """
    return _cost(cluster, "all_gather", ranks, nbytes, shares, concurrent, algorithm)


def reduce_scatter(
    cluster: Cluster,
    ranks: Sequence[int],
    nbytes: float,
    shares: Sequence[float] | None = None,
    *,
    concurrent: int = 1,
    algorithm: str | None = None,
) -> float:
    """Seconds until each of `ranks` holds its piece of the sum of their `nbytes`-byte tensors. Arguments as `all_gather`."""
    return _cost(cluster, "reduce_scatter", ranks, nbytes, shares, concurrent, algorithm)


def all_to_all(
    cluster: Cluster,
    ranks: Sequence[int],
    nbytes: float,
    shares: Sequence[float] | None = None,
    *,
    concurrent: int = 1,
    algorithm: str | None = None,
) -> float:
    """Seconds until a tensor of `nbytes` bytes in all, cut along one dim over `ranks`, is cut along another.

    Each of p devices holds n/p bytes and sends n/p^2 to each other one: (p - 1)(latency + n/p^2/bandwidth) on equal links.
    `shares` counts for both cuts.
    """
    return _cost(cluster, "all_to_all", ranks, nbytes, shares, concurrent, algorithm)


def broadcast(
    cluster: Cluster, ranks: Sequence[int], nbytes: float, *, concurrent: int = 1, algorithm: str | None = None
) -> float:
    """Seconds until `nbytes` bytes of one of `ranks` are on all of them (whichever one: the mean root counts)."""
    return _cost(cluster, "broadcast", ranks, nbytes, None, concurrent, algorithm)


def _cost(
    cluster: Cluster,
    collective: str,
    ranks: Sequence[int],
    nbytes: float,
    shares: Sequence[float] | None,
    concurrent: int,
    algorithm: str | None,
) -> float:
    key = (
        collective,
        ranks if type(ranks) is tuple else tuple(ranks),
        None if shares is None else tuple(shares),
        concurrent,
        algorithm,
    )
    curves = cluster._curves.get(key)  # type: ignore[attr-defined]
    if curves is None:
        curves = cluster._curves[key] = _curves(cluster, *key)  # type: ignore[attr-defined]
    if nbytes < 0:
        _checked(nbytes)
    return min(curve(nbytes) for curve in curves) if len(curves) > 1 else curves[0](nbytes)


def _checked(nbytes: float) -> float:
    if nbytes < 0:
        raise ValueError(f"nbytes must be >= 0, got {nbytes}")
    return nbytes


# -- cost as a function of bytes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """T(n) = max over lines (a, b) of a + b n: seconds as a function of bytes, n >= 0. Closed under + and max."""

    lines: tuple[tuple[float, float], ...] = ((0.0, 0.0),)

    def __call__(self, nbytes: float) -> float:
        lines = self.lines
        if len(lines) == 1:
            return lines[0][0] + lines[0][1] * nbytes
        return max(a + b * nbytes for a, b in lines)

    def __add__(self, other: Curve) -> Curve:
        return Curve(_upper([(a + c, b + d) for a, b in self.lines for c, d in other.lines]))

    def __or__(self, other: Curve) -> Curve:
        """The slower of the two, for each n: they run side by side."""
        return Curve(_upper([*self.lines, *other.lines]))

    def scaled(self, times: float = 1.0, fraction: float = 1.0) -> Curve:
        """`times` repetitions on a `fraction` of the bytes."""
        return Curve(tuple((times * a, times * fraction * b) for a, b in self.lines))


def _upper(lines: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lines that are highest for some n >= 0, by slope: the upper envelope (monotone chain)."""
    envelope: list[tuple[float, float]] = []
    for a, b in sorted(lines, key=lambda line: (line[1], line[0])):
        while envelope:
            c, d = envelope[-1]
            if a >= c:  # steeper or as steep, and not lower at 0: the last line is nowhere higher
                envelope.pop()
            elif len(envelope) > 1 and (c - a) * (d - envelope[-2][1]) <= (envelope[-2][0] - c) * (b - d):
                envelope.pop()  # the new line overtakes before the last one has overtaken the one before
            else:
                break
        if not envelope or b > envelope[-1][1]:
            envelope.append((a, b))
    return tuple(envelope)


def _slowest(curves: Sequence[Curve]) -> Curve:
    total = curves[0]
    for curve in curves[1:]:
        total = total | curve
    return total


def _step(cluster: Cluster, messages: Sequence[tuple[int, int]], fraction: float, concurrent: int) -> Curve:
    """One step: the (source, destination) messages leave together, each with `fraction` of the bytes."""
    routes = [(src, *cluster.route(src, dst)) for src, dst in messages if src != dst]
    load: dict[tuple[int, int], int] = {}
    for src, link, level in routes:
        if link.shared:
            port = (level, cluster.port(level, src))
            load[port] = load.get(port, 0) + 1
    lines = {
        (
            link.latency,
            fraction / link.bandwidth * (load[level, cluster.port(level, src)] * concurrent if link.shared else 1),
        )
        for src, link, level in routes
    }
    return Curve(_upper(list(lines)))


# -- the algorithms ----------------------------------------------------------------------------------------------------


def _ring(cluster: Cluster, collective: str, ranks: Ranks, piece: float, concurrent: int) -> Curve:
    p = len(ranks)
    around = [(ranks[i], ranks[(i + 1) % p]) for i in range(p)]
    if collective == "broadcast":
        return _scatter(cluster, ranks, concurrent) + _ring(cluster, "all_gather", ranks, 1 / p, concurrent)
    turns = 2 * (p - 1) if collective == "all_reduce" else p - 1
    return _step(cluster, around, piece, concurrent).scaled(turns)


def _scatter(cluster: Cluster, ranks: Ranks, concurrent: int) -> Curve:
    """ranks[0] hands out n/p to each: halves of what is left, over ceil(log2 p) rounds."""
    total, blocks = Curve(), [ranks]
    while any(len(block) > 1 for block in blocks):
        cut = [(block[: (len(block) + 1) // 2], block[(len(block) + 1) // 2 :]) for block in blocks]
        largest = max(len(high) for _, high in cut) / len(ranks)
        total = total + _step(cluster, [(low[0], high[0]) for low, high in cut if high], largest, concurrent)
        blocks = [half for pair in cut for half in pair if half]
    return total


def _tree(cluster: Cluster, collective: str, ranks: Ranks, piece: float, concurrent: int) -> Curve:
    p, rounds = len(ranks), ceil(log2(len(ranks)))
    total = Curve()
    for distance in (2**r for r in range(rounds)):
        if collective in ("all_gather", "reduce_scatter"):  # everyone passes on all it has, or what is still missing
            messages = [(ranks[i], ranks[(i + distance) % p]) for i in range(p)]
            total = total + _step(cluster, messages, min(min(distance, p - distance) * piece, 1.0), concurrent)
        else:  # a binomial tree: a reduce runs these rounds in this order, a broadcast in the opposite one
            messages = [(ranks[i], ranks[i + distance]) for i in range(0, p - distance, 2 * distance)]
            total = total + _step(cluster, messages, 1.0, concurrent)
    return total.scaled(2) if collective == "all_reduce" else total


def _halving(cluster: Cluster, collective: str, ranks: Ranks, piece: float, concurrent: int) -> Curve:
    """Reduce-scatter and all-gather by doubling distances: an all-reduce for large tensors."""
    return _tree(cluster, "all_gather", ranks, piece, concurrent).scaled(2)


def _pairwise(cluster: Cluster, ranks: Ranks, shares: Sequence[float], concurrent: int) -> Curve:
    """All-to-all: each device sends its pieces one after the other; shared connections carry all that leaves their group."""
    per_device, leaving = [], {}
    for i, src in enumerate(ranks):
        total = Curve()
        for j, dst in enumerate(ranks):
            if i == j:
                continue
            link, level = cluster.route(src, dst)
            fraction = shares[i] * shares[j]
            total = total + Curve(((link.latency, fraction / link.bandwidth),))
            if link.shared:
                port = (level, cluster.port(level, src))
                latency, slope = leaving.get(port, (0.0, 0.0))
                leaving[port] = (max(latency, link.latency), slope + concurrent * fraction / link.bandwidth)
        per_device.append(total)
    return _slowest(per_device + [Curve((line,)) for line in leaving.values()])


def _hierarchical(
    cluster: Cluster, collective: str, ranks: Ranks, concurrent: int, flat: Callable[..., Curve]
) -> Curve | None:
    """Inside the groups, then across them, by the algorithm `flat`; None where the ranks form no groups.

    Each group of k_g devices acts as k = gcd of the k_g positions, so that groups of unlike sizes match: with k < k_g
    each position's piece is first brought together from k_g / k devices (or handed out to them afterwards).
    """
    groups = cluster.split(ranks)
    if len(groups) < 2 or len(groups) == len(ranks):
        return None
    k = 1 if collective == "broadcast" else gcd(*(len(group) for group in groups))

    def inside(what: str) -> Curve:
        found = []
        for group in groups:
            if len(group) == 1:
                continue
            deeper = _hierarchical(cluster, what, group, concurrent, flat)
            curve = deeper or flat(cluster, what, group, 1 / len(group), concurrent)
            together = len(group) // k
            if together > 1 and what != "broadcast":
                curve = curve + _step(cluster, [(group[1], group[0])], 1 / len(group), concurrent).scaled(together - 1)
            found.append(curve)
        return _slowest(found)

    heads = tuple(group[0] for group in groups)
    across = _hierarchical(cluster, collective, heads, concurrent * k, flat) or flat(
        cluster, collective, heads, 1 / len(heads), concurrent * k
    )
    across = across.scaled(1, 1 / k)
    if collective == "all_reduce":
        return inside("reduce_scatter") + across + inside("all_gather")
    return across + inside(collective)  # a reduce-scatter runs the other way, in the same time


ALGORITHMS = ("ring", "tree", "hierarchical")


def _curves(
    cluster: Cluster,
    collective: str,
    ranks: Ranks,
    shares: tuple[float, ...] | None,
    concurrent: int,
    algorithm: str | None,
) -> list[Curve]:
    """The curves of all algorithms for one collective on `ranks`, or of the one named `algorithm`."""
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"no algorithm is called {algorithm!r}; known are {', '.join(ALGORITHMS)}")
    if not ranks or len(set(ranks)) != len(ranks):
        raise ValueError(f"{collective}: ranks must be at least one and differ, got {ranks}")
    if any(not 0 <= rank < len(cluster) for rank in ranks):
        raise ValueError(f"{collective}: ranks must be in 0..{len(cluster) - 1}, got {ranks}")
    p = len(ranks)
    if p == 1:
        return [Curve()]
    weights = _fractions(collective, shares, p)
    if collective == "all_to_all":
        return [_pairwise(cluster, ranks, weights, concurrent)]
    order, piece = cluster.ordered(ranks), max(weights)
    found: list[Curve] = []
    if algorithm in (None, "ring"):
        found.append(_ring(cluster, collective, order, piece, concurrent))
    if algorithm in (None, "tree"):
        found.append(_tree(cluster, collective, order, piece, concurrent))
        if collective == "all_reduce":
            found.append(_halving(cluster, collective, order, piece, concurrent))
    if algorithm in (None, "hierarchical") and shares is None:
        nested = [_hierarchical(cluster, collective, order, concurrent, flat) for flat in (_ring, _tree)]
        found += [curve for curve in nested if curve is not None]
    return _useful(found or [_ring(cluster, collective, order, piece, concurrent)])


def _useful(curves: list[Curve]) -> list[Curve]:
    """Without the single lines that another single line is nowhere slower than: they are never the fastest."""
    kept: list[Curve] = []
    for curve in sorted(curves, key=lambda c: c.lines):
        a, b = curve.lines[0]
        if len(curve.lines) > 1 or not any(
            len(k.lines) == 1 and k.lines[0][0] <= a and k.lines[0][1] <= b for k in kept
        ):
            kept.append(curve)
    return kept


def _fractions(collective: str, shares: tuple[float, ...] | None, p: int) -> list[float]:
    if shares is None:
        return [1 / p] * p
    if len(shares) != p or min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(
            f"{collective}: shares must be {p} numbers >= 0, one per rank and not all 0, got {list(shares)}"
        )
    return [share / sum(shares) for share in shares]
