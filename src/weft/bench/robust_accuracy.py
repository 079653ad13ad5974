"""The settings of `flag-aggregator`: attacks, numbers of faulty workers, data; which rules run; where Flag loses."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from weft.bench.byzfl_rules import load
from weft.bench.robust import Server, side_by_side
from weft.bench.system import Row
from weft.comm.attacks import (
    Attack,
    AugmentationNoise,
    DataAttack,
    DroppedPackets,
    Gaussian,
    InnerProduct,
    LabelFlip,
    LittleIsEnough,
    Mimic,
    SignFlip,
)
from weft.comm.rules import NNM, Bulyan, Flag, NormEqualisedMean

__all__ = ["ATTACKS", "rules_for", "server_rows"]

ATTACKS: dict[str, Attack | DataAttack] = {
    "random x 100": Gaussian(100.0),
    "sign flip x 10": SignFlip(10.0),
    "inner product": InnerProduct(0.1),
    "little is enough": LittleIsEnough(),
    "mimic": Mimic(),
    "label flip": LabelFlip(),
    "dropped packets": DroppedPackets(0.5),
    "augmentation noise": AugmentationNoise(3.0),
}
STEPS = 100  # without faults twice as many
SEEDS = 3
BLUNT = ("random x 100", "sign flip x 10")


def rules_for(byzfl: Any, faulty: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Column name -> rule, each told f."""
    nnm, trimmed = byzfl.NNM(faulty), byzfl.TrMean(faulty)
    return {
        "byzfl_mean": byzfl.Average(),
        "norm_equalised_mean": NormEqualisedMean(),
        "byzfl_krum": byzfl.Krum(faulty),
        "byzfl_multi_krum": byzfl.MultiKrum(faulty),
        "byzfl_geometric_median": byzfl.GeometricMedian(),
        "byzfl_median": byzfl.Median(),
        "byzfl_trimmed_mean": trimmed,
        "byzfl_nnm_trimmed_mean": lambda stack: trimmed(nnm(stack)),
        "bulyan": Bulyan(faulty),
        "flag": Flag(),
        "flag_paper_scale": Flag(scale="paper"),
        "nnm_flag": NNM(faulty, Flag()),
    }


def server_rows(seed: int, steps: int = STEPS) -> Iterator[Row]:
    """One row a setting: mean accuracy over three seeds and its standard error, by rule; twice the steps without faults."""
    settings = []
    for alpha, counts in ((0.5, (0, 1, 2, 3)), (math.inf, (0, 3))):
        for faulty in counts:
            for name, attack in ATTACKS.items() if faulty else (("no attack", None),):
                if math.isinf(alpha) and faulty and name not in BLUNT:
                    continue  # with equal shares only these ever hurt a mean
                settings.append((seed, steps if faulty else 2 * steps, alpha, faulty, name, attack))
    for row in side_by_side(_measured, settings):
        _say_where_it_loses(row)
        yield row


def _measured(seed: int, steps: int, alpha: float, faulty: int, name: str, attack: Attack | DataAttack | None) -> Row:
    rules = rules_for(load(), faulty)
    seeds = tuple(range(SEEDS * seed, SEEDS * (seed + 1)))
    found = Server(alpha=alpha, steps=steps, seeds=seeds).run(list(rules.values()), faulty, attack)
    return _row(f"{name}, f = {faulty}, alpha = {alpha:g}", dict(zip(rules, found, strict=True)))


def _row(setting: str, found: Mapping[str, list[float]]) -> Row:
    values = {}
    for rule, runs in found.items():
        values[rule] = statistics.mean(runs)
        values[f"{rule}_error"] = statistics.stdev(runs) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0
    return Row(setting, **values)


def _say_where_it_loses(row: Row) -> None:
    rivals = {
        k: v for k, v in row.values.items() if not k.endswith("_error") and not k.startswith(("flag", "nnm_flag"))
    }
    best = max(rivals, key=rivals.__getitem__)
    behind = 100 * (rivals[best] - row.values["flag"])
    if behind > 0:
        print(f"{row.method}: Flag is {behind:.1f} points behind {best}", file=sys.stderr)
