"""What the server knows of its clients' speed: declared, then measured; counted shares against the law of large numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weft.comm.waits import Any
from weft.federated import Participation
from weft.federated.participation import RELIABLE


def test_declared_times_hold_until_enough_results_have_come():
    books = Participation([2.0, math.nan])
    for _ in range(RELIABLE - 1):
        books.measured(0, 6.0)
    assert books.time(0) == 2.0
    books.measured(0, 6.0)
    assert books.time(0) == 6.0
    assert math.isnan(books.time(1))
    books.measured(1, 3.0)
    assert books.time(1) == 3.0


def test_what_nobody_declared_is_guessed():
    books = Participation([1.0, 3.0, math.nan, math.nan])
    assert books.times([0.0, 0.0, 0.5, 7.0]) == [1.0, 3.0, 2.0, 7.0]  # the mean, but at least as long as it is out
    nothing = Participation([math.nan] * 3)
    assert Any().shares(nothing.times([0.0] * 3)) == pytest.approx((1 / 3,) * 3)


def test_estimated_times_and_shares_converge():
    """A client that declared a third of its time and takes part in a random tenth of the aggregations."""
    random, books, mean = np.random.default_rng(0), Participation([1.0]), 3.0
    errors = []
    for n in range(100_000):
        if random.random() < 0.1:
            books.measured(0, mean * random.lognormal(-0.08, 0.4))
            books.took_part(0, n)
            if books.count[0] in (100, 1000, 9000):
                errors.append(abs(books.share(0, prior=0.9) - 0.1))
    assert errors[0] < 0.04 and errors[1] < 0.01 and errors[2] < 0.004
    assert books.time(0) == pytest.approx(mean, rel=0.02)


def test_shares_of_a_beat_are_exact():
    """From participation to participation, so that when the first one was does not matter."""
    books = Participation([1.0])
    for k in range(RELIABLE + 1):
        assert books.share(0, prior=0.5) == 0.5
        books.took_part(0, 2 + 3 * k)
    assert books.share(0, prior=0.5) == 1 / 3
