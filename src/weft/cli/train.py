"""`weft train`: plan a model, or take a plan, and train it over local processes or under torchrun."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Protocol

from weft.cli import inputs
from weft.cli import plan as planning
from weft.cli.curve import curve_svg, smooth
from weft.paths import to_folder

__all__ = ["add"]

EXAMPLES = """examples:
  weft train --task language-model --processes 2 --steps 200 --plan-page plan.html --curve loss.svg
  weft train --task language-model --data book.txt --checkpoint run/ --steps 1000
  weft train mymodel:build --cluster cluster.yaml --plan plan.json --lr 1e-3 --clip-norm 1.0
  torchrun --nproc-per-node 4 -m weft train mymodel:build --processes 4 --steps 500

`mymodel:build` returns (model, batches) or (model, batches, loss); `batches` is a DataLoader or any iterable of global batches.
"""


def add(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="plan a model and train it over several processes",
        description="Plan a model for a cluster (or take --plan), start the processes (or use those of torchrun), and train.",
        epilog=EXAMPLES,
    )
    inputs.add_job(command)
    inputs.add_cluster(command)
    planning.add_options(command)
    command.add_argument("--plan", metavar="FILE", help="train by this plan instead of searching for one")
    command.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps (default 100)")
    command.add_argument("--lr", type=float, default=3e-4, metavar="X", help="learning rate (default 0.0003)")
    command.add_argument("--clip-norm", type=float, metavar="X", help="scale gradients down to this global norm")
    command.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default 1)")
    command.add_argument("--bf16", action="store_true", help="compute in bfloat16 where PyTorch's autocast does")
    command.add_argument("--checkpoint", metavar="DIR", help="save there at the end and on Ctrl-C")
    command.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="and every N steps")
    command.add_argument(
        "--resume", metavar="DIR", help="go on from this checkpoint, whatever plan and processes wrote it"
    )
    command.add_argument("--log-dir", metavar="DIR", help="write TensorBoard-readable logs there")
    command.add_argument("--curve", metavar="FILE", help="write the loss curve as an SVG picture")
    command.set_defaults(run=run)
    return command


class Trainer(Protocol):
    """What `weft.run` yields, as far as this command uses it."""

    def step(self, batch: Any) -> float: ...


def run(arguments: argparse.Namespace) -> int:
    from weft import runtime

    check(arguments)
    main = int(os.environ.get("RANK", "0")) == 0  # under torchrun, one process speaks
    job = inputs.load_job(arguments)
    plan = _loaded(arguments) if arguments.plan else planning.find(arguments, job)
    if main:
        print(plan, file=sys.stderr if arguments.json else sys.stdout, flush=True)
        planning.show(plan, arguments)
    optimizer = partial(inputs.optimizer_class(arguments.optimizer), lr=arguments.lr)
    options: dict[str, Any] = {"loss": job.loss, "seed": arguments.seed, "accumulate": arguments.accumulate}
    options |= {"clip_norm": arguments.clip_norm} if arguments.clip_norm is not None else {}
    options |= {
        name: getattr(arguments, name) for name in ("checkpoint", "resume", "log_dir") if getattr(arguments, name)
    }
    options |= {"checkpoint_every": arguments.checkpoint_every, "autocast": "bf16" if arguments.bf16 else None}
    start = time.perf_counter()
    with runtime.run(plan, job.model, optimizer, **options) as trainer:
        losses, seconds = train(trainer, job, arguments.steps, quiet=not main)
    if main:
        report(arguments, plan, losses, seconds, time.perf_counter() - start, job.tokens)
    return 0 if math.isfinite(losses[-1]) else 1


def _loaded(arguments: argparse.Namespace) -> Any:
    """The plan of --plan, checked against the machines that are named besides."""
    from weft.planner import Plan

    plan = Plan.load(arguments.plan)
    if arguments.cluster:
        plan.check(inputs.load_cluster(arguments))
    if arguments.processes is not None and arguments.processes != plan.mesh.size:
        raise ValueError(
            f"--plan {arguments.plan} is for {plan.mesh.size} processes, not {arguments.processes}; plan again for these"
        )
    return plan


def check(arguments: argparse.Namespace) -> None:
    """Refuse bad numbers before anything slow happens."""
    searching = [
        name
        for name in ("memory", "mesh", "strategy", "no_recompute", "no_offload", "allow_replicated")
        if getattr(arguments, name)
    ]
    if arguments.plan and searching:
        raise ValueError(
            f"--{searching[0].replace('_', '-')} is for the search of a plan, and --plan {arguments.plan} is one; leave one out"
        )
    if arguments.checkpoint_every and not arguments.checkpoint:
        raise ValueError("--checkpoint-every needs --checkpoint DIR, the folder to save to")
    for option, least in (("steps", 1), ("accumulate", 1), ("checkpoint_every", 0)):
        if getattr(arguments, option) < least:
            raise ValueError(f"--{option.replace('_', '-')} must be at least {least}, got {getattr(arguments, option)}")
    for option in ("lr", "clip_norm"):
        number = getattr(arguments, option)
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"--{option.replace('_', '-')} must be a positive number, got {number}")
    if arguments.curve and Path(arguments.curve).suffix.lower() not in (".svg", ".html"):
        raise ValueError(f"--curve writes an SVG picture; name it .svg (or .html), not {arguments.curve!r}")
    inputs.check_folders(
        {"--curve": arguments.curve, "--plan-page": arguments.plan_page, "--save-plan": arguments.save_plan}
    )
    if arguments.checkpoint:
        to_folder("--checkpoint", arguments.checkpoint, beside=True)
    if arguments.log_dir:
        to_folder("--log-dir", arguments.log_dir)
    if arguments.resume:
        from weft.runtime.checkpoint import check as check_checkpoint

        check_checkpoint(Path(arguments.resume))


def train(trainer: Trainer, job: inputs.Job, steps: int, quiet: bool) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step."""
    batches = job.batches()
    losses: list[float] = []
    seconds: list[float] = []
    with progress(steps, quiet) as tell:
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"the batches ended after {len(losses)} steps; give an iterable that can start again, or --steps"
                )
            begin = time.perf_counter()
            losses.append(float(trainer.step(batch)))
            seconds.append(time.perf_counter() - begin)
            tell(losses[-1], job.tokens / seconds[-1] if job.tokens else 0.0)
    return losses, seconds


