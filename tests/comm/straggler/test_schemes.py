"""Schemes by brute force: every conforming late pattern decodes by its deadline, whatever the scheme says of itself.

The oracle is a plain executor: integer chunk gradients, workers that lose a whole round when late, messages added up as tasks
say. A job must come out as the sum over all chunks, each counted exactly once.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from weft.comm.combine import Arrival
from weft.comm.straggler.gc import GC, Uncoded
from weft.comm.straggler.lateness import Arbitrary, Bursty, PerRound
from weft.comm.straggler.m_sgc import MSGC
from weft.comm.straggler.sr_sgc import SRSGC


def execute(scheme, late, patient=False):
    """Run a late pattern (rounds, n) through the scheme with one arrival a second-fraction; give the decoded jobs, or None if the
    scheme would not close a round (with `patient`, late workers come then, after 10 seconds)."""
    rounds, n = late.shape
    scheme = scheme.sized(n)
    chunks = len(scheme.fractions())
    identity = np.eye(chunks)  # the gradient of chunk c is the unit vector c
    history, inbox, done = [], {}, {}
    for t in range(rounds):
        tasks = scheme.assign(t, history)
        order = [int(i) for i in np.flatnonzero(~late[t])]
        arrivals, decision = [], None
        for i in order:
            arrivals.append(Arrival(i, seconds=1.0))
            decision = scheme.close(t, arrivals, 1.0, history)
            assert decision is None or len(arrivals) == len(order) or scheme.mu == 0
            if decision is not None:
                break
        if decision is None:
            decision = scheme.close(t, arrivals, 1.0 + scheme.mu, history)
        if decision is None and patient:
            for i in np.flatnonzero(late[t]):
                arrivals.append(Arrival(int(i), seconds=10.0))
                decision = scheme.close(t, arrivals, 10.0, history)
                if decision is not None:
                    break
        if decision is None:
            return None
        assert decision.tasks == tasks
        for i in set(range(n)) - decision.late:
            for task in tasks[i]:
                inbox.setdefault(task.job, {}).setdefault((t, i), np.zeros(chunks))
                inbox[task.job][t, i] += task.coefficient * identity[task.chunk]
        for job, weights in decision.jobs.items():
            assert job not in done and 0 <= t - job <= scheme.delay
            done[job] = sum(weight * inbox[job][key] for key, weight in weights.items())
        history.append(decision)
    return done


def decodes_all(scheme, late, **options):
    done = execute(scheme, late, **options)
    delay = scheme.sized(late.shape[1]).delay
    return (
        done is not None
        and set(range(max(0, len(late) - delay))) <= set(done)
        and all(np.allclose(sums, 1.0, rtol=0, atol=1e-9) for sums in done.values())
    )


def patterns(model, rounds, n):
    """All conforming patterns in which somebody is on time in every round, grown round by round from conforming prefixes."""
    rows = [np.array(row, dtype=bool) for row in product((False, True), repeat=n) if not all(row)]
    back = getattr(model, "W", 1)
    found = [np.zeros((0, n), dtype=bool)]
    for _ in range(rounds):
        longer = (np.vstack((head, row)) for head in found for row in rows)
        found = [pattern for pattern in longer if model.allows(pattern[-back:])]
    return found


def random_pattern(model, rounds, n, generator):
    """A dense conforming pattern: late marks are thrown in, those that break the model taken out."""
    late = np.zeros((rounds, n), dtype=bool)
    for t in range(rounds):
        for i in generator.permutation(n):
            if generator.random() < 0.6:
                late[t, i] = True
                if late[t].all() or not model.allows(late[: t + 1]):
                    late[t, i] = False
    return late


GCS = [(n, s, kind) for n in (3, 4) for s in range(n) for kind in ("cyclic", "repetition")
       if kind == "cyclic" or n % (s + 1) == 0]  # fmt: skip
CASES = [  # scheme, its model, n, rounds: all patterns
    (SRSGC(1, 2, 2), Bursty(1, 2, 2), 3, 5),
    (SRSGC(1, 2, 1), Bursty(1, 2, 1), 3, 5),
    (SRSGC(1, 3, 2), Bursty(1, 3, 2), 3, 5),
    (SRSGC(2, 3, 2), Bursty(2, 3, 2), 3, 5),
    (SRSGC(1, 2, 2), PerRound(1), 3, 5),
    (MSGC(1, 2, 2), Bursty(1, 2, 2), 3, 5),
    (MSGC(1, 2, 1), Bursty(1, 2, 1), 3, 5),
    (MSGC(1, 2, 2), Arbitrary(1, 2, 2), 3, 5),
    (MSGC(1, 3, 1), Bursty(1, 3, 1), 3, 5),
    (MSGC(2, 3, 2), Bursty(2, 3, 2), 3, 5),
    (MSGC(2, 3, 3), Bursty(2, 3, 3), 3, 5),
    (MSGC(1, 2, 3), Arbitrary(1, 2, 3), 3, 5),
    (MSGC(2, 3, 1), Arbitrary(2, 4, 1), 3, 5),
]
RANDOM = [
    (SRSGC(2, 3, 4), Bursty(2, 3, 4), 6), (SRSGC(2, 5, 3), Bursty(2, 5, 3), 6), (SRSGC(3, 4, 5), Bursty(3, 4, 5), 7),
    (SRSGC(1, 4, 4), PerRound(1), 6), (MSGC(2, 4, 3), Bursty(2, 4, 3), 6), (MSGC(3, 4, 2), Bursty(3, 4, 2), 5),
    (MSGC(2, 3, 2), Arbitrary(2, 4, 2), 6), (MSGC(1, 4, 5), Bursty(1, 4, 5), 5), (MSGC(2, 5, 3), Arbitrary(2, 6, 3), 6),
]  # fmt: skip


@pytest.mark.parametrize(("n", "s", "kind"), GCS)
def test_gc_decodes_every_late_set(n, s, kind):
    for count in range(s + 1):
        for chosen in combinations(range(n), count):
            late = np.zeros((1, n), dtype=bool)
            late[0, list(chosen)] = True
            assert decodes_all(GC(s, kind), late) and decodes_all(GC(s, kind, mu=1.0), late)


def test_repetition_bears_more_than_s_and_cyclic_waits():
    late = np.array([[True, False, False, True]])
    assert decodes_all(GC(1, "repetition"), late)
    assert execute(GC(1), late) is None and decodes_all(GC(1), late, patient=True)
    assert execute(GC(1, "repetition"), np.array([[True, True, False, False]])) is None


@pytest.mark.parametrize(("scheme", "model", "n", "rounds"), CASES, ids=str)
def test_all_conforming_patterns_decode(scheme, model, n, rounds):
    every = patterns(model, rounds, n)
    chosen = np.random.default_rng(0).permutation(len(every))[:100]  # all of them: the slow test
    assert len(every) > 20
    for k in chosen:
        assert decodes_all(scheme, every[k]), every[k].astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "model", "n", "rounds"), CASES, ids=str)
def test_all_conforming_patterns_decode_in_full(scheme, model, n, rounds):
    longer = min(rounds + 1, 2 * scheme.W + scheme.B)
    every = patterns(model, longer, n)
    picked = (
        every if len(every) <= 4_000 else [every[k] for k in np.random.default_rng(1).permutation(len(every))[:4_000]]
    )
    for late in picked:
        assert decodes_all(scheme, late), late.astype(int)


@pytest.mark.parametrize(("scheme", "model", "n"), RANDOM, ids=str)
def test_random_conforming_patterns_decode(scheme, model, n):
    generator = np.random.default_rng(0)
    for _ in range(12):
        late = random_pattern(model, 2 * scheme.W + scheme.B, n, generator)
        assert decodes_all(scheme, late), late.astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "model", "n"), RANDOM, ids=str)
def test_many_random_conforming_patterns_decode(scheme, model, n):
    generator = np.random.default_rng(1)
    for _ in range(2000):
        late = random_pattern(model, 2 * scheme.W + scheme.B, n, generator)
        assert decodes_all(scheme, late), late.astype(int)


@pytest.mark.parametrize(
    ("scheme", "late"),
    [
        (Uncoded(), [[1, 0, 0, 0]]),
        (GC(1), [[1, 1, 0, 0]]),
        (SRSGC(1, 2, 2), [[1, 1, 0, 0], [1, 0, 0, 0]]),  # a burst of two; the one who must repeat is late again
        (MSGC(1, 2, 2), [[1, 1, 0, 0], [0, 1, 1, 0]]),
        (MSGC(1, 2, 1), [[1, 0, 0, 0], [0, 1, 0, 0]]),  # two distinct ones
    ],
    ids=str,
)
def test_other_patterns_do_not_decode_without_waiting(scheme, late):
    late = np.array(late, dtype=bool)
    assert execute(scheme, late) is None
    assert decodes_all(scheme, late, patient=True)


@pytest.mark.parametrize(
    "scheme", [SRSGC(1, 2, 2), SRSGC(2, 3, 3), MSGC(1, 2, 2), MSGC(2, 3, 2), MSGC(2, 4, 4)], ids=str
)
def test_any_pattern_decodes_if_the_master_waits(scheme):
    generator = np.random.default_rng(2)
    for _ in range(15):
        late = generator.random((10, 4)) < generator.random()
        late[np.arange(10), generator.integers(0, 4, 10)] = False  # somebody is always on time
        assert decodes_all(scheme, late, patient=True)


@pytest.mark.parametrize("n", [4, 6])
@pytest.mark.parametrize(
    ("scheme", "load", "delay"),
    [
        (Uncoded(), lambda n: 1 / n, 0),
        (GC(2), lambda n: 3 / n, 0),
        (SRSGC(2, 3, 3), lambda n: 3 / n, 2),  # s = ceil(6/4) = 2
        (SRSGC(1, 3, 3), lambda n: 2 / n, 1),  # s = 1
        (MSGC(1, 2, 2), lambda n: 3 * 2 / (n * (1 + 3)), 1),
        (MSGC(2, 4, 3), lambda n: 4 * 5 / (n * (2 + 3 * 4)), 4),
        (MSGC(2, 4, 0), lambda n: 5 / (n * 5), 4),
        (MSGC(2, 4, 4), lambda n: 5 / (n * 3) if n == 4 else 5 * 5 / (n * (2 + 3 * 5)), 4),
    ],
    ids=lambda value: "load" if callable(value) else str(value),
)
def test_loads_are_the_formulas(scheme, load, delay, n):
    scheme = scheme.sized(n)
    shares, history = scheme.fractions(), []
    assert sum(shares) == pytest.approx(1) and scheme.delay == delay and scheme.load == pytest.approx(load(n))
    for t in range(3 * (delay + 1)):
        tasks = scheme.assign(t, history)
        history.append(scheme.close(t, [Arrival(i, seconds=1.0) for i in range(n)], 1.0, history))
        for i in range(n):
            assert {task.chunk for task in tasks[i]} <= set(scheme.holds(i))
            done = sum(shares[task.chunk] for task in tasks[i])
            if t < delay or (isinstance(scheme, MSGC) and scheme.lam == n):
                assert done <= scheme.load + 1e-12  # the first rounds have empty mini-tasks
            else:
                assert done == pytest.approx(scheme.load)


def test_loads_of_the_paper():
    assert MSGC(1, 2, 27).sized(256).load == pytest.approx(0.0075, abs=5e-5)
    assert SRSGC(2, 3, 23).sized(256).load == pytest.approx(0.051, abs=5e-4)
    assert GC(15).sized(256).load == 0.0625 and Uncoded().sized(256).load == pytest.approx(0.0039, abs=5e-5)


def test_dropping_is_scaled_up_and_biased():
    done = execute(Uncoded(drop=1), np.array([[False, True, False, False]]))
    assert np.allclose(done[0], [4 / 3, 0, 4 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GC(4).sized(4), "s must be below the number of workers 4, got 4"),
        (lambda: GC(2, "repetition").sized(4), "must divide"),
        (lambda: GC(-1), "whole number"),
        (lambda: GC(1, "round"), "cyclic"),
        (lambda: GC(1, mu=-1.0), "mu must be"),
        (lambda: GC(1).load, "call sized"),
        (lambda: Uncoded(3).sized(3), "drop must be below"),
        (lambda: MSGC(2, 2, 1), "0 < B < W"),
        (lambda: MSGC(0, 2, 1), "0 < B < W"),
        (lambda: MSGC(1, 2, 5).sized(4), "lam must be at most"),
        (lambda: SRSGC(2, 4, 1), "divide W - 1"),
        (lambda: SRSGC(2, 3, 5).sized(4), "lam must be at most"),
        (lambda: SRSGC(2, 3, 1).sized(0), "workers must be"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
