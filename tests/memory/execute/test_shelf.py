"""What is copied to the lower tier comes back, and a plan that offloads is carried out."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from tests.memory.execute.loops import assert_same, train
from tests.memory.models import make, run, snapshot

from weft.graph import call
from weft.memory.execute.limit import limit
from weft.memory.execute.shelf import Shelf
from weft.memory.planning.check import Tier, check
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.private import bytes_of, storage_of
from weft.memory.schedule import Action, Schedule
from weft.memory.tracing.tracer import trace

CPU = torch.device("cpu")


@pytest.mark.parametrize("nbytes", [0, 1, 511, 4096, 100_003])
def test_round_trip(nbytes):
    shelf, x = Shelf(CPU), torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    shelf.save("x", storage_of(x))
    shelf.save("y", storage_of(x + 1))
    assert "x" in shelf and "z" not in shelf
    for _ in range(2):
        assert torch.equal(bytes_of(shelf.load("x")), x)
    shelf.forget("x")
    shelf.save("z", storage_of(x + 2))  # in its place
    assert "x" not in shelf
    assert torch.equal(bytes_of(shelf.load("y")), x + 1) and torch.equal(bytes_of(shelf.load("z")), x + 2)
    shelf.clear()
    assert "y" not in shelf


def test_round_trip_in_several_blocks(monkeypatch):
    monkeypatch.setattr("weft.memory.execute.shelf.BLOCK", 8192)
    shelf, x = Shelf(CPU), torch.randint(0, 256, (5 * 8192 + 7,), dtype=torch.uint8)
    for name in "xyz":
        shelf.save(name, storage_of(x + ord(name)))
    assert all(torch.equal(bytes_of(shelf.load(name)), x + ord(name)) for name in "xyz")


def test_copies_run_besides(monkeypatch):
    """A copy is asked for and goes on in the thread; the next one waits its turn, whoever needs one waits for it."""
    may, write = threading.Event(), os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *arguments: may.wait(30) and write(*arguments))
    shelf, x = Shelf(CPU), torch.randint(0, 256, (5000,), dtype=torch.uint8)
    shelf.save("x", storage_of(x))
    shelf.save("y", storage_of(x + 1))
    shelf.fetch("x")  # behind the two
    assert "x" in shelf and shelf.nbytes == 10_000 and set(shelf._leaving) == {"x", "y"} and not may.is_set()
    threading.Timer(0.05, may.set).start()
    shelf.saved("x")
    assert may.is_set() and torch.equal(bytes_of(shelf.load("x")), x)
    x.zero_()  # it is away, and the other one as well
    assert not torch.equal(bytes_of(shelf.load("x")), x) and shelf.load("y").nbytes() == 5000
    shelf.clear()
    assert not shelf.nbytes


def offloading(trace, most=12):
    """A schedule that sends activations away as soon as they are made, and brings each back before it is read again."""
    away = [
        v
        for v, value in enumerate(trace.values)
        if value.category == "activation" and value.born >= 0 and value.nbytes > 1000
        and any(trace.ops[j].phase == "backward" for j in trace.readers[v]) and value.dies < len(trace.ops)
        and trace.ops[value.born].phase == "forward"
    ][:most]  # fmt: skip
    actions = []
    there = dict.fromkeys(away, True)
    saved = set()
    for j, op in enumerate(trace.ops):
        for v in op.reads:
            if not there.get(v, True):
                actions.append(Action("load", v))
                there[v] = True
        actions.append(Action("run", j))
        for v in away:
            if there[v] and trace.values[v].born <= j < trace.values[v].dies and any(k > j for k in trace.readers[v]):
                if v not in saved:
                    actions.append(Action("save", v))
                    saved.add(v)
                actions.append(Action("drop", v))
                there[v] = False
    return Schedule(tuple(actions)), away


def test_a_plan_that_offloads_is_bit_equal():
    made = make("gpt")
    eager = train(make("gpt"), optimizer=torch.optim.SGD)
    traced = trace(made.model, made.batch, made.loss, torch.optim.SGD)
    schedule, away = offloading(traced)
    checked = check(traced, schedule, Tier(bandwidth=1e9))
    assert len(away) == 12 and checked.saved_bytes and checked.loaded_bytes
    budget = checked.peak + 1024  # a little more, for what the trace does not have
    limited = limit(MemoryPlan(traced, budget, schedule, checked, "by hand"), model=made.model)
    found = train(made, within=limited, optimizer=torch.optim.SGD)
    assert_same(eager, found)
    assert found.replayed == [True] * 5 and not limited.notes


def test_leaving_early_takes_from_the_shelf():
    made, other = make("gpt"), make("gpt")
    traced = trace(made.model, made.batch, made.loss)
    schedule, _ = offloading(traced)
    plan = MemoryPlan(traced, 2**30, schedule, check(traced, schedule, Tier(bandwidth=1e9)), "by hand")
    with limit(plan, model=made.model) as limited:
        torch.manual_seed(1)
        loss = call(made.model, made.batch, made.loss)
        assert limited._executor.dropped and len(limited._executor.shelf._copies) > 5
    loss.backward()
    run(other)
    assert all(
        torch.equal(a, b) for a, b in zip(snapshot(made.model).values(), snapshot(other.model).values(), strict=True)
    )
