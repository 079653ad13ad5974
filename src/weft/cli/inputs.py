"""What several commands read from the command line: the model, the cluster, the optimizer, the mesh.

model, batches, loss    `load_job` from MODULE:FUNCTION or --task
cluster                 `load_cluster` from --cluster FILE or --processes N
optimizer               `optimizer_class` from --optimizer NAME
mesh shape              `parse_mesh`: 8, 2x4
files to write          `check_folders`
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import names, paths

if TYPE_CHECKING:
    from weft.cluster import Cluster

__all__ = [
    "Job",
    "add_cluster",
    "add_job",
    "check_folders",
    "load_cluster",
    "load_job",
    "optimizer_class",
    "parse_mesh",
]

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}


@dataclass(frozen=True)
class Job:
    """What to train: the model, one batch to plan with, all batches to train on (None: that one again and again), the loss.

    Attributes:
        model: the single-device module.
        batch: the first batch.
        batches: a function giving an iterator over global batches, for ever.
        loss: a loss function, or None if the model returns its loss.
        tokens: items per batch that throughput counts (tokens of text), 0 to count rows.
    """

    model: Any
    batch: Any
    batches: Callable[[], Iterator[Any]]
    loss: Callable[..., Any] | None = None
    tokens: int = 0


def add_job(command: argparse.ArgumentParser) -> None:
    """The arguments that say what model is meant."""
    command.add_argument(
        "target",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="a function of yours returning (model, batch) or (model, batch, loss); `batch` may also be a DataLoader. "
        "MODULE is an importable name or a path to a .py file",
    )
    command.add_argument("--task", metavar="NAME", help="instead: a task of weft, such as language-model, or hf:gpt2")
    command.add_argument("--data", metavar="FILE", help="for --task: train on this text instead of the default corpus")
    command.add_argument("--batch-size", type=int, metavar="N", help="for --task: rows of the global batch")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")


def add_cluster(command: argparse.ArgumentParser) -> None:
    """The arguments that say what machines are meant."""
    command.add_argument("--cluster", metavar="FILE", help="cluster file, as written by `weft profile` or by hand")
    command.add_argument("--processes", type=int, metavar="N", help="instead: N processes on this machine (default 2)")


def load_cluster(arguments: argparse.Namespace) -> Cluster:
    """The cluster of --cluster, or of --processes on this machine."""
    from weft.cluster import Cluster

    if arguments.cluster and arguments.processes:
        raise ValueError("give --cluster or --processes, not both: the file says how many processes there are")
    if arguments.cluster:
        return Cluster.load(arguments.cluster)
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {arguments.processes}")
    return Cluster.local(processes=arguments.processes or 2)


def optimizer_class(name: str) -> Any:
    """The class of torch.optim called `name`."""
    attribute = names.pick(name, OPTIMIZERS, "optimizer")
    import torch

    return getattr(torch.optim, attribute)


def parse_mesh(text: str) -> tuple[int, ...]:
    """Mesh shape of `2x4`.

    >>> parse_mesh("2x4")
    (2, 4)
    """
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", text.strip().lower()):
        raise ValueError(f"not a mesh shape: {text!r}; write devices per axis, as 8 or 2x4")
    return tuple(int(size) for size in text.strip().lower().split("x"))


def check_folders(files: Mapping[str, str | None]) -> None:
    """Refuse files (by their names on the command line; None: not given) that could not be written, before anything slow."""
    for name, path in files.items():
        if path:
            paths.to_file(name, path)


def load_job(arguments: argparse.Namespace) -> Job:
    """The model, batches and loss that the command line names."""
    if bool(arguments.target) == bool(arguments.task):
        raise ValueError("say what to train: MODULE:FUNCTION or --task NAME (one of the two); `--help` has examples")
    if arguments.task:
        return _task_job(arguments)
    for option in ("data", "batch_size"):
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} goes with --task; a function of yours brings its own batches"
            )
    import torch

    torch.manual_seed(arguments.seed)
    factory = _factory(arguments.target)
    with _blamed(arguments.target):
        made = factory()
    return _job_of(made, arguments.target)


def _task_job(arguments: argparse.Namespace) -> Job:
    from weft.tasks import build

    options = {"data": arguments.data, "batch_size": arguments.batch_size, "seed": arguments.seed}
    task = build(arguments.task, **{name: value for name, value in options.items() if value is not None})
    return Job(task.model, task.batch, task.batches, task.loss, task.tokens)


def _factory(target: str) -> Callable[[], Any]:
    """The user's function; the current directory is on the path, as for `python -m`."""
    module_name, colon, function = target.partition(":")
    if not colon or not module_name or not function:
        raise ValueError(
            f"{target!r} does not name a function; write MODULE:FUNCTION, as mymodel:build or ./mymodel.py:build"
        )
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        if not path.is_file():
            raise ValueError(f"there is no file {module_name}")
        folder, module_name = str(path.parent), path.stem
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with _blamed(f"importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
                raise ValueError(
                    f"there is no module {module_name!r} here or installed; name a .py file or run where it is"
                ) from error
            raise
    found = getattr(module, function, None)
    if found is None:
        near = names.nearest(function, [name for name, value in vars(module).items() if callable(value)])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{module_name} has no function {function!r}{hint}")
    if not callable(found):
        raise ValueError(f"{target} is a {type(found).__name__}, not a function")
    maker: Callable[[], Any] = found
    return maker


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Errors of the user's own code with its line; those that say enough by themselves pass."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        frame = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename][-1]
        raise ValueError(
            f"{what} raised {type(error).__name__}: {error}\n    {frame.filename}:{frame.lineno}: {frame.line}\n"
            "--debug shows the whole traceback"
        ) from error


def _job_of(made: Any, target: str) -> Job:
    """A job from what the user's function returned."""
    import torch

    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise ValueError(
            f"{target} must return (model, batch) or (model, batch, loss) with an nn.Module first; got {kind}"
        )
    model, batch, *rest = made
    loss = rest[0] if rest else None
    if loss is not None and not callable(loss):
        raise ValueError(f"{target} returned a loss that cannot be called: {type(loss).__name__}")
    if isinstance(batch, (torch.Tensor, tuple, list, Mapping)):
        return Job(model, batch, lambda: itertools.repeat(batch), loss)
    if isinstance(batch, Iterable):
        first = next(iter(batch), None)
        if first is None:
            raise ValueError(f"{target} returned batches that end at once; there must be one to plan with")
        if isinstance(batch, Iterator):
            return Job(model, first, lambda: itertools.chain([first], batch), loss)
        return Job(model, first, lambda: _again_and_again(batch), loss)
    raise ValueError(
        f"{target} returned a batch of type {type(batch).__name__}; expected tensors or an iterable of batches"
    )


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader
