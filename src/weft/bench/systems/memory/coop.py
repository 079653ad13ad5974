"""Coop: rematerialisation that knows addresses, against DTR, DTE, a pager, checkpointing and torch's own budget.

Three parts:

    on paper    steps of five networks, recorded here once with the CPU seconds of their operators (`traces/`), run through each
                published policy and through weft's plan: the same on every machine
    live        a GPT on real text: eager, `torch.utils.checkpoint` per block, torch's `activation_memory_budget` and
                `weft.memory.limit`, in turns in one process; peaks read from the allocator. Nobody has inductor's kernels:
                torch's budget runs by the backend `aot_eager_decomp_partition`, operator by operator as the others do
    online      the BiLSTM with nothing planned, eager and in three budgets in turns: what deciding as operators come takes.
                Milliseconds per operator are CPU time beyond eager's, torch's own for a dispatch mode included, over the
                operators of the step, views not counted; what is dropped runs again, so that only the first is bookkeeping alone

Bytes are of activations and workspace: parameters and gradients are allocated before. Where Coop loses is in the table: on
equal-sized tensors (ResNet), and against a pager wherever pages can be remapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from weft.bench.system import Claim, Row, System, ratio, value

if TYPE_CHECKING:
    from weft.memory import Trace

__all__ = ["SYSTEM", "run"]

MIB = 2**20
ROUNDS = 16
# network -> shares of eager's peak; the card's table has all but Swin
SHARES = {"GPT": (0.5, 0.3), "BiLSTM": (0.8,), "U-Net": (0.6,), "ResNet": (0.5,), "Swin": (0.4,)}
TORCH = "torch budget, without inductor (aot_eager_decomp_partition)"
POLICIES = {
    "Coop": "coop",
    "Coop with partition": "coop-partition",
    "DTR": "dtr",
    "DTE": "dte",
    "pager": "pager",
}

SYSTEM = System(
    name="coop",
    title="Coop: Memory is not a Commodity",
    paper="arXiv:2311.00591",
    cite="Zhang et al., 2023",
    minutes=6,
    solves="train a model that almost fits: a byte limit that is kept, gradients bit-equal, the cheapest recomputation",
    keywords=("recomputation", "checkpointing", "rematerialisation", "out of memory", "fragmentation", "activation memory"),
    use=("weft.memory.limit", "weft.memory.trace", "weft.memory.plan", "weft.memory.meter"),
    baselines=(
        "DTR", "DTE", "pager", "eager", "torch.utils.checkpoint",
        "activation_memory_budget (backend aot_eager_decomp_partition: without inductor)",
    ),
    tests=("tests/memory/core/test_core.py", "tests/memory/execute/test_limit.py", "tests/memory/planning/test_choose.py"),
    claims=(
        Claim("GPT at 50 %: recomputation, Coop / DTR", ratio("recompute", "GPT 50 %: Coop", "GPT 50 %: DTR"), at_most=0.7),
        Claim("GPT at 30 %: recomputation, Coop / DTR", ratio("recompute", "GPT 30 %: Coop", "GPT 30 %: DTR"), at_most=0.7),
        Claim("GPT at 50 %: fragmentation of Coop", value("fragmentation", "GPT 50 %: Coop"), at_most=0.04),
        Claim("GPT at 30 %: fragmentation of Coop", value("fragmentation", "GPT 30 %: Coop"), at_most=0.04),
        Claim("BiLSTM at 80 %: candidates per search, Coop / DTR",
              ratio("candidates", "BiLSTM 80 %: Coop", "BiLSTM 80 %: DTR"), at_most=0.1),
        Claim("GPT in 64 MiB: recomputation of weft's plan", value("recompute", "GPT 64 MiB: plan"), at_most=0.34),
        Claim("GPT in 80 MiB: recomputation of weft's plan", value("recompute", "GPT 80 MiB: plan"), at_most=0.23),
        Claim("GPT: least feasible MiB of activations", lambda r: r["GPT: least", "activation_bytes"] / MIB, at_most=56),
        Claim("largest rise of the plan's cost from one budget to the next larger one, 20 budgets",
              value("worst_rise", "GPT: 20 budgets"), at_most=0.0),
        Claim("seconds to plan 676 operators (Swin at 40 %)", value("planning_seconds", "Swin 40 %: plan"), at_most=0.5),
        Claim("seconds to plan 5,039 operators (BiLSTM at 80 %)", value("planning_seconds", "BiLSTM 80 %: plan"), at_most=5.0),
        Claim("live, at the peak of checkpointing: CPU seconds, weft / torch.utils.checkpoint",
              ratio("cpu_seconds", "weft, as checkpoint", "checkpoint per block"), at_most=1.0),
        Claim("live, at the peak of checkpointing: bytes, weft / torch.utils.checkpoint",
              ratio("activation_bytes", "weft, as checkpoint", "checkpoint per block"), at_most=1.0),
        Claim("live, in 124 MiB: CPU seconds, weft / eager", ratio("cpu_seconds", "weft, 124 MiB", "eager"), at_most=0.80 / 0.73),
        Claim("live, at the peak of torch's budget without inductor: CPU seconds, weft / torch",
              ratio("cpu_seconds", "weft, as torch budget", TORCH), at_most=0.80 / 0.89),
        Claim("live: measured bytes above the budget, worst of all", value("excess_bytes", "weft, as checkpoint"), at_most=0),
        Claim("live: CPU seconds beside the step's own when nothing is dropped, share of eager",
              lambda r: r["weft, nothing dropped", "cpu_seconds"] / r["eager", "cpu_seconds"] - 1, at_most=0.02),
        Claim("online, nothing dropped: milliseconds of bookkeeping per operator",
              value("ms_per_operator", "online, nothing dropped"), at_most=0.03),
        Claim("live: loss against eager, absolute",
              lambda r: abs(r["weft, as checkpoint", "loss"] - r["eager", "loss"]), at_most=0),
    ),
)  # fmt: skip


def run(seed: int) -> Iterator[Row]:
    yield from on_paper()
    yield from live(seed)
    yield from online(seed)


def on_paper() -> Iterator[Row]:
    """The published policies and weft's plan on the recorded steps; recomputation as a share of the step."""
    from weft.bench.step_traces import load

    for network, shares in SHARES.items():
        trace = load(network)
        for share in shares:
            budget = trace.fixed + int(share * (trace.peak - trace.fixed))
            for label, policy in POLICIES.items():
                yield _simulated(f"{network} {100 * share:.0f} %: {label}", trace, budget, policy)
            yield _planned(f"{network} {100 * share:.0f} %: plan", trace, budget)
    gpt = load("GPT")
    for mib in (124, 80, 64):
        yield _planned(f"GPT {mib} MiB: plan", gpt, gpt.fixed + mib * MIB)
    yield from _many_budgets(gpt)


