"""A tiled linear layer is the linear layer: exactly, in numbers that add exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.memory.tiers.training import ADAMW, differing
from torch import nn

from weft.memory.tiers.store import Tiers
from weft.memory.tiers.tiered import Tiered
from weft.memory.tiers.tiling import TiledLinear, parts, tile

SPLITS = list(itertools.product(range(1, 8), range(1, 6)))


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("bias", [True, False])
def test_every_split_of_seven_by_five(bias):
    linear = nn.Linear(7, 5, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(whole_numbers(*parameter.shape, seed=seed))
    x, gradient = whole_numbers(2, 3, 7, seed=10), whole_numbers(2, 3, 5, seed=11)
    x.requires_grad_()
    expected = linear(x)
    expected.backward(gradient)
    x_gradient, x.grad = x.grad, None
    for inputs, outputs in SPLITS:
        tiled = tile(linear, inputs, outputs)
        y = tiled(x)
        assert torch.equal(y, expected)
        y.backward(gradient)
        assert torch.equal(x.grad, x_gradient)
        x.grad = None
        weight, bias_ = tiled.whole()
        assert torch.equal(weight, linear.weight)
        assert torch.equal(bias_, linear.bias) if bias else bias_ is None
        for tile_ in tiled.modules():
            if isinstance(tile_, nn.Linear):
                tile_.weight.data = tile_.weight.grad
                if tile_.bias is not None:
                    tile_.bias.data = tile_.bias.grad
        weight, bias_ = tiled.whole()  # of the gradients now
        assert torch.equal(weight, linear.weight.grad) and (not bias or torch.equal(bias_, linear.bias.grad))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_tiles_are_frozen_as_the_layer_is(frozen):
    linear = nn.Linear(7, 5)
    getattr(linear, frozen).requires_grad_(False)
    for name, parameter in tile(linear, 2, 3).named_parameters():
        assert parameter.requires_grad == (frozen not in name)


def test_parts_are_near_equal():
    for size, count in itertools.product(range(1, 20), range(1, 8)):
        if count <= size:
            found = parts(size, count)
            assert sum(found) == size and len(found) == count and max(found) - min(found) <= 1


@pytest.mark.parametrize("splits", [(0, 1), (1, 0), (8, 1), (1, 6)])
def test_more_parts_than_features(splits):
    with pytest.raises(ValueError, match="must be from 1 to"):
        tile(nn.Linear(7, 5), *splits)


def test_initial_values_are_spread_as_the_whole_layers():
    torch.manual_seed(0)
    tiled = TiledLinear(400, 100, 4, 5)
    weight, bias = tiled.whole()
    assert weight.abs().max() <= 1 / 20 < 1.01 * weight.abs().max() and bias.abs().max() <= 1 / 20


def test_one_tile_at_a_time_on_the_device(tmp_path):
    """Trained from disk, a tiled layer is the tiled layer in memory; no two tiles need to be there together."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), TiledLinear(32, 48, 4, 4), nn.Linear(48, 2))

    reference, model = make(), make()
    optimizer = ADAMW(reference.parameters())
    most = 0
    with Tiered(model, ADAMW, Tiers("disk", "disk", "disk"), tmp_path, keep_below=1, ahead=1, chunk=1) as tiered:
        trim = tiered.presence.trim

        def counted():
            nonlocal most
            trim()
            held = [tiered.slots[i] for i in tiered.presence.held if tiered.slots[i].name.startswith("1.")]
            most = max(most, sum(slot.nbytes for slot in held))

        tiered.presence.trim = counted
        for turn in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(turn))
            for m, begin, end in (
                (reference, optimizer.zero_grad, optimizer.step),
                (model, tiered.zero_grad, tiered.step),
            ):
                begin()
                m(x).square().mean().backward()
                end()
        assert not differing(reference.state_dict(), tiered.state_dict())
    one = 8 * 12 * 4
    assert one <= most <= 2 * one + 12 * 4  # the tile, the one that the order keeps for its backward, a bias
