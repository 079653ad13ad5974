"""Top-k: exactly the largest; the sampled threshold within its bounds and with nearly all of the mass."""

from __future__ import annotations

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.codecs import TopK
from weft.comm.codecs.top_k import BLOCK, _at_least, kept, sample_select

STATE = {"seed": 3, "shared_seed": 4}


def normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def heavy(count, seed=0):
    """Student's t with 2 degrees of freedom: a few entries hold most of the mass, as in gradients of embeddings."""
    chi = normal(2 * count, seed + 1000).view(2, -1).square().sum(0)
    return normal(count, seed) / (chi / 2).sqrt()


def test_exact_selection_is_the_largest():
    x, spec = normal(1000), Spec("w", (50, 20))
    codec = TopK(0.03, selection="exact")
    values, where = codec.sent(codec.encode(x, spec, STATE, 0.03, 0), spec, 0.03)
    largest = sorted(range(1000), key=lambda i: -abs(float(x[i])))[:30]
    assert sorted(where.tolist()) == sorted(largest)
    assert torch.equal(values, x[where])


@pytest.mark.parametrize("selection", ["exact", "sampled"])
def test_equals_at_the_threshold_never_push_out_what_is_larger(selection):
    """300 entries go: those at the end are the largest, the 9,700 before them are equals."""
    x = torch.full((10_000,), -0.5)
    x[-200:] = 1.0
    index = TopK(0.03, selection=selection).select(x, 0.03, seed=1).index
    assert len(index) == len(set(index.tolist())) == 300
    assert set(range(9_800, 10_000)) <= set(index.tolist())
    assert len(TopK(0.03, selection=selection).select(torch.zeros(10_000), 0.03, seed=1).index) == 300


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
def test_search_in_blocks_misses_nothing(count):
    x = normal(count).clamp(-2, 2)  # some lie on the threshold itself
    for threshold in (0.0, 1.5, 2.0, 3.0):
        assert torch.equal(_at_least(x, threshold), (x.abs() >= threshold).nonzero().view(-1))


@pytest.mark.parametrize("draw", [normal, heavy], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.001])
def test_sampled_threshold_stays_in_bounds_and_keeps_the_mass(draw, ratio):
    count = 50_000
    wanted = kept(ratio, count)
    shares = []
    for seed in range(25):
        x = draw(count, seed)
        selected = sample_select(x, wanted, ratio, seed=seed * 7919)
        assert selected.exact or 0.8 * wanted <= selected.found <= 1.3 * wanted
        assert len(selected.index) <= wanted
        assert len(set(selected.index.tolist())) == len(selected.index)
        best = x.abs().topk(wanted).values
        sent = x[selected.index].abs()
        shares.append(float(sent.sum() / best.sum()))
        # Those sent are the largest there are: nothing above the smallest of them was left out.
        assert int((x.abs() > sent.min()).sum()) < len(selected.index)
    assert min(shares) >= 0.75 and sum(shares) / len(shares) >= 0.9


def test_too_many_above_the_threshold_are_trimmed_by_size_not_by_position():
    """The sample sees small entries only, so its threshold lets a run of growing ones through; the last are the largest."""
    x = torch.full((10_000,), 0.1)
    x[5000:6000] = torch.linspace(1, 2, 1000)
    x[0::49] = 0.05  # every 49th is looked at: 200 samples of 10,000, the step made odd
    selected = sample_select(x, 100, 0.01, seed=0, sample=0.0099)
    assert selected.found > 130 and selected.exact
    assert sorted(selected.index.tolist()) == sorted(x.topk(100).indices.tolist())


def test_a_threshold_too_high_is_lowered_and_in_the_end_given_up():
    x = torch.full((10_000,), 1e-6)
    x[0::99] = 1.0  # all that the sample sees: 102 entries, where 200 are wanted
    x[1::99] = 0.9
    selected = sample_select(x, 200, 0.02, seed=0, sample=0.0099)
    assert selected.found == 203 and len(selected.index) == 200
    lonely = torch.full((10_000,), 1e-6)
    lonely[0::101] = 1.0
    selected = sample_select(lonely, 500, 0.05, seed=0, sample=0.0099)  # 0.8^10 does not reach 1e-6
    assert selected.exact and len(selected.index) == 500


@pytest.mark.parametrize("seed", range(4))
def test_the_sample_sees_every_column(seed):
    """All that is large lies in odd columns: a step of 50 would see nothing else, or nothing of it."""
    x = normal(100_000).view(-1, 100)
    x[:, ::2] *= 1e-3
    found = sample_select(x.view(-1), 2000, 0.02, seed, sample=0.02).found
    assert 0.8 * 2000 <= found <= 1.6 * 2000


def test_the_sample_moves_from_step_to_step():
    x = heavy(40_000)
    seen = {tuple(sorted(TopK().select(x, 0.01, seed).index.tolist())) for seed in range(40)}
    assert len(seen) > 5


@pytest.mark.parametrize("values", [torch.float32, torch.float16])
def test_short_messages_are_padded_without_effect(values):
    """A message that found fewer than k repeats a position with value 0."""
    codec, spec, ratio = TopK(values=values), Spec("w", (40_000,)), 0.01
    for seed in range(20):
        x = normal(40_000, seed)
        state = {"seed": seed, "shared_seed": 0}
        message = codec.encode(x, spec, state, ratio, 0)
        sent, where = codec.sent(message, spec, ratio)
        assert len(where) == 400
        if len(set(where.tolist())) < 400:
            break
    else:
        pytest.fail("no draw was short; the padding was not tested")
    real = torch.tensor(sorted(set(where.tolist())))
    decoded = codec.decode(message, spec, ratio)
    assert torch.allclose(decoded[real], x[real], rtol=2**-10)
    assert int((decoded != 0).sum()) == len(real)
    assert int((sent == 0).sum()) == 400 - len(real)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e10, 1e30])
def test_half_precision_values_keep_every_magnitude(scale):
    codec, spec = TopK(values=torch.float16, selection="exact"), Spec("w", (1000,))
    x = scale * normal(1000)
    values, where = codec.sent(codec.encode(x, spec, STATE, 0.1, 0), spec, 0.1)
    assert torch.allclose(values, x[where], rtol=2**-10)
    assert codec.nbytes(spec, 0.1) == 100 * 6 + 4


def test_kept():
    assert kept(0.07, 100) == 7  # 0.07 * 100 is a little above 7
    assert kept(0.001, 10) == 1 and kept(1.0, 10) == 10 and kept(0.0101, 100) == 2


def test_ratio_one_goes_dense():
    codec, spec = TopK(), Spec("w", (4, 4))
    assert codec.bypass(spec, 1.0) and codec.bypass(spec, 1) and not codec.bypass(spec, 0.99)


def test_tensors_beyond_int32_are_refused():
    with pytest.raises(ValueError, match="int32"):
        TopK().message(Spec("embedding", (2**16, 2**16)), 0.001)
