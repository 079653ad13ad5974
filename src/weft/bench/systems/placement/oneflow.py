"""OneFlow's placements and boxing in weft: the plan that weft finds, against DDP and `parallelize_module`.

Three comparisons on this machine, each in its own pair of gloo processes, and two planning times:

    GPT, 10.7 M parameters, batch 8 x 128 of real text    weft's plan, and tensor parallelism by hand, in turns with
                                                          one process, DDP and `parallelize_module`
    100,000-class softmax head                            weft's plan in turns with DDP: bytes per step, head memory
    planning                                              12-layer GPT-2 on 8 and on 8 x 8 devices, one thread

Predictions come from a profile of this machine that is made first, in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator

from weft.bench.system import Claim, Row, System, difference, ratio, value

__all__ = ["SYSTEM", "run"]

SYSTEM = System(
    name="oneflow",
    title="OneFlow: Redesign the Distributed Deep Learning Framework from Scratch",
    paper="arXiv:2110.15032",
    cite="Yuan et al., 2021",
    minutes=4,
    solves="train an unmodified model over several processes by data, tensor or mixed parallelism, without writing communication",
    keywords=("data parallel", "tensor parallel", "sequence parallel", "planning", "softmax", "large vocabulary"),
    use=("weft.plan", "weft.run", "weft.planner.Plan.manual", "weft.placement.box", "weft.placement.localize"),
    baselines=("one process", "DDP", "parallelize_module"),
    tests=("tests/placement/test_boxing.py", "tests/runtime/test_equal.py", "tests/bench/test_pair.py"),
    claims=(
        Claim("step CPU seconds, weft's plan / DDP", ratio("cpu_seconds", "weft plan", "DDP"), at_most=1.05),
        Claim("step wall seconds, weft's plan / DDP", ratio("wall_seconds", "weft plan", "DDP"), at_most=1.05),
        Claim("step CPU seconds, weft tensor parallel / parallelize_module",
              ratio("cpu_seconds", "weft tensor", "parallelize_module"), at_most=0.85),
        Claim("step wall seconds, weft tensor parallel / parallelize_module",
              ratio("wall_seconds", "weft tensor", "parallelize_module"), at_most=0.85),
        Claim("loss, weft's plan against one process, relative", difference("loss", "weft plan", "one process"), at_most=1e-4),
        Claim("loss, weft tensor parallel against one process, relative",
              difference("loss", "weft tensor", "one process"), at_most=1e-4),
        Claim("predicted / measured step seconds - 1, absolute",
              lambda r: abs(r["weft plan", "predicted_seconds"] / r["weft plan", "wall_seconds"] - 1), at_most=0.2),
        Claim("predicted / measured peak memory - 1, absolute",
              lambda r: abs(r["weft plan", "predicted_bytes"] / r["weft plan", "peak_bytes"] - 1), at_most=0.1),
        Claim("100k classes: bytes per step, weft's plan / DDP", ratio("wire_bytes", "weft head", "DDP head"), at_most=0.2),
        Claim("100k classes: head bytes per process, weft's plan / DDP",
              ratio("head_bytes", "weft head", "DDP head"), at_most=0.501),
        Claim("100k classes: loss against DDP, relative", difference("loss", "weft head", "DDP head"), at_most=1e-4),
        Claim("GPT-2 on a mesh of 8: seconds to capture and plan", value("planning_seconds", "planning 8"), at_most=3),
        Claim("GPT-2 on a mesh of 8 x 8: seconds to capture and plan", value("planning_seconds", "planning 8x8"), at_most=8),
        Claim("GPT-2 on a mesh of 8 x 8: memory of the planner, GiB",
              lambda r: r["planning 8x8", "planner_bytes"] / 2**30, at_most=1),
    ),
)  # fmt: skip

ROUNDS = 12


def run(seed: int) -> Iterator[Row]:
    from weft.bench.pair import Contender, Setting, side_by_side
    from weft.bench.planning import planning_row, profiled_cluster

    with profiled_cluster(processes=2) as cluster:
        ours = "weft.bench.ours:planned"
        yield from side_by_side(
            (
                Contender("one process", "weft.bench.baselines:single"),
                Contender("DDP", "weft.bench.baselines:ddp"),
                Contender("weft plan", ours, {"cluster": cluster}),
                Contender("parallelize_module", "weft.bench.baselines:tensor"),
                Contender("weft tensor", ours, {"cluster": cluster, "strategy": "tp"}),
            ),
            "weft.bench.problems:gpt_on_text",
            Setting(rounds=ROUNDS, memory=True),
            {"seed": seed},
        )
        yield from side_by_side(
            (
                Contender("DDP head", "weft.bench.baselines:ddp"),
                Contender("weft head", ours, {"cluster": cluster}),
            ),
            "weft.bench.problems:wide_head",
            Setting(rounds=ROUNDS),
            {"seed": seed},
        )
    yield planning_row("planning 8", devices=8, hosts=1, mesh=(8,))
    yield planning_row("planning 8x8", devices=64, hosts=8, mesh=(8, 8))
