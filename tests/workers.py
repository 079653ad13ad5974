"""A pool of worker processes joined by gloo, shared by all tests that need several processes.

    pool(n).run(fn, *args, timeout=60) -> [result of rank 0, ..., result of rank n - 1]

`fn(*args)` runs on n processes with `torch.distributed` initialised (gloo, world size n, one thread each). `fn` is a module-level
function of any file; arguments and results are pickled. The processes are started once (importing torch takes seconds) and
reused by every test; a new world size only makes a new process group. An exception of any rank is raised here with that rank's
traceback. A run that outlasts its timeout, or a rank that dies, ends in `WorkerDied`, and the processes are replaced.
`collect` gives every rank's outcome instead, for tests of failures. No process survives the tests.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

START_SECONDS = 120.0  # for a process to start and import torch on a busy machine
PEER_SECONDS = 60.0  # timeout of the process groups, also for forming them


class WorkerDied(RuntimeError):
    """A rank ended, or did not answer in time."""


@dataclass
class Outcome:
    """What became of one rank: a value, an error, or neither (it died or hung)."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    finished: bool = False


class Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when the child imports torch
        try:
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self.world: tuple[int, int] | None = None  # size and number of the process group it is in

    def kill(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(10)


class Workers:
    """The processes of this test session."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.made = 0  # process groups so far
        atexit.register(self.close)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def collect(self, size: int, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Outcome]:
        self._join(size)
        members = self.workers[:size]
        message = pickle.dumps(("run", fn.__module__, sys.modules[fn.__module__].__file__, fn.__qualname__, args))
        for worker in members:
            worker.pipe.send_bytes(message)
        outcomes = _answers(members, timeout)
        if not all(outcome.finished for outcome in outcomes):
            self._replace([worker for worker, outcome in zip(members, outcomes, strict=True) if not outcome.finished])
        if not all(outcome.finished and outcome.error is None for outcome in outcomes):
            for worker in self.workers:  # messages of the failed run may be under way
                worker.world = None
        return outcomes

    def _join(self, size: int) -> None:
        """Have the first `size` workers in one process group of just them."""
        while len(self.workers) < size:
            self.workers.append(Worker())
        members = self.workers[:size]
        ours = members[0].world
        if ours is not None and ours[0] == size and all(w.world == ours for w in members):
            return
        self.made += 1
        members[0].pipe.send_bytes(pickle.dumps(("host",)))
        (port,) = _values(members[:1], START_SECONDS)
        for rank, worker in enumerate(members):
            worker.pipe.send_bytes(pickle.dumps(("join", rank, size, port)))
        _values(members, START_SECONDS)
        for worker in members:
            worker.world = (size, self.made)

    def _replace(self, gone: list[Worker]) -> None:
        for worker in gone:
            worker.kill()
        self.workers = [worker for worker in self.workers if worker not in gone]


def _values(members: list[Worker], timeout: float) -> list[Any]:
    outcomes = _answers(members, timeout)
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None or not outcome.finished:
            raise WorkerDied(f"worker {rank} did not start within {timeout:g} s: {outcome.trace}")
    return [outcome.value for outcome in outcomes]


def _answers(members: list[Worker], timeout: float) -> list[Outcome]:
    """One outcome per worker. Once a rank has failed the others get fifteen more seconds."""
    outcomes = [Outcome() for _ in members]
    place: dict[Connection, int] = {worker.pipe: number for number, worker in enumerate(members)}
    deadline = time.monotonic() + timeout
    while place and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(place), left):
            number = place.pop(pipe)  # type: ignore[arg-type]
            try:
                outcomes[number] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                failed = outcomes[number].error is not None
            except (EOFError, ConnectionResetError):
                outcomes[number].trace, failed = "the process ended", True
            if failed:
                deadline = min(deadline, time.monotonic() + 15)
    return outcomes


class Pool:
    """n ranks; see the module's header."""

    def __init__(self, workers: Workers, size: int):
        self.workers, self.size = workers, size

    def collect(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Outcome]:
        """Every rank's outcome."""
        return self.workers.collect(self.size, timeout, fn, args)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Every rank's result.

        Raises:
            The exception of the rank that failed first hand (not one that only lost its peer), with its traceback as a note.
            WorkerDied: a rank ended or did not answer within `timeout` seconds.
        """
        outcomes = self.collect(fn, *args, timeout=timeout)
        failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        if failed:
            rank, outcome = next((item for item in failed if type(item[1].error).__name__ != "PeerLost"), failed[0])
            assert outcome.error is not None
            outcome.error.add_note(f"on rank {rank} of {self.size}:\n{outcome.trace}")
            raise outcome.error
        silent = [rank for rank, outcome in enumerate(outcomes) if not outcome.finished]
        if silent:
            raise WorkerDied(
                f"ranks {silent} of {self.size} ended or did not answer within {timeout:g} s in {fn.__qualname__}"
            )
        return [outcome.value for outcome in outcomes]


# ---- in the worker process


def serve(pipe: Connection) -> None:
    """Answer messages until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    state: dict[str, Any] = {}
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the tests are over; open process groups need no goodbye
        outcome = Outcome(finished=True)
        try:
            outcome.value = ANSWERS[message[0]](state, *message[1:])
        except BaseException as error:  # raised again in the tests' process
            outcome.error, outcome.trace = error, traceback.format_exc()
        try:
            answer = pickle.dumps(outcome)
            pickle.loads(answer)
        except Exception as error:  # an exception or result that does not survive pickling
            said = outcome.trace or f"the result of type {type(outcome.value).__name__} cannot be pickled: {error}"
            answer = pickle.dumps(Outcome(error=RuntimeError(said), trace=said, finished=True))
        pipe.send_bytes(answer)


def _host(state: dict[str, Any]) -> int:
    """Make the store of the next process group; returns its port."""
    import torch.distributed as dist

    limit = timedelta(seconds=START_SECONDS)
    state["store"] = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    return int(state["store"].port)


def _join(state: dict[str, Any], rank: int, size: int, port: int) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    limit = timedelta(seconds=START_SECONDS)
    store = state["store"] if rank == 0 else dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    state["kept"] = store
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PEER_SECONDS))


def _run(state: dict[str, Any], module: str, file: str, name: str, args: tuple[Any, ...]) -> Any:
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    fn: Any = sys.modules[module]
    for part in name.split("."):
        fn = getattr(fn, part)
    return fn(*args)


ANSWERS: dict[str, Callable[..., Any]] = {"host": _host, "join": _join, "run": _run}
