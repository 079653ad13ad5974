"""Layer-wise settings on real ranks and with the real codecs: one decision for all, nothing lost when it changes, resumed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from weft.comm.codec import Spec
from weft.comm.codecs import LowRank, Quantise, TopK
from weft.comm.controller import Controller
from weft.comm.controllers import LayerwiseBudget
from weft.comm.exchange import Exchange
from weft.comm.memories import ErrorFeedback

SHAPES = {"loud": (40, 50), "quiet": (50, 30), "tiny": (4, 4)}
FAMILIES = {
    "top-k": (TopK(0.05, "exact"), (0.01, 0.02, 0.05, 0.1, 0.3), 0.05),
    "quantise": (Quantise(4, 128, stochastic=False), (2, 3, 4, 6, 8), 4),
    "low-rank": (LowRank(4), (1, 2, 4, 8, 12), 4),
}


def gradients(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    scale = {"loud": 5.0, "quiet": 0.3, "tiny": 1.0}
    found = {}
    for name, shape in SHAPES.items():
        rows = torch.randn(shape, generator=generator) * torch.linspace(0, 1, shape[1]) ** 4
        found[name] = scale[name] * rows
    return found


def rounds(family, steps, stop=None):
    """(settings after every step, results, conserved?) of this rank; with `stop`, through a checkpoint."""
    codec, settings, default = FAMILIES[family]

    def exchange():
        controller = LayerwiseBudget(settings, default, alpha=1.1, every=4)  # room for "quiet" to send less
        return Exchange(codec, ErrorFeedback(), controller=controller)

    current, history, results = exchange(), [], []
    wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    delivered = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(steps):
        if step == stop:
            state = current.state_dict()
            current.close()
            current = exchange()
            current.load_state_dict(state)
        mine = gradients(step, dist.get_rank())
        mean = current.reduce(mine, step).wait()
        for name in SHAPES:
            wanted[name] += mine[name].double()
            delivered[name] += mean[name].double()
        history.append(dict(current.core.settings))
        results.append(mean)
    owed = {}
    for name, shape in SHAPES.items():
        error = current.core.states[name].get("error", torch.zeros(shape)).view(shape).double()
        total = torch.stack([wanted[name], error])
        dist.all_reduce(total)
        wanted[name], owed[name] = total / dist.get_world_size()
    conserved = all(
        torch.allclose(delivered[n] + owed[n], wanted[n], rtol=1e-4, atol=1e-4 * float(wanted[n].abs().max()))
        for n in SHAPES
    )
    current.close()
    return history, results, conserved


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_change_settings_together_and_lose_nothing(pool, family):
    found = pool(2).run(rounds, family, 12)
    (history, results, conserved), other = found
    assert history == other[0]
    for mine, theirs in zip(results, other[1], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)
    assert conserved and other[2]
    default = FAMILIES[family][2]
    assert all(setting == default for step in history[:4] for setting in step.values())
    assert history[4] == history[7] and set(history[4].values()) != {default}  # dated by steps 4 and 8
    assert history[4].get("tiny", default) == default  # below `smallest`


def test_resuming_reproduces_the_decisions(pool):
    straight, resumed = (pool(2).run(rounds, "top-k", 12, stop)[0] for stop in (None, 6))
    assert straight[0] == resumed[0]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(straight[1], resumed[1], strict=True) for n in SHAPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_say_what_messages_do(family):
    codec, settings, _ = FAMILIES[family]
    x, spec = gradients(0, 0)["loud"].view(-1), Spec("loud", SHAPES["loud"])
    said = codec.error(x, spec, settings)
    for setting, error in zip(settings, said, strict=True):
        state = {"seed": 0, "shared_seed": 0}
        for step in range(3):
            message = codec.encode(x, spec, state, setting, step)
        literal = float((x.double() - codec.decode(message, spec, setting).double()).square().sum())
        if family == "low-rank":  # the best that there is: what power iteration tends to from above
            assert error <= literal * (1 + 1e-5)
            assert literal <= 1.5 * error + 1e-6
        else:
            assert error == pytest.approx(literal, rel=1e-5)
        assert sum(part.numel() * part.element_size() for part in message) == codec.nbytes(spec, setting)


class Watch(Controller):
    def __init__(self):
        self.seen = {}

    def observe(self, spec, gradient, step):
        self.seen[spec.name, step] = gradient.clone().view(spec.shape)

    def decide(self, step, specs):
        return {}


def watched():
    """What the controller sees of a sparse and of a linear codec, with error feedback that owes something."""
    found = []
    for codec in (TopK(0.05), LowRank(1)):
        watch = Watch()
        exchange = Exchange(codec, ErrorFeedback(), controller=watch)
        for step in range(3):
            exchange.reduce(gradients(step, dist.get_rank()), step).wait()
        exchange.close()
        found.append(watch.seen)
    return found


def test_decisions_see_gradients_before_any_code(pool):
    """Averages of coded ones lack what the setting in force drops, and would confirm it."""
    mine, others = pool(2).run(watched)
    assert not any(others)
    for seen in mine:
        assert len(seen) == 3 * len(SHAPES)
        assert all(torch.equal(gradient, gradients(step, 0)[name]) for (name, step), gradient in seen.items())
