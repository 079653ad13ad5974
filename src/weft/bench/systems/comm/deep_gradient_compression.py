"""Deep Gradient Compression against plain DDP, fp16, PowerSGD and top-k with error feedback, on links of a known speed.

Two gloo processes in network namespaces of their own, joined by a cable with a token bucket: 100 Mbit/s, 1 Gbit/s, and without a
limit (the honest negative: there the codec costs more than the bytes). The model is a byte-level transformer of 6.5 million
parameters on tinyshakespeare; batches are small (4 windows of 64 bytes a rank for the times, 2 for the training) so that all ends
in minutes. Quality: the same steps and seeds for every method. The transformer has one learning rate for all and one seed: its
losses say how methods compare at that rate, not at each one's best; the residual
network (3 blocks of 16, 32 and 64 channels, as the published CIFAR-10 family; 4,000 lossless images, 1,000 of them for the test;
34 epochs of 187 steps, mean of three seeds) the best of three for each method, judged on 1,000 images of the training. As
published, the learning rate rises while the ratio falls, and then goes down by a cosine.

How long a run lasts decides what it shows. An entry waits about 1/ratio steps until it is sent, and what is sent often has lost
its momentum to the masking, so DGC begins late and catches up as the rate goes down. A network of half the channels ended
3 points behind plain DDP after as many steps, and 4 after a quarter of them (16 epochs of twice the batch); the published runs
are of 200 epochs.
"""

from __future__ import annotations

from collections.abc import Iterator

from weft.bench.system import Claim, Measure, Results, Row, System, ratio, value

__all__ = ["SYSTEM", "run"]

STEPS, LR = 800, 0.05
ROWS, CONTEXT = 2, 64  # a rank's batch in training the transformer
RESNET = {"epochs": 34, "rates": (0.05, 0.1, 0.2), "rows": 8, "widths": (16, 32, 64), "held_out": 1000}
TUNED = "each at its best of three rates"
FIXED = f"at one fixed rate {LR:g}"
SLOW, FAST, FREE = "100 Mbit/s", "1 Gbit/s", "no limit"
TIMED = ("plain DDP", "fp16 hook", "PowerSGD-4", "DGC 1%", "DGC 0.1%")
TRAINED = ("plain DDP", "PowerSGD-4", "top-k 1%, error feedback", "DGC 1%", "DGC 0.1%")


def _slow(measure: str, baseline: str, ours: str) -> Measure:
    """baseline / ours on the slow link."""
    return ratio(measure, f"{baseline}, {SLOW}", f"{ours}, {SLOW}")


def _points(results: Results) -> float:
    return results["ResNet, DGC 1%", "accuracy_percent"] - results["ResNet, plain DDP", "accuracy_percent"]


SYSTEM = System(
    name="deep-gradient-compression",
    title="Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training",
    paper="arXiv:1712.01887",
    cite="Lin et al., 2018",
    minutes=38,
    repeats="the residual network's accuracies are means of three seeds, the transformer's losses are of one",
    settings=("weft.bench.compressed",),
    solves="data-parallel training over links of 1 Gbit/s and below, where sending gradients takes longer than computing them",
    keywords=("gradient compression", "top-k", "sparsification", "DGC", "PowerSGD", "slow network"),
    use=("weft.comm.dgc", "weft.comm.attach", "weft.comm.TopK", "weft.comm.MomentumCorrection"),
    baselines=("plain DDP", "fp16 hook", "PowerSGD-4", "top-k with error feedback and momentum in the optimizer"),
    tests=(
        "tests/comm/codecs/test_top_k.py", "tests/comm/memories/test_momentum_correction.py", "tests/comm/test_presets.py",
    ),
    claims=(
        Claim("whole step at 100 Mbit/s, plain DDP / DGC 1%", _slow("step_seconds", "plain DDP", "DGC 1%"), at_least=5),
        Claim("whole step at 100 Mbit/s, fp16 / DGC 1%", _slow("step_seconds", "fp16 hook", "DGC 1%"), at_least=2),
        Claim("exchange at 100 Mbit/s, plain DDP / DGC 1%", _slow("exchange_seconds", "plain DDP", "DGC 1%"), at_least=5),
        Claim("exchange at 100 Mbit/s, fp16 / DGC 1%", _slow("exchange_seconds", "fp16 hook", "DGC 1%"), at_least=2.5),
        Claim("bytes on the interface, plain DDP / DGC 0.1%", _slow("wire_bytes", "plain DDP", "DGC 0.1%"), at_least=270),
        Claim("codec CPU seconds a step, DGC 1%", value("codec_cpu_seconds", f"DGC 1%, {SLOW}"), at_most=0.05),
        Claim(f"validation loss {FIXED}, DGC 1% / plain DDP", ratio("validation_loss", "DGC 1%", "plain DDP"), at_most=1.02),
        Claim(f"validation loss {FIXED}, DGC 0.1% / plain DDP", ratio("validation_loss", "DGC 0.1%", "plain DDP"), at_most=1.02),
        Claim(
            f"validation loss {FIXED}, DGC 1% / top-k 1% with error feedback",
            ratio("validation_loss", "DGC 1%", "top-k 1%, error feedback"),
            at_most=1.0,
        ),
        Claim("largest difference between ranks, DGC 1%", value("ranks_apart", "DGC 1%"), at_most=0),
        Claim(f"ResNet on CIFAR-10, {TUNED}: accuracy, DGC 1% - plain DDP, points", _points, at_least=-0.5),
    ),
)  # fmt: skip


