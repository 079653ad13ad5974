"""Attacks do what their papers say; ByzFL's where it has them."""

from __future__ import annotations

import math

import pytest
import torch

from weft.comm.attacks import (
    ATTACKS,
    DATA_ATTACKS,
    AugmentationNoise,
    DroppedPackets,
    Gaussian,
    InnerProduct,
    LabelFlip,
    LittleIsEnough,
    Mimic,
    SignFlip,
    TwoFaced,
    hidden_deviation,
)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


HONEST = torch.randn(12, 1000, generator=draw()) + 1


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_shape_dtype_and_drawing(name, count):
    attack = ATTACKS[name]()
    sent = attack.messages(HONEST, count, draw(1))
    assert sent.shape == (count, 1000) and sent.dtype == HONEST.dtype
    assert torch.equal(sent, attack.messages(HONEST, count, draw(1)))  # what is drawn comes from the generator
    before = HONEST.clone()
    attack.messages(HONEST, count, draw(1)).zero_()
    assert torch.equal(HONEST, before)


def test_formulas():
    mean, std = HONEST.mean(0), HONEST.std(0)
    torch.testing.assert_close(SignFlip(10.0).messages(HONEST, 2, draw())[1], -10 * mean)
    torch.testing.assert_close(InnerProduct(0.5).messages(HONEST, 2, draw())[0], -0.5 * mean)
    torch.testing.assert_close(LittleIsEnough(1.5).messages(HONEST, 1, draw())[0], mean - 1.5 * std)
    torch.testing.assert_close(Mimic(4).messages(HONEST, 3, draw())[2], HONEST[4])
    torch.testing.assert_close(TwoFaced(2.0).messages(HONEST, 1, draw(), receiver=1)[0], mean - 2 * std)
    torch.testing.assert_close(TwoFaced(2.0).messages(HONEST, 1, draw(), receiver=4)[0], mean + 2 * std)
    noise = Gaussian(100.0).messages(HONEST, 2, draw())
    ratio = noise.norm(dim=1) / HONEST.norm(dim=1).mean()
    assert torch.all((ratio > 85) & (ratio < 115)) and not torch.equal(noise[0], noise[1])


def test_byzfl_has_the_same():
    from weft.bench.byzfl_rules import load

    try:
        byzfl = load()
    except ImportError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(byzfl.SignFlipping()(HONEST), SignFlip(1.0).messages(HONEST, 1, draw())[0])
    torch.testing.assert_close(byzfl.ALittleIsEnough(-1.5)(HONEST), LittleIsEnough(1.5).messages(HONEST, 1, draw())[0])
    torch.testing.assert_close(
        byzfl.InnerProductManipulation(2.0)(HONEST), InnerProduct(2.0).messages(HONEST, 1, draw())[0]
    )


def test_deviation_that_hides():
    """s = floor(n/2 + 1) - f honest workers must lie farther out: their share of the n - f is 1 - Phi(z)."""
    for workers, faulty in [(15, 1), (15, 2), (15, 3), (50, 24), (26, 5)]:
        z = hidden_deviation(workers, faulty)
        beyond = (1 - math.erf(z / math.sqrt(2))) / 2 * (workers - faulty)
        assert math.isclose(beyond, workers // 2 + 1 - faulty, rel_tol=1e-6)
    assert hidden_deviation(15, 3) < hidden_deviation(15, 6)
    with pytest.raises(ValueError, match="below n/2"):
        hidden_deviation(10, 5)


def test_dropped_packets_lose_whole_packets():
    sent = DroppedPackets(0.5, packet=100).messages(HONEST, 3, draw(2))
    for row, source in zip(sent.split(100, 1), HONEST[:3].split(100, 1), strict=True):
        lost = (row == 0).all(1)
        assert torch.equal(row[~lost], source[~lost])
    assert torch.equal(DroppedPackets(0.0).messages(HONEST, 2, draw()), HONEST[:2])
    assert DroppedPackets(1.0).messages(HONEST, 2, draw()).abs().sum() == 0
    with pytest.raises(ValueError, match="rate"):
        DroppedPackets(1.5)


def test_bad_data():
    x, y = torch.rand(8, 64), torch.arange(8)
    same, flipped = LabelFlip().corrupt(x, y, 10, draw())
    assert torch.equal(same, x) and torch.equal(flipped, 9 - y)
    noisy, labels = AugmentationNoise(3.0).corrupt(x, y, 10, draw())
    assert torch.equal(labels, y) and 2 < float((noisy - x).std() / x.std()) < 4
    assert set(DATA_ATTACKS) == {"label-flip", "augmentation-noise"}


def test_mimic_of_nobody():
    with pytest.raises(ValueError, match="one of the 12"):
        Mimic(12).messages(HONEST, 1, draw())