def _simulated(label: str, trace: Trace, budget: int, policy: str) -> Row:
    from weft.errors import BudgetError
    from weft.memory import simulate

    try:
        found = simulate(trace, budget, policy, moves=False, log=False)
    except BudgetError:
        return Row(label, feasible=0)
    return Row(
        label, feasible=1, recompute=found.overhead, fragmentation=found.fragmentation, candidates=found.candidates,
        activation_bytes=found.peak - trace.fixed,
    )  # fmt: skip


def _planned(label: str, trace: Trace, budget: int) -> Row:
    import time

    from weft.memory import plan

    start = time.process_time()
    found = plan(trace, budget)
    seconds = time.process_time() - start
    return Row(
        label, feasible=1, recompute=found.overhead, activation_bytes=found.peak - trace.fixed, planning_seconds=seconds
    )


def _many_budgets(trace: Trace) -> Iterator[Row]:
    from weft.memory import least, plan

    low, high = least(trace), trace.peak
    yield Row("GPT: least", activation_bytes=low - trace.fixed, share=(low - trace.fixed) / (high - trace.fixed))
    costs = [plan(trace, low + (high - low) * step // 19).overhead for step in range(20)]
    yield Row(
        "GPT: 20 budgets", worst_rise=max(after - before for before, after in pairwise(costs)), recompute=costs[0]
    )


def live(seed: int) -> Iterator[Row]:
    """A GPT on real text, every way of fitting it in turn."""
    import torch

    from weft.bench.recompute import checkpointed, compiled, eager, gpt_with_dropout, limited, measured, take_turns

    torch.set_num_threads(1)
    model, batch = gpt_with_dropout(seed)
    plain, checkpoint = eager(model), checkpointed(model)
    take_turns([plain, checkpoint], batch, rounds=0)
    peaks = {}
    for share in (0.7, 0.5, 0.3):
        tried = compiled(model, share)
        take_turns([tried], batch, rounds=0)
        peaks[share] = tried.peak
    torchs = compiled(model, min(peaks, key=lambda share: peaks[share]))
    take_turns([torchs], batch, rounds=0)
    ours = [
        limited(model, 2 * plain.peak, "weft, nothing dropped"),
        limited(model, checkpoint.peak, "weft, as checkpoint"),
        limited(model, torchs.peak, "weft, as torch budget"),
        limited(model, 124 * MIB, "weft, 124 MiB"),
    ]
    limits = dict(
        zip((way.name for way in ours), (2 * plain.peak, checkpoint.peak, torchs.peak, 124 * MIB), strict=True)
    )
    torchs.name = TORCH
    ways = [plain, *ours, checkpoint, torchs]
    take_turns(ways, batch, rounds=ROUNDS)
    excess = max(way.peak - limits[way.name] for way in ours)
    for way, row in zip(ways, measured(ways), strict=True):
        extra = {"excess_bytes": excess} if way.name == "weft, as checkpoint" else {}
        yield Row(way.name, **row, **extra)


def online(seed: int) -> Iterator[Row]:
    """Thousands of small operators, none of them planned."""
    import torch

    from weft.bench.recompute import eager, limited, measured, take_turns
    from weft.bench.step_traces import NETWORKS, load

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, batch = NETWORKS["BiLSTM"]()
    plain = eager(model.train())
    take_turns([plain], batch, rounds=0)
    shares = {"online, nothing dropped": 2.0, "online, in 80 %": 0.8, "online, in 50 %": 0.5}
    ways = [limited(model, int(share * plain.peak), label, replay=False) for label, share in shares.items()]
    plain.name, num_ops = "eager BiLSTM", len(load("BiLSTM").ops)
    take_turns([plain, *ways], batch, rounds=ROUNDS)
    first, *rows = measured([plain, *ways])
    yield Row(plain.name, **first)
    for way, row in zip(ways, rows, strict=True):
        beside = row["cpu_seconds"] - first["cpu_seconds"]
        yield Row(way.name, **row, ms_per_operator=1e3 * beside / num_ops)
