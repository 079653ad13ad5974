"""ZeRO-Infinity: train from disk, against training in memory and against memory-mapped state.

One process, taking turns: a GPT of 28 million parameters (454 MB of parameters, gradients and Adam state) in memory; by weft with
parameters and state on disk, in turns and overlapped; with parameters, gradients and state in memory-mapped files, of which a
quarter may be resident, as much memory as weft may use (`resident_bytes` is what they take, since what forward and backward
read stays besides); and the bytes that weft moves, by plain threads, which is what the disk alone takes: no overlap can beat it.
64 tokens a step, which the disk bounds, and 512, which computing bounds. What a step from disk takes is predicted before: its
bytes by `traffic`, the disk's rates by `measure`, computing by steps in memory that end before the others begin.

Then what plans say of activations that wait on disk: a GPT whose activations, half of their bytes or all that can go, leave and
come back within `weft.memory.limit`, on a tier measured just before; predicted seconds against measured ones.

Then processes with a throttled link each: every process reading its 1/N of each parameter, against one process reading it and
broadcasting; on demand, where only one link of the latter is busy, and with one parameter read ahead, where two are: of two
links that is all there are, so that splitting gains nothing there.

Numbers are of the disk under the folder for temporary files (`TMPDIR`), which the first row names with its rates. A file system
that is memory, or one without O_DIRECT, runs too, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from weft.bench.system import Claim, Results, Row, System, difference, ratio

__all__ = ["SYSTEM", "run"]

MEMORY, OURS, SERIAL, MAPPED, RAW = "in memory", "weft overlapped", "weft in turns", "memory-mapped", "raw transfers"
CAP = 108 << 20  # a quarter of the parameters, gradients and Adam state
RATE = 16e6  # bytes per second of a throttled link


BOUND = "memory-mapped / raw transfers: if computing and all else were free"
LONG = ", 512 tokens"
WAITING = ", its activations"
PREDICTED = "predicted before the steps"
HALF, MOST = "half of the activations on disk", "most activations on disk"


def _ideal(results: Results, tokens: str = "") -> float:
    """Seconds of max(compute, bytes / bandwidth), both measured in turns with ours."""
    return max(results[MEMORY + tokens, "wall_seconds"], results[RAW + tokens, "wall_seconds"])


def _predicted(measure: str, method: str, tokens: str = "") -> Callable[[Results], float]:
    """|predicted / measured - 1| of a step from disk."""
    return lambda r: abs(r[PREDICTED + tokens, measure] / r[method + tokens, "wall_seconds"] - 1)


def beside(results: Results) -> Iterator[str]:
    """The disk, its file system, and its rates before the steps and among them."""
    disk = next((name for name in results.methods if name.startswith("disk: ")), "")
    rows = {"before the steps": disk, "among those of 64 tokens": RAW, "among those of 512": RAW + LONG}
    rates = [
        f"{results[row, 'read_rate'] / 1e6:,.0f} MB/s read and {results[row, 'write_rate'] / 1e6:,.0f} written {when}"
        for when, row in rows.items()
    ]
    yield f"{disk}; measured with plain threads, {', '.join(rates)}"


def _foretold(method: str) -> Callable[[Results], float]:
    """|predicted / measured - 1| of a step within a limit; the prediction is a multiple of the step in memory."""
    eager = MEMORY + WAITING
    return lambda r: abs(r[eager, "wall_seconds"] * r[method, "predicted"] / r[method, "wall_seconds"] - 1)


def _moved(results: Results) -> float:
    """Counted bytes of a step over the formula's."""
    return max(
        results[OURS, measure] / results[RAW, measure] for measure in ("read_bytes", "written_bytes")
    )  # fmt: skip


