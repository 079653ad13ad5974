"""One battery over the whole table of codecs: what `weft.comm.codec` promises of every one, with each of its settings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.comm.codec import Codec, LinearCodec, Setting, Spec
from weft.comm.codecs import CODECS, Cast, Identity, LowRank, Quantise, RandK, ScalarSeed, SharedRandK, Sign, TopK

OPTIONS: dict[str, tuple[Codec, ...]] = {  # a codec that is not named here is tested with its defaults
    "cast": (Cast(), Cast("bfloat16")),
    "identity": (Identity(),),
    "low-rank": (LowRank(), LowRank(2, warm=False)),
    "quantise": tuple(
        Quantise(scale=scale, stochastic=stochastic, bucket=64)
        for scale in ("range", "max", "norm")
        for stochastic in (True, False)
    ),
    "rand-k": (RandK(), RandK(unbiased=False), RandK(shared=True)),
    "scalar-seed": (ScalarSeed(), ScalarSeed(unbiased=False)),
    "shared-rand-k": (SharedRandK(), SharedRandK(unbiased=True)),
    "sign": (Sign(), Sign(scale="sides")),
    "top-k": (TopK(), TopK(selection="exact"), TopK(values=torch.float16)),
}
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "low-rank": (1, 4),
    "quantise": (2, 3, 8),  # all widths: test_packing.py
    "rand-k": (0.001, 0.1, 0.7),
    "scalar-seed": (1, 3),
    "shared-rand-k": (0.001, 0.1, 0.7),
    "sign": (0, 7),
    "top-k": (0.001, 0.1, 0.7),
}
CASES = [
    (name, codec, setting)
    for name in CODECS
    for codec in OPTIONS.get(name, (CODECS[name](),))
    for setting in SETTINGS.get(name, (CODECS[name]().default(Spec("w", (4, 4))),))
]


def moved(tensor, by):
    """The same values elsewhere in memory, `by` entries behind an aligned address."""
    place = tensor.new_empty(tensor.numel() + by)[by:].view(tensor.shape)
    return place.copy_(tensor)


def cases(chosen=CASES):
    return pytest.mark.parametrize(("name", "codec", "setting"), chosen, ids=str)


CONTRACTIVE = [case for case in CASES if case[1].contraction(Spec("w", (1, 1)), case[2]) > 0]
UNBIASED = [case for case in CASES if case[1].unbiased and not isinstance(case[1], Identity)]

shapes = st.one_of(st.just((1,)), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 700)))
vectors = st.builds(
    lambda seed, shape, scale: (
        scale * torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed)),
        Spec("w", shape),
    ),
    st.integers(0, 2**31),
    shapes,
    st.sampled_from([0.0, 1e-20, 1.0, 1e15]),
)


def state(seed: int = 0) -> dict[str, int]:
    return {"seed": seed, "shared_seed": seed + 1}


def squared(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def test_every_class_of_the_table_is_a_codec_that_needs_no_options():
    for name, codec in CODECS.items():
        assert issubclass(codec, Codec), name
        assert codec() == codec(), f"{name}: options are frozen and compare equal"


@cases()
@settings(max_examples=6, deadline=None)
@given(given_vector=vectors)
def test_messages_have_the_declared_sizes_and_add_up_to_what_is_decoded(name, codec, setting, given_vector):
    x, spec = given_vector
    assume(not (codec == Cast("float16") and x.abs().max() > 65504))  # beyond its range: the exchange skips the step
    before = x.clone()
    message = codec.encode(x, spec, state(), setting, 0)
    assert [(tuple(part.shape), part.dtype) for part in message] == [tuple(p) for p in codec.message(spec, setting)]
    assert torch.equal(x, before)
    decoded = codec.decode(message, spec, setting)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    if not isinstance(codec, SharedRandK):  # its positions do not travel
        assert codec.nbytes(spec, setting) == sum(part.numel() * part.element_size() for part in message)
    values, where = codec.sent(message, spec, setting)
    scattered = values if where is None else torch.zeros(spec.numel).index_add_(0, where, values)
    assert torch.equal(scattered, decoded)
    out = torch.ones(spec.numel)
    codec.add_to(out, message, spec, setting, weight=0.5)
    assert torch.allclose(out, 1 + 0.5 * decoded, rtol=1e-6)


@cases(CONTRACTIVE)
@settings(max_examples=10, deadline=None)
@given(given_vector=vectors)
def test_contraction(name, codec, setting, given_vector):
    x, spec = given_vector
    contraction = codec.contraction(spec, setting)
    assert 0 <= contraction <= 1
    draws = 64 if isinstance(codec, RandK | SharedRandK | ScalarSeed) else 1  # promised in the mean
    errors = [
        squared(x.double() - codec.decode(codec.encode(x, spec, state(draw), setting, draw), spec, setting).double())
        for draw in range(draws)
    ]
    mean, spread = torch.tensor(errors).mean(), torch.tensor(errors).std() / math.sqrt(draws) if draws > 1 else 0.0
    assert mean <= (1 - contraction + 1e-6) * squared(x) + 5 * spread


@cases(UNBIASED)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_unbiased_codecs_are_unbiased_with_the_promised_variance(name, codec, setting, scale):
    spec, draws = Spec("w", (10, 9)), 300
    x = scale * torch.randn(90, generator=torch.Generator().manual_seed(5))
    decoded = torch.stack(
        [codec.decode(codec.encode(x, spec, state(), setting, step), spec, setting) for step in range(draws)]
    ).double()
    errors = (decoded - x.double()) / scale
    # 3 standard errors for the sum of all entries, 5 for the worst of 90: of the typical entry at least, as one that is
    # hardly ever rounded up shows no spread at all. The floor is what float32 and 16-bit noise cut off.
    standard_error = errors.std(0) / math.sqrt(draws)
    assert (errors.mean(0).abs() <= 5 * standard_error.clamp(min=float(standard_error.mean())) + 2e-4).all()
    total = errors.sum(1)
    assert abs(total.mean()) <= 3 * total.std() / math.sqrt(draws) + 2e-3
    energy = errors.square().sum(1)
    promised = codec.variance(spec, setting) * squared(x) / scale**2
    assert energy.mean() <= promised * (1 + 1e-5) + 4 * energy.std() / math.sqrt(draws)


@cases()
def test_draws_depend_on_seed_and_step_alone(name, codec, setting):
    spec = Spec("w", (60, 50))
    x = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = codec.encode(x, spec, state(4), setting, 7)
    torch.manual_seed(2)
    again = codec.encode(x, spec, state(4), setting, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(codec.decode(first, spec, setting), codec.decode(again, spec, setting))
    if codec.unbiased and not isinstance(codec, Identity):
        later = codec.encode(x, spec, state(4), setting, 8)
        other = codec.encode(x, spec, state(5), setting, 7)
        for message in (later, other):
            assert not torch.equal(codec.decode(message, spec, setting), codec.decode(first, spec, setting))


@cases([case for case in CASES if case[0] == "quantise"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_grids_of_tiny_and_huge_tensors_are_the_same(name, codec, setting, scale):
    """About 1e-30 and 1e30, whose squares float32 has not: a power of two changes no bit of what it multiplies."""
    spec = Spec("w", (30, 20))
    x = torch.randn(600, generator=torch.Generator().manual_seed(2))
    packed, scales = codec.encode(x, spec, state(), setting, 0)
    others, further = codec.encode(scale * x, spec, state(), setting, 0)
    assert torch.equal(packed, others) and torch.equal(scale * scales, further)


@cases()
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (65,), (9, 7)])
def test_zeros_stay_zeros(name, codec, setting, shape):
    spec = Spec("w", shape)
    kept = state()
    for step in range(3):  # and leave nothing behind that spoils later steps
        message = codec.encode(torch.zeros(spec.numel), spec, kept, setting, step)
        assert torch.equal(codec.decode(message, spec, setting), torch.zeros(spec.numel))
    x = torch.randn(spec.numel)
    assert codec.decode(codec.encode(x, spec, kept, setting, 3), spec, setting).isfinite().all()


@cases()
def test_strided_tensors_and_wider_ones_are_coded_alike(name, codec, setting):
    spec = Spec("w", (30, 20))
    wide = torch.randn(1200, generator=torch.Generator().manual_seed(3))
    strided = wide[::2]
    reference = codec.encode(strided.contiguous(), spec, state(), setting, 0)
    for x in (strided,) if isinstance(codec, Identity) else (strided, strided.double()):
        message = codec.encode(x, spec, state(), setting, 0)
        assert [part.dtype for part in message] == [part.dtype for part in reference]
        assert torch.allclose(codec.decode(message, spec, setting), codec.decode(reference, spec, setting))


@pytest.mark.parametrize("name", CODECS)
def test_settings_may_change_from_step_to_step(name):
    for codec in OPTIONS.get(name, (CODECS[name](),)):
        spec, kept = Spec("w", (40, 30)), state()
        x = torch.randn(1200, generator=torch.Generator().manual_seed(6))
        choices = SETTINGS.get(name, (codec.default(spec),))
        for step, setting in enumerate((*choices, *reversed(choices), *choices)):
            message = codec.encode(x, spec, kept, setting, step)
            assert [tuple(part.shape) for part in message] == [shape for shape, _ in codec.message(spec, setting)]
            assert codec.decode(message, spec, setting).isfinite().all()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=6, deadline=None)
@given(given_vector=vectors)
def test_error_gives_what_encoding_loses(name, given_vector):
    x, spec = given_vector
    for codec in OPTIONS.get(name, (CODECS[name](),)):
        assume(not (codec == Cast("float16") and x.abs().max() > 65504))
        choices = SETTINGS.get(name, (codec.default(spec),))
        found = codec.error(x, spec, choices)
        assert len(found) == len(choices) and all(error >= 0 for error in found)
        for setting, error in zip(choices, found, strict=True):
            if isinstance(codec, RandK | SharedRandK | ScalarSeed):
                continue  # an expectation: measured against draws in test_expected_errors
            message = codec.encode(x, spec, state(), setting, 0)
            lost = squared(x.double() - codec.decode(message, spec, setting).double())
            if isinstance(codec, LowRank) or (isinstance(codec, TopK) and codec.selection == "sampled"):
                assert error <= lost + 1e-5 * squared(x)  # the best possible: by SVD, by one sort
            elif isinstance(codec, TopK):
                assert math.isclose(error, lost, rel_tol=1e-4, abs_tol=1e-5 * squared(x))
            else:
                assert math.isclose(error, codec.error(x, spec, [setting])[0], rel_tol=1e-9)


@pytest.mark.parametrize("codec", [RandK(), RandK(unbiased=False), ScalarSeed(), ScalarSeed(unbiased=False)], ids=str)
def test_expected_errors(codec):
    spec, draws = Spec("w", (8, 8)), 500
    x = torch.randn(64, generator=torch.Generator().manual_seed(8))
    setting = 0.1 if isinstance(codec, RandK) else 2
    lost = torch.tensor(
        [
            squared(x - codec.decode(codec.encode(x, spec, state(), setting, step), spec, setting))
            for step in range(draws)
        ]
    )
    expected = codec.error(x, spec, [setting])[0]
    assert abs(lost.mean() - expected) <= 4 * lost.std() / math.sqrt(draws)


@pytest.mark.parametrize("name", [name for name in CODECS if issubclass(CODECS[name], LinearCodec)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rounds_of_linear_codecs_agree_on_all_ranks(name, ranks):
    """The rounds, averaged by hand between ranks: every rank gets the same bits, and of one rank alone what it decodes."""
    codec, spec = CODECS[name](), Spec("w", (40, 30))
    setting = SETTINGS.get(name, (codec.default(spec),))[-1]
    xs = [torch.randn(1200, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]
    states = [{"seed": rank, "shared_seed": 9} for rank in range(ranks)]
    results = all_rounds(codec, xs, spec, states, setting, 0)
    assert all(torch.equal(result, results[0]) for result in results)
    values, where = codec.own(xs[0], results[0], spec, states[0], setting)
    assert values.shape == ((1200,) if where is None else where.shape)
    if ranks == 1:
        message = codec.encode(xs[0], spec, {"seed": 0, "shared_seed": 9}, setting, 0)
        assert torch.allclose(codec.decode(message, spec, setting), results[0], atol=1e-5)


def all_rounds(codec, xs, spec, states, setting, step):
    """Run a linear codec's rounds on all ranks of one process, exact means between them."""
    generators = [codec.rounds(x.clone(), spec, kept, setting, step) for x, kept in zip(xs, states, strict=True)]
    sent, results = [next(generator) for generator in generators], []
    while not results:
        mean = torch.stack(sent).mean(0)
        sent = []
        for generator in generators:
            try:
                sent.append(generator.send(mean.clone()))
            except StopIteration as end:
                results.append(end.value)
    return results


