"""The formulas of what tiers cost, and the choice that they make."""

from __future__ import annotations

import itertools

import pytest

from weft.errors import BudgetError
from weft.memory.tiers.store import TIERS, Tiers
from weft.memory.tiers.traffic import Room, choose, efficiency, intensity, traffic

GB = 10**9


def test_the_papers_numbers():
    """2 K tokens per device at 70 TFLOP/s: 60 GB/s for parameters give 64 %, 1500 GB/s for states 92 % (SC21 slides)."""
    assert efficiency(intensity("parameters", tokens=2048), 60e9, 70e12) == pytest.approx(0.64, abs=0.005)
    assert efficiency(intensity("states", tokens=2048), 1.5e12, 70e12) == pytest.approx(0.92, abs=0.005)
    assert efficiency(intensity("activations", width=2048), 4e9, 70e12) > 0.7
    with pytest.raises(ValueError, match="buffers"):
        intensity("buffers")


def test_bytes_per_class():
    p = 1000
    assert traffic(Tiers(), p).read == {"host": 0, "disk": 0}
    assert traffic(Tiers("host"), p).read["host"] == 2 * p
    moved = traffic(Tiers("disk", "disk", "disk"), p)
    assert (moved.read["disk"], moved.write["disk"]) == (2 * p + p + 2 * p + p, p + 2 * p + p)
    half = traffic(Tiers("disk", "disk", "disk"), p, world=2)
    assert half.read["disk"] == moved.read["disk"] / 2  # bandwidth-centric: every process moves its 1/N
    assert traffic(Tiers(activations="disk"), p, activations=7).write["disk"] == 7


def test_seconds():
    moved = traffic(Tiers(optimizer="disk"), 1 * GB)  # reads 2, writes 3
    rooms = {"disk": Room(float("inf"), 2e9, 1e9)}
    assert moved.seconds(1.0, rooms) == pytest.approx(4.0)
    assert moved.seconds(1.0, rooms, overlapped=False) == pytest.approx(5.0)
    assert moved.seconds(9.0, rooms) == 9.0


ROOMS = {"device": Room(16 * GB), "host": Room(64 * GB, 12e9, 12e9), "disk": Room(2000 * GB, 3e9, 2e9)}


def test_the_highest_tiers_that_hold_it():
    assert choose(ROOMS, 1 * GB, compute=0.1)[0] == Tiers()
    small = choose(ROOMS, 5 * GB, compute=0.1)[0]
    assert small.parameters == "device" and small != Tiers()
    big = choose(ROOMS, 250 * GB, compute=0.1, largest=GB)[0]
    assert (big.parameters, big.optimizer) == ("disk", "disk")


def test_more_processes_need_lower_tiers_less():
    alone, eight = (choose(ROOMS, 12 * GB, compute=0.1, world=world, largest=GB) for world in (1, 8))
    assert eight[1] < alone[1]


def test_the_choice_is_the_best_of_all():
    for parameters, compute in itertools.product((2 * GB, 8 * GB, 30 * GB), (0.01, 100.0)):
        tiers, seconds = choose(ROOMS, parameters, compute=compute, largest=GB)
        assert seconds == traffic(tiers, parameters).seconds(compute, ROOMS)
        for names in itertools.product(TIERS, repeat=3):
            other = Tiers(*names)
            device = parameters * (
                (other.parameters == "device") + (other.gradients == "device") + 2 * (other.optimizer == "device")
            ) + (2 * GB if other.parameters != "device" else 0) + (GB if other.gradients != "device" else 0)  # fmt: skip
            host = parameters * (
                (other.parameters == "host") + (other.gradients == "host") + 2 * (other.optimizer == "host")
            )
            if device <= 16 * GB and host <= 64 * GB:
                assert seconds <= traffic(other, parameters).seconds(compute, ROOMS)


def test_nothing_fits():
    with pytest.raises(BudgetError) as caught:
        choose({"device": Room(GB)}, 10 * GB, compute=1.0)
    assert caught.value.budget == GB and caught.value.least == 40 * GB
