"""Which scheme is fastest on a record of how long workers took: every candidate replayed on a virtual clock.

Record     times[t, i], seconds that worker i needed in round t with load 1/n (all waited for)
Model      seconds are affine in the load and in the messages k that a worker makes in a round, one for each job:
               time(load, k) = time(1/n, 1) ((1 + slope load)/(1 + slope/n) + message (k - 1))        `slope`, `scaled`
           where slope is the seconds of a whole batch over those of a round without any work, and message those of one
           message more over those of an uncoded round: MSGC(1, 2, 0) has its load in two messages, so that quick runs of
           both show it. M-SGC makes W - 1 + B messages where the others make one; small models pay for each
Replay     each round closes by the scheme's own rule on the scaled record; its past is its own      `replay`
           `carry`: workers are processes, as in a `Farm`. One that is late when a round closes finishes what it began, and
           only then takes the newest order: a burst that an uncoded record shows as one long round, since everybody waited,
           is many late rounds of a scheme that does not wait. Without, every round asks afresh, as with serverless functions
Fit        all candidates with delay T <= max_delay, cheapest lower bound first; one whose bound, every round at
           (1 + mu) kappa, is above the best total so far is not replayed               `ranking`, `fit`

What is left out: the first and the last T rounds, which are emptier, and the seconds of decoding, which are the master's.
Source: the parameter choice of Krishnan, Ebrahimi, Khisti, arXiv:2211.13802, section 4 (80 uncoded rounds).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.comm.straggler.gc import GC, Uncoded
from weft.comm.straggler.m_sgc import MSGC
from weft.comm.straggler.scheme import Past, Scheme
from weft.comm.straggler.sr_sgc import SRSGC

__all__ = ["Replay", "candidates", "fit", "ranking", "replay", "scaled", "slope"]

MUS = (0.1, 0.25, 0.5, 1.0)  # of SR-SGC and M-SGC, whose late workers cost something later
LONGEST = 4  # largest B that is tried: longer bursts are for GC


@dataclass(frozen=True)
class Replay:
    """What became of a record under a scheme.

    Attributes:
        seconds: of each round, float64 (rounds,).
        late: who was late, bool (rounds, workers).
    """

    seconds: np.ndarray = field(repr=False)
    late: np.ndarray = field(repr=False)

    @property
    def total(self) -> float:
        return float(self.seconds.sum())


def slope(loads: Sequence[float], seconds: Sequence[float]) -> float:
    """c / f of the line seconds = f + c load through measured points; infinity where no fixed part is left.

    Args:
        loads: shares of a batch, at least two different ones.
        seconds: what a round with that load takes on a worker that is not late.
    """
    if len(set(loads)) < 2 or len(loads) != len(seconds):
        raise ValueError(f"slope: give seconds for at least two different loads, got loads {list(loads)}")
    per_load, fixed = np.polyfit(np.asarray(loads, dtype=float), np.asarray(seconds, dtype=float), 1)
    if per_load <= 0:
        return 0.0
    return float(per_load / fixed) if fixed > 0 else math.inf


def scaled(scheme: Scheme, slope: float, message: float = 0.0) -> float:
    """time(load, k) / time(1/n, 1) of a sized scheme."""
    load, n = scheme.load, scheme.count
    work = load * n if math.isinf(slope) else (1 + slope * load) / (1 + slope / n)
    return work + message * (scheme.messages - 1)


def replay(scheme: Scheme, times: np.ndarray, slope: float, carry: bool = True, message: float = 0.0) -> Replay:
    """Run a scheme over a record.

    Args:
        scheme: sized or not; the record has the number of workers.
        times: float (rounds, workers), > 0, seconds with load 1/n. Infinite: never came.
        slope: of time over load, >= 0.
        carry: a late worker first finishes what it began (a process); False: it begins every round with the others.
        message: seconds of one message more in a round over those of an uncoded round, >= 0.
    Raises:
        ValueError: the record is not a matrix of positive numbers, a price is negative, or the scheme does not fit n.
    """
    times = _checked(times, slope, message)
    sized = scheme.sized(times.shape[1])
    found = _run(sized, times, scaled(sized, slope, message), math.inf, carry)
    assert found is not None
    return found


def _run(scheme: Scheme, times: np.ndarray, longer: float, limit: float, carry: bool) -> Replay | None:
    """The replay with all times `longer`, or None as soon as its total is sure to be above `limit` seconds."""
    rounds, workers = times.shape
    times = times * longer
    least = np.minimum((1 + scheme.mu) * times.min(1), times.max(1))
    rest = float(least.sum())
    late, redo = np.zeros((rounds, workers), dtype=bool), np.zeros((rounds, workers), dtype=bool)
    seconds, busy = np.empty(rounds), np.zeros(workers)  # busy: with what a worker began in earlier rounds
    for t in range(rounds):
        start = max(0, t - scheme.memory)  # schemes look no further back
        past = Past(late[start:t], redo[start:t])
        redo[t] = scheme.redo(past)
        comes = busy + times[t]
        seconds[t] = _close(scheme, past, comes)
        late[t] = comes > seconds[t]
        if carry:
            began = busy <= seconds[t]  # who did not get to this round's order will find the next one in its mailbox
            busy[began] = comes[began]
            busy[late[t]] -= seconds[t]
            busy[~late[t]] = 0.0
        rest += float(seconds[t] - least[t])
        if rest > limit:
            return None
    return Replay(seconds, late)


def _close(scheme: Scheme, past: Past, times: np.ndarray) -> float:
    """When the round after `past` closes, given when each worker comes."""
    last = float(times.max())
    end = (1 + scheme.mu) * float(times.min())
    if end >= last:
        return last
    if scheme.admits(past, times > end):
        return end
    ends = np.unique(times[times > end])  # the first arrival that makes the late set admissible: it is monotone
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if scheme.admits(past, times > ends[middle]) else (middle + 1, high)
    return float(ends[low])


def candidates(workers: int, max_delay: int, mus: Iterable[float] = MUS) -> list[Scheme]:
    """All schemes that are tried: every parameter for up to 32 workers, a geometric grid beyond; delay at most `max_delay`."""
    grid = sorted({0, *(round(2 ** (k / 4)) for k in range(4 * 20)), *range(min(workers, 32) + 1)})
    counts = [number for number in grid if number <= workers]
    found: list[Scheme] = [Uncoded()]
    for s in range(1, workers):
        if s <= 64 or workers % (s + 1) == 0:
            found += [GC(s), GC(s, "repetition")] if workers % (s + 1) == 0 else [GC(s)]
    for mu in mus:
        for B in range(1, min(max_delay, LONGEST) + 1):
            for windows in range(1, 4):
                found += [SRSGC(B, windows * B + 1, lam, mu) for lam in counts if lam > 0]
            for W in range(B + 1, min(max_delay + 2 - B, 2 * LONGEST) + 1):
                found += [MSGC(B, W, lam, mu) for lam in counts]
    fitting = []
    for scheme in found:
        try:
            fitting.append(scheme.sized(workers))
        except ValueError:
            continue  # s >= n in SR-SGC
    return fitting


def ranking(
    times: np.ndarray,
    slope: float,
    among: Iterable[Scheme],
    jobs: int | None = None,
    families: bool = True,
    carry: bool = True,
    message: float = 0.0,
) -> list[tuple[float, Scheme]]:
    """(seconds of the whole record, scheme) for the best of each family, the fastest first, or for the best of all only.
    Arguments as of `fit`."""
    times = _checked(times, slope, message)
    workers = times.shape[1]
    first, last = times.min(1), times.max(1)

    def tail(scheme: Scheme) -> float:
        return 1 + scheme.delay / jobs if jobs else 1.0

    def bound(scheme: Scheme) -> float:
        shortest = np.minimum((1 + scheme.mu) * first, last).sum()
        return float(shortest) * scaled(scheme, slope, message) * tail(scheme)

    best: dict[str, tuple[float, Scheme]] = {}
    for scheme in sorted((scheme.sized(workers) for scheme in among), key=bound):
        family = type(scheme).__name__ if families else ""
        so_far = best[family][0] if family in best else math.inf
        if bound(scheme) >= so_far:
            continue
        run = _run(scheme, times, scaled(scheme, slope, message), so_far / tail(scheme), carry)
        if run is not None and run.total * tail(scheme) < so_far:
            best[family] = (run.total * tail(scheme), scheme)
    return sorted(best.values(), key=lambda item: item[0])


def fit(
    times: np.ndarray,
    slope: float,
    max_delay: int,
    jobs: int | None = None,
    among: Iterable[Scheme] | None = None,
    show: bool = True,
    carry: bool = True,
    message: float = 0.0,
) -> Scheme:
    """The scheme that would have been fastest on a record, sized for its workers.

    Args:
        times: float (rounds, workers) of an uncoded run; 80 rounds or so, of which 10 are the least.
        slope: of time over load; the function of this name finds it from two loads.
        max_delay: largest T, that is the number of models that take turns, less one.
        jobs: how many jobs will be run; the T rounds at the end are then counted.
        among: what is tried; `candidates(workers, max_delay)` by default.
        show: print the best of each family.
        carry: as in `replay`; False where late workers do not stay late, such as serverless functions.
        message: as in `replay`; for a `Farm`, seconds of a quiet round of MSGC(1, 2, 0) over those of Uncoded(), less 1.
    Raises:
        ValueError: the record is too short or not positive, max_delay is negative, no scheme of `among` has a delay of at most
            `max_delay`, or none bears the workers that never come.
    """
    times = _checked(times, slope, message)
    rounds, workers = times.shape
    if rounds < 10:
        raise ValueError(f"fit: a record needs at least 10 rounds, got {rounds}; 80 tell short from long bursts")
    if max_delay < 0:
        raise ValueError(f"fit: max_delay must be >= 0, got {max_delay}; it is the number of models less one")
    tried = [scheme.sized(workers) for scheme in (candidates(workers, max_delay) if among is None else among)]
    fitting = [scheme for scheme in tried if scheme.delay <= max_delay]
    if not fitting:
        raise ValueError(
            f"fit: among must hold a scheme with a delay of at most max_delay = {max_delay}, got delays "
            f"{sorted({scheme.delay for scheme in tried})}"
        )
    ranked = ranking(times, slope, fitting, jobs, carry=carry, message=message)
    if not ranked:
        never = np.flatnonzero(np.isinf(times).any(0)).tolist()
        raise ValueError(
            f"fit: none of {len(fitting)} schemes ends every round of this record, in which workers {never} do not come in some "
            "rounds; leave them out, or let `among` hold GC with a larger s"
        )
    if show:
        print(f"{'scheme':<44} {'load':>7} {'T':>3} {'s/round':>9} {'of best':>8}")
        for total, scheme in ranked:
            name = repr(scheme).replace(f", workers={workers}", "")
            print(
                f"{name:<44} {scheme.load:>7.4f} {scheme.delay:>3} {total / rounds:>9.4g} {total / ranked[0][0]:>8.2f}"
            )
    return ranked[0][1]


def _checked(times: np.ndarray, slope: float, message: float) -> np.ndarray:
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 2 or not times.size or not (times > 0).all() or np.isinf(times.min(1)).any():
        raise ValueError(
            f"times must be a (rounds, workers) matrix of seconds > 0 with somebody on time in every round, got shape "
            f"{times.shape}"
        )
    if not slope >= 0:
        raise ValueError(f"slope must be >= 0, got {slope}; measure two loads and use weft.comm.straggler.slope")
    if not 0 <= message < math.inf:
        raise ValueError(
            f"message must be >= 0, got {message}; it is what one message more costs, as a share of an uncoded round"
        )
    return times
