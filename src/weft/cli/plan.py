"""`weft plan`: find a plan, say what was chosen and why, save it, draw it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from weft.cli import inputs

__all__ = ["add", "add_options", "find", "show"]

EXAMPLES = """examples:
  weft plan --task language-model --processes 2
  weft plan mymodel:build --cluster cluster.yaml --save plan.json --page plan.html
  weft plan ./mymodel.py:build --processes 4 --mesh 2x2 --strategy dp,tp --memory 6GiB --json

where mymodel.py has

  def build():
      return MyModel(), torch.randn(32, 100)      # (model, batch), or (model, batch, loss)
"""


def add(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="find a plan for a model and a cluster",
        description="Decide where every value and parameter of a model lives on a cluster, without starting anything.",
        epilog=EXAMPLES,
    )
    inputs.add_job(command)
    inputs.add_cluster(command)
    add_options(command)
    command.set_defaults(run=run)
    return command


def add_options(command: argparse.ArgumentParser) -> None:
    """How to plan and what to write: `weft train` takes these too."""
    command.add_argument(
        "--optimizer", default="adamw", metavar="NAME", help=f"one of {', '.join(inputs.OPTIMIZERS)} (default adamw)"
    )
    command.add_argument(
        "--memory", metavar="SIZE", help="use at most this much per device, as 6GiB (default: what the cluster says)"
    )
    command.add_argument(
        "--no-recompute",
        action="store_true",
        help="keep every activation that backward needs (default: compute some again where only that makes a plan fit, or the "
        "fastest)",
    )
    command.add_argument(
        "--no-offload",
        action="store_true",
        help="move no activation to the host memory or disk that the cluster file names below a device (default: where only that "
        "makes a plan fit, or the fastest)",
    )
    command.add_argument(
        "--mesh", metavar="SHAPE", help="arrange the devices so, as 8 or 2x4 (default: the best found)"
    )
    command.add_argument(
        "--strategy",
        metavar="NAME",
        help="only plans of this kind, or of these along the mesh axes: dp, zero-1, zero-2, zero-3, tp, sp, tp+sp, any; "
        "dp,tp is data parallel over the first axis and tensor parallel over the second (default any)",
    )
    command.add_argument(
        "--allow-replicated",
        action="store_true",
        help="operators without a rule may run whole on every device (default: they are an error that lists them all)",
    )
    command.add_argument("--save-plan", "--save", dest="save_plan", metavar="FILE", help="write the plan as JSON")
    command.add_argument(
        "--plan-page", "--page", dest="plan_page", metavar="FILE", help="write the plan as one HTML page"
    )


def run(arguments: argparse.Namespace) -> int:
    inputs.check_folders({"--save": arguments.save_plan, "--page": arguments.plan_page})
    found = find(arguments, inputs.load_job(arguments))
    if arguments.json:
        print(found.to_json())
    else:
        print(found)
    show(found, arguments)
    return 0


def find(arguments: argparse.Namespace, job: inputs.Job) -> Any:
    """The plan for the arguments' model and cluster."""
    from weft.planner import Constraints, plan

    options: dict[str, Any] = {}
    if arguments.memory:
        options["memory"] = arguments.memory
    if arguments.mesh:
        options["mesh"] = inputs.parse_mesh(arguments.mesh)
    if arguments.no_recompute:
        options["recompute"] = False
    if arguments.no_offload:
        options["offload"] = False
    if arguments.allow_replicated:
        options["allow_replicated"] = True
    if arguments.strategy:
        names = tuple(name.strip() for name in arguments.strategy.split(","))
        options["constraints"] = Constraints(names if len(names) > 1 else names[0])
    return plan(
        job.model,
        job.batch,
        cluster=inputs.load_cluster(arguments),
        loss=job.loss,
        optimizer=inputs.optimizer_class(arguments.optimizer),
        **options,
    )


def show(found: Any, arguments: argparse.Namespace) -> None:
    """Write the files that were asked for."""
    if arguments.save_plan:
        found.save(arguments.save_plan)
        print(f"plan saved in {arguments.save_plan}", file=sys.stderr)
    if arguments.plan_page:
        found.show(arguments.plan_page)
        print(f"plan drawn in {arguments.plan_page}", file=sys.stderr)
