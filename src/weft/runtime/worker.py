"""One of the processes that weft started: it does what the controller says, and ends when the controller does.

    commands and replies    pickled through one pipe, in order; tensors through shared memory (`shared`)
    the controller is gone  its end of the pipe closes: this process ends at once, whatever it is doing
    a fellow is gone        the controller says so: this process prints the error that names it, and ends

Signals from the keyboard, and SIGTERM to all processes of a job, are the controller's business: they are ignored from the start
(`launch.BOOT`), so that somebody is left to remove the run's folder.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pickle
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import WorkerDied
from weft.placement.deferred import Tape
from weft.runtime.driver import InProcess
from weft.runtime.engine import Job, Options
from weft.runtime.failure import say
from weft.runtime.shared import Note, SharedTensors, remove_folder, take

__all__ = ["main"]


def main(handle: int) -> None:
    """Entry point of a started process; `handle` is the file descriptor of its pipe."""
    pipe = Connection(handle)
    boot = pickle.loads(pipe.recv_bytes())
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(pipe, inbox, boot["rank"], Path(boot["folder"])), daemon=True)
    reader.start()
    try:
        worker = _Worker(boot, _unpickled(boot["options"], boot["main"]))
    except Exception as error:
        pipe.send_bytes(_pickled(("error", error, traceback.format_exc())))
        return
    pipe.send_bytes(_pickled(("done", os.getpid())))
    while True:
        try:
            message = inbox.get()
            name, arguments = _unpickled(message, boot["main"])
            if name == "stop":
                break
            reply = ("done", getattr(worker, name)(*arguments))
        except Exception as error:
            reply = ("error", error, traceback.format_exc())  # type: ignore[assignment]
        pipe.send_bytes(_pickled(reply))
    worker.close()
    pipe.send_bytes(_pickled(("done", None)))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and finalisers of collectives could wait for each other


def _pickled(reply: tuple[Any, ...]) -> bytes:
    try:
        blob = pickle.dumps(reply)
        pickle.loads(blob)
        return blob
    except Exception:
        return pickle.dumps(("error", RuntimeError(f"{type(reply[1]).__name__}: {reply[1]}"), str(reply[-1])))


def _read(pipe: Connection, inbox: queue.SimpleQueue[bytes], rank: int, folder: Path) -> None:
    """Pass commands on; two of them do not wait for their turn."""
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            remove_folder(folder)
            os._exit(1)
        if message.startswith(b"died"):
            say(rank, WorkerDied(*pickle.loads(message[4:])))
            os._exit(1)
        inbox.put(message)


_MAIN: list[str] = []


def _unpickled(message: bytes, script: str | None) -> Any:
    """What the controller sent; for what the user's script defines it is imported here, as `multiprocessing` does."""
    if b"__main__" in message and not _MAIN and script:
        from multiprocessing import spawn

        _MAIN.append(script)
        spawn._fixup_main_from_path(script)  # type: ignore[attr-defined]
    return pickle.loads(message)


def _import_all(modules: Sequence[str]) -> None:
    """Import what registers the graph's operators; for `__main__` its name in the message has done so."""
    for module in modules:
        if module != "__main__":
            importlib.import_module(module)


class _Worker:
    """The commands. Every worker runs each of them; replies that only one need give come from rank 0."""

    def __init__(self, boot: dict[str, Any], options: Options):
        torch.set_num_threads(boot["threads"])
        self.folder, self.rank = Path(boot["folder"]), boot["rank"]
        device = torch.device(boot["device"])
        if device.type == "cuda":
            device = torch.device("cuda", self.rank)
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(self.folder / "rendezvous"), boot["processes"]),
            rank=self.rank,
            world_size=boot["processes"],
            timeout=datetime.timedelta(seconds=options.timeout),
        )
        self.driver = InProcess(options, device)
        self.shared = SharedTensors(self.folder)
        self._opened: dict[str, Tensor] = {}

    def setup(
        self, modules: Sequence[str], graph: Any, assignment: Any, wanted: Any, values: Note | Tape, squeezes: Any
    ) -> str:
        _import_all(modules)
        self.driver.setup(graph, assignment, wanted, take(values) if isinstance(values, Note) else values, squeezes)
        return self.driver.exchange

    def add(self, modules: Sequence[str], graph: Any) -> None:
        _import_all(modules)
        self.driver.add(graph)

    def _jobs(self, note: Note, shares: list[tuple[int, float, bool]]) -> list[Job]:
        tensors = iter(take(note, self._opened).values())
        return [Job([next(tensors) for _ in range(count)], share, train) for count, share, train in shares]

    def step(self, note: Note, shares: list[tuple[int, float, bool]], options: Any) -> Any:
        return self.driver.step(self._jobs(note, shares), options)

    def gradients(self, note: Note, shares: list[tuple[int, float, bool]]) -> tuple[float, Note | None]:
        loss, found = self.driver.gradients(self._jobs(note, shares))
        return loss, self.shared.put(found) if self.rank == 0 else None

    def evaluate(self, note: Note, shares: list[tuple[int, float, bool]]) -> float:
        return self.driver.evaluate(self._jobs(note, shares)[0])

    def names(self) -> list[tuple[str, int]]:
        """Parameters and buffers with their sizes in bytes."""
        nodes = [*self.driver.engine.graph.of("parameter"), *self.driver.engine.graph.of("buffer")]
        sizes = {node.target: node.outputs[0].nbytes for node in nodes}
        return [(name, sizes[name]) for name in self.driver.engine.names]

    def whole(self, names: list[str]) -> Note | None:
        found = {}
        for name in names:
            value = self.driver.engine.whole(name)
            if self.rank == 0:
                found[name] = value
        return self.shared.put(found) if self.rank == 0 else None

    def load_values(self, note: Note) -> None:
        self.driver.load_values(take(note))

    def save(self, path: Path, about: dict[str, Any]) -> None:
        self.driver.save(path, about)

    def load(self, path: Path) -> tuple[dict[str, Any], int, str]:
        return self.driver.load(path), self.driver.last_step, self.driver.exchange

    def memory(self) -> dict[str, int]:
        return self.driver.memory()[0]

    def close(self) -> None:
        self.shared.close()
        dist.barrier()  # nobody leaves while another still talks
