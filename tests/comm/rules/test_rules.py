"""One battery over every rule: what holds for all of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comm.combine import Info
from weft.comm.gram import gram, weighted
from weft.comm.rules import (
    MDA,
    RULES,
    BrokenMessage,
    Bucketing,
    CenteredClip,
    Flag,
    GeometricMedian,
    Meamed,
    Median,
    MultiKrum,
    NearestToOwn,
    TrimmedMean,
)
from weft.comm.rules.mixing import NNM

WITH_F = ("krum", "multi-krum", "bulyan", "mda", "nnm", "nearest-to-own", "trimmed-mean", "meamed")
ROBUST = [name for name in RULES if name not in ("mean", "norm-equalised-mean", "bucketing")]
TAKES_NO_F = [name for name in RULES if name not in WITH_F]


def build(name, f=2):
    """The rule with f where it takes one; mixing before a rule that is robust itself."""
    if name == "nnm":
        return NNM(f, TrimmedMean(f))
    if name == "bucketing":
        return Bucketing(1, TrimmedMean(f))
    return RULES[name](f) if name in WITH_F else RULES[name]()


def cloud(seed, count=15, length=40, dtype=torch.float64):
    """Messages around a common mean of norm about 6, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(length, generator=generator, dtype=dtype)
    return centre + 0.5 * torch.randn(count, length, generator=generator, dtype=dtype)


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_order_does_not_matter(name, seed):
    messages = cloud(seed)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    own = 4
    result = build(name)(messages, own)
    again = build(name)(messages[order], int((order == own).nonzero()))
    torch.testing.assert_close(again, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 7.0, 1e12])
def test_scales_with_the_messages(name, scale):
    messages = cloud(1)
    torch.testing.assert_close(build(name)(messages * scale, 0), build(name)(messages, 0) * scale, rtol=1e-8, atol=0)


# The norm-equalised mean and Flag read directions, bucketing hashes norms: these know where 0 is.
@pytest.mark.parametrize("name", [name for name in RULES if name not in ("norm-equalised-mean", "flag", "bucketing")])
def test_moves_with_the_messages(name):
    messages, shift = cloud(2), torch.linspace(-3, 3, 40, dtype=torch.float64)
    torch.testing.assert_close(build(name)(messages + shift, 0), build(name)(messages, 0) + shift, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_messages_of_16_bits_are_combined_in_32(name, dtype):
    for messages in (cloud(3).to(dtype), torch.full((15, 3), 1.8, dtype=dtype), torch.full((15, 3), 1e4, dtype=dtype)):
        expected = build(name)(messages.double(), 4)
        found = build(name)(messages, 4)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("messages", [torch.ones(15, 3, dtype=torch.int64), torch.ones(15)])
def test_what_are_no_messages(name, messages):
    with pytest.raises(ValueError, match=r"floating-point numbers of shape \(n, d\)"):
        build(name)(messages, 0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e7])
def test_equal_messages_are_returned(name, value):
    message = value * torch.linspace(0.5, 1, 20, dtype=torch.float64)
    result = build(name)(message.repeat(15, 1), 3)
    torch.testing.assert_close(result, message, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["nnm", "nearest-to-own", "trimmed-mean", "meamed", "mda", "multi-krum", "bulyan"])
def test_no_faults_expected_is_the_mean(name):
    messages = cloud(3)
    torch.testing.assert_close(build(name, f=0)(messages, 0), messages.mean(0))


