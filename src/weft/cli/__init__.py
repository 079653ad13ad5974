"""The command line: arguments in, library calls, tables out.

    weft plan      find a plan for a model and a cluster, print it, save it, draw it       `cli.plan`
    weft memory    what a step holds, and how it fits into a number of bytes               `cli.memory`
    weft train     plan and train over local processes, or under torchrun                  `cli.train`
    weft profile   measure this machine into a cluster file                                `cli.profile`
    weft export    gather a checkpoint into one safetensors file                           `cli.export`
    weft systems   the catalogue of published systems                                      `cli.catalogue`
    weft bench     run a system's claims, side by side with what users have now            `cli.catalogue`
    weft cite      the papers that a plan or a system rests on                             `cli.cite`

Results go to standard output (`--json`: one JSON value, nothing else), progress and errors to standard error.
Exit codes: 0 done; 1 a claim was missed or a run failed; 2 bad usage or input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from weft.cli import catalogue, cite, export, memory, plan, profile, train
from weft.errors import WeftError

__all__ = ["main", "parser"]

COMMANDS = (
    plan.add,
    memory.add,
    train.add,
    profile.add,
    export.add,
    catalogue.add_systems,
    catalogue.add_bench,
    cite.add,
)


def parser() -> argparse.ArgumentParser:
    """The argument parser of `weft` with all commands."""
    from weft import __version__

    top = argparse.ArgumentParser(
        prog="weft",
        description="Write a PyTorch model once, for one device; weft plans it and trains it over the machines you have.",
        epilog="`weft COMMAND --help` explains a command and gives an example. "
        "Exit codes: 0 done, 1 a claim was missed or a run failed, 2 bad usage or input, 130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"weft {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        command = add(commands)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--json", action="store_true", help="print one JSON value instead of tables")
        command.add_argument("--debug", action="store_true", help="on an error, show the traceback too")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are printed as one message, without a traceback."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # `weft systems | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:  # what the user gave: an input, a file, a module
        if arguments.debug:
            raise
        _complain(error)
        return 2
    except (WeftError, RuntimeError) as error:  # what happened: a process died, a worker failed
        if arguments.debug:
            raise
        _complain(error)
        return 1


def _complain(error: BaseException | str) -> None:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        error = f"there is no file {error.filename}"
    text = str(error) or type(error).__name__
    print(f"weft: {text}", file=sys.stderr)
