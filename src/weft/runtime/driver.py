"""What a `Trainer` needs of the processes that do the work, and the driver for one that is this process.

    InProcess    this process is one of them (torchrun), or the only one
    Spawned      (launch.py) this process starts local ones and only tells them what to do

All arguments are those of the whole program: whole tensors, whole micro-batches. A driver brings each process its part.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.graph.graph import Graph
from weft.placement.assignment import Assignment
from weft.placement.deferred import Tape, materialise
from weft.runtime import checkpoint
from weft.runtime.choice import Choice
from weft.runtime.engine import Engine, Job, Options, StepResult, connect
from weft.runtime.failure import Interrupts, PeerWatch
from weft.runtime.optimizer import Recipe

if TYPE_CHECKING:
    from weft.planner.squeeze import Squeeze

__all__ = ["Driver", "InProcess", "Values", "named_tensors", "whole_values"]

Values = Mapping[str, Tensor] | Tape  # whole tensors by name, or how to make them


class Driver(abc.ABC):
    """Runs engines. `setup` comes first, `close` last; after an error of a lost process only `close` works.

    Attributes:
        rank: of the process that the user's code runs in: 0 prints and writes; always 0 with spawned processes.
        processes: how many engines there are.
        alone: the user's code runs in this process only, so that it may end at any place.
        last_step: number of updates made; a step that is skipped (`check_finite=False`) is none.
        failure: the error of the last command; None after one that went well.
        exchange: the name of what sends gradients, where there was a choice: "plain" for all-reduce; else "".
    """

    exchange: str = ""
    rank: int
    processes: int
    alone: bool
    last_step: int = 0
    failure: BaseException | None = None
    interrupts: Interrupts | None = None

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Meanwhile Ctrl-C waits: for the next command outside, or for `close`. A second one does not."""
        return contextlib.nullcontext() if self.interrupts is None else self.interrupts.held()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """A command runs in here: Ctrl-C waits, and `failure` is what comes of it."""
        try:
            with self.held():
                yield
        except BaseException as error:
            self.failure = error
            raise
        self.failure = None

    def _interrupt(self) -> None:
        """After a command that changes nothing: raise the KeyboardInterrupt that had to wait, if there is one."""
        if self.interrupts is not None:
            self.interrupts.raise_one()

    @abc.abstractmethod
    def setup(
        self,
        graph: Graph,
        assignment: Assignment,
        wanted: Recipe,
        values: Values,
        squeezes: Mapping[int, Squeeze] | None = None,
    ) -> None:
        """Build the engines for the planned graph and fill parameters and buffers.

        Args:
            squeezes: rank -> bytes that a step of its process may take, and the tier below them; those that are missing have
                no limit.
        """

    @abc.abstractmethod
    def add(self, graph: Graph) -> None:
        """Make programs for the same model at other sizes."""

    @abc.abstractmethod
    def step(self, jobs: Sequence[Job], options: Sequence[Mapping[str, Any]]) -> StepResult:
        """One training step; `options` are the optimizer's options that changed, per group."""

    @abc.abstractmethod
    def gradients(self, jobs: Sequence[Job]) -> tuple[float, dict[str, Tensor]]:
        """Loss and whole gradients of a step that is not made."""

    @abc.abstractmethod
    def evaluate(self, job: Job) -> float:
        """Loss of a batch."""

    @abc.abstractmethod
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters and buffers, one at a time; valid until the next is asked for."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Model and optimizer state: DTensors where this process is one of the mesh, whole tensors of the model elsewhere."""

    @abc.abstractmethod
    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers from whole tensors."""

    @abc.abstractmethod
    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write a checkpoint folder; see `checkpoint.save`."""

    @abc.abstractmethod
    def load(self, path: Path) -> dict[str, Any]:
        """Read one, and return what `save` was told about it."""

    @abc.abstractmethod
    def memory(self) -> list[dict[str, int]]:
        """Bytes kept between steps by what they are, of the processes that this one can see."""

    @abc.abstractmethod
    def close(self, *, broken: bool = False) -> None:
        """End; `broken` if the processes may be gone, or in the middle of something. May be called twice.

        Raises:
            KeyboardInterrupt: Ctrl-C came while the run was ending in good order.
        """


def _command(method: Callable[..., Any]) -> Callable[..., Any]:
    """A command: `_noting`, and a lost process shows as `WorkerDied` instead of the transport's error."""

    @functools.wraps(method)
    def run(self: InProcess, *args: Any) -> Any:
        with self._noting(), contextlib.nullcontext() if self.watch is None else self.watch.translating():
            return method(self, *args)

    return run


def _asking(method: Callable[..., Any]) -> Callable[..., Any]:
    """A command that changes nothing: Ctrl-C waits for its end, and no longer."""
    command = _command(method)

    @functools.wraps(method)
    def run(self: InProcess, *args: Any) -> Any:
        result = command(self, *args)
        self._interrupt()
        return result

    return run


