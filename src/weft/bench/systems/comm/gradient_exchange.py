"""The exchange itself: what it costs where nothing is coded, and whether `auto` picks well on real links.

On loopback, in one pair of gloo processes taking turns: plain DDP and DDP with an exchange of identities. Then two ranks in
network namespaces, joined by cables of eight kinds, training a byte-level GPT on real text: plain, three fixed exchanges, `auto`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from weft.bench.system import Claim, Results, Row, System, ratio

__all__ = ["SYSTEM", "WIRES", "run"]

RATES = {"10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "no limit": None}
WIRES = {f"{name}, {delay * 1e3:g} ms": (rate, delay) for name, rate in RATES.items() for delay in (0.0, 0.02)}
FIXED = ("plain", "bfloat16", "low rank 4", "top-k 1 %")


def _worst(against: Callable[[Results, str], float]) -> Callable[[Results], float]:
    """The largest ratio of `auto`'s step to another, over the wires measured."""

    def measure(results: Results) -> float:
        wires = [wire for wire in WIRES if results.get(f"auto, {wire}", "step_seconds") is not None]
        if not wires:
            raise KeyError("no wire could be measured")
        return max(results[f"auto, {wire}", "step_seconds"] / against(results, wire) for wire in wires)

    return measure


def _plain(results: Results, wire: str) -> float:
    return results[f"plain, {wire}", "step_seconds"]


def _best(results: Results, wire: str) -> float:
    return min(results[f"{name}, {wire}", "step_seconds"] for name in FIXED)


def _apart(results: Results) -> float:
    return abs(results["attach(identity)", "parameters_digest"] - results["DDP", "parameters_digest"])


SYSTEM = System(
    name="gradient-exchange",
    title="PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
    paper="arXiv:2006.15704",
    cite="Li et al., 2020",
    minutes=6,
    solves="put any gradient exchange under DistributedDataParallel in one line, and pick one that is never slower than plain",
    keywords=("DDP", "all-reduce", "gradient compression", "slow network", "auto"),
    use=("weft.comm.attach", "weft.comm.Exchange", "weft.comm.auto"),
    baselines=("DDP", *FIXED[1:]),
    tests=(
        "tests/comm/test_attach.py",
        "tests/comm/test_exchange.py",
        "tests/comm/test_auto.py",
        "tests/bench/test_links.py",
    ),
    claims=(
        Claim(
            "step CPU seconds, attach(identity) / DDP", ratio("cpu_seconds", "attach(identity)", "DDP"), at_most=1.03
        ),
        Claim("parameters, attach(identity) and DDP, difference of their hashes", _apart, at_most=0.0),
        Claim("step wall seconds, auto / plain DDP, worst of eight links", _worst(_plain), at_most=1.03),
        Claim("step wall seconds, auto / best fixed choice, worst of eight links", _worst(_best), at_most=1.10),
    ),
)


def run(seed: int, wires: tuple[str, ...] = tuple(WIRES)) -> Iterator[Row]:
    from weft.bench.links import LinksNotPermitted, Wire, on_links
    from weft.bench.pair import Contender, Setting, side_by_side

    yield from side_by_side(
        (Contender("DDP", "weft.bench.attached:plain"), Contender("attach(identity)", "weft.bench.attached:attached")),
        "weft.bench.problems:gpt_on_text",
        Setting(rounds=16, warmup=3),
        {"seed": seed},
    )
    for name in wires:
        rate, delay = WIRES[name]
        rounds = 3 if rate == 1e7 else 7
        options = {"seed": seed, "rounds": rounds, "layers": 2, "width": 192}
        try:
            ranks = on_links("weft.bench.attached:on_wire", 2, Wire(rate, delay), options, timeout=240)
        except LinksNotPermitted as error:
            print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
            continue
        print(
            f"{name}: auto chose {ranks[0]['chosen']}; predicted {ranks[0]['predicted']}", file=sys.stderr, flush=True
        )
        for method in (*FIXED, "auto"):
            yield Row(f"{method}, {name}", step_seconds=max(rank["seconds"][method] for rank in ranks))
