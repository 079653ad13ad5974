"""Each rule equals its literal textbook form in float64, and ByzFL's where that can be imported."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from weft.comm.rules import (
    MDA,
    NNM,
    Bucketing,
    Bulyan,
    CenteredClip,
    GeometricMedian,
    Krum,
    Meamed,
    Median,
    MultiKrum,
    NearestToOwn,
    NormEqualisedMean,
    TrimmedMean,
)
from weft.comm.rules.sorting import comparators, mean_near_median, median, sorted_rows, trimmed_mean

SIZES = [(5, 1), (7, 1), (11, 2), (15, 3), (16, 3), (23, 5)]
SEEDS = range(3)


def cloud(seed, count, length=13):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, 1, generator=generator, dtype=torch.float64) + 0.5
    return spread * torch.randn(count, length, generator=generator, dtype=torch.float64) + 1


def apart(x):
    return np.array([[np.sum((a - b) ** 2) for b in x] for a in x])


def krum_order(x, count):
    """Rows by the literal score: the sum of squared distances to the `count` nearest others."""
    square = apart(x)
    score = [np.sort(np.delete(square[i], i))[:count].sum() for i in range(len(x))]
    return np.argsort(score, kind="stable")


@pytest.fixture(scope="module")
def byzfl():
    from weft.bench.byzfl_rules import load

    try:
        return load()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("count, f", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_krum(count, f, seed):
    x = cloud(seed, count)
    if count >= 2 * f + 3:
        order = krum_order(x.numpy(), count - f - 2)
        torch.testing.assert_close(Krum(f)(x), x[order[0]])
        torch.testing.assert_close(MultiKrum(f)(x), x[order[: count - f].copy()].mean(0))
        torch.testing.assert_close(MultiKrum(f, m=2)(x), x[order[:2].copy()].mean(0))
    order = krum_order(x.numpy(), count - f - 1)
    torch.testing.assert_close(Krum(f, spare=1)(x), x[order[0]])


@pytest.mark.parametrize("count, f", [(7, 1), (11, 2), (15, 3), (23, 5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_bulyan(count, f, seed):
    x = cloud(seed, count)
    left, picked = list(range(count)), []
    while len(picked) < count - 2 * f:
        neighbours = max(len(left) - f - 2, 1)
        order = krum_order(x[left].numpy(), neighbours)
        if neighbours == 1:  # mutual nearest neighbours tie: the one nearer to all
            square = apart(x[left].numpy())
            least = np.sort(square + np.diag([np.inf] * len(left)), 1)[:, 0]
            tied = [i for i in range(len(left)) if least[i] <= least.min() * (1 + 1e-12)]
            order = [min(tied, key=lambda i: square[i].sum())]
        picked.append(left.pop(order[0]))
    chosen, beta = x[picked].numpy(), count - 4 * f
    middle = np.median(chosen, 0)
    expected = [
        column[np.argsort(abs(column - m), kind="stable")[:beta]].mean()
        for column, m in zip(chosen.T, middle, strict=True)
    ]
    torch.testing.assert_close(Bulyan(f)(x), torch.tensor(expected))


@pytest.mark.parametrize("count, f", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_entry_by_entry(count, f, seed):
    x = cloud(seed, count)
    columns = np.sort(x.numpy(), 0)
    torch.testing.assert_close(Median()(x), torch.tensor(np.median(columns, 0)))
    torch.testing.assert_close(TrimmedMean(f)(x), torch.tensor(columns[f : count - f].mean(0)))
    middle = np.median(columns, 0)
    near = np.take_along_axis(columns, np.argsort(abs(columns - middle), 0, kind="stable")[: count - f], 0)
    torch.testing.assert_close(Meamed(f)(x), torch.tensor(near.mean(0)))


@pytest.mark.parametrize("count, f", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_nearest(count, f, seed):
    x = cloud(seed, count)
    square = apart(x.numpy())
    mixed = torch.stack([x[np.argsort(row, kind="stable")[: count - f].copy()].mean(0) for row in square])
    torch.testing.assert_close(NNM(f)(x), mixed.mean(0))
    torch.testing.assert_close(NNM(f, TrimmedMean(f))(x), TrimmedMean(f)(mixed))
    torch.testing.assert_close(NNM(f, Krum(f, spare=1))(x), Krum(f, spare=1)(mixed))
    for own in (0, count - 1):
        torch.testing.assert_close(NearestToOwn(f)(x, own), mixed[own])


def trimmed(rows, f):
    return np.sort(rows, 0)[f : len(rows) - f].mean(0)


INNER = {  # rule with f -> the same by hand
    "trimmed-mean": (TrimmedMean, trimmed),
    "multi-krum": (
        lambda f: MultiKrum(f, spare=1),
        lambda rows, f: rows[krum_order(rows, len(rows) - f - 1)[: len(rows) - f]].mean(0),
    ),
    "nnm, trimmed-mean": (lambda f: NNM(f, TrimmedMean(f)), lambda rows, f: trimmed(nearest(rows, f), f)),
    "bulyan": (Bulyan, lambda rows, f: Bulyan(f)(torch.from_numpy(rows)).numpy()),  # by hand above
}


def nearest(rows, f):
    return np.stack([rows[np.argsort(row, kind="stable")[: len(rows) - f]].mean(0) for row in apart(rows)])


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("broken", [1, 2, 3])
@pytest.mark.filterwarnings("ignore::weft.comm.rules.BrokenMessage")
def test_mixing_leaves_the_inner_rule_as_many_faulty_ones_as_can_be_left(inner, broken):
    """Mixed by hand from the n - b finite messages, of which f - b may lie: the paper's f for its n."""
    f, (rule, by_hand) = 2, INNER[inner]
    left = max(f - broken, 0)
    for seed in SEEDS:
        x = (64 * cloud(seed, 15)).round()  # products are exact: buckets are drawn by the bits of norms
        x[torch.randperm(15, generator=torch.Generator().manual_seed(seed))[:broken]] = torch.nan
        rest = x[x.isfinite().all(1)].numpy()
        expected = by_hand(nearest(rest, left), left)
        torch.testing.assert_close(NNM(f, rule(f))(x), torch.from_numpy(expected))
        buckets = Bucketing(1, rule(f))(x)  # of one message each: a shuffle, then the rule
        torch.testing.assert_close(buckets, torch.from_numpy(by_hand(rest, left)))
        pairs = Bucketing(2).mix(torch.from_numpy(rest @ rest.T)).numpy() @ rest
        if inner != "bulyan":  # wants 4f + 3 buckets
            torch.testing.assert_close(Bucketing(2, rule(f))(x), torch.from_numpy(by_hand(pairs, left)))


