"""`weft export`: gather a checkpoint, however many processes wrote it, into one safetensors file."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from weft.cli import inputs

__all__ = ["add"]


def add(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="gather a checkpoint into one safetensors file",
        description="Put the pieces of a checkpoint's parameters and buffers together into one safetensors file, which the\n"
        "original module loads: model.load_state_dict(safetensors.torch.load_file(FILE)).",
        epilog="example:\n  weft train --task language-model --checkpoint run/ --steps 100\n  weft export run/ model.safetensors",
    )
    command.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, as written by `weft train --checkpoint`"
    )
    command.add_argument("output", metavar="FILE", help="the safetensors file to write")
    command.set_defaults(run=run)
    return command


def run(arguments: argparse.Namespace) -> int:
    if not Path(arguments.checkpoint).exists():
        raise ValueError(f"there is no checkpoint {arguments.checkpoint}")
    inputs.check_folders({"FILE": arguments.output})
    from weft.runtime import export

    with warnings.catch_warnings():  # torch says that it reads in a single process, which is what is meant
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        written = export(arguments.checkpoint, arguments.output)
    nbytes = written.stat().st_size
    print(json.dumps({"file": str(written), "bytes": nbytes}) if arguments.json else f"{nbytes:,} bytes in {written}")
    return 0
