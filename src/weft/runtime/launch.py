"""Start local processes and drive them from this one: what `weft.run` does without torchrun.

Each process is a fresh interpreter (it imports the user's script only for classes and functions that this defines), reached
through a pipe. Commands go to all, and each answers; batches and values go through shared memory. Every wait listens to all
pipes at once and has an end:

    a process dies             its pipe closes: `WorkerDied` here within milliseconds; the others are told, print the same and end
    a command fails alike      on every process, nothing is lost: the error is raised here, and the run may go on
    a command fails on some    the others would wait for ever: all are ended, and the error is raised
    nobody answers in time     all are ended, `WorkerDied` names who was silent
    Ctrl-C                     the command under way is finished first, then whatever `close` does; a second is not put off
    this process dies          the pipes close, and every process ends by itself and tidies up; also if SIGTERM came to all
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from weft.errors import PeerLost, WorkerDied
from weft.graph.graph import Graph
from weft.graph.origins import defining_modules
from weft.placement.assignment import Assignment
from weft.placement.deferred import Tape
from weft.runtime.choice import Choice
from weft.runtime.driver import Driver, Values
from weft.runtime.engine import Job, Options, StepResult
from weft.runtime.failure import Interrupts, how_it_ended
from weft.runtime.optimizer import Recipe
from weft.runtime.shared import SharedTensors, remove_folder, run_folder, take

if TYPE_CHECKING:
    from weft.planner.squeeze import Squeeze

__all__ = ["Spawned"]

START_SECONDS = 180.0  # for a process to import torch and join, on a busy machine
AFTERMATH_SECONDS = 3.0  # after one process failed: for the others to fail too, or for a death to show
END_SECONDS = 10.0  # for a process to leave in good order
CHUNK_NBYTES = 256 << 20  # of values brought here at once
BOOT = """import json, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[2])
from weft.runtime.worker import main
main(int(sys.argv[1]))"""


class _Process:
    """A started process: its pipe, and how it ended."""

    def __init__(self, rank: int, boot: Mapping[str, Any], environment: Mapping[str, str]):
        here, there = socket.socketpair()
        path = [os.path.abspath(item) for item in sys.path]
        with here, there:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(there.fileno()), json.dumps(path)],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env=dict(environment),
            )
            self.pipe = Connection(here.detach())
        self.rank = rank
        self.pipe.send_bytes(pickle.dumps({**boot, "rank": rank}))

    def ended(self, seconds: float) -> int | None:
        """The return code, waiting for it for so long; None if it still runs."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.popen.kill()
        self.ended(END_SECONDS)
        self.pipe.close()


def _pickled(options: Options) -> bytes:
    """The options of a run for its processes.

    Raises:
        ValueError: a part of the exchange cannot be sent.
    """
    try:
        return pickle.dumps(options)
    except Exception as error:
        of = options.exchange.auto if isinstance(options.exchange, Choice) else options.exchange
        part = next((name for name, value in vars(of).items() if not _picklable(value)), "")
        raise ValueError(
            f"run: {part or 'a part'} of exchange= cannot be sent to the processes that weft starts ({error}); define its "
            "functions and classes at the top level of the script or of a module, or start the script with torchrun"
        ) from error


def _picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


