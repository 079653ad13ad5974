"""Codes against late workers: exact gradients without waiting for everybody, for a master and its workers.

    Uncoded        wait for all (or drop the last few: biased)                          T = 0
    GC             any n - s of n coded sums suffice                                    T = 0        (s + 1)/n
    SRSGC          a weaker code, and a second chance B rounds later                    T = B
    MSGC           most of a job uncoded, spread over W - 1 + B rounds                  T = W - 2 + B
    PerRound, Bursty, Arbitrary    who may be late when; `gilbert_elliott` makes random patterns
    fit, replay, slope             the fastest scheme on a record, on a virtual clock
    Farm           a master and worker processes that train several models in turn, M >= T + 1
    Crew           processes that serve several farms, one after the other

All four are `Wait` policies: `assign` says who computes what, `close` when a round is over and by which weights each job is
decoded: weights @ messages.
"""

from __future__ import annotations

from weft.comm.straggler.crew import Crew
from weft.comm.straggler.farm import Farm, Log
from weft.comm.straggler.gc import GC, Uncoded
from weft.comm.straggler.lateness import Arbitrary, Bursty, Lateness, PerRound, gilbert_elliott
from weft.comm.straggler.m_sgc import MSGC
from weft.comm.straggler.replay import Replay, candidates, fit, ranking, replay, slope
from weft.comm.straggler.scheme import Scheme, TooManyLate
from weft.comm.straggler.sr_sgc import SRSGC

__all__ = [
    "GC", "MSGC", "SRSGC", "Uncoded", "Scheme", "TooManyLate",
    "Arbitrary", "Bursty", "Lateness", "PerRound", "gilbert_elliott",
    "Replay", "candidates", "fit", "ranking", "replay", "slope",
    "Crew", "Farm", "Log", "SCHEMES",
]  # fmt: skip

SCHEMES: dict[str, type[Scheme]] = {"uncoded": Uncoded, "gc": GC, "sr-sgc": SRSGC, "m-sgc": MSGC}