@pytest.mark.parametrize("name", [name for name in RULES if name != "mean"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_message_that_is_not_finite_is_left_out_and_named(name, value):
    messages = cloud(4)
    messages[5, 7] = value
    with pytest.warns(BrokenMessage, match="number 5"):
        result = build(name)(messages, 0)
    assert torch.isfinite(result).all()
    rest = torch.cat([messages[:5], messages[6:]])
    if name in TAKES_NO_F and name != "bucketing":  # f or not: the same as never having had it
        torch.testing.assert_close(result, build(name)(rest, 0), rtol=1e-10, atol=1e-12)
    if name in (*WITH_F, "bucketing"):  # it was one of the f
        torch.testing.assert_close(result, build(name, f=1)(rest, 0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in RULES if name != "mean"])
def test_nothing_finite_is_an_error(name):
    with pytest.raises(ValueError, match="finite"):
        build(name)(torch.full((15, 3), torch.nan), 0)


@pytest.mark.parametrize("name", WITH_F)
def test_too_few_messages(name):
    if name == "nearest-to-own":
        pytest.skip("keeps at least the own message")
    with pytest.raises(ValueError, match=r"needs n >= \d+ messages for f = 2, got 4"):
        build(name)(cloud(0, 4), 0)


@pytest.mark.parametrize("name", WITH_F)
@pytest.mark.parametrize("f", [-1, 1.5])
def test_f_is_a_count(name, f):
    with pytest.raises(ValueError, match="f must be an integer of 0 or more"):
        RULES[name](f)


@pytest.mark.parametrize("name", RULES)
def test_no_message_at_all(name):
    with pytest.raises(ValueError):
        build(name)(torch.zeros(0, 4), 0)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [10.0, 1e4, 1e9, 1e30])
@given(seed=st.integers(0, 1000))
@settings(max_examples=2, deadline=None)
def test_two_that_lie_far_off_hardly_move_it(name, dtype, size, seed):
    """Breakdown: two attackers of fifteen, far off in a common direction; the honest spread is 0.5 sqrt(40) = 3.2."""
    messages = cloud(seed, dtype=dtype)
    honest = messages[2:].mean(0)
    away = torch.randn(40, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)
    messages[:2] = honest + size * away / away.norm() * 3.2
    result = build(name)(messages, 5)
    bound = 8.0 if name == "flag" else 4.5  # Flag bounds norms, not directions: it may lose its own length
    assert (result - honest).norm() < bound


def test_f_too_small_lets_the_attack_through():
    messages = cloud(0)
    messages[:3] = 1e6
    assert MultiKrum(3)(messages).abs().max() < 10
    assert MultiKrum(2)(messages).abs().max() > 1e3
    assert TrimmedMean(2)(messages).abs().max() > 1e3


@pytest.mark.parametrize("scale", [1.0, 1e-22])
@pytest.mark.parametrize("rule", [GeometricMedian(), Median(), Meamed(6), TrimmedMean(6), MDA(6), CenteredClip()])
def test_six_of_fifteen_as_far_as_floats_go_move_it_no_further_than_near_ones(rule, scale):
    """Nor do they end an iteration early. At 1e-22 the squares of float32 are gone."""
    messages = cloud(9, dtype=torch.float32)
    honest = messages[6:].mean(0)
    messages[:6] = 1e30
    assert (rule(messages * scale) / scale - honest).norm() < 3 * 3.2


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].needs in ("gram", "count")])
def test_weights_are_what_the_exchange_applies(name):
    """The plain call is finish(W @ messages) with W from the Gram matrix, and segments may be combined one by one."""
    messages, rule = cloud(6), build(name)
    info = Info(15, gram(messages), 0)
    left, whole = rule.resolve(info)
    parts = torch.cat([left.finish(weighted(whole, part)) for part in messages.split(13, 1)])
    torch.testing.assert_close(parts, rule(messages, 0), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::weft.comm.rules.BrokenMessage")
@pytest.mark.parametrize("name", [n for n in WITH_F if RULES[n].needs == "gram"] + ["bucketing"])
def test_segments_of_broken_messages_are_finished_by_the_rule_that_is_left(name):
    """Message 5 is broken in one segment alone; in the others its Gram matrix must tell. One weight row for each result."""
    messages = cloud(6)
    messages[5, 3] = torch.nan
    info = Info(15, gram(messages), 0)
    left, whole = build(name).resolve(info)
    assert whole.isfinite().all() and not whole[..., 5].any()
    parts = [left.finish(weighted(whole, part)) for part in messages.split(13, 1)]
    rest = torch.cat([messages[:5], messages[6:]])
    torch.testing.assert_close(torch.cat(parts), build(name, f=1)(rest, 0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_warns_of_nothing_when_all_is_well(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(name)(cloud(7, dtype=torch.float32), 0)


@pytest.mark.parametrize("name", RULES)
def test_single_precision_decides_as_double_does(name):
    messages = cloud(8, length=3000)
    wide = build(name)(messages, 0)
    torch.testing.assert_close(build(name)(messages.float(), 0).double(), wide, rtol=1e-4, atol=1e-4)


def test_flag_needs_a_gram_and_says_so():
    with pytest.raises(ValueError, match="inner products"):
        Flag().weights(Info(5))
    with pytest.raises(ValueError, match="own"):
        NearestToOwn(1)(cloud(0))


@pytest.mark.parametrize(
    "rule",
    [MultiKrum(0, m=7), MultiKrum(1, m=6), MultiKrum(1, m=4), Flag(m=6), Flag(m=3), Flag(m=7, whole=True)],
    ids=str,
)
@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_broken_message_ends_no_rule_that_holds_without_it(rule, broken):
    """An option that asks for more than are left asks for all that may be taken of them."""
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule(x)
    x[:broken] = torch.nan
    with pytest.warns(BrokenMessage):
        found = rule(x)
    left = max(getattr(rule, "f", 0) - broken, 0)
    most = 7 - broken - (left if isinstance(rule, MultiKrum) else 0 if rule.whole else 1)
    same = (
        MultiKrum(left, m=min(rule.m, most))
        if isinstance(rule, MultiKrum)
        else Flag(m=min(rule.m, most), whole=rule.whole)
    )
    torch.testing.assert_close(found, same(x[broken:]))


def test_multi_krum_takes_no_more_than_are_honest():
    with pytest.raises(ValueError, match="m must be at most n - f = 6, got 7"):
        MultiKrum(1, m=7)(torch.randn(7, 3))


def test_nearest_to_own_needs_both_the_products_and_its_own():
    products = torch.eye(3, dtype=torch.float64)
    for info in (Info(3, products), Info(3, products, own=3), Info(3, None, own=0)):
        with pytest.raises(ValueError, match="needs the inner products and the own message's number"):
            NearestToOwn().weights(info)
