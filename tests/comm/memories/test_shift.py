"""Shifted compression: what is delivered, what the references follow, and the descent that converges only with it."""

from __future__ import annotations

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.codecs import RandK, TopK
from weft.comm.memories.shift import Shift
from weft.comm.memory import NoMemory
from weft.comm.variational import Game, Simulated, descent


def test_delivers_the_common_reference_and_the_message():
    memory, spec = Shift(0.5), Spec("w", (3,))
    states = [{}, {}]
    values = [torch.tensor([4.0, 2, 0]), torch.tensor([0.0, 2, 8])]
    for _ in range(3):
        sent = []
        for state, x in zip(states, values, strict=True):
            y = memory.before(x, spec, state)
            where = y.abs().topk(1).indices
            memory.after(y, y[where], where, state)
            sent.append(torch.zeros(3).index_add_(0, where, y[where]))
        common = states[0].get("common", torch.zeros(3))
        delivered = [memory.delivered((sent[0] + sent[1]) / 2, spec, state) for state in states]
        assert torch.equal(delivered[0], delivered[1])
        torch.testing.assert_close(delivered[0], common + (sent[0] + sent[1]) / 2)
        mean = (states[0]["reference"] + states[1]["reference"]) / 2
        torch.testing.assert_close(states[0]["common"], mean)  # every rank follows the mean of all references


def test_states_are_replaced_and_dense_messages_work():
    memory, spec, state = Shift(1.0), Spec("w", (3,)), {}
    x = torch.tensor([1.0, 2.0, 3.0])
    memory.after(memory.before(x, spec, state), x, None, state)
    first = state["reference"]
    assert torch.equal(memory.before(x, spec, state), torch.zeros(3))
    memory.after(torch.zeros(3), x, None, state)
    assert torch.equal(first, x) and torch.equal(state["reference"], 2 * x)


@pytest.mark.parametrize(
    ("codec", "memory", "gamma"),
    [(RandK(0.25), Shift(0.25), 0.03), (TopK(0.25, "exact"), Shift(1.0), 0.03)],
    ids=["diana", "ef21"],
)
def test_descent_converges_with_it_and_stalls_without(codec, memory, gamma):
    game = Game.bilinear(size=10, workers=4, spread=1.5)
    distances = []
    for kept in (memory, NoMemory()):
        simulated = Simulated(4, codec, kept, wire=torch.float64)
        *_, z = simulated.iterate(
            700, lambda m, z: descent(z, game.operators[m], gamma, compressed=True), {"z": game.start.clone()}
        )
        distances.append(game.distance(z))
    assert distances[0] < 1e-4 < 1e-2 < distances[1]


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_bad_rates_are_named(rate):
    with pytest.raises(ValueError, match="rate must be in"):
        Shift(rate)
