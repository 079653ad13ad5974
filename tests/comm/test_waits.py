"""Schedules: when a round closes, how often each worker takes part, and what is refused."""

from __future__ import annotations

import math

import pytest

from weft.comm.combine import Arrival
from weft.comm.wait import Wait
from weft.comm.waits import WAITS, All, Any, Clock, Count, First


def come(*sources: int) -> tuple[Arrival, ...]:
    return tuple(Arrival(source) for source in sources)


def test_all_waits_for_everybody():
    wait = All().sized(3)
    assert wait.close(0, come(0, 2), 99.0) is None
    assert wait.close(0, come(0, 1, 2), 0.1).late == frozenset()


def test_first_leaves_out_the_rest():
    wait = First(2).sized(4)
    assert wait.close(0, come(3), 1.0) is None
    assert wait.close(0, come(1, 3), 1.0).late == {0, 2}


def test_any_and_count():
    assert Any().close(0, (), 5.0) is None
    assert Any().close(0, come(4), 0.0) is not None
    assert Count(3).close(0, come(0, 1), 5.0) is None
    assert Count(3).close(0, come(0, 1, 5), 5.0) is not None


def test_the_clock_closes_on_time_with_whoever_has_come():
    wait = Clock(0.2)
    assert wait.deadline(7) == 0.2
    assert wait.close(0, come(0, 1, 2), 0.1999) is None
    assert wait.close(0, (), 0.2) is not None
    assert wait.close(0, (), 0.6 - 0.4) is not None  # 0.19999999999999996, which is 0.2


def test_the_clock_counts_ticks_exactly():
    """0.6 / 0.2 and 1.1 / 0.1 are not whole numbers in floating point; the times are."""
    assert Clock(0.2).shares([0.6, 0.2, 0.2000001, 1.0]) == (1 / 3, 1.0, 1 / 2, 1 / 5)
    assert Clock(0.1).shares([1.1]) == (1 / 11,)


def test_a_slow_enough_clock_is_all_and_a_fast_one_is_any():
    times = [0.25, 0.5, 1.0]
    assert Clock(1.0).shares(times) == All().sized(3).shares(times) == (1.0, 1.0, 1.0)
    fast = Clock(1e-6).shares(times)
    assert [s / sum(fast) for s in fast] == pytest.approx(Any().shares(times), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10])
def test_shares_of_count_add_up_and_fall_with_time(count):
    times = [0.2 + 0.08 * i for i in range(10)]
    shares = Count(count).shares(times)
    assert sum(shares) == pytest.approx(count)
    assert list(shares) == sorted(shares, reverse=True)
    assert all(0 < share <= 1 for share in shares)


def test_who_never_returns_has_no_share():
    times = [0.5, math.inf, 1.0]
    assert Any().shares(times) == (2 / 3, 0.0, 1 / 3)
    assert Clock(0.5).shares(times) == (1.0, 0.0, 0.5)
    assert Count(2).shares(times) == (1.0, 0.0, 1.0)
    assert First(2).shares(times) == (1.0, 0.0, 1.0)


def test_auto_takes_the_quantile_with_the_wanted_participation():
    times = [0.2 + 0.8 * i / 19 for i in range(20)]
    for part in (1 / 3, 1 / 2, 2 / 3, 1.0):
        chosen = Clock("auto", part=part).sized(20, times)
        means = {dt: sum(1 / math.ceil(t / dt - 1e-9) for t in times) / 20 for dt in times}
        assert abs(means[chosen.dt] - part) == pytest.approx(min(abs(mean - part) for mean in means.values()))


def test_auto_without_times_waits_for_that_part_of_the_workers():
    wait = Clock("auto", part=0.5).sized(5, [math.nan] * 5)
    assert wait.deadline(0) == math.inf
    assert wait.close(0, come(0, 1), 9.0) is None
    assert wait.close(0, come(0, 1, 4), 9.0) is not None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Clock(0), "dt must be seconds > 0"),
        (lambda: Clock(-1.0), "dt must be seconds > 0"),
        (lambda: Clock(math.nan), "dt must be seconds > 0"),
        (lambda: Clock("now"), "dt must be seconds > 0"),
        (lambda: Clock(1.0, part=0), "part must be in"),
        (lambda: Count(0), "count must be a whole number >= 1"),
        (lambda: Count(2.5), "count must be a whole number >= 1"),
        (lambda: First(0), "count must be a whole number >= 1"),
        (lambda: Count(4).sized(3), "at most the number of workers 3"),
        (lambda: First(4).sized(3), "at most the number of workers 3"),
        (lambda: All().sized(0), "must be a whole number >= 1"),
        (lambda: All().close(0, (), 0.0), "number of workers must be known"),
        (lambda: First(2).close(0, come(0, 1), 0.0), "number of workers must be known"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("name", WAITS)
def test_every_schedule_is_pure(name):
    """Asked twice, it says the same; the same rule serves many runs."""
    wait: Wait = {"count": Count(2), "first": First(2), "clock": Clock(0.5)}.get(name) or WAITS[name]()
    assert type(wait) is WAITS[name]
    wait = wait.sized(3, [1.0, 2.0, 3.0])
    for sources in ((), (0,), (0, 2), (0, 1, 2)):
        for now in (0.1, 0.5, 2.0):
            assert wait.close(0, come(*sources), now) == wait.close(0, come(*sources), now)
    assert wait.assign(0, ()) == {}
    assert hash(wait) == hash(wait.sized(3, [1.0, 2.0, 3.0]))
