"""Late workers, in replays and for real: what `weft bench sequential-gradient-coding` runs.

    replays        256 workers, 480 jobs, a two-state chain of lateness; parameters chosen on another record of 80 rounds
    real           8 worker processes, two of which share a core with a load that comes in bursts; two settings, `LIGHT` where a
                   round is mostly fixed cost and bursts last many rounds, `COSTLY` as in the third replay

In a replay a worker takes 1 + slope x load seconds, times U(2, 6) while it is late. Two rules are shown: the paper's (every
scheme, GC included, gives late workers until twice the fastest one's time) and ours (GC closes as soon as it can decode, the
others give 10 % grace, since here workers on time do not differ). In the real run nothing sleeps on behalf of anybody: the
late workers lose the processor to other processes that are pinned to their core and spin. Some of these always spin, so that
the two have as small a share of their core as the six have of theirs, and are not the fast ones between bursts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from weft.bench.digits import digit_images
from weft.bench.system import Row
from weft.comm.straggler import (
    GC,
    MSGC,
    Crew,
    Farm,
    Log,
    Scheme,
    Uncoded,
    candidates,
    fit,
    gilbert_elliott,
    ranking,
    replay,
    slope,
)

__all__ = ["SETTINGS", "real", "replays"]

# late, recover, slope: the card's rows
SETTINGS = ((0.02, 0.8, 8.0), (0.02, 0.8, 20.0), (0.04, 0.8, 8.0), (0.02, 0.5, 8.0))
WORKERS, JOBS, MODELS = 256, 480, 9
FAMILIES = ("Uncoded", "GC", "SRSGC", "MSGC")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def record(rounds: int, late: float, recover: float, per_load: float, seed: int) -> np.ndarray:
    """Seconds of an uncoded round, (rounds, 256)."""
    pattern = gilbert_elliott(rounds, WORKERS, late, recover, seed)
    factor = np.random.default_rng(seed + 1).uniform(2, 6, pattern.shape)
    return np.where(pattern, factor, 1.0) * (1 + per_load / WORKERS)


def total(scheme: Scheme, times: np.ndarray, per_load: float) -> float:
    """Seconds for all jobs, the T rounds at the end included."""
    return replay(scheme, times[: JOBS + scheme.sized(WORKERS).delay], per_load, carry=False).total


def replays(seed: int) -> Iterator[Row]:
    """One row per setting and rule: seconds of each family, and how far `fit` is from the best in hindsight."""
    for late, recover, per_load in SETTINGS:
        chosen_on = record(80, late, recover, per_load, 1000 * seed + 10)
        times = record(JOBS + MODELS, late, recover, per_load, 1000 * seed + 20)
        for rule, mus in (("paper's rule", (1.0,)), ("ours", (0.1,))):
            tried = candidates(WORKERS, MODELS - 1, mus)
            if rule != "ours":
                tried = [replace(scheme, mu=1.0) if isinstance(scheme, GC) else scheme for scheme in tried]
            chosen = ranking(chosen_on, per_load, tried, JOBS, carry=False)
            seconds = {type(scheme).__name__: total(scheme, times, per_load) for _, scheme in chosen}
            fitted = {}
            if rule == "ours":
                (_, best), *_ = ranking(times[:JOBS], per_load, tried, JOBS, families=False, carry=False)
                hindsight = min(total(best, times, per_load), *seconds.values())
                fitted["fit_against_hindsight"] = seconds[type(chosen[0][1]).__name__] / hindsight
            any_s = [scheme for scheme in tried if isinstance(scheme, GC) and scheme.kind == "cyclic"]
            _, cyclic = ranking(chosen_on, per_load, any_s, JOBS, carry=False)[0]
            seconds["GCcyclic"] = total(cyclic, times, per_load)
            say(f"late {late}, recover {recover}, slope {per_load:g}, {rule}: {[scheme for _, scheme in chosen]}")
            yield Row(
                f"replay {late:.0%} {recover} slope {per_load:g}, {rule}",
                **{f"{family.lower()}_seconds": seconds[family] for family in FAMILIES},
                gc_cyclic_seconds=seconds["GCcyclic"],
                m_sgc_against_gc=seconds["MSGC"] / seconds["GC"],
                m_sgc_against_gc_cyclic=seconds["MSGC"] / seconds["GCcyclic"],
                fit_load=chosen[0][1].load,
                fit_seconds=seconds[type(chosen[0][1]).__name__],
                **fitted,
            )


# the real run

PROCESSES, SLOW, REAL_JOBS, REPEATS = 8, (2, 5), 100, 3
RIVALS = 32  # processes that spin on the slow workers' core: while they do, a worker there gets about a 33rd of it
ALWAYS = PROCESSES - 2 * len(SLOW)  # processes that spin there all the time: as many on either core then want it


@dataclass(frozen=True)
class Setting:
    """Four networks on digits, and when the rivals spin: all of them at the same times, exponential in length.

    Attributes:
        network: makes one from a seed.
        rate: of SGD with momentum 0.9.
        bursts: means of a burst and of a pause, in seconds.
        in_rounds: they are in rounds of the quiet uncoded run instead.
    """

    name: str
    network: Callable[[int], nn.Module]
    rate: float
    bursts: tuple[float, float]
    in_rounds: bool


RIVAL = """
import os, random, sys, time
draw, burst, pause, begin = random.Random(int(sys.argv[1])), *map(float, sys.argv[2:])
edge = begin
parent = os.getppid()
while os.getppid() == parent:  # ends with the bench, however that ends
    end = edge + draw.expovariate(1 / burst)
    while time.monotonic() < end:
        pass
    edge = end + draw.expovariate(1) * pause
    time.sleep(max(0.0, edge - time.monotonic()))
