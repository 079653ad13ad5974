"""MASHA: bytes to the solution of a game, the proven rate, the shortcuts that stall, digits under attack and a GAN.

The bilinear game has 100 + 100 coordinates and 10 workers with unlike matrices (L = 2.1, largest L_m about 6.1). Every method
takes its best step size of a grid, the one of fewest bytes up; bytes up are those that one worker sends, bytes down those that it
receives, of stochastic methods means over three draws. What the server sends back is coded too; not for rand-k, which would need
smaller steps. Refreshes in 6 bits both ways, as coded differences to the last ones, are ours: the paper sends them uncompressed.
These bits converge on six other games too (sizes 30, 100 and 200, 4 and 10 workers); 4 or 5 for refreshes need fewer bytes still.
Training under attack and the GAN are compared at equal bytes up. Four processes on a cable of 100 Mbit/s, with refreshes of 8
bits, need permission for network namespaces; without it that claim stays open.

Where it loses: without compression the optimistic gradient needs fewer bytes than extragradient, one evaluation a step instead of
two. And few workers, or games of their own that are hardly stiffer than the common one, leave less to save: 4 workers with
L_m = 2.9 where L = 1.7 need 0.39 of the optimistic gradient's bytes both ways.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from weft.bench.system import Claim, Measure, Results, Row, System, ratio, value

__all__ = ["SYSTEM", "run"]

BEST = "MASHA-1, 3 bits, coded refreshes"
REACHED = "to a gap of 1e-6, MASHA-1 with coded refreshes"
OURS = ("MASHA-1, 3 bits", "MASHA-1, rand-k", "MASHA-2, top-k")  # as in the paper, with uncompressed refreshes
LINK = "adversarial training at 100 Mbit/s"


UNCOMPRESSED = ("extragradient", "optimistic")


def floats_saved(*baselines: str) -> Measure:
    """Bytes up in floats that the best tuned baseline sends, over those of the best of the paper's own forms."""
    return lambda results: (
        min(results[name, "floats"] for name in baselines) / min(results[name, "floats"] for name in OURS)
    )


def both_ways(results: Results, name: str) -> float:
    """Bytes that a worker sends and receives."""
    return results[name, "bytes"] + results[name, "bytes_down"]


def up(*baselines: str) -> Measure:
    """Bytes up of MASHA-1 with coded refreshes, over those of the best baseline."""
    return lambda results: results[BEST, "bytes"] / min(results[name, "bytes"] for name in baselines)


def up_and_down(*baselines: str) -> Measure:
    """Bytes both ways of MASHA-1 with coded refreshes, over those of the best baseline."""
    return lambda results: both_ways(results, BEST) / min(both_ways(results, name) for name in baselines)


def more_accurate(results: Results) -> float:
    name = "adversarial training, "
    return results[name + "masha", "robust_accuracy"] - results[name + "extragradient", "robust_accuracy"]


SYSTEM = System(
    name="masha",
    title="Distributed Methods with Compressed Communication for Solving Variational Inequalities, with Theoretical Guarantees",
    paper="arXiv:2110.03313",
    cite="Beznosikov et al., 2022",
    minutes=3,
    repeats="bytes of methods that draw a coin are means over three draws",
    settings=("weft.bench.games",),
    solves="train games and saddle points (GANs, adversarial and robust training) over slow links, and still converge",
    keywords=("variational inequalities", "saddle point", "GAN", "adversarial training", "extragradient", "compression"),
    use=("weft.comm.masha.MASHA", "weft.comm.masha.step_size", "weft.comm.memories.Shift"),
    baselines=("extragradient", "optimistic gradient", "extragradient on a compressed F", "top-k without memory"),
    tests=("tests/comm/test_masha.py", "tests/comm/memories/test_shift.py"),
    claims=(
        Claim(f"bytes up {REACHED} / tuned extragradient", up("extragradient"), at_most=1 / 3),
        Claim(f"bytes up {REACHED} / best tuned without compression (optimistic gradient)", up(*UNCOMPRESSED), at_most=1 / 3),
        Claim(f"bytes up and down {REACHED} / tuned extragradient", up_and_down("extragradient"), at_most=1 / 3),
        Claim(
            f"bytes up and down {REACHED} / best tuned without compression (optimistic gradient)",
            up_and_down(*UNCOMPRESSED), at_most=1 / 3,
        ),
        Claim(
            "floats up to a gap of 1e-6, tuned extragradient / best with plain refreshes",
            floats_saved("extragradient"), at_least=1.7,
        ),
        Claim(
            "floats up to a gap of 1e-6, best tuned without compression (optimistic gradient) / best with plain refreshes",
            floats_saved(*UNCOMPRESSED), at_least=1.7,
        ),
        Claim(
            "mean squared distance / proven bound, largest over 200 steps",
            value("worst_over_bound", "MASHA-1 at the proven step size"), at_most=1.0,
        ),
        Claim(
            "decrease per step, measured / proven",
            lambda r: r["MASHA-1 at the proven step size", "decrease_per_step"]
            / r["MASHA-1 at the proven step size", "proven_decrease"],
            at_least=1.0,
        ),
        Claim("gap where extragradient on rand-k of F stalls", value("gap", "extragradient on rand-k of F"), at_least=1e-2),
        Claim("gap where extragradient on top-k of F stalls", value("gap", "extragradient on top-k of F"), at_least=1e-2),
        Claim(
            "gap of MASHA-2 without memory after 300 steps",
            value("gap", "MASHA-2, top-k without memory, 300 steps"), at_least=1e-2,
        ),
        Claim("gap of MASHA-2 with memory after 300 steps", value("gap", "MASHA-2, top-k with memory, 300 steps"), at_most=1e-5),
        Claim("robust accuracy at equal bytes up, ours - extragradient, points", more_accurate, at_least=0.0),
        Claim(
            "GAN's energy distance at equal bytes up, ours / extragradient",
            ratio("energy_distance", "GAN, masha", "GAN, extragradient"), at_most=1.0,
        ),
        Claim(
            "seconds to a robust accuracy at 100 Mbit/s, extragradient / ours",
            ratio("seconds", f"{LINK}, extragradient", f"{LINK}, masha"), at_least=2.0,
        ),
    ),
)  # fmt: skip


def run(seed: int) -> Iterator[Row]:
    from weft.bench import games
    from weft.bench.links import why_not

    def say(what: str) -> None:
        print(f"masha: {what}", file=sys.stderr, flush=True)

    say("bilinear game")
    yield from games.bilinear(seed)
    yield games.proven_rate(seed)
    say("adversarial training at equal bytes")
    yield from games.robust(seed)
    say("GAN at equal bytes")
    yield from games.generative(seed)
    if why_not():
        say(f"no slow link: {why_not()}")
    else:
        say("adversarial training on a slow link")
        yield from games.over_links(seed)