BAD = [
    ("top-k", {"ratio": 0.0}, "ratio"),
    ("top-k", {"ratio": 1.5}, "ratio"),
    ("top-k", {"ratio": float("nan")}, "ratio"),
    ("top-k", {"selection": "fast"}, "selection"),
    ("top-k", {"values": torch.int8}, "values"),
    ("top-k", {"sample": 0.0}, "sample"),
    ("rand-k", {"ratio": -0.1}, "ratio"),
    ("shared-rand-k", {"ratio": 2.0}, "ratio"),
    ("quantise", {"bits": 1}, "bits"),
    ("quantise", {"bits": 9}, "bits"),
    ("quantise", {"bits": 4.0}, "bits"),
    ("quantise", {"bucket": 0}, "bucket"),
    ("quantise", {"scale": "l1"}, "scale"),
    ("sign", {"bucket": -1}, "bucket"),
    ("sign", {"scale": "max"}, "scale"),
    ("low-rank", {"rank": 0}, "rank"),
    ("scalar-seed", {"directions": 0}, "directions"),
]


@pytest.mark.parametrize(("name", "options", "argument"), BAD, ids=str)
def test_bad_options_are_named(name, options, argument):
    with pytest.raises(ValueError, match=rf"\b{argument} must be .*got"):
        CODECS[name](**options)