SYSTEM = System(
    name="zero-infinity",
    title="ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning",
    paper="arXiv:2104.07857",
    cite="Rajbhandari et al., 2021",
    minutes=6,
    beside=beside,
    solves="train a model whose parameters, gradients and optimizer state fit on no device and in no memory, from disk",
    keywords=("ZeRO", "offload", "NVMe", "disk", "host memory", "optimizer state", "crash", "resume"),
    use=(
        "weft.memory.tiers.Tiered", "weft.memory.tiers.Tiers", "weft.memory.tiers.DiskOptimizer", "weft.memory.tiers.tile",
        "weft.memory.tiers.choose", "weft.memory.tiers.measured",
    ),
    baselines=(MEMORY, MAPPED, RAW, "owner broadcast"),
    tests=(
        "tests/memory/tiers/test_tiered.py", "tests/memory/tiers/test_processes.py", "tests/memory/tiers/test_kill.py",
        "tests/memory/tiers/test_disk_optimizer.py", "tests/memory/tiers/test_rates.py", "tests/memory/tiers/test_loops.py",
    ),
    claims=(
        Claim("step seconds, weft overlapped / max(compute, bytes / bandwidth)",
              lambda r: r[OURS, "wall_seconds"] / _ideal(r), at_most=1.15),
        Claim("512 tokens: step seconds, weft overlapped / max(compute, bytes / bandwidth)",
              lambda r: r[OURS + LONG, "wall_seconds"] / _ideal(r, LONG), at_most=1.15),
        Claim("step seconds, memory-mapped / weft overlapped", ratio("wall_seconds", MAPPED, OURS), at_least=5),
        Claim("peak bytes of tensors, weft overlapped / memory cap", lambda r: r[OURS, "peak_bytes"] / CAP, at_most=1),
        Claim("predicted before / measured step seconds - 1, absolute, overlapped",
              _predicted("overlapped_seconds", OURS), at_most=0.25),
        Claim("512 tokens: predicted before / measured step seconds - 1, absolute, overlapped",
              _predicted("overlapped_seconds", OURS, LONG), at_most=0.25),
        Claim("predicted before / measured step seconds - 1, absolute, in turns",
              _predicted("in_turns_seconds", SERIAL), at_most=0.25),
        Claim("half of the activations on disk: predicted / measured step seconds - 1, absolute", _foretold(HALF), at_most=0.25),
        Claim("most activations on disk: predicted / measured step seconds - 1, absolute", _foretold(MOST), at_most=0.25),
        Claim("activations on disk: loss against in memory, relative", difference("loss", MOST, MEMORY + WAITING), at_most=0),
        Claim("bytes moved per step / formula", _moved, at_most=1.05),
        Claim("loss after the last step against in memory, relative", difference("loss", OURS, MEMORY), at_most=0),
        Claim("bytes per second of the reader / plain threads", lambda r: r["plain reader", "wall_seconds"]
              / r["weft reader", "wall_seconds"], at_least=0.8),
        *(
            Claim(f"{world} throttled links, {said}: owner broadcast / each its 1/{world}, seconds",
                  ratio("wall_seconds", f"owner broadcast, {world}{ahead}", f"each its 1/{world}{ahead}"), at_least=least)
            for said, ahead in (("read on demand", ""), ("one parameter read ahead", ", 1 ahead"))
            for world, least in ((2, 1.7), (4, 3.2))
        ),
    ),
)  # fmt: skip


def run(seed: int) -> Iterator[Row]:
    import tempfile

    from weft.bench.offload import peak, predicted, resident
    from weft.bench.pair import Contender, Setting, side_by_side
    from weft.memory.tiers import describe, measure

    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        place, rates = describe(folder), measure(folder)
    kind = "memory, not a disk" if place.is_memory else "O_DIRECT" if place.direct else "through the page cache"
    yield Row(f"disk: {place.filesystem} on {place.device}, {kind}", read_rate=rates["read"], write_rate=rates["write"])
    here = "weft.bench.offload:"
    long = {"batch": 4, "tokens": 128}
    for label, tokens in (("", {}), (LONG, long)):
        (alone,) = side_by_side(
            (Contender(MEMORY, "weft.bench.baselines:single"),),
            here + "gpt_wide",
            Setting(processes=1, rounds=6, warmup=3),
            {"seed": seed, **tokens},
        )
        compute = alone.values["wall_seconds"]
        seconds = {
            f"{way}_seconds": predicted(rates, compute, way == "overlapped", **tokens)
            for way in ("overlapped", "in_turns")
        }
        yield Row(PREDICTED + label, compute_seconds=compute, **seconds)
    rows = side_by_side(
        (
            Contender(MEMORY, "weft.bench.baselines:single"),
            Contender(OURS, here + "tiered"),
            Contender(RAW, here + "raw"),
            Contender(SERIAL, here + "tiered", {"overlap": False}),
            Contender(MAPPED, here + "mapped", {"cap": CAP}),
        ),
        here + "gpt_wide",
        Setting(processes=1, rounds=10, warmup=3),
        {"seed": seed},
    )
    yield from rows
    seconds = {row.method: row.values["wall_seconds"] for row in rows}
    yield Row(BOUND, ratio=seconds[MAPPED] / seconds[RAW])
    yield Row(OURS, peak_bytes=peak(overlap=True))
    yield Row(SERIAL, peak_bytes=peak(overlap=False))
    yield Row(MAPPED, resident_bytes=resident(CAP))
    yield from side_by_side(
        (
            Contender(MEMORY + LONG, "weft.bench.baselines:single"),
            Contender(OURS + LONG, here + "tiered"),
            Contender(RAW + LONG, here + "raw"),
        ),
        here + "gpt_wide",
        Setting(processes=1, rounds=6, warmup=3),
        {"seed": seed, **long},
    )
    yield from side_by_side(
        (
            Contender(MEMORY + WAITING, "weft.bench.baselines:single"),
            Contender(HALF, here + "waiting", {"share": 0.5}),
            Contender(MOST, here + "waiting", {"share": 0.0}),
        ),
        here + "gpt_wide",
        Setting(processes=1, rounds=8, warmup=9),
        {"seed": seed, "layers": 4, "width": 192, "batch": 8, "tokens": 192},
    )
    size = {"nbytes": 384 << 20}
    yield from side_by_side(
        (Contender("plain reader", here + "raw_reader", size), Contender("weft reader", here + "reader", size)),
        here + "links",
        Setting(processes=1, rounds=10, warmup=1),
    )
    for world in (2, 4):
        link = {"rate": RATE}
        yield from side_by_side(
            (
                Contender(f"owner broadcast, {world}", here + "broadcast", link),
                Contender(f"each its 1/{world}", here + "gathered", link),
                Contender(f"owner broadcast, {world}, 1 ahead", here + "broadcast", {**link, "ahead": 1}),
                Contender(f"each its 1/{world}, 1 ahead", here + "gathered", {**link, "ahead": 2 << 20}),
            ),
            here + "links",
            Setting(processes=world, rounds=4, warmup=2),
        )
