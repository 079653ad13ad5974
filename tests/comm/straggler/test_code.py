"""Gradient codes: every late set of at most s workers, for every s < n <= 8."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from weft.comm.straggler.code import cyclic, decode, repetition


def late_sets(n, s):
    for chosen in combinations(range(n), s):
        late = np.zeros(n, dtype=bool)
        late[list(chosen)] = True
        yield late


@pytest.mark.parametrize("n", range(1, 9))
def test_cyclic_decodes_every_late_set(n):
    gradients = np.random.default_rng(n).standard_normal((n, 50))
    whole = gradients.sum(0)
    for s in range(n):
        code, condition = cyclic(n, s), 0.0
        assert all(set(np.flatnonzero(row)) == {(i + k) % n for k in range(s + 1)} for i, row in enumerate(code))
        single = (code.astype(np.float32) @ gradients.astype(np.float32)).astype(np.float32)
        for late in late_sets(n, s):
            weights = decode(code, late)
            assert weights is not None and not weights[late].any()
            assert np.linalg.norm(weights @ (code @ gradients) - whole) <= 1e-10 * np.linalg.norm(whole)
            assert np.linalg.norm(weights @ single - whole) <= 1e-5 * np.linalg.norm(whole)
            condition = max(condition, np.abs(weights).max() * np.abs(code).sum(1).max())
        print(f"n = {n}, s = {s}: rounding errors are enlarged at most {condition:.0f} times")
        if 0 < s < n - 1:
            assert any(decode(code, late) is None for late in late_sets(n, s + 1))  # s + 1 late are too many


@pytest.mark.parametrize(("n", "s"), [(n, s) for n in range(1, 9) for s in range(n) if n % (s + 1) == 0])
def test_repetition_is_exact(n, s):
    gradients = np.random.default_rng(n).integers(-1000, 1000, (n, 20)).astype(float)
    code = repetition(n, s)
    for late in late_sets(n, s):
        weights = decode(code, late)
        assert set(np.unique(weights)) <= {0.0, 1.0} and not weights[late].any()
        assert (weights @ (code @ gradients) == gradients.sum(0)).all()


def test_a_large_code_is_well_conditioned():
    code, late = cyclic(64, 7), np.zeros(64, dtype=bool)
    late[np.random.default_rng(0).choice(64, 7, replace=False)] = True
    weights = decode(code, late)
    assert np.abs(weights).max() * np.abs(code).sum(1).max() < 1e5
    assert np.allclose(weights @ code, 1, atol=1e-10)


@pytest.mark.parametrize("n", [16, 32, 80])
def test_no_two_late_workers_hold_the_same_half_of_a_pair(n):
    """Where n shares factors with the phases tried, a cosine has the same value at two workers: nothing decodes without both."""
    code = cyclic(n, 2)
    for late in late_sets(n, 2):
        if n < 50 or late[:3].any():
            weights = decode(code, late)
            assert weights is not None and np.allclose(weights @ code, 1, atol=1e-9)


def test_impossible_codes():
    with pytest.raises(ValueError, match="s must be in"):
        cyclic(4, 4)
    with pytest.raises(ValueError, match="must divide"):
        repetition(4, 2)
