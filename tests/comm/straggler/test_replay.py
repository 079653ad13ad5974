"""The virtual clock against the policies themselves, and `fit` against trying everything."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weft.comm.combine import Arrival
from weft.comm.straggler.gc import GC, Uncoded
from weft.comm.straggler.lateness import Arbitrary, Bursty, PerRound, gilbert_elliott
from weft.comm.straggler.m_sgc import MSGC
from weft.comm.straggler.replay import candidates, fit, ranking, replay, scaled, slope
from weft.comm.straggler.sr_sgc import SRSGC


def record(rounds, n, late=0.1, recover=0.7, seed=0):
    pattern, generator = gilbert_elliott(rounds, n, late, recover, seed), np.random.default_rng(seed)
    return np.where(pattern, generator.uniform(2, 6, pattern.shape), generator.uniform(1, 1.1, pattern.shape))


def never(worker):
    times = np.ones((20, 4))
    times[:, worker] = math.inf
    return times


def by_events(scheme, times):
    """Rounds driven by single arrivals and by the clock, through assign and close."""
    n = times.shape[1]
    scheme = scheme.sized(n)
    history, seconds = [], []
    for t, row in enumerate(times * scaled(scheme, 3.0)):
        arrivals, decision, now = [], None, 0.0
        waiting = [int(i) for i in np.argsort(row, kind="stable")]
        while decision is None:
            wake = scheme.wake(arrivals)
            if wake > now and (not waiting or wake < row[waiting[0]]) and not math.isinf(wake):
                now = wake
            else:
                arrivals.append(Arrival(waiting[0], seconds=row[waiting[0]]))
                now = row[waiting.pop(0)]
            decision = scheme.close(t, arrivals, now, history)
        history.append(decision)
        seconds.append(now)
    late = np.array([[i in decision.late for i in range(n)] for decision in history])
    return np.array(seconds), late


@pytest.mark.parametrize(
    "scheme",
    [Uncoded(), Uncoded(drop=2), GC(2), GC(2, mu=1.0), GC(1, "repetition"), SRSGC(2, 3, 3), SRSGC(1, 3, 2, mu=0.3),
     MSGC(1, 2, 3), MSGC(2, 4, 2, mu=0.5), MSGC(1, 3, 8)],
    ids=str,
)  # fmt: skip
def test_the_virtual_clock_is_the_policy_event_by_event(scheme):
    times = record(40, 8)
    run = replay(scheme, times, 3.0, carry=False)
    seconds, late = by_events(scheme, times)
    assert np.array_equal(run.late, late) and np.allclose(run.seconds, seconds, rtol=1e-12)
    assert run.total == pytest.approx(seconds.sum())


def test_a_late_worker_finishes_what_it_began_and_skips_what_it_missed():
    times, s = record(60, 6), 2
    begin, free, seconds, late = 0.0, np.zeros(6), [], []
    for row in times:  # GC closes with the n - s-th result; a mailbox holds the newest order only
        comes = np.maximum(free, begin) + row
        end = np.sort(comes)[-s - 1]
        free = np.where(np.maximum(free, begin) <= end, comes, free)
        seconds.append(end - begin)
        late.append(comes > end)
        begin = end
    run = replay(GC(s), times, 0.0)
    assert np.allclose(run.seconds, seconds) and np.array_equal(run.late, late)
    burst = np.ones((12, 4))
    burst[0, 0] = 7.5
    assert replay(GC(1), burst, 0.0).late[:7, 0].all() and not replay(GC(1), burst, 0.0, carry=False).late[1:].any()


@pytest.mark.parametrize("message", [0.0, 0.3])
def test_fit_is_the_best_of_all(capsys, message):
    times = record(40, 6)
    best = fit(times, 5.0, max_delay=2, message=message)
    every = {scheme: replay(scheme, times, 5.0, message=message).total for scheme in candidates(6, 2)}
    assert every[best] == min(every.values()) and best.delay <= 2
    table = capsys.readouterr().out
    assert all(family in table for family in ("Uncoded", "GC", "SRSGC", "MSGC")) and "of best" in table
    assert len(ranking(times, 5.0, candidates(6, 2), message=message)) == 4
    among = [Uncoded(), MSGC(1, 3, 1, mu=0.1)]  # three messages where the other makes one
    assert type(fit(times, 5.0, 2, among=among, message=message)) is (Uncoded if message else MSGC)


def test_nobody_late_means_uncoded_and_one_model_means_no_delay():
    assert fit(np.ones((20, 8)), 5.0, max_delay=3, show=False) == Uncoded(workers=8)
    assert fit(record(40, 8), 5.0, max_delay=0, show=False).delay == 0


def test_slope():
    assert slope([0.1, 0.3, 0.5], [1.2, 1.6, 2.0]) == pytest.approx(2.0)
    assert slope([0.1, 0.2], [1.0, 2.0]) == pytest.approx(math.inf) or slope([0.1, 0.2], [1.0, 2.0]) > 1e9
    assert slope([0.1, 0.2], [1.0, 0.9]) == 0.0
    assert scaled(GC(3, workers=8), math.inf) == 4 and scaled(Uncoded(workers=8), 7.0, 0.5) == 1
    split = MSGC(1, 2, 0, workers=8)
    assert split.load == pytest.approx(1 / 8) and scaled(split, 7.0, 0.5) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="two different loads"):
        slope([0.1, 0.1], [1.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(np.ones((5, 4)), 1.0, 1), "at least 10 rounds"),
        (lambda: fit(np.ones((20, 4)), -1.0, 1), "slope must be"),
        (lambda: fit(np.ones((20, 4)), math.nan, 1), "slope must be"),
        (lambda: fit(np.ones((20, 4)), 1.0, 1, message=-0.1), "message must be"),
        (lambda: fit(np.zeros((20, 4)), 1.0, 1), "seconds > 0"),
        (lambda: fit(np.ones(20), 1.0, 1), "matrix"),
        (lambda: fit(np.ones((20, 4)), 1.0, -1), "max_delay"),
        (lambda: fit(np.ones((20, 4)), 1.0, 1, among=[]), r"delay of at most max_delay = 1, got delays \[\]"),
        (lambda: fit(np.ones((20, 4)), 1.0, 0, among=[MSGC(1, 2, 1)]), r"max_delay = 0, got delays \[1\]"),
        (lambda: fit(never(3), 1.0, 0, among=[Uncoded()]), r"workers \[3\] do not come"),
        (lambda: gilbert_elliott(10, 4, 0.0, 0.5, 0), "must be in"),
    ],
)
def test_bad_records(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lateness_models():
    late = np.array([[1, 0], [1, 0], [0, 0], [0, 1]], dtype=bool)
    assert Bursty(2, 3, 1).allows(late[:3]) and not Bursty(1, 3, 1).allows(late)
    assert not Bursty(2, 3, 1).allows(late) and Bursty(2, 3, 2).allows(late)
    assert not Bursty(2, 3, 2).allows(np.array([[1], [0], [1]], dtype=bool))  # twice in a window, not one burst
    assert Arbitrary(2, 3, 1).allows(np.array([[1], [0], [1]], dtype=bool))
    assert PerRound(1).allows(late) and not PerRound(0).allows(late)


def test_gilbert_elliott_has_its_rates():
    late = gilbert_elliott(20_000, 8, 0.05, 0.5, 3)
    assert late.mean() == pytest.approx(0.05 / 0.55, rel=0.05)
    assert (late[1:] & late[:-1]).sum() / late[:-1].sum() == pytest.approx(0.5, rel=0.05)
    assert np.array_equal(late, gilbert_elliott(20_000, 8, 0.05, 0.5, 3))
