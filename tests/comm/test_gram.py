"""The two products: accuracy of what decides, and rows that must not be read."""

from __future__ import annotations

import pytest
import torch

from weft.comm.gram import cancels, gram, weighted
from weft.comm.rules.by_gram import distances


@pytest.mark.parametrize("count", [1, 2, 3, 14, 15, 16, 17, 31])
@pytest.mark.parametrize("length", [1, 7, 32768, 70_001])
def test_equals_the_plain_product(count, length):
    x = torch.randn(count, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    torch.testing.assert_close(gram(x), x @ x.T)
    found = gram(x.float())
    assert found.dtype == torch.float64 and found.shape == (count, count)
    torch.testing.assert_close(found, x.float().double() @ x.float().double().T, rtol=1e-5, atol=1e-5 * length**0.5)


def test_neighbours_at_a_million_entries():
    """Gradients with much in common, as the card measured: every nearest neighbour right, distances to 1e-5."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1_000_000, generator=g) * 0.8 + torch.randn(7, 1_000_000, generator=g)
    exact = distances(x.double() @ x.double().T)
    found = distances(gram(x))
    away = ~torch.eye(7, dtype=torch.bool)
    assert ((found - exact).abs() / exact)[away].max() < 1e-5
    assert torch.equal(found.argsort(1), exact.argsort(1))


def test_messages_that_nearly_agree_are_multiplied_in_double():
    """Parameters of peers: norm 30, apart by 1e-3. In single precision nothing of that is left."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1000, generator=g) + 3e-5 * torch.randn(6, 1000, generator=g)
    exact = distances(x.double() @ x.double().T)
    assert cancels((x @ x.T).double())
    torch.testing.assert_close(distances(gram(x)), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_message_shows_on_the_diagonal_only_there(value):
    x = torch.randn(5, 100)
    x[3, 50] = value
    assert torch.isfinite(gram(x).diagonal()).tolist() == [True, True, True, False, True]


def test_a_finite_message_whose_square_overflows_is_not_broken():
    x = torch.randn(5, 100)
    x[3] *= 1e30
    found = gram(x)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, x.double() @ x.double().T)


def test_messages_whose_squares_underflow_keep_their_digits():
    x = 1e-22 * torch.randn(5, 100)
    x[3] = 0
    torch.testing.assert_close(gram(x), x.double() @ x.double().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7])
def test_what_a_common_offset_costs(offset):
    """As `gram` says it: squared distances are right to rounding of the squared lengths, not of themselves."""
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    exact = (x[:, None] - x[None]).square().sum(2)
    sums = x.square().sum(1)[:, None] + x.square().sum(1)[None, :]
    assert float(((distances(gram(x)) - exact).abs() / sums).max()) < 1e-15


def test_beyond_float64_it_is_as_if_infinite_or_zero():
    x = torch.randn(3, 4, dtype=torch.float64)
    assert not torch.isfinite(gram(x * 1e160).diagonal()).any()
    assert not gram(x * 1e-170).any()


def test_segments_add_up():
    x = torch.randn(5, 1000, dtype=torch.float64)
    torch.testing.assert_close(sum(gram(part) for part in x.split(333, 1)), gram(x))


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("zero", [[], [2], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
def test_rows_of_weight_zero_are_not_read(shape, zero):
    x, w = torch.randn(5, 40_000), torch.randn(shape, dtype=torch.float64)
    w[..., zero] = 0
    expected = w @ x.double()
    x[zero] = torch.nan
    torch.testing.assert_close(weighted(w, x).double(), expected, rtol=1e-5, atol=1e-5)


def test_shape():
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        gram(torch.zeros(3))
