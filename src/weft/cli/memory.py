"""`weft memory`: what a training step holds, and how it fits into a budget, before anything is trained."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from weft.cli import inputs

if TYPE_CHECKING:
    from weft.memory.planning.memory_plan import MemoryPlan
    from weft.memory.record import Trace

__all__ = ["add"]

EXAMPLES = """examples:
  weft memory mymodel:build                              what the step holds, and the least that will do
  weft memory mymodel:build --budget 6GiB                what to recompute so that it fits, and what that costs
  weft memory mymodel:build --budget 6GiB --explain      and the largest tensors, and what other budgets would cost
  weft memory mymodel:build --device A100-80GB --budget 70GiB --picture memory.html
  weft memory --task language-model --budget 100MiB --save plan.json

where mymodel.py has

  def build():
      return MyModel(), torch.randn(32, 100)      # (model, batch), or (model, batch, loss)

Then, around the training loop as it is:

  with weft.memory.limit("6GiB"):
"""
NO_OPTIMIZER = "none"
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.0)  # of the way from the least to the unplanned peak, told by --explain


def add(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "memory",
        help="what a training step holds, and how it fits into a number of bytes",
        description="Trace one training step, say what it holds at its peak, and plan what to recompute so that it fits into a\n"
        "budget: bytes of all tensors at once (parameters, gradients, optimizer state, inputs, activations, workspace).",
        epilog=EXAMPLES,
    )
    inputs.add_job(command)
    command.add_argument(
        "--budget", metavar="SIZE", help="bytes that the step may hold, as 6GiB (default: say what it needs)"
    )
    command.add_argument(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help=f"whose state counts: one of {', '.join(inputs.OPTIMIZERS)}, or none (default adamw)",
    )
    command.add_argument(
        "--device",
        metavar="NAME",
        help="for this device, as A100-80GB, which need not be here (default: where the model is)",
    )
    command.add_argument(
        "--offload",
        metavar="RATE",
        help="activations may also be copied to host memory over a link of this rate, as 12GB/s (default: recompute only)",
    )
    command.add_argument(
        "--explain", action="store_true", help="the largest tensors at the peak, and what other budgets would cost"
    )
    command.add_argument("--picture", metavar="FILE", help="draw memory over the step as one HTML page")
    command.add_argument("--save", metavar="FILE", help="write the plan as JSON (.z: compressed) for weft.memory.limit")
    command.set_defaults(run=run)
    return command


def run(arguments: argparse.Namespace) -> int:
    from weft.memory.planning.choose import frontier, plan
    from weft.memory.tracing import show, table, trace

    check(arguments)
    tier = _tier(arguments.offload)
    job = inputs.load_job(arguments)
    optimizer = None if arguments.optimizer == NO_OPTIMIZER else inputs.optimizer_class(arguments.optimizer)
    print("tracing one step ...", file=sys.stderr)
    traced = trace(job.model, job.batch, job.loss, optimizer, device=arguments.device)
    planned = plan(traced, arguments.budget, tier=tier) if arguments.budget else plan(traced, None)
    others: list[MemoryPlan] = []
    if arguments.explain:
        budgets = [int(planned.least + share * (traced.peak - planned.least)) for share in SHARES]
        others = [found for found in frontier(traced, budgets, tier=tier) if found is not None]
    if arguments.json:
        print(json.dumps(as_json(traced, planned, others), indent=1))
    else:
        print(in_words(traced, planned))
        if arguments.explain:
            print(f"\n{table(traced)}\n\n{costs_of(others)}\n\n{advice(arguments.budget or str(planned.least))}")
    if arguments.picture:
        show(traced, arguments.picture, planned if arguments.budget else None)
        print(f"memory drawn in {arguments.picture}", file=sys.stderr)
    if arguments.save:
        planned.save(arguments.save)
        print(f"plan saved in {arguments.save}", file=sys.stderr)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be before tracing, which may take a while."""
    from weft.cluster import library
    from weft.cluster.units import nbytes_of

    if arguments.device and arguments.device.split(":")[0] not in ("cpu", "cuda"):
        library.device(arguments.device)  # raises with the nearest names
    if arguments.budget:
        nbytes_of(arguments.budget, "--budget")
    if arguments.save and not arguments.budget:
        raise ValueError("--save writes the plan for a budget; say which with --budget")
    inputs.check_folders({"--picture": arguments.picture, "--save": arguments.save})


def _tier(rate: str | None) -> Any:
    """Host memory behind a link of `rate`, None if it may not be used."""
    if rate is None:
        return None
    from weft.cluster.units import quantity
    from weft.memory.planning.check import Tier

    try:
        return Tier(quantity(rate, "bytes per second"))
    except ValueError as error:
        raise ValueError(f"--offload {error}") from None


# -- what is told -----------------------------------------------------------------------------------------------------------


def in_words(traced: Trace, planned: MemoryPlan) -> str:
    """The step, and the plan if there is a budget."""
    from weft.memory.planning.memory_plan import size
    from weft.memory.tracing import by_category, peak_operator

    held = by_category(traced, peak_operator(traced))
    parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in sorted(held.items(), key=lambda item: -item[1]))
    lines = [
        f"{traced.model} on {traced.device}: {len(traced.ops)} operators, {size(traced.peak)} at the peak: {parts}"
    ]
    if planned.budget:
        return "\n".join([*lines, str(planned)])
    lines += [f"note: {note}" for note in traced.notes]
    lines.append(
        f"the least that will do is {size(planned.least)}; --budget SIZE says what that, or anything between, costs"
    )
    return "\n".join(lines)


def costs_of(plans: list[MemoryPlan]) -> str:
    """A line for each of some budgets, the largest first."""
    from weft.memory.planning.memory_plan import size

    rows = [
        f"  {size(p.budget):>10}  {100 * p.overhead:6.1f} % slower  {p.checked.repeated:5d} operators again"
        for p in plans
    ]
    return "\n".join(["what other budgets would cost", *rows])


def advice(budget: str) -> str:
    """The lines of code that keep to the budget, and what it does not count."""
    return (
        f'in your program\n  with weft.memory.limit("{budget}"):\n      ...  # the training loop as it is\n'
        "not counted: the interpreter and its libraries, other processes, the allocator's own rounding (docs/make-it-fit.md)"
    )


def as_json(traced: Trace, planned: MemoryPlan, others: list[MemoryPlan]) -> dict[str, Any]:
    """Everything as one value."""
    from dataclasses import asdict

    from weft.memory.tracing import by_category, held_at, peak_operator
    from weft.memory.tracing.moments import described

    at = peak_operator(traced)
    found: dict[str, Any] = {
        "model": traced.model,
        "device": traced.device,
        "operators": len(traced.ops),
        "seconds": traced.seconds,
        "peak": traced.peak,
        "fixed": traced.fixed,
        "notes": list(traced.notes),
        "least": planned.least,
        "by_category": by_category(traced, at),
        "largest": [
            {"what": described(traced, v), "category": v.category, "nbytes": v.nbytes} for v in held_at(traced, at)[:10]
        ],
    }
    if planned.budget:
        found["plan"] = {
            "budget": planned.budget, "peak": planned.peak, "reserved": planned.reserved, "seconds": planned.seconds,
            "overhead": planned.overhead, "method": planned.method, "repeated": planned.checked.repeated,
            "recomputed": [asdict(part) for part in planned.recomputed],
            "offloaded": [asdict(part) for part in planned.offloaded],
        }  # fmt: skip
    if others:
        found["others"] = [{"budget": p.budget, "overhead": p.overhead, "repeated": p.checked.repeated} for p in others]
    return found
