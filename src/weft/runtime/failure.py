"""Noticing that a process of the run has died, and ending the others with an error that names it.

    spawned processes    the controller sees the end of their pipes; it tells the others           `how_it_ended`, `launch`
    under torchrun       every process watches every other: by process id on the same machine,      `PeerWatch`
                         by a heartbeat in the rendezvous store elsewhere

A process may be stuck in a collective when its peer dies. The watch runs in a thread: it first lets the main thread raise
`WorkerDied` (the transport usually fails too, or a signal reaches Python), and if that does not happen it prints the error
and ends the process. Either way it takes seconds, and no wait is without an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weft.errors import PeerLost, WorkerDied

__all__ = ["Interrupts", "PeerWatch", "how_it_ended", "say"]

POLL_SECONDS = 0.25  # between looks at the processes of this machine
BEAT_SECONDS = 1.0  # between heartbeats
SILENT_SECONDS = 20.0  # without a heartbeat a process counts as lost: long enough for a busy machine
GRACE_SECONDS = 5.0  # for the main thread to raise the error itself
LEAVE_SECONDS = 2.0  # for the thread to end: longer only if the store does not answer


def how_it_ended(returncode: int | None) -> str:
    """What a return code of `subprocess` says, as the verb of a sentence.

    >>> how_it_ended(-9)
    'was killed by SIGKILL'
    """
    if returncode is None:
        return "stopped answering"
    if returncode < 0:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        return f"was killed by {name}" + (
            " (out of memory?)" if returncode == -signal.SIGKILL and _low_memory() else ""
        )
    return f"exited with code {returncode}"


def _low_memory() -> bool:
    """Whether this machine is short of memory now, so that the kernel may have killed a process."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return fields["MemAvailable"] < 0.05 * fields["MemTotal"]
    return False


def say(rank: int, error: BaseException) -> None:
    """Write an error to stderr in one piece, naming the process that says it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"weft, rank {rank} (pid {os.getpid()}): {type(error).__name__}: {error}\n")
        sys.stderr.flush()


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def this_machine() -> str:
    """The same for all processes that see the same process ids."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # containers on one machine do not see each other's ids
    return "|".join(parts)


