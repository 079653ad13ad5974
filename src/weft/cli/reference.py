"""docs/cli.md from the argument parser: `python -m weft.cli.reference > docs/cli.md` (`make docs`)."""

from __future__ import annotations

import argparse
from typing import Any

from weft.cli import parser

__all__ = ["page"]

HEAD = """# The command line

Written by `make docs` from the parser; do not edit. Every command says the same with `--help`.

Results go to standard output (`--json`: one JSON value and nothing else), progress and errors to standard error.
An error is one message without a traceback; `--debug` shows the traceback.

| exit code | meaning |
| --: | --- |
| 0 | done |
| 1 | a claim was missed, or a run failed: a process died, the loss is not finite |
| 2 | bad usage or input |
| 130 | interrupted |
"""


def page() -> str:
    """The whole page, a section per command."""
    parts = [HEAD]
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += [_section(name, command) for name, command in action.choices.items()]
    return "\n".join(parts)


def _section(name: str, command: argparse.ArgumentParser) -> str:
    lines = [f"## weft {name}", "", command.description or "", "", "| argument | |", "| --- | --- |"]
    lines += [f"| {_form(action)} | {_cell(action.help)} |" for action in command._actions if action.dest != "help"]
    if command.epilog:
        lines += ["", "```", command.epilog.strip(), "```"]
    return "\n".join(lines) + "\n"


def _form(action: argparse.Action) -> str:
    """`--steps N`, `MODULE:FUNCTION`."""
    argument: Any = action.metavar or action.dest
    if not action.option_strings:
        return f"`{argument}`".replace("|", "\\|")
    value = "" if action.nargs == 0 else f" {argument}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