@contextmanager
def progress(steps: int, quiet: bool) -> Iterator[Any]:
    """Yield `tell(loss, tokens_per_second)`: a bar on a terminal, a line now and then elsewhere, nothing if quiet."""
    if quiet:
        yield lambda loss, rate: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def tell(loss: float, rate: float) -> None:
            nonlocal done
            done += 1
            if done == 1 or done == steps or done % max(1, steps // 10) == 0:
                print(
                    f"step {done}/{steps}  loss {loss:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else ""),
                    file=sys.stderr,
                    flush=True,
                )

        yield tell
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, said="")
        yield lambda loss, rate: bar.update(
            task, advance=1, said=f"loss {loss:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
        )


def report(
    arguments: argparse.Namespace, plan: Any, losses: list[float], seconds: list[float], total: float, tokens: int
) -> None:
    """Say how it went, predicted beside measured, and write the curve."""
    from weft.planner.units import seconds as took

    later = sorted(seconds[1:])  # the first step builds the programs, and waits for processes to start
    usual = later[len(later) // 2] if later else None
    predicted = float(plan.prediction.seconds)
    value: dict[str, Any] = {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "smoothed_loss": smooth(losses)[-1],
        "step_seconds": usual,  # None: there was none but the first
        "predicted_step_seconds": predicted,
        "total_seconds": total,
    }
    if tokens and usual is not None:
        value["tokens_per_second"] = tokens / usual
    counted = f"{len(losses)} step{'s' * (len(losses) > 1)}"
    if arguments.curve:
        pace = f"{took(usual)} a step (predicted {took(predicted)})" if usual else f"predicted {took(predicted)} a step"
        subtitle = f"{plan.mesh.size} processes, {pace}"
        title = f"{arguments.task or arguments.target}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {counted}"
        svg = curve_svg(losses, title, subtitle) if all(map(math.isfinite, losses)) else None
        if svg is not None:
            html = Path(arguments.curve).suffix.lower() == ".html"
            Path(arguments.curve).write_text(f"<!doctype html><title>{escape(title)}</title>{svg}" if html else svg)
            print(f"loss curve in {arguments.curve}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**value, "losses": losses}))
        return
    rate = f", {value['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in value else ""
    pace = (
        f"a step takes {took(usual)}, predicted {took(predicted)}"
        if usual
        else f"a step is predicted to take {took(predicted)}"
    )
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {counted} and {total:.1f} s; {pace}{rate}")
