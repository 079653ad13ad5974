"""The exchange thread, with futures in place of collectives: the order of the wire, and how failures spread."""

from __future__ import annotations

import threading

import pytest
import torch

import weft.comm.fifo as fifo
from weft.comm.fifo import Fifo, Job
from weft.errors import PeerLost


class Wire:
    """A collective that ends when the test says so."""

    def __init__(self):
        self.future = torch.futures.Future()

    def get_future(self):
        return self.future


class Recorded(Job):
    def __init__(self, log, name, rounds, wires, step=0, alone=False):
        self.log, self.name, self.rounds, self.wires = log, name, rounds, wires
        self.step, self.alone = step, alone
        self.over, self.error = threading.Event(), None

    def prepare(self):
        self.log.append(f"prepare {self.name}")

    def run(self):
        for number in range(self.rounds):
            self.log.append(f"start {self.name}{number}")
            wire = Wire()
            self.wires.put(wire)
            yield wire
        self.over.set()

    def fail(self, error):
        self.error = error
        self.over.set()


def played(jobs_of, rounds):
    import queue

    log, wires = [], queue.SimpleQueue()
    thread = Fifo("test", 20.0, lambda error: None, lambda: None)
    jobs = jobs_of(log, wires)
    for job in jobs:
        thread.submit(job)
    for _ in range(rounds):
        wires.get(timeout=10).future.set_result(None)
    for job in jobs:
        assert job.over.wait(10)
    thread.close()
    return log


def test_all_rounds_of_a_job_come_before_the_next_job_which_is_prepared_meanwhile():
    log = played(lambda log, w: [Recorded(log, "a", 2, w), Recorded(log, "b", 3, w), Recorded(log, "c", 1, w)], 6)
    starts = [entry for entry in log if entry.startswith("start")]
    assert starts == ["start a0", "start a1", "start b0", "start b1", "start b2", "start c0"]
    assert log.index("prepare b") < log.index("start b0") and log.index("prepare c") < log.index("start c0")


@pytest.mark.parametrize(("step", "alone"), [(1, False), (0, True)])
def test_a_job_of_another_step_or_that_wants_to_be_alone_is_not_prepared_while_one_is_on_the_wire(step, alone):
    log = played(lambda log, w: [Recorded(log, "a", 2, w), Recorded(log, "b", 1, w, step, alone)], 3)
    assert log == ["prepare a", "start a0", "start a1", "prepare b", "start b0"]


def test_an_error_on_the_wire_fails_every_job_and_every_later_one():
    import queue

    broken, log, wires = [], [], queue.SimpleQueue()
    thread = Fifo("test", 20.0, broken.append, lambda: None)
    jobs = [Recorded(log, name, 1, wires) for name in "ab"]
    for job in jobs:
        thread.submit(job)
    wires.get(timeout=10).future.set_exception(RuntimeError("Connection closed by peer"))
    for job in jobs:
        assert job.over.wait(10) and isinstance(job.error, PeerLost)
    late = Recorded(log, "late", 1, wires)
    thread.submit(late)
    assert late.over.wait(10) and late.error is jobs[0].error is broken[0]
    assert "Connection closed" in str(late.error)
    thread.close()


def test_close_waits_for_what_was_submitted():
    import queue

    log, wires = [], queue.SimpleQueue()
    thread = Fifo("test", 20.0, lambda error: None, lambda: None)
    jobs = [Recorded(log, name, 1, wires) for name in "ab"]
    for job in jobs:
        thread.submit(job)
    first = wires.get(timeout=10)
    closing = threading.Thread(target=thread.close)
    closing.start()
    first.future.set_result(None)
    wires.get(timeout=10).future.set_result(None)
    closing.join(10)
    assert not closing.is_alive() and thread.error is None and [job.error for job in jobs] == [None, None]


def test_silence_ends_by_timeout_and_news_of_a_failure_ends_it_sooner(monkeypatch):
    import queue

    monkeypatch.setattr(fifo, "LISTEN", 0.02)
    monkeypatch.setattr(fifo, "GRACE", 0.0)
    for timeout, news, rank in ((0.1, None, -1), (60.0, (3, "ValueError: no"), 3)):
        job = Recorded([], "a", 1, queue.SimpleQueue())
        thread = Fifo("test", timeout, lambda error: None, lambda news=news: news)
        thread.submit(job)
        assert job.over.wait(10) and isinstance(job.error, PeerLost) and job.error.rank == rank
        thread.close()