"""


@contextmanager
def spinning(count: int, core: int, seed: int, burst: float, pause: float) -> Iterator[None]:
    """Other people's processes on a core, in bursts, for as long as the context lasts; with pause = 0 all the time."""
    arguments = [str(seed), str(burst), str(pause), str(time.monotonic() + 1.0)]
    started = [subprocess.Popen([sys.executable, "-S", "-c", RIVAL, *arguments]) for _ in range(count)]
    try:
        for process in started:
            os.sched_setaffinity(process.pid, {core})
        time.sleep(1.0)
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait(10)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1 797 digits, in a fixed random order."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def perceptron(seed: int) -> nn.Module:
    """2 ms for all 1 797 digits and back, 0.6 ms for one of them: fixed cost."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions(seed: int) -> nn.Module:
    """Some 30 ms for all digits, 1 ms for one of them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


LIGHT = Setting("light load, long bursts", perceptron, 0.3, (0.2, 0.1), in_rounds=False)
# The lateness of the third replay: 4 % of 8 workers turn late in a round, and the two are all that ever do: 16 % of theirs.
COSTLY = Setting("costly load, short bursts", convolutions, 0.05, (1 / 0.8, 1 / 0.16), in_rounds=True)


def train(crew: Crew, setting: Setting, policy: Scheme, jobs: int) -> tuple[Log, float]:
    """Train four networks in turn; the log and the mean loss over all data at the end."""
    nets, (x, y) = [setting.network(seed) for seed in range(4)], digits()
    with Farm(policy, nets, [(x, y)], partial(torch.optim.SGD, lr=setting.rate, momentum=0.9), crew=crew) as farm:
        log = farm.run(jobs)
    with torch.no_grad():
        loss = statistics.fmean(float(nn.functional.cross_entropy(net(x), y)) for net in nets)
    return log, loss


def real(seed: int) -> Iterator[Row]:
    """One row per scheme: wall seconds for 100 jobs, loss, how long it waited; repeated three times in turn, the median."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        say("the real run needs Linux and two cores: skipped")
        return
    before = os.sched_getaffinity(0)
    slow_core, *others = sorted(before)
    with Crew(PROCESSES) as crew:
        for worker, pid in enumerate(crew.pids):
            os.sched_setaffinity(pid, {slow_core} if worker in SLOW else set(others))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        os.sched_setaffinity(0, set(others))
        try:
            with spinning(ALWAYS, slow_core, seed, 1.0, 0.0):
                for setting in (LIGHT, COSTLY):
                    yield from _measured(crew, setting, slow_core, seed)
        finally:
            os.sched_setaffinity(0, before)
            torch.set_num_threads(threads)


def _measured(crew: Crew, setting: Setting, slow_core: int, seed: int) -> Iterator[Row]:
    split = MSGC(1, 2, 0)  # an uncoded round's load in two messages
    alone: tuple[Scheme, ...] = (Uncoded(), GC(2), GC(3), split)
    quick: dict[Scheme, float] = {}
    for one in alone:  # without rivals: what the load costs, and what a message costs
        log, _ = train(crew, setting, one, 30)
        times = np.delete(log.times[5:], SLOW, axis=1)
        quick[one] = float(np.median(times[np.isfinite(times)]))
    measured = slope([one.sized(PROCESSES).load for one in alone[:3]], [quick[one] for one in alone[:3]])
    message = max(0.0, quick[split] / quick[Uncoded()] - 1)
    unit = quick[Uncoded()] if setting.in_rounds else 1.0
    with spinning(RIVALS, slow_core, seed, unit * setting.bursts[0], unit * setting.bursts[1]):
        log, _ = train(crew, setting, Uncoded(), 80)
        with_table = fit(log.times, measured, max_delay=3, jobs=REAL_JOBS, show=False, message=message)
        say(
            f"{setting.name}: round {1e3 * quick[Uncoded()]:.1f} ms, slope {measured:.2f}, message {message:.2f}; "
            f"fit: {with_table}"
        )
        ranked = ranking(log.times, measured, candidates(8, 3), REAL_JOBS, message=message)
        best = {type(scheme).__name__: scheme for _, scheme in ranked}
        schemes: dict[str, Scheme] = {
            "uncoded, wait for all": Uncoded(),
            "uncoded, drop the 2 slowest": Uncoded(drop=2),
            "GC": GC(len(SLOW)),
            "SR-SGC": best["SRSGC"],
            "M-SGC": best["MSGC"],
            "fit": with_table,
        }
        runs: dict[str, list[tuple[Log, float]]] = {name: [] for name in schemes}
        for _ in range(REPEATS):
            for name, scheme in schemes.items():
                runs[name].append(train(crew, setting, scheme, REAL_JOBS))
                say(f"{name}: {scheme}: {runs[name][-1][0].seconds:.2f} s")
    for name, done in runs.items():
        logs = [log for log, _ in done]
        yield Row(
            f"real, {setting.name}: {name}",
            wall_seconds=statistics.median(log.seconds for log in logs),
            loss=statistics.median(loss for _, loss in done),
            decoding_seconds=statistics.median(log.decoding for log in logs),
            late_share=float(np.mean([log.late.mean() for log in logs])),
            outdated=statistics.median(log.outdated for log in logs),
            load=schemes[name].sized(PROCESSES).load,
            measured_slope=measured,
            message_share=message,
        )
