"""One battery over the whole table of schemes: what `weft.comm.straggler.scheme` promises of every one."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from weft.comm.combine import Arrival
from weft.comm.straggler import GC, MSGC, SCHEMES, SRSGC, Scheme, Uncoded

WORKERS, ROUNDS = 6, 24
OPTIONS = {
    "uncoded": (Uncoded(),),
    "gc": (GC(2), GC(2, "repetition")),
    "sr-sgc": (SRSGC(1, 2, 2), SRSGC(2, 3, 3)),
    "m-sgc": (MSGC(1, 2, 2), MSGC(2, 4, 6)),
}
BAD = [
    ("uncoded", {"drop": -1}, "drop"), ("uncoded", {"mu": -0.5}, "mu"),
    ("gc", {"s": 1.5}, "s"), ("gc", {"s": 1, "kind": "ring"}, "kind"), ("gc", {"s": 1, "mu": math.inf}, "mu"),
    ("sr-sgc", {"B": 0, "W": 2, "lam": 1}, "B"), ("sr-sgc", {"B": 2, "W": 4, "lam": 1}, "W"),
    ("sr-sgc", {"B": 1, "W": 2, "lam": -1}, "lam"),
    ("m-sgc", {"B": 2, "W": 2, "lam": 1}, "W"), ("m-sgc", {"B": 1, "W": 2, "lam": True}, "lam"),
]  # fmt: skip
TOO_FEW = [Uncoded(6), GC(6), GC(3, "repetition"), SRSGC(1, 2, 7), MSGC(1, 2, 7)]
schemes = pytest.mark.parametrize("scheme", [scheme for each in OPTIONS.values() for scheme in each], ids=str)


def one_round(scheme, number, history, seconds):
    """Workers arrive in the order of their seconds until the round closes; nobody stays away for ever."""
    arrivals = []
    for worker in np.argsort(seconds, kind="stable"):
        arrivals.append(Arrival(int(worker), seconds=float(seconds[worker])))
        later = [second for second in seconds if second > seconds[worker]]
        for now in (float(seconds[worker]), min(scheme.wake(arrivals), min(later, default=math.inf))):
            if math.isfinite(now) and (decision := scheme.close(number, arrivals, now, tuple(history))) is not None:
                return decision
    raise AssertionError("everybody has come, and the round does not close")


def times(seed=0):
    generator = np.random.default_rng(seed)
    return 1 + 0.1 * generator.random((ROUNDS, WORKERS)) + 9 * (generator.random((ROUNDS, WORKERS)) < 0.25)


def go(scheme, seed=0, history=()):
    history = list(history)
    for number, seconds in enumerate(times(seed)[len(history) :], len(history)):
        history.append(one_round(scheme, number, history, seconds))
    return history


def test_the_table_is_the_battery():
    assert set(OPTIONS) == set(SCHEMES)
    for name, kind in SCHEMES.items():
        assert issubclass(kind, Scheme) and all(type(scheme) is kind for scheme in OPTIONS[name])


@schemes
def test_a_batch_is_cut_into_what_workers_hold(scheme):
    scheme = scheme.sized(WORKERS)
    fractions = scheme.fractions()
    assert sum(fractions) == pytest.approx(1.0) and min(fractions) > 0
    held = [scheme.holds(worker) for worker in range(WORKERS)]
    assert {chunk for chunks in held for chunk in chunks} == set(range(len(fractions)))
    assert all(len(chunks) == len(set(chunks)) for chunks in held)


@schemes
@pytest.mark.parametrize("seed", range(3))
def test_work_is_what_is_declared_and_every_job_is_the_batch_by_its_deadline(scheme, seed):
    scheme = scheme.sized(WORKERS)
    fractions = scheme.fractions()
    found, most, sent, inbox = {}, 0.0, 0, {}
    for number, decision in enumerate(go(scheme, seed)):
        for worker, tasks in decision.tasks.items():
            assert {task.chunk for task in tasks} <= set(scheme.holds(worker))
            assert all(max(0, number - scheme.delay) <= task.job <= number for task in tasks)
            most = max(most, sum(fractions[task.chunk] for task in tasks))
            sent = max(sent, len({task.job for task in tasks}))
            for task in tasks if worker not in decision.late else ():
                row = inbox.setdefault((task.job, number, worker), np.zeros(len(fractions)))
                row[task.chunk] += task.coefficient
        for job, weights in decision.jobs.items():
            assert job not in found and number - scheme.delay <= job <= number
            assert all(round <= number for round, _ in weights)
            found[job] = sum(weight * inbox[job, round, worker] for (round, worker), weight in weights.items())
    assert most == pytest.approx(scheme.load) and sent == scheme.messages
    assert set(range(ROUNDS - scheme.delay)) <= set(found)
    for parts in found.values():
        np.testing.assert_allclose(parts, 1.0, atol=1e-9)  # every chunk once


@schemes
def test_decisions_are_all_that_it_knows(scheme):
    """The same again; and from a history that was written down, by a scheme made anew."""
    sized = scheme.sized(WORKERS)
    straight = go(sized)
    for stop in (1, 7, 16):
        again = pickle.loads(pickle.dumps(scheme)).sized(WORKERS)
        assert go(again, history=pickle.loads(pickle.dumps(straight[:stop]))) == straight
    before = pickle.dumps(straight)
    tasks = sized.assign(5, straight)
    assert tasks == straight[5].tasks and pickle.dumps(straight) == before
    assert sized.sized(WORKERS) == sized and hash(sized) == hash(scheme.sized(WORKERS))


@schemes
def test_fewer_late_workers_never_close_a_round_later(scheme):
    scheme = scheme.sized(WORKERS)
    from weft.comm.straggler.scheme import Past

    history = go(scheme)
    for number in range(0, ROUNDS, 5):
        past = Past.of(history[:number], WORKERS, scheme.memory)
        admitted = {
            bits: scheme.admits(past, np.array([bits >> worker & 1 for worker in range(WORKERS)], dtype=bool))
            for bits in range(2**WORKERS - 1)
        }
        assert admitted[0]
        for bits, fine in admitted.items():
            assert not fine or all(admitted[bits & ~(1 << worker)] for worker in range(WORKERS))


@schemes
def test_the_number_of_workers_is_needed_and_checked(scheme):
    with pytest.raises(ValueError, match="number of workers must be known"):
        _ = scheme.count
    for workers in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"{type(scheme).__name__}: workers must be a whole number"):
            scheme.sized(workers)


@pytest.mark.parametrize("scheme", TOO_FEW, ids=str)
def test_too_few_workers_are_named(scheme):
    with pytest.raises(ValueError, match=f"{type(scheme).__name__}: .* number of workers 5"):
        scheme.sized(5)


@pytest.mark.parametrize(("name", "options", "what"), BAD, ids=str)
def test_bad_options_are_named(name, options, what):
    kind = SCHEMES[name]
    with pytest.raises(ValueError, match=rf"{kind.__name__}: .*\b{what}\b"):
        kind(**options)
