"""Flag aggregation against its literal form by singular vectors of d x n matrices, and what the paper's objective promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comm.rules import Flag
from weft.comm.rules.flag import subspace

KINDS = ("random", "common mean", "low rank", "near-degenerate", "one far off")


def gradients(kind, seed, count=9, length=60):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, generator=g, dtype=torch.float64)
    if kind == "common mean":
        x = torch.randn(length, generator=g, dtype=torch.float64) + 0.3 * x
    elif kind == "low rank":  # rank 6 of 9, above m = 5
        x = torch.randn(count, 6, generator=g, dtype=torch.float64) @ x[:6]
    elif kind == "near-degenerate":
        x = torch.randn(length, generator=g, dtype=torch.float64) + 1e-3 * x
    elif kind == "one far off":
        x[2] *= 1e6
    return x


def literal(x, m, lam, iters, scale):
    """The same steps on columns of length d by SVD: x_i, differences of unit vectors, column weights (sin^2 + 1e-7)^(-1/4)."""
    count, norms = len(x), x.norm(dim=1)
    unit = x / norms[:, None]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j] if lam else []
    apart = [(unit[i] - unit[j]) / (unit[i] - unit[j]).norm() for i, j in pairs]
    columns = torch.stack([*unit, *apart], 1)
    weight = torch.tensor([1.0] * count + [lam / (count * (count - 1))] * len(pairs), dtype=torch.float64)

    def sines(y):
        return (1 - (y.T @ columns).square().sum(0)).clamp(min=0)

    def top(square_weights):
        return torch.linalg.svd(columns * square_weights.sqrt(), full_matrices=False).U[:, :m]

    y = top(weight)
    value = (weight * sines(y).sqrt()).sum()
    for _ in range(iters):
        new = top(weight * (sines(y) + 1e-7).rsqrt())
        found = (weight * sines(new).sqrt()).sum()
        if found > value:
            break
        fell, y, value = value - found, new, found
        if fell < 1e-10:
            break
    s = {"norm": norms.quantile(0.5).expand(count), "paper": norms, "public": torch.full((count,), count / m).double()}
    return y @ (y.T @ (unit.T @ s[scale])) / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.0, 0.7])
@pytest.mark.parametrize("scale", ["norm", "paper", "public"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_form_by_singular_vectors(kind, lam, scale, seed):
    x = gradients(kind, seed)
    expected = literal(x, 5, lam, 5, scale)
    found = Flag(5, lam, 5, scale)(x)
    assert (found - expected).norm() <= 1e-8 * x.norm(dim=1).mean()


def non_increasing(seed, length, m, lam):
    x = gradients("random", seed, length=length)
    unit = x / x.norm(dim=1, keepdim=True)
    basis, history = subspace(unit, m, lam, 20)
    assert all(after <= before for before, after in itertools.pairwise(history))
    torch.testing.assert_close(basis.T @ basis, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**31), m=st.integers(1, 8), lam=st.sampled_from([0.0, 0.5, 5.0]))
@settings(max_examples=15, deadline=None)
def test_the_objective_never_increases(seed, m, lam):
    non_increasing(seed, 9, m, lam)


def test_a_step_that_would_increase_it_is_not_taken():
    """Nine gradients of rank six, m = 5: the floor under the angles makes a few of these steps go up."""
    for seed in range(40):
        non_increasing(seed, 6, 5, 0.0)


def test_reweighting_finds_the_line_most_gradients_share():
    """Six on a line and three together elsewhere: least squares leans to the three, sines do not."""
    x = torch.zeros(9, 4, dtype=torch.float64)
    x[:6, 0], x[6:, 1], x[6:, 0] = 1.0, 1.0, 0.4
    unit = x / x.norm(dim=1, keepdim=True)
    plain, robust = subspace(unit, 1, 0.0, 0)[0], subspace(unit, 1, 0.0, 50)[0]
    assert abs(plain[0, 0]) < 0.97
    assert abs(robust[0, 0]) > 0.9999


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_turning_space_turns_the_result(lam):
    x = gradients("random", 0)
    q = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(Flag(lam=lam)(x @ q.T), q @ Flag(lam=lam)(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_one_huge_norm_changes_only_its_own_term(lam):
    x = gradients("common mean", 1)
    huge = x.clone()
    huge[3] *= 1e6
    flag = Flag(lam=lam, scale="public")  # unit vectors only: nothing may change
    torch.testing.assert_close(flag(huge), flag(x), rtol=1e-7, atol=1e-9)
    paper = Flag(lam=lam, scale="paper")
    change = paper(huge) - paper(x)
    only = x.clone()
    only[[i for i in range(9) if i != 3]] = 0.0
    # (1e6 - 1)/n Y Y^T g_3: parallel to the projection of g_3, which keeps v_3 of its square
    along = float(change @ x[3] / x[3].norm() / ((1e6 - 1) / 9 * x[3].norm()))
    length = float(change.norm() / ((1e6 - 1) / 9 * x[3].norm()))
    assert math.isclose(along, length**2, rel_tol=1e-6)
    norm = Flag(lam=lam)  # in the median norm's scale it cannot grow beyond it
    assert norm(huge).norm() <= 1.01 * huge.norm(dim=1).quantile(0.5)


def test_m_equal_to_n_is_the_mean_and_has_to_be_asked_for():
    x = gradients("random", 2)
    with pytest.raises(ValueError, match="m must be below the number of gradients 9"):
        Flag(9)(x)
    torch.testing.assert_close(Flag(9, scale="paper", whole=True)(x), x.mean(0))


def test_rank_below_m_is_the_mean():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(9, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 50, generator=g, dtype=torch.float64)
    torch.testing.assert_close(Flag(5, scale="paper")(x), x.mean(0))


def test_a_zero_gradient_has_weight_zero():
    x = gradients("random", 4)
    x[2] = 0
    found = Flag(4)(x)
    assert torch.isfinite(found).all()
    rest = Flag(4)(torch.cat([x[:2], x[3:]]))
    torch.testing.assert_close(found, rest * 8 / 9)
    assert torch.equal(Flag()(torch.zeros(5, 7)), torch.zeros(7))


@pytest.mark.parametrize("options", [{"m": 0}, {"lam": -1.0}, {"lam": math.inf}, {"iters": -1}, {"scale": "unit"}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Flag(**options)


def test_fewer_than_three():
    with pytest.raises(ValueError, match="n >= 3"):
        Flag()(torch.randn(2, 4))
