"""Rules that make one vector of n messages: the result is W @ messages, or goes entry by entry where no W can say it.

    count          Mean                                            mean
    gram           Krum, MultiKrum, Bulyan                         krum
                   GeometricMedian, CenteredClip, NormEqualisedMean    centre
                   Flag                                            flag
                   MDA, NearestToOwn                               subset
                   NNM, Bucketing (before another rule)            mixing
    elementwise    Median, TrimmedMean, Meamed                     elementwise (sorting)
    arrivals       Unbiased, Equal, Polynomial                     arrivals

`RULES` names those that take nothing but messages: `pick(name, RULES, "rule")(**options)`.
"""

from __future__ import annotations

from weft.comm.combine import Combine
from weft.comm.rules.by_gram import BrokenMessage
from weft.comm.rules.centre import CenteredClip, GeometricMedian, NormEqualisedMean
from weft.comm.rules.elementwise import Meamed, Median, TrimmedMean
from weft.comm.rules.flag import Flag
from weft.comm.rules.krum import Bulyan, Krum, MultiKrum
from weft.comm.rules.mean import Mean
from weft.comm.rules.mixing import NNM, Bucketing
from weft.comm.rules.subset import MDA, NearestToOwn

__all__ = [
    "RULES",
    "BrokenMessage",
    "Bucketing",
    "Bulyan",
    "CenteredClip",
    "Flag",
    "GeometricMedian",
    "Krum",
    "MDA",
    "Mean",
    "Meamed",
    "Median",
    "MultiKrum",
    "NNM",
    "NearestToOwn",
    "NormEqualisedMean",
    "TrimmedMean",
]

RULES: dict[str, type[Combine]] = {
    "mean": Mean,
    "norm-equalised-mean": NormEqualisedMean,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric-median": GeometricMedian,
    "centered-clip": CenteredClip,
    "mda": MDA,
    "flag": Flag,
    "nnm": NNM,
    "bucketing": Bucketing,
    "nearest-to-own": NearestToOwn,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "meamed": Meamed,
}
