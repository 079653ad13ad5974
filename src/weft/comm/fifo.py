"""One thread per exchange that does all its communication, first in, first out.

Problem    Collectives of one group must start in the same order on every rank. A codec of several rounds that starts its second
           one from a callback (as torch's powerSGD_hook does) loses that order as soon as two buckets are under way: on gloo the
           ranks then pair unlike messages and abort, or wait for ever.
Method     One thread runs the jobs in the order of `submit`. Every collective is started by it, and all rounds of a job before
           the first of the next. While a round of job i is on the wire, job i + 1 is prepared (encoded), which communicates
           nothing. The end of a round reaches the thread through its own queue, so callbacks do nothing but report.
Guarantee  The order of collectives depends on the order of `submit` alone. An error, or no answer within `timeout`, fails every
           job under way and every later one, and is told to the other ranks, which look for such news once a second.
"""

from __future__ import annotations

import abc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, final

import torch.distributed as dist

from weft.errors import PeerLost, together

__all__ = ["Fifo", "Job"]

GRACE = 5.0  # seconds that the group's own timeout gets to report first; its message says more than ours
LISTEN = 1.0  # seconds of silence after which the thread asks whether another rank has failed


class Job(abc.ABC):
    """What the thread runs. `alone`: may be prepared only when no other job is on the wire."""

    doing: str = "a gradient exchange"
    step: int = 0
    alone: bool = False

    @abc.abstractmethod
    def prepare(self) -> None:
        """All that can be done before the job's turn on the wire; communicates only if `alone`."""

    @abc.abstractmethod
    def run(self) -> Iterator[dist.Work]:
        """Start collectives; yields each that must be over before it is asked to go on."""

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """The job will not be done. May be called at any time, also before `prepare`."""


@final
class Fifo:
    """The thread; `timeout` in seconds for each round.

    `broken` is called once with the error that ends it, `listen` (cheap, thread-safe) gives news of another rank's failure as
    (rank, what happened), or None.
    """

    def __init__(
        self,
        name: str,
        timeout: float,
        broken: Callable[[BaseException], None],
        listen: Callable[[], tuple[int, str] | None],
    ):
        self.timeout = timeout
        self.error: BaseException | None = None
        self._broken, self._listen = broken, listen
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:  # so that no job slips in between an error and the end of the thread
            if self.error is None:
                self._queue.put(job)
                return
        job.fail(self.error)

    def close(self) -> None:
        """End the thread once what was submitted is done."""
        self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(self.timeout + 2 * GRACE)

    def _serve(self) -> None:
        waiting: deque[Job] = deque()
        current: Job | None = None
        try:
            closing, ready = False, False  # `ready`: the first waiting job is prepared
            rounds: Iterator[dist.Work] = iter(())
            while not (closing and current is None and not waiting):
                event = self._queue.get() if current is None else self._hear(current)
                if event is None:
                    closing = True
                elif isinstance(event, Job):
                    waiting.append(event)
                else:
                    _check(event, current)
                    current = current if self._advance(rounds) else None
                while current is None and waiting:
                    current = waiting.popleft()
                    if not ready:
                        current.prepare()
                    ready, rounds = False, current.run()
                    current = current if self._advance(rounds) else None
                if current is not None and waiting and not ready:
                    following = waiting[0]
                    if not following.alone and following.step == current.step:
                        following.prepare()
                        ready = True
        except BaseException as error:
            self._break(error, current, waiting)

    def _hear(self, job: Job) -> Any:
        """The next event while a round of `job` is on the wire."""
        deadline = time.monotonic() + self.timeout + GRACE
        while True:
            try:
                return self._queue.get(timeout=LISTEN)
            except queue.Empty:
                news = self._listen()
            if news is not None:
                raise PeerLost(news[0], job.doing, f"it failed with {news[1]}")
            if time.monotonic() > deadline:
                raise PeerLost(-1, job.doing, f"no answer within {self.timeout:g} s")

    def _advance(self, rounds: Iterator[dist.Work]) -> bool:
        """Start the next round; False if the job is over."""
        work = next(rounds, None)
        if work is None:
            return False
        work.get_future().add_done_callback(self._queue.put)
        return True

    def _break(self, error: BaseException, current: Job | None, waiting: deque[Job]) -> None:
        with self._lock:
            self.error = error
        if current is not None:
            waiting.appendleft(current)
        while True:
            try:
                event = self._queue.get_nowait()
            except queue.Empty:
                break
            if isinstance(event, Job):
                waiting.append(event)
        for job in waiting:
            job.fail(error)
        self._broken(error)


def _check(done: Any, job: Job | None) -> None:
    """Raise what a round ended with."""
    with together(job.doing if job is not None else Job.doing):
        done.wait()  # over already; on a GPU this orders our stream after the collective's
