"""Directions: the hash against plain Python, the order of additions, unbiasedness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comm.zeroth.directions import DIRECTIONS, GOLDEN, PIECE, Normal, Rademacher, seed_of, signs, signs_anywhere

MASK = 2**64 - 1


def splitmix(state: int) -> int:
    """The published generator's output for a state, written from its paper."""
    x = state & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def sign(seed: int, index: int) -> int:
    return 1 if splitmix(seed + (index // 64) * 0x9E3779B97F4A7C15) >> (index % 64) & 1 else -1


def direction(tensors: list[torch.Tensor], seed: int, name: str = "rademacher") -> list[torch.Tensor]:
    z = [torch.zeros_like(tensor) for tensor in tensors]
    DIRECTIONS[name].move(z, z, [(seed, 1.0)])
    return z


def test_the_hash_is_splitmix64():
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first output from state 0, as published
    assert [sign(5, i) for i in range(200)] == signs(5, 0, 4, torch.device("cpu")).int().tolist()[:200]


@given(st.integers(0, MASK), st.integers(0, 10**9), st.integers(1, 40))
def test_numpy_and_torch_make_the_same_signs(seed, first, words):
    ours = signs(seed, first, words, torch.device("cpu"))
    other = signs_anywhere((seed + first * GOLDEN) & MASK, words, torch.device("cpu"))
    assert torch.equal(ours, other)


def test_every_entry_is_a_function_of_seed_and_index():
    """A tensor starts at a word of its own; pieces and groups of tensors do not show."""
    sizes = [3, 64, 65, PIECE + 100, 2 * PIECE, 1]
    z = direction([torch.empty(size) for size in sizes], 77)
    first = 0
    for size, found in zip(sizes, z, strict=True):
        for i in {0, 1, size // 2, min(PIECE, size - 1), size - 1} & set(range(size)):
            assert found[i] == sign(77, 64 * first + i), (size, i)
        first += -(-size // 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_terms_are_added_one_after_the_other(name, dtype):
    torch.manual_seed(0)
    start = [torch.randn(5, 7), torch.randn(()), torch.randn(300), torch.randn(0)]
    start = [tensor.to(dtype) for tensor in start]
    terms = [(seed_of(1, t, 0, 0), c) for t, c in enumerate([0.1, -3.3e-4, 7.0, 1e-9])]
    to = [torch.full_like(tensor, 9.0) for tensor in start]
    DIRECTIONS[name].move(to, start, terms)
    for place, tensor in enumerate(start):
        expected = tensor.clone()
        for seed, c in terms:
            z = direction(start, seed, name)[place]
            z = z.float() if name == "rademacher" else z  # signs are added in single precision to what is shorter
            expected = expected.add(z, alpha=c).to(dtype)
        assert torch.equal(to[place], expected)
    before = [tensor.clone() for tensor in start]
    DIRECTIONS[name].move(to, start, [])
    assert all(torch.equal(a, b) for a, b in zip(to, before, strict=True))
    DIRECTIONS[name].move(start, start, terms)  # in place
    DIRECTIONS[name].move(to, before, terms)
    assert all(torch.equal(a, b) for a, b in zip(to, start, strict=True))


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 200)] * 4), min_size=2, max_size=50, unique=True))
def test_triples_have_seeds_of_their_own(triples):
    assert len({seed_of(*triple) for triple in triples}) == len(triples)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name in DIRECTIONS:
        direction([torch.empty(100)], 5, name)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [Rademacher(), Normal()], ids=["rademacher", "normal"])
def test_g_times_z_is_the_gradient_on_average(kind):
    """20,000 directions on a quadratic: every entry of the mean within 3 standard errors of the true gradient."""
    torch.manual_seed(0)
    a = torch.randn(12, 12, dtype=torch.float64)
    a, theta, eps = a @ a.T / 12, torch.randn(12, dtype=torch.float64), 1e-3
    z = torch.zeros(20_000, 12, dtype=torch.float64)
    for k in range(20_000):
        kind.move([z[k]], [z[k]], [(seed_of(0, 0, 0, k), 1.0)])
    plus, minus = theta + eps * z, theta - eps * z
    g = ((plus @ a * plus).sum(1) / 2 - (minus @ a * minus).sum(1) / 2) / (2 * eps)
    samples = g[:, None] * z
    error = (samples.mean(0) - a @ theta).abs()
    assert (error <= 3 * samples.std(0) / 20_000**0.5).all()