def run(seed: int) -> Iterator[Row]:
    """Rows per method and link, then per method trained, then the crossover in the number of ranks."""
    from weft.bench.compressed import say
    from weft.bench.links import LinksNotPermitted, Wire, on_links

    here = "weft.bench.compressed"
    measured: dict[str, dict[str, float]] = {}
    try:
        for label, wire, rounds in ((SLOW, Wire(1e8), 4), (FAST, Wire(1e9), 4), (FREE, Wire(), 4)):
            say(f"steps of {', '.join(TIMED)} at {label}")
            found = on_links(
                f"{here}:step_times", 2, wire, {"methods": TIMED, "rounds": rounds, "seed": seed}, timeout=280
            )
            for method, numbers in zip(TIMED, found[0], strict=True):
                measured[f"{method}, {label}"] = numbers
                yield Row(f"{method}, {label}", **numbers)
        yield from _crossover(measured)
        say("training the transformer")
        options = {
            "methods": TRAINED,
            "steps": STEPS,
            "seed": seed,
            "lr": LR,
            "rows": ROWS,
            "context": CONTEXT,
            "stage": STEPS // 20,
        }
        found = on_links(f"{here}:text_losses", 2, Wire(), options, timeout=3600)
        for method, numbers in zip(TRAINED, found[0], strict=True):
            yield Row(method, **numbers)
        say("training the residual network")
        both = ("plain DDP", "DGC 1%")
        seeds = tuple(range(3 * seed, 3 * seed + 3))
        options = {"methods": both, "seeds": seeds, **RESNET}
        found = on_links(f"{here}:image_accuracy", 2, Wire(), options, timeout=3600)
        for method, numbers in zip(both, found[0], strict=True):
            yield Row(f"ResNet, {method}", **numbers)
    except LinksNotPermitted as error:
        say(f"deep-gradient-compression: not run, and its claims are open: {error}")
    except FileNotFoundError as error:
        say(f"deep-gradient-compression: not run to its end, the rest of its claims is open: {error}")


def _crossover(measured: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Up to how many ranks an all-gather of m bytes each is faster than a ring all-reduce of D bytes, and codec seconds aside.

    From the measured bytes at 2 ranks, D = wire bytes of plain DDP and m those of DGC, by `AllGather.crossover`.
    """
    from weft.bench.compressed import say
    from weft.comm.topology import AllGather

    dense = measured[f"plain DDP, {SLOW}"]["wire_bytes"]
    for method in ("DGC 1%", "DGC 0.1%"):
        most = AllGather.crossover(dense, measured[f"{method}, {SLOW}"]["wire_bytes"])
        say(f"{method}: the all-gather moves fewer bytes than plain all-reduce up to {most:.0f} ranks")
        yield Row(f"crossover, {method}", ranks=most)
