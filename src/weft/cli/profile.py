"""`weft profile`: measure this machine, or the processes under torchrun, into a cluster file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from weft.cli import inputs

__all__ = ["add"]


def add(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="measure this machine into a cluster file",
        description="Measure how fast operators and collectives run, with all processes at work at once, and write a cluster\n"
        "file that `weft plan --cluster FILE` reads. Run it on a quiet machine; it prints how well its fit predicts.",
        epilog="examples:\n  weft profile --processes 2 --output cluster.yaml\n"
        "  weft profile --offload /fast/disk\n"
        "  torchrun --nproc-per-node 8 -m weft profile --output cluster.yaml",
    )
    command.add_argument(
        "--processes", type=int, metavar="N", help="processes on this machine (default 2; not under torchrun)"
    )
    command.add_argument(
        "--quick", action="store_true", help="fewer sizes and repeats: seconds instead of a minute, less exact"
    )
    command.add_argument(
        "--offload",
        metavar="DIR",
        help="also measure what activations may wait on: a folder of a disk, or `host` for the memory of the host of GPUs",
    )
    command.add_argument(
        "--output", metavar="FILE", default="cluster.yaml", help="where to write (default cluster.yaml)"
    )
    command.set_defaults(run=run)
    return command


def run(arguments: argparse.Namespace) -> int:
    from weft.cluster import profile
    from weft.memory.tiers.rates import check_folder, copies

    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if under_torchrun and arguments.processes is not None:
        raise ValueError("--processes has no meaning under torchrun, which says how many processes there are")
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {arguments.processes}")
    inputs.check_folders({"--output": arguments.output})
    folder = arguments.offload or ""
    if folder == "host" and not under_torchrun:
        raise ValueError(
            "--offload host is for accelerators, which torchrun's processes measure; name a folder of a disk"
        )
    if folder and folder != "host":
        folder = str(check_folder(folder))
    cluster, report = profile(
        processes=arguments.processes or 2, quick=arguments.quick, offload=folder, copies=copies if folder else None
    )
    if under_torchrun and int(os.environ["RANK"]) != 0:
        return 0
    cluster.save(arguments.output, str(report))
    if arguments.json:
        print(json.dumps({"cluster": cluster.to_dict(), "file": arguments.output, "report": str(report)}, indent=1))
    else:
        print(report)
    print(f"cluster written to {arguments.output}", file=sys.stderr)
    return 0
