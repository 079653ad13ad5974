"""ZeRO as a choice of placements: optimizer state, gradients, parameters in shards, against FSDP2 and DDP.

In one pair of gloo processes, taking turns: DDP, ZeRO-1, -2 and -3 by weft, and FSDP2 (`fully_shard` per block). The model is
the GPT of `oneflow`. Memory is counted tensor by tensor; Adam's state is included from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator

from weft.bench.system import Claim, Row, System, difference, ratio

__all__ = ["SYSTEM", "run"]

SYSTEM = System(
    name="zero-sharding",
    title="ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    paper="arXiv:1910.02054",
    cite="Rajbhandari et al., 2020",
    minutes=3,
    solves="train a model whose parameters, gradients and optimizer state do not fit on one device, as simply as data parallel",
    keywords=("ZeRO", "FSDP", "memory", "optimizer state", "data parallel"),
    use=("weft.planner.Plan.manual", "weft.placement.ParameterPlacement", "weft.run"),
    baselines=("DDP", "FSDP2"),
    tests=("tests/runtime/test_equal.py", "tests/bench/test_pair.py"),
    claims=(
        Claim("step CPU seconds, weft ZeRO-3 / FSDP2", ratio("cpu_seconds", "weft ZeRO-3", "FSDP2"), at_most=1.0),
        Claim("step wall seconds, weft ZeRO-3 / FSDP2", ratio("wall_seconds", "weft ZeRO-3", "FSDP2"), at_most=1.0),
        Claim("bytes per step, weft ZeRO-3 / FSDP2", ratio("wire_bytes", "weft ZeRO-3", "FSDP2"), at_most=1.0),
        Claim("peak memory, weft ZeRO-3 / FSDP2", ratio("peak_bytes", "weft ZeRO-3", "FSDP2"), at_most=1.05),
        Claim(
            "parameter bytes between steps, weft ZeRO-3 / DDP",
            ratio("parameter_bytes", "weft ZeRO-3", "DDP"),
            at_most=0.51,
        ),
        Claim("peak memory, weft ZeRO-1 / DDP", ratio("peak_bytes", "weft ZeRO-1", "DDP"), at_most=0.9),
        Claim("bytes per step, weft ZeRO-1 / DDP", ratio("wire_bytes", "weft ZeRO-1", "DDP"), at_most=1.05),
        *(
            Claim(f"loss, {method} against DDP, relative", difference("loss", method, "DDP"), at_most=1e-4)
            for method in ("weft ZeRO-1", "weft ZeRO-2", "weft ZeRO-3", "FSDP2")
        ),
    ),
)


def run(seed: int) -> Iterator[Row]:
    from weft.bench.pair import Contender, Setting, side_by_side

    ours = "weft.bench.ours:planned"
    yield from side_by_side(
        (
            Contender("DDP", "weft.bench.baselines:ddp"),
            Contender("FSDP2", "weft.bench.baselines:fsdp2"),
            *(Contender(f"weft ZeRO-{stage}", ours, {"strategy": f"zero-{stage}"}) for stage in (1, 2, 3)),
        ),
        "weft.bench.problems:gpt_on_text",
        Setting(rounds=12, memory=True),
        {"seed": seed},
    )