@pytest.mark.parametrize("count, f", [(4, 1), (5, 2), (7, 2), (9, 3)])
@pytest.mark.parametrize("seed", range(6))
def test_least_diameter_by_enumeration(count, f, seed):
    x = cloud(seed, count, 3)
    square = apart(x.numpy())
    subsets = [list(s) for s in itertools.combinations(range(count), count - f)]
    widest = [max(square[i, j] for i in s for j in s) for s in subsets]
    best = [s for s, w in zip(subsets, widest, strict=True) if w <= min(widest) * (1 + 1e-9)]
    best.sort(key=lambda s: square[np.ix_(s, s)].sum())
    torch.testing.assert_close(MDA(f)(x), x[best[0]].mean(0))


def test_least_diameter_of_fifty_is_quick():
    x = cloud(0, 50)
    x[:10] += 20
    torch.testing.assert_close(MDA(10)(x), x[10:].mean(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_geometric_median_is_the_minimum(seed):
    x = cloud(seed, 9)
    point = GeometricMedian(iterations=2000)(x)
    total = (x - point).norm(dim=1).sum()
    for _ in range(50):
        assert (x - point - 1e-3 * torch.randn(13, dtype=torch.float64)).norm(dim=1).sum() >= total - 1e-9
    # three smoothed steps from zero, written with vectors
    z = torch.zeros(13, dtype=torch.float64)
    for _ in range(3):
        beta = 1 / (x - z).norm(dim=1).clamp(min=0.1)
        z = (x * beta[:, None]).sum(0) / beta.sum()
    torch.testing.assert_close(GeometricMedian(iterations=3, nu=0.1, start="zero")(x), z)


def test_a_message_may_be_the_geometric_median():
    corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(GeometricMedian()(corners), corners[3])  # inside the triangle of the others: Fagnano, 1775
    obtuse = torch.tensor([[0.0, 0.0], [4.0, 1.0], [-4.0, 1.0]])
    assert torch.equal(GeometricMedian()(obtuse), obtuse[0])  # an angle above 120 degrees
    line = torch.tensor([[1.0], [9.0], [3.0], [4.0]])
    torch.testing.assert_close(GeometricMedian()(line), torch.tensor([3.5]))  # any point between the two in the middle


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_nearest_of_messages_whose_squares_are_no_float32(scale):
    x = cloud(4, 9)
    messages = (scale * x).float()
    torch.testing.assert_close(
        NearestToOwn(4)(messages, 2), NearestToOwn(4)(messages.double(), 2).float(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("tau", [0.5, 3.0, 100.0])
def test_centred_clipping(tau):
    x = cloud(1, 9)
    for start in ("zero", "medoid"):
        v = torch.zeros(13, dtype=torch.float64)
        if start == "medoid":
            v = x[int(np.argmin(np.sqrt(apart(x.numpy())).sum(1)))]
        for _ in range(4):
            away = x - v
            v = v + (away * (tau / away.norm(dim=1)).clamp(max=1.0)[:, None]).mean(0)
        torch.testing.assert_close(CenteredClip(tau, iterations=4, start=start)(x), v)


def test_norm_equalised_mean():
    x = cloud(2, 9)
    x[3] *= 1e6
    x[4] = 0
    norms = x.norm(dim=1)
    expected = sum(x[i] / norms[i] * norms.quantile(0.5) for i in range(9) if i != 4) / 9
    torch.testing.assert_close(NormEqualisedMean()(x), expected)


@pytest.mark.parametrize("count, f", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_byzfl_says_the_same(byzfl, count, f, seed):
    x = cloud(seed, count)
    y = x.numpy()

    def same(ours, theirs, **given):
        torch.testing.assert_close(ours(x, **given), torch.from_numpy(np.asarray(theirs(y.copy()))))

    same(Krum(f, spare=1), byzfl.Krum(f))
    same(MultiKrum(f, spare=1), byzfl.MultiKrum(f))
    same(Median(), byzfl.Median())
    same(TrimmedMean(f), byzfl.TrMean(f))
    same(Meamed(f), byzfl.Meamed(f))
    same(GeometricMedian(3, 0.1, "zero"), byzfl.GeometricMedian())
    same(CenteredClip(2.0, 1, "zero"), byzfl.CenteredClipping(tau=2.0))
    same(NNM(f), lambda z: byzfl.NNM(f)(z).mean(0))
    same(NNM(f, TrimmedMean(f)), lambda z: byzfl.TrMean(f)(byzfl.NNM(f)(z)))
    same(NearestToOwn(f), byzfl.MoNNA(f, idx=2), own=2)


@pytest.mark.parametrize("count", [*range(1, 9), 13, 15, 16, 31, 50])
def test_the_network_sorts(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(0, 7, (count, 300), generator=generator).float()
    found = torch.stack(sorted_rows(x.unbind(0), tuple(range(count))))
    assert torch.equal(found, x.sort(0).values)
    middle = count // 2
    assert torch.equal(sorted_rows(x.unbind(0), (middle,))[middle], x.sort(0).values[middle])
    if count <= 8:  # a network that sorts all zeros and ones sorts everything (Knuth, the 0-1 principle)
        ones = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count))).T.contiguous()
        assert torch.equal(torch.stack(sorted_rows(ones.unbind(0), tuple(range(count)))), ones.sort(0).values)


def test_what_nobody_reads_is_not_compared():
    assert len(comparators(15, (7,))) < len(comparators(15, tuple(range(15)))) <= 60


def test_blocks_join():
    x = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(median(x), torch.quantile(x, 0.5, 0))
    torch.testing.assert_close(trimmed_mean(x, 1), x.sort(0).values[1:-1].mean(0))
    torch.testing.assert_close(mean_near_median(x, 0), x.mean(0), rtol=1e-4, atol=1e-6)
