"""Methods side by side in the same processes, taking turns step by step.

Timing one method after another compares the machine's moods. Here every method of a comparison lives in the same worker
processes; a round runs one step of each, in an order that rotates, with a barrier before each step. What is reported is the
median over the rounds (`turns.across`) of: CPU seconds of all threads, summed over processes (`cpu_seconds`); wall seconds of the
slowest process (`wall_seconds`); bytes over loopback (`wire_bytes`).

    Setting         how many processes and rounds
    Contender       a label, the function that builds it (`module:function`), its options
    side_by_side    start the processes, take turns, return one row per contender

A contender's function takes (problem, **options) and is a context manager that yields a `Step`. Every contender gets the same
`Problem`: the same initial weights, the same batches in the same order, the same optimizer. Losses of the last round are
compared by the caller: they must be equal.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.bench.system import Row
from weft.bench.turns import Taken, across, rotated, watch

__all__ = ["Contender", "Problem", "Setting", "Step", "side_by_side"]


@dataclass(frozen=True)
class Setting:
    """How a comparison runs.

    Attributes:
        processes: worker processes on this machine, >= 1.
        rounds: timed steps of every contender; the first `warmup` steps before them are not timed.
        memory: also run each contender once more, alone, under the memory meter (`peak_bytes`: the worst process).
        timeout: seconds after which a worker that waits for another gives up.
    """

    processes: int = 2
    rounds: int = 12
    warmup: int = 3
    memory: bool = False
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.processes < 1 or self.rounds < 1 or self.warmup < 0:
            raise ValueError(f"Setting: processes and rounds must be >= 1 and warmup >= 0, got {self}")


@dataclass(frozen=True)
class Contender:
    """One method: `build` names a function `module:function` of (problem, **options)."""

    label: str
    build: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is trained: fresh models with the same weights, the batches, the optimizer.

    Attributes:
        factory: builds a model; its forward takes a batch's items and returns the loss.
        batches: global batches, tuples of tensors whose first dim is the batch.
        optimizer: a function of parameters.
    """

    factory: Callable[[], Any]
    batches: Sequence[tuple[Any, ...]]
    optimizer: Callable[..., Any]
    seed: int = 0

    def model(self) -> Any:
        """A new model with the initial weights, the same each time."""
        import torch

        torch.manual_seed(self.seed)
        return self.factory()

    def share(self, batch: tuple[Any, ...], rank: int, world: int) -> tuple[Any, ...]:
        """This process's rows of a global batch, for data-parallel baselines."""
        return tuple(item.chunk(world)[rank] for item in batch)


@dataclass
class Step:
    """One training step of a contender: `run(batch)` takes the global batch and returns a loss.

    `mean` says that a process returns the mean over its own rows, so that the global loss is the mean over processes.
    `facts()`, called on every process once all steps are done, is added to the row (predicted seconds, bytes of parameters).
    """

    run: Callable[[tuple[Any, ...]], Any]
    mean: bool = False
    facts: Callable[[], dict[str, float]] = dict


def side_by_side(
    contenders: Sequence[Contender], problem: str, setting: Setting, options: Mapping[str, Any] | None = None
) -> list[Row]:
    """Run all contenders in the same processes, taking turns; one row each, in their order.

    Args:
        contenders: the methods.
        problem: `module:function` giving the `Problem`, called in each worker with `**options`.
        setting: processes and rounds.
        options: for the problem; JSON values.
    Raises:
        RuntimeError: a worker failed; its error is shown.
    """
    from torch.multiprocessing.spawn import start_processes

    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        answer = Path(folder) / "rows.json"
        port = _free_port()
        arguments = (setting, tuple(contenders), problem, dict(options or {}), port, str(answer))
        try:
            start_processes(_worker, arguments, nprocs=setting.processes, start_method="spawn")
        except Exception as error:
            raise RuntimeError(f"a benchmark worker failed: {error}") from error
        return [Row(item.pop("method"), **item) for item in json.loads(answer.read_text())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _load(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _worker(
    rank: int,
    setting: Setting,
    contenders: Sequence[Contender],
    problem_path: str,
    options: dict[str, Any],
    port: int,
    answer: str,
) -> None:
    """One process of the comparison: the environment of torchrun, one process group, all contenders."""
    world = setting.processes
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99",
    }  # fmt: skip
    import datetime

    import torch
    import torch.distributed as dist

    # One compute thread per process: two spinning pools on two cores slow each other threefold.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=setting.timeout))
    try:
        problem: Problem = _load(problem_path)(**options)
        rows = _take_turns(setting, contenders, problem)
        if setting.memory:
            for contender, row in zip(contenders, rows, strict=True):
                row["peak_bytes"] = _peak(contender, problem)
        if rank == 0:
            Path(answer).write_text(json.dumps(rows))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _take_turns(setting: Setting, contenders: Sequence[Contender], problem: Problem) -> list[dict[str, Any]]:
    import torch.distributed as dist

    measured: list[list[Taken]] = [[] for _ in contenders]
    losses: list[float] = [float("nan")] * len(contenders)
    with contextlib.ExitStack() as stack:
        steps: list[Step] = [
            stack.enter_context(_load(contender.build)(problem, **contender.options)) for contender in contenders
        ]
        for turn in range(setting.warmup + setting.rounds):
            batch = problem.batches[turn % len(problem.batches)]
            for index in rotated(range(len(steps)), turn):
                losses[index], taken = _timed(steps[index], batch)
                if turn >= setting.warmup:
                    measured[index].append(taken)
        facts = [step.facts() for step in steps]
        everyone: list[Any] = [None] * setting.processes
        dist.all_gather_object(everyone, (measured, losses))
    rows = []
    for index, (contender, step) in enumerate(zip(contenders, steps, strict=True)):
        final = [own[index] for _, own in everyone]
        rows.append({
            "method": contender.label,
            **across([taken[index] for taken, _ in everyone]),
            "loss": sum(final) / len(final) if step.mean else final[0],
            **facts[index],
        })  # fmt: skip
    return rows


def _timed(step: Step, batch: tuple[Any, ...]) -> tuple[float, Taken]:
    """The loss of one step, and what it took; bytes are those over loopback."""
    import torch.distributed as dist

    from weft.bench.meters import loopback_bytes

    gc.collect()  # of what the contender before this one left: its cycles of Python objects are not this one's cost
    dist.barrier()
    before = loopback_bytes()
    dist.barrier()  # nobody starts before everybody has read the counter
    with watch() as taken:
        loss = step.run(batch)
    dist.barrier()
    taken.nbytes = float(loopback_bytes() - before)
    return float(loss), taken


def _peak(contender: Contender, problem: Problem, steps: int = 2) -> float:
    """Most bytes of tensors that any process held during a step, once the first step has made the optimizer's state."""
    import torch
    import torch.distributed as dist

    from weft.bench.meters import peak_bytes

    with peak_bytes() as found, _load(contender.build)(problem, **contender.options) as step:
        step.run(problem.batches[0])
        with found.window():
            for turn in range(steps):
                step.run(problem.batches[(1 + turn) % len(problem.batches)])
    worst = torch.tensor([float(found.peak)])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)