@pytest.mark.parametrize(
    ("name", "setting"), [("top-k", 0), ("rand-k", 1.1), ("quantise", 16), ("low-rank", 0.5), ("sign", -2), ("scalar-seed", "4")]
)  # fmt: skip
def test_bad_settings_are_named_too(name, setting):
    """A controller's slip must not end in a wrong message size on the wire."""
    codec, spec = CODECS[name](), Spec("w", (4, 4))
    with pytest.raises(ValueError, match=r"must be .*got"):
        codec.message(spec, setting)
    with pytest.raises(ValueError, match=r"must be .*got"):
        codec.encode(torch.ones(16), spec, state(), setting, 0)


def test_a_cast_takes_torchs_types():
    assert Cast(torch.bfloat16) == Cast("bfloat16")
    with pytest.raises(ValueError, match=r"must be one of \['bfloat16', 'float16'\], got torch.int8"):
        Cast(torch.int8)


@cases()
def test_bits_do_not_depend_on_where_a_tensor_lies(name, codec, setting):
    """A bucket begins anywhere, and buckets change: a matrix product's or a dot product's bits change with the address."""
    spec = Spec("w", (70, 150))
    x = torch.randn(spec.numel, generator=torch.Generator().manual_seed(0))
    found = []
    for by in (0, 1, 5):
        state = {"seed": 1, "shared_seed": 2}
        message = codec.encode(moved(x, by), spec, state, setting, 0)
        made = [*message, codec.decode([moved(part, by) for part in message], spec, setting)]
        if isinstance(codec, LinearCodec):
            talk = codec.rounds(moved(x, by), spec, {"seed": 1, "shared_seed": 2}, setting, 0)
            mean = next(talk)
            try:
                while True:
                    mean = talk.send(moved(mean, by))
            except StopIteration as stop:
                made.append(stop.value)
        found.append(made)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