@final
class Spawned(Driver):
    """Local processes, started here. They come up while the caller goes on; `setup` waits for them."""

    def __init__(self, processes: int, options: Options, device: str = "cpu"):
        sent = _pickled(options)
        self.rank, self.processes, self.alone, self.options = 0, processes, True, options
        self._folder = run_folder()
        self._shared = SharedTensors(self._folder)
        self._outstanding = self._torn = False
        self._workers: list[_Process] = []
        self.interrupts: Interrupts = Interrupts()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // processes)
        environment = {
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "WEFT_WORKER": "1",
        }
        boot = {
            "processes": processes,
            "folder": str(self._folder),
            "options": sent,
            "device": device,
            "threads": threads,
            "main": getattr(sys.modules.get("__main__"), "__file__", None),
        }
        atexit.register(self._kill)
        try:
            for rank in range(processes):
                self._workers.append(_Process(rank, boot, environment))
        except BaseException:
            self._kill()
            raise
        self._outstanding = True  # each will report that it is there

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [worker.popen.pid for worker in self._workers]

    # ---- asking

    def _ask(self, name: str, *arguments: Any, seconds: float | None = None) -> list[Any]:
        """Have every process run a command; their results by rank."""
        if self._torn:  # a second Ctrl-C cut a command off: pipes may hold half of a message
            self._kill()
            raise KeyboardInterrupt
        if not self._workers:
            raise ValueError(f"{name}: the run has ended")
        message = pickle.dumps((name, arguments))
        try:
            with self._noting():
                if self._outstanding:
                    self._answers("join", START_SECONDS)
                self._outstanding = True
                for worker in self._workers:
                    with contextlib.suppress(OSError):  # its pipe is closed: the answer will be its death
                        worker.pipe.send_bytes(message)
                return self._answers(name, self.options.timeout if seconds is None else seconds)
        except KeyboardInterrupt:
            self._torn = True
            raise

    def _answers(self, name: str, seconds: float) -> list[Any]:
        waiting = {worker.pipe: worker for worker in self._workers}
        replies: dict[int, tuple[Any, ...]] = {}
        deadline = time.monotonic() + seconds
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                worker = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    replies[worker.rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._died(worker)
                if replies[worker.rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + AFTERMATH_SECONDS)
        self._outstanding = False
        errors = [reply for reply in replies.values() if reply[0] == "error"]
        if errors:
            self._failed(errors, everybody=len(errors) == len(self._workers))
        if waiting:
            self._silent(list(waiting.values()), f"did not finish '{name}' within {seconds:.0f} s")
        return [replies[worker.rank][1] for worker in self._workers]

    def _silent(self, workers: Sequence[_Process], how: str) -> None:
        """Give up on processes that do not answer: any of them may be the one that hangs, the others wait for it."""
        others = ", ".join(str(worker.rank) for worker in workers[1:])
        self._died(
            workers[0], f"{how} (nor did rank {others}; any of them may be the one that hangs)" if others else how
        )

    def _died(self, worker: _Process, how: str | None = None) -> None:
        """Tell the others, end them all, and raise."""
        how = how or how_it_ended(worker.ended(END_SECONDS))
        error = WorkerDied(worker.rank, worker.popen.pid, how, self.last_step)
        message = b"died" + pickle.dumps(error.args)
        for other in self._workers:
            if other is not worker:
                with contextlib.suppress(OSError):
                    other.pipe.send_bytes(message)
        for other in self._workers:
            if other is not worker:
                other.ended(AFTERMATH_SECONDS)
        self._kill()
        raise error

    def _failed(self, errors: Sequence[tuple[Any, ...]], everybody: bool) -> None:
        own = [reply for reply in errors if not isinstance(reply[1], PeerLost)]
        if own and everybody and len(own) == len(errors):
            _, error, story = own[0]  # all failed alike: they are in step, and the run may go on
            error.add_note(f"in a process of the run:\n{story}")
            raise error
        for worker in self._workers:  # a transport error may be the first sign of a death
            if worker.ended(AFTERMATH_SECONDS / len(self._workers)) is not None:
                self._died(worker)
        self._kill()
        _, error, story = (own or list(errors))[0]
        error.add_note(f"in a process of the run, which has been ended:\n{story}")
        raise error

    def _kill(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        self._shared.close()
        remove_folder(self._folder)

    # ---- the commands

    def setup(
        self,
        graph: Graph,
        assignment: Assignment,
        wanted: Recipe,
        values: Values,
        squeezes: Mapping[int, Squeeze] | None = None,
    ) -> None:
        sent = values if isinstance(values, Tape) else self._shared.put(values)
        modules = defining_modules(graph)
        self.exchange = self._ask("setup", modules, graph, assignment, wanted, sent, dict(squeezes or {}))[0]
        self._shared.close()

    def add(self, graph: Graph) -> None:
        self._ask("add", defining_modules(graph), graph)
        self._interrupt()

    def _send_jobs(self, jobs: Sequence[Job]) -> tuple[Any, list[tuple[int, float, bool]]]:
        leaves = [leaf for job in jobs for leaf in job.leaves]
        note = self._shared.put({str(number): leaf for number, leaf in enumerate(leaves)})
        return note, [(len(job.leaves), job.weight, job.train) for job in jobs]

    def step(self, jobs: Sequence[Job], options: Sequence[Mapping[str, Any]]) -> StepResult:
        results: list[StepResult] = self._ask("step", *self._send_jobs(jobs), list(options))
        self.last_step = results[0].steps
        return replace(results[0], stop=self.interrupts.taken(), peak=max(result.peak for result in results))

    def gradients(self, jobs: Sequence[Job]) -> tuple[float, dict[str, Tensor]]:
        loss, note = self._ask("gradients", *self._send_jobs(jobs))[0]
        self._interrupt()
        return loss, {name: tensor.clone() for name, tensor in take(note).items()}

    def evaluate(self, job: Job) -> float:
        loss = self._ask("evaluate", *self._send_jobs([job]))[0]
        self._interrupt()
        return loss

    def values(self) -> Iterator[tuple[str, Tensor]]:
        chunk: list[str] = []
        filled = 0
        sizes = self._ask("names")[0]
        for number, (name, nbytes) in enumerate(sizes):
            chunk.append(name)
            filled += nbytes
            if filled >= CHUNK_NBYTES or number == len(sizes) - 1:
                found = take(self._ask("whole", chunk)[0])
                self._interrupt()
                yield from found.items()
                chunk, filled = [], 0

    def state(self) -> dict[str, Any]:
        return {"model": {name: value.clone() for name, value in self.values()}}

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        self._ask("load_values", self._shared.put(values))

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        self._ask("save", Path(os.path.abspath(path)), dict(about))
        self._interrupt()

    def load(self, path: Path) -> dict[str, Any]:
        about, self.last_step, self.exchange = self._ask("load", Path(os.path.abspath(path)))[0]
        return about

    def memory(self) -> list[dict[str, int]]:
        return self._ask("memory")

    def close(self, *, broken: bool = False) -> None:
        atexit.unregister(self._kill)
        try:
            if self._workers and not broken:
                self._ask("stop", seconds=END_SECONDS)
                for worker in self._workers:
                    worker.ended(END_SECONDS)
        finally:
            self._kill()
            self.interrupts.close(silent=broken)
