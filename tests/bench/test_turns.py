"""Turns: everybody's in every round, no place for ever, and medians of what all processes took."""

from __future__ import annotations

import time

from weft.bench.turns import Taken, across, least, rotated, there_and_back, watch


def test_orders():
    assert [rotated("abc", turn) for turn in (-1, 0, 1, 5)] == [list("cab"), list("abc"), list("bca"), list("cab")]
    assert [there_and_back("abc", turn) for turn in (0, 1, 2)] == [list("abc"), list("cba"), list("abc")]


def test_a_watch_tells_waiting_from_work():
    with watch() as taken:
        time.sleep(0.05)
    assert taken.wall >= 0.05 > taken.cpu


def test_across_processes():
    first = [Taken(1.0, 5.0, 10.0), Taken(2.0, 1.0, 30.0), Taken(9.0, 9.0, 20.0)]
    second = [Taken(1.0, 3.0, 99.0), Taken(4.0, 7.0, 99.0), Taken(9.0, 1.0, 99.0)]
    assert across([first, second]) == {"cpu_seconds": 6.0, "wall_seconds": 7.0, "wire_bytes": 20.0}


def test_the_least_of_several_rounds(monkeypatch):
    clock = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0, 6.0, 11.0])  # rounds of 3 and 1, then of 2 and 5 seconds
    monkeypatch.setattr("weft.bench.turns.time.process_time", lambda: next(clock))
    calls = {"a": lambda: "x", "b": lambda: "y"}
    assert least(calls, 2, enough=4.0) == ({"a": 2.0, "b": 1.0}, {"a": "x", "b": "y"})
    clock = iter([0.0, 3.0, 3.0, 5.0])
    assert least(calls, 9, enough=4.0)[0] == {"a": 3.0, "b": 2.0}  # one round was enough