class Interrupts:
    """Ctrl-C between steps, not in the middle of one: `with interrupts.held():` puts it off until it is asked for.

    A second Ctrl-C inside the body is raised at once. Outside of it, and in threads other than the main one, nothing changes.
    """

    def __init__(self) -> None:
        self._held, self._requested = 0, False
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._signalled)

    def _signalled(self, number: int, frame: Any) -> None:
        if not self._held or self._requested:
            raise KeyboardInterrupt
        self._requested = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def taken(self) -> bool:
        """Whether there was a Ctrl-C since the last time; it is then the caller's to raise."""
        requested, self._requested = self._requested, False
        return requested

    def raise_one(self) -> None:
        """Raise what was put off, unless more that puts it off is around."""
        if not self._held and self.taken():
            raise KeyboardInterrupt

    def close(self, *, silent: bool = False) -> None:
        """Put the former handler back, and raise what was put off, unless `silent`."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
        if self.taken() and not silent:
            raise KeyboardInterrupt


class PeerWatch:
    """Watches the other processes of a `torch.distributed` job; `with watch.translating():` raises what it finds.

    Args:
        store: the job's key-value store; the watch uses a connection of its own.
        rank, size: of this process, and how many there are.
        step: the last step that this process finished.
    Attributes:
        died: the error, once a process is known to be lost.
    """

    def __init__(self, store: Any, rank: int, size: int, step: Callable[[], int], *, exit_process: bool = True):
        self.rank, self.size, self.step, self.exit_process = rank, size, step, exit_process
        self.died: WorkerDied | None = None
        self._raised = threading.Event()
        self._stopping = threading.Event()
        self._main = threading.main_thread()
        self._handlers: dict[int, Any] = {}
        self._store = store.clone()
        self._store.set(self._key("peer", rank), json.dumps([os.getpid(), this_machine()]))
        self._beat()
        self._threads = [threading.Thread(target=self._watch, name="weft-watch", daemon=True)]

    def start(self, on_interrupt: Callable[[], None]) -> None:
        """Start watching. The first SIGINT or SIGTERM calls `on_interrupt`, a second one raises KeyboardInterrupt."""
        self._on_interrupt = on_interrupt
        if threading.current_thread() is self._main:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._signalled)
        for thread in self._threads:
            thread.start()

    def close(self, *, broken: bool = False) -> None:
        """Stop watching. Unless `broken`, this process leaves in good order and the others stop watching it too."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._raised.set()  # it need not wait for the main thread either
        # a thread that is in the store while the interpreter ends aborts it; and a beat must not come after "done"
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(LEAVE_SECONDS)
        if not broken:
            with contextlib.suppress(Exception):
                self._store.set(self._key("beat", self.rank), "done")
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    @contextlib.contextmanager
    def translating(self) -> Iterator[None]:
        """Turn a transport's failure inside the body into `WorkerDied`, if a process is found to be lost."""
        try:
            yield
        except WorkerDied:
            self._raised.set()
            raise
        except (PeerLost, RuntimeError) as error:
            deadline = time.monotonic() + 3 * BEAT_SECONDS
            while self.died is None and time.monotonic() < deadline and isinstance(error, PeerLost):
                time.sleep(POLL_SECONDS / 2)
            if self.died is None:
                raise
            self._raised.set()
            raise self.died from error

    # ---- the thread

    def _watch(self) -> None:
        names = [self._key("peer", r) for r in range(self.size)]
        try:
            while not self._store.check(names):  # not `wait`, which `close` could not end
                if self._stopping.wait(POLL_SECONDS):
                    return
            peers = {r: json.loads(self._store.get(self._key("peer", r))) for r in range(self.size) if r != self.rank}
        except Exception:
            return
        here = this_machine()
        local = {r: pid for r, (pid, machine) in peers.items() if machine == here}
        pids = {r: pid for r, (pid, _) in peers.items()}
        heard = {r: (time.monotonic(), b"", 0) for r in peers}
        next_beat = 0.0
        while not self._stopping.wait(POLL_SECONDS):
            now = time.monotonic()
            gone = [r for r, pid in local.items() if not alive(pid)]
            if now >= next_beat or gone:
                next_beat = now + BEAT_SECONDS
                try:
                    self._beat()
                    self._listen(heard, now)
                except Exception:
                    if not self._stopping.is_set():
                        lost = gone[0] if gone else min(pids)
                        self._found(lost, pids[lost], heard[lost][2], "is gone, with the rendezvous store")
                    return
            for r in gone:
                local.pop(r)
                if heard[r][1] != b"done":
                    self._found(r, pids[r], heard[r][2], "was killed or exited")
                    return
            for r, (when, what, step) in heard.items():
                if what != b"done" and now - when > SILENT_SECONDS:
                    self._found(r, pids[r], step, f"has been silent for {now - when:.0f} s")
                    return

    def _beat(self) -> None:
        if not self._stopping.is_set():
            self._store.set(self._key("beat", self.rank), json.dumps([time.time(), self.step()]))

    def _listen(self, heard: dict[int, tuple[float, bytes, int]], now: float) -> None:
        names = [self._key("beat", r) for r in heard]
        for r, value in zip(heard, self._store.multi_get(names), strict=True):
            if value != heard[r][1]:
                step = heard[r][2] if value == b"done" else json.loads(value)[1]
                heard[r] = (now, value, step)

    def _found(self, rank: int, pid: int, step: int, how: str) -> None:
        """Tell the main thread; if it cannot hear, end the process with the error on stderr."""
        if self._stopping.is_set():
            return
        self.died = WorkerDied(rank, pid, how, max(step, self.step()))  # a step ends for all or none
        with contextlib.suppress(
            Exception
        ):  # wakes sleeping system calls; collectives fail by themselves or not at all
            signal.pthread_kill(self._main.ident, signal.SIGINT)  # type: ignore[arg-type]
        if not self._raised.wait(GRACE_SECONDS) and not self._stopping.is_set() and self.exit_process:
            say(self.rank, self.died)
            os._exit(1)

    def _signalled(self, number: int, frame: Any) -> None:
        """In the main thread, between two lines of Python."""
        if self.died is None and number == signal.SIGTERM:  # torchrun ends everybody when one has died: find out who
            deadline = time.monotonic() + 4 * POLL_SECONDS
            while self.died is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 4)
        if self.died is not None:
            self._raised.set()
            raise self.died
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._on_interrupt()

    _interrupted = False

    @staticmethod
    def _key(what: str, rank: int) -> str:
        return f"weft/{what}/{rank}"