@final
class InProcess(Driver):
    """This process runs one engine.

    Args:
        options: of the run.
        device: where tensors live.
        owns: end the process group with the run.
        watched: notice when another process dies, and when a signal asks for an end.
    """

    def __init__(
        self, options: Options, device: torch.device | str = "cpu", *, owns: bool = False, watched: bool = False
    ):
        self.options, self.device, self._owns = options, device, owns
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.engine: Engine
        self._stop_requested = False
        self.watch: PeerWatch | None = None
        self.alone = self.processes == 1
        self.interrupts = Interrupts() if self.alone else None
        if watched and self.processes > 1:
            store = dist.distributed_c10d._get_default_store()
            self.watch = PeerWatch(store, self.rank, self.processes, lambda: self.last_step)
            self.watch.start(self._request_stop)

    def _request_stop(self) -> None:
        self._stop_requested = True

    @_command
    def setup(
        self,
        graph: Graph,
        assignment: Assignment,
        wanted: Recipe,
        values: Values,
        squeezes: Mapping[int, Squeeze] | None = None,
    ) -> None:
        comms = connect(assignment.mesh)
        squeeze = (squeezes or {}).get(comms.rank)
        within = (squeeze.budget, squeeze.tier) if squeeze is not None else (None, None)
        options = replace(self.options, measure=self.options.measure or bool(squeezes))
        self.engine = Engine(graph, assignment, comms, wanted, options, self.device, *within)
        if isinstance(values, Tape):
            self._materialise(values)
        else:
            self.engine.load(_of_first_process(values))
        self._note_choice()

    def _note_choice(self) -> None:
        if isinstance(self.options.exchange, Choice):
            self.exchange = self.engine.coded.name if self.engine.coded is not None else "plain"

    def _materialise(self, tape: Tape) -> None:
        """Make each process's pieces of a model that nobody holds whole."""
        for name, value in materialise(tape, names=self.engine.names):
            self.engine.load_one(name, value)
        self.engine.store.updated()

    @_asking
    def add(self, graph: Graph) -> None:
        self.engine.add(graph)

    @_command
    def step(self, jobs: Sequence[Job], options: Sequence[Mapping[str, Any]]) -> StepResult:
        self.engine.stop_requested = self._stop_requested
        result = self.engine.step(jobs, options)
        self.last_step = self.engine.steps
        return replace(result, stop=True) if self.interrupts is not None and self.interrupts.taken() else result

    @_asking
    def gradients(self, jobs: Sequence[Job]) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = self.engine.gradients(jobs)
        return loss, {name: gradient.cpu().clone() for name, gradient in gradients}

    @_asking
    def evaluate(self, job: Job) -> float:
        return self.engine.evaluate(job)

    def values(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.engine.names:
            yield name, self._whole(name)

    @_asking
    def _whole(self, name: str) -> Tensor:
        return self.engine.whole(name)

    @_asking
    def state(self) -> dict[str, Any]:
        found = checkpoint.dtensors(self.engine)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.engine.optimizer.param_groups]
        found["optimizer"]["param_groups"] = groups
        return found

    @_command
    def load_values(self, values: Mapping[str, Tensor]) -> None:
        self.engine.load(values)

    @_asking
    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        checkpoint.save(self.engine, path, about)

    @_command
    def load(self, path: Path) -> dict[str, Any]:
        about = checkpoint.load(self.engine, path)
        self.last_step = self.engine.steps
        self._note_choice()
        return about

    def memory(self) -> list[dict[str, int]]:
        return [self.engine.memory()]

    def close(self, *, broken: bool = False) -> None:
        if hasattr(self, "engine"):
            self.engine.keeper.close()
            if self.engine.coded is not None and not broken:
                self.engine.coded.exchange.close()
        if self.watch is not None:
            self.watch.close(broken=broken)
        if broken and self.processes > 1:
            atexit.register(_end_in_any_case)
        elif self._owns and dist.is_initialized():
            dist.destroy_process_group()
            self._owns = False
        if self.interrupts is not None:
            self.interrupts.close(silent=broken)


EXIT_SECONDS = 10  # for an interpreter to end after a process was lost


def _end_in_any_case() -> None:
    """Ending the interpreter waits for collectives that will never end: give that a limit."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)


def _of_first_process(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The values that the first process has, on every process: nothing is sent if all agree."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    sums = [(name, *_checksum(tensor)) for name, tensor in values.items()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sums)
    if all(other == everyone[0] for other in everyone):
        return values
    if any([item[0] for item in other] != [item[0] for item in everyone[0]] for other in everyone):
        raise ValueError("the processes hold models with different parameters; build the same model in each")
    agreed = {}
    for name, tensor in values.items():
        agreed[name] = tensor.detach().clone().contiguous()
        dist.broadcast(agreed[name], src=0)
    return agreed


def _checksum(tensor: Tensor) -> tuple[float, float]:
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).double()
    return float(flat.sum()), float(flat.abs().sum())


def named_tensors(model: nn.Module, loss: Any = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a model, and of a loss that is a module, under all their names in the captured graph."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    if isinstance(loss, nn.Module):
        yield from ((f"loss.{name}", tensor) for name, tensor in named_tensors(loss))


def whole_values(model: nn.Module, loss: Any = None) -> dict[str, Tensor]:
    """Those tensors by the name that the graph holds them under: tied ones under their first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named_tensors(model, loss):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found
