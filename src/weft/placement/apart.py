"""Run small pieces of work where a crash does no harm: in a forked child.

An operator that is tried on operands of shapes it was never meant for may read out of bounds and take the process with it
(torch's `_weight_norm` does). The child works through the tasks and sends each result back; if it dies or stalls, the task it
was at has no result, and a new child goes on behind it.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["each_apart"]

_LENGTH = struct.Struct("<Q")


def each_apart(
    work: Callable[[Any], Any], tasks: Sequence[Any], *, seconds: float = 60.0, crashes: int = 20
) -> list[Any]:
    """`[work(task) for task in tasks]` in forked children; None stands for a task that ended its child.

    Args:
        work: what to do; its results are pickled. Runs with one compute thread, for a pool of the parent's does not survive
            the fork. Its exceptions are not caught: they end the child like a crash.
        tasks: what to do it with.
        seconds: longest that one task may take.
        crashes: after so many the remaining tasks are None too: such an operator is not worth more.
    """
    if not hasattr(os, "fork"):
        return [work(task) for task in tasks]
    results: list[Any] = []
    while len(results) < len(tasks) and crashes > 0:
        results += _until_crash(work, tasks[len(results) :], seconds)
        if len(results) < len(tasks):
            results.append(None)
            crashes -= 1
    return results + [None] * (len(tasks) - len(results))


def _until_crash(work: Callable[[Any], Any], tasks: Sequence[Any], seconds: float) -> list[Any]:
    """Results of the tasks up to the first that ends the child."""
    here, there = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: the child uses none of theirs
        child = os.fork()
    if child == 0:
        _serve(work, tasks, there)
    os.close(there)
    results: list[Any] = []
    try:
        while (message := _receive(here, seconds)) is not None:
            results.append(pickle.loads(message))
    finally:
        os.close(here)
        try:
            os.kill(child, signal.SIGKILL)
        finally:
            os.waitpid(child, 0)
    return results


def _serve(work: Callable[[Any], Any], tasks: Sequence[Any], pipe: int) -> None:
    """The child: send each result behind its length, then end without the parent's exit handlers."""
    try:
        import torch

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        faulthandler.disable()  # crashes are expected here, and nobody's news
        torch.set_num_threads(1)
        with os.fdopen(pipe, "wb") as out:
            for task in tasks:
                message = pickle.dumps(work(task))
                out.write(_LENGTH.pack(len(message)) + message)
                out.flush()
    finally:
        os._exit(0)


def _receive(pipe: int, seconds: float) -> bytes | None:
    """One message; None when the child has ended or sends nothing for `seconds`."""
    head = _read(pipe, _LENGTH.size, seconds)
    return None if head is None else _read(pipe, _LENGTH.unpack(head)[0], seconds)


def _read(pipe: int, count: int, seconds: float) -> bytes | None:
    found = b""
    while len(found) < count:
        if not select.select([pipe], [], [], seconds)[0]:
            return None
        piece = os.read(pipe, count - len(found))
        if not piece:
            return None
        found += piece
    return found
