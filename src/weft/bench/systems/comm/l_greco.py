"""L-GreCo: bytes at equal error and loss after equal steps, layer-wise settings against one setting for all.

Errors are tables of the gradients of a 6.4 M parameter byte-level transformer on real text, 20 steps summed after 40. "Accordion"
is compared at the error that its own choice has. Training is of a smaller model, two workers with error feedback in one process,
three seeds. Steps of two processes on a cable need permission for network namespaces; without it those claims stay open. There
uniform and programme take turns, step by step.
Equal L2 error of one summed gradient is not equal accuracy, so both are claims. Top-k's settings have a floor of a quarter of the
default in all claims: without it nearly all tensors fall to the least density. Rows without the floor stand beside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from weft.bench.system import Claim, Measure, Row, System, ratio, value

__all__ = ["SYSTEM", "run"]

NAMES = {"top-k": "Top-k", "quantise": "quantised", "low-rank": "PowerSGD"}
SAVED = {
    "top-k": 2.0,
    "quantise": 1.5,
    "low-rank": 2.0,
}  # our issue asks for 1.5 throughout, the paper's check for 2, 1.3, 2


def saved(family: str) -> Measure:
    """Bytes of the uniform setting over ours."""
    return ratio("bytes", f"{family} uniform", f"{family} programme")


SYSTEM = System(
    name="l-greco",
    title="L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep Learning",
    paper="arXiv:2210.17357",
    cite="Alimohammadi et al., 2024",
    minutes=8,
    repeats="losses of trainings are means of three seeds",
    settings=("weft.bench.layerwise",),
    solves="compress gradients without tuning every layer by hand: fewer bytes at the error of a setting known to be safe",
    keywords=("gradient compression", "layer-wise", "dynamic programming", "adaptive", "PowerSGD", "Top-k", "quantisation"),
    use=("weft.comm.controllers.LayerwiseBudget", "weft.comm.controllers.plan_layers"),
    baselines=("uniform", "greedy", "accordion", "one threshold for all"),
    tests=("tests/comm/controllers/test_layerwise.py", "tests/comm/controllers/test_accordion.py"),
    claims=(
        *(
            Claim(f"{NAMES[f]}: bytes at equal error, uniform / ours", saved(f), at_least=least)
            for f, least in SAVED.items()
        ),
        *(Claim(f"{NAMES[f]}: error, ours / uniform", value("error", f"{f} programme"), at_most=1.0) for f in SAVED),
        *(
            Claim(f"{NAMES[f]}: bytes, greedy / ours", ratio("bytes", f"{f} greedy", f"{f} programme"), at_least=1.0)
            for f in SAVED
        ),
        *(
            Claim(
                f"{NAMES[f]}: bytes at Accordion's error, Accordion / ours",
                value("its_bytes_over_ours", f"{f} accordion"), at_least=1.0,
            )
            for f in SAVED
        ),
        *(
            Claim(
                f"{NAMES[f]}: validation loss, ours / uniform",
                ratio("loss", f"{f} programme, trained", f"{f} uniform, trained"), at_most=1.01,
            )
            for f in SAVED
        ),
        *(
            Claim(
                f"{NAMES[f]}: step seconds at 100 Mbit/s, ours / uniform",
                ratio("step_seconds", f"{f} programme at 100 Mbit/s", f"{f} uniform at 100 Mbit/s"), at_most=1.0,
            )
            for f in SAVED
        ),
        *(
            Claim(f"{NAMES[f]}: decision's share of training", value("share_of_training", f"{f} decision"), at_most=0.01)
            for f in SAVED
        ),
    ),
)  # fmt: skip


def run(seed: int) -> Iterator[Row]:
    from weft.bench.layerwise import FAMILIES, choices, over_links, summed_gradients, trained
    from weft.bench.links import why_not

    print("l-greco: gradients of 60 steps", file=sys.stderr, flush=True)
    sums, each, seconds = summed_gradients(seed)
    for family in FAMILIES:
        yield from choices(family, sums, each, seconds)
    del sums, each
    yield trained(None, "dense", seed)
    for family in FAMILIES:
        labels = ["uniform", "programme"] + ["programme, no floor"] * (family.wide != family.settings)
        for label in labels:
            print(f"l-greco: training, {family.name} {label}", file=sys.stderr, flush=True)
            yield trained(family, label, seed)
    if why_not():
        print(f"l-greco: no slow link: {why_not()}", file=sys.stderr, flush=True)
    else:
        print("l-greco: steps on a slow link", file=sys.stderr, flush=True)
        yield from over_links(seed)
