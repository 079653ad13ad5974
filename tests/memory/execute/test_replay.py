"""Replay: it does what the plan says, without deciding, and hands over when the program does something else."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from tests.slow import slow_but
from torch import nn

from weft.memory.execute.actions import Actions
from weft.memory.execute.limit import limit
from weft.memory.execute.online import Online
from weft.memory.execute.replay import Replay
from weft.memory.execute.succession import Succession
from weft.memory.meters import meter
from weft.memory.planning.choose import plan
from weft.memory.tracing.tracer import trace

KIB = 1024


class Net(nn.Module):
    """Layers whose path can be changed from outside: `extra` runs after the layers, on every activation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(8))
        self.extra = None

    def forward(self, x):
        kept = []
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.1)
            kept.append(x)
        loss = x.square().mean()
        return loss + self.extra(kept) if self.extra is not None else loss


def loop(within, change=None, steps=16, at=12):
    """SGD; from step `at` on the net is changed. Returns losses, parameters, and what executed each step."""
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(1)
    x, losses, kinds = torch.randn(128, 48), [], []
    with within as manager:
        for step in range(steps):
            if step == at:
                net.extra = change
            opt.zero_grad()
            loss = net(x)
            loss.backward()
            opt.step()
            losses.append(loss.item())
            kinds.append(type(manager._executor))
    return losses, [p.detach().clone() for p in net.parameters()], kinds


BUDGET = 430 * KIB


def same(one, other):
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_a_static_loop_is_replayed_and_repeats_what_the_plan_says():
    limited = limit(BUDGET)
    eager, found = loop(limit("1 GiB", replay=False)), loop(limited)
    assert same(eager, found)
    assert found[2][3:] == [Replay] * 13 and not limited.notes
    plan = limited._succession.cycle.plans[0]
    assert any(action.kind == "again" for action in plan.schedule.actions)


def count_repeats(monkeypatch):
    seen = []
    honest = Actions._again
    monkeypatch.setattr(Actions, "_again", lambda self, j, *rest: (seen.append(j), honest(self, j, *rest))[1])
    return seen


def test_repetitions_are_those_of_the_plan(monkeypatch):
    seen = count_repeats(monkeypatch)
    limited = limit(BUDGET)
    *_, kinds = loop(limited)
    expected = [
        action.index for action in limited._succession.cycle.plans[0].schedule.actions if action.kind == "again"
    ]
    assert seen == expected * kinds[3:].count(Replay)


def test_nothing_is_remembered_where_all_stays_and_there_is_room_for_as_much_again(monkeypatch):
    remembered, remember = [], Replay._remember
    monkeypatch.setattr(Replay, "_remember", lambda self, *args: remembered.append(self.at) or remember(self, *args))
    net = Net()
    step = trace(net, torch.randn(128, 48), optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    losses, params, kinds = loop(limit(2 * step.peak - step.fixed + 16 * KIB))
    assert set(kinds[4:]) == {Replay} and not remembered
    expected, others, _ = loop(limit(BUDGET))
    assert remembered
    assert losses == expected and all(map(torch.equal, params, others))


def test_what_a_list_is_made_of_is_there_when_that_is_repeated(monkeypatch):
    """As caches of keys and values begin: with an empty tensor, which nobody else keeps."""

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([torch.tensor([]), torch.tanh(layer(x)) + 1], dim=-1)
        return x.square().mean()

    monkeypatch.setattr(Net, "forward", forward)
    limited = limit(BUDGET)
    found = loop(limited)
    assert same(loop(limit("1 GiB", replay=False)), found) and found[2][3:] == [Replay] * 13
    plan = limited._succession.cycle.plans[0]
    again = {plan.trace.ops[action.index].name for action in plan.schedule.actions if action.kind == "again"}
    assert "aten.cat.default" in again


CHANGES = {
    "reads what the plan dropped": lambda kept: sum(k.sum() for k in kept) * 1e-3,
    "writes in place": lambda kept: kept[-1].detach().clone().mul_(2).add_(1).sum() * 1e-3,
    "other operators for long": lambda kept: torch.stack([torch.sin(k).mean() for k in kept]).sum(),
    "prints": lambda kept: len(str(kept[3].detach())) * 1e-3,
    "numpy": lambda kept: float(kept[2].detach().numpy().sum()) * 1e-3,
    "changes a parameter's data": lambda kept: torch.zeros(3).add_(1).sum() * 0,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("at", [5, 12])  # while everything is remembered, and later
def test_a_changed_program_goes_on_and_is_still_right(name, at):
    eager = loop(limit("1 GiB", replay=False), CHANGES[name], at=at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limited = limit(BUDGET + 350 * KIB)
        found = loop(limited, CHANGES[name], at=at)
    assert same(eager, found), name
    assert Replay in found[2][:at]


@pytest.mark.parametrize("seed", slow_but([0], range(4)))
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_measured_decides_about_seconds_only(name, seed, monkeypatch):
    """Whatever operators seem to take, and so whatever is dropped after a plan had to be given up."""
    draw, now = random.Random(seed), [0.0]

    def clock():
        now[0] += draw.choice([1e-6, 1e-5, 1e-4, 1e-3])
        return now[0]

    eager = loop(limit("1 GiB", replay=False), CHANGES[name], at=6)
    monkeypatch.setattr("weft.memory.execute.online.time.thread_time", clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = loop(limit(BUDGET), CHANGES[name], at=6)
    assert same(eager, found)


def test_falling_back_is_said_once_and_the_new_program_is_planned():
    limited = limit(BUDGET + 100 * KIB)
    with pytest.warns(UserWarning, match="it goes on online") as caught:
        *_, kinds = loop(limited, CHANGES["other operators for long"], at=6)
    assert len([w for w in caught if "weft.memory.limit" in str(w.message)]) == len(limited.notes) == 1
    assert limited._succession.cycle.given_up == 1 and Online in kinds[6:] and kinds[-1] is Replay


def test_leaving_in_the_middle_of_a_replayed_step_hands_everything_back():
    net, kept, eager_kept = Net(), [], []
    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    x = torch.randn(128, 48)

    def step(keep):
        torch.manual_seed(2)
        opt.zero_grad()
        net.extra = (lambda tensors: keep.extend(tensors) or 0.0) if keep is not None else (lambda tensors: 0.0)
        loss = net(x)
        if keep is not None:
            raise KeyError("mine")
        loss.backward()
        opt.step()

    with pytest.raises(KeyError):
        step(eager_kept)
    with pytest.raises(KeyError, match="mine"), warnings.catch_warnings(), limit(BUDGET) as limited:
        warnings.simplefilter("error")
        for _ in range(12):
            step(None)
        assert isinstance(limited._executor, Replay) and not limited._executor._cautious
        step(kept)
    assert len(kept) == 8 and all(torch.equal(a, b) for a, b in zip(kept, eager_kept, strict=True))


def test_a_value_kept_longer_than_the_plan_knows_is_there():
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    x, seen = torch.randn(128, 48), {}

    def step(number, keep):
        torch.manual_seed(2)
        opt.zero_grad()
        net.extra = lambda tensors: seen.__setitem__(number, tensors) or 0.0 if keep else 0.0
        net(x).backward()
        opt.step()

    with limit("1 GiB", replay=False):
        step(0, True)
    with warnings.catch_warnings(), limit(BUDGET + 200 * KIB) as limited:
        warnings.simplefilter("ignore")
        for number in range(1, 22):
            step(number, number in (6, 21))
            if number == 12:  # planned again, with what is carried on from the sixth
                assert any(action.kind == "again" for action in limited._succession.cycle.plans[0].schedule.actions)
            seen.pop(number - 1, None) if number - 1 not in (0, 6, 21) else None
    for number in (6, 21):
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[number], strict=True))


def test_extra_calls_that_make_little_do_not_end_replay():
    limited = limit(BUDGET)
    found = loop(limited, lambda kept: kept[-1].detach().abs().max() * 0, at=10)
    assert same(found, loop(limit("1 GiB", replay=False), lambda kept: kept[-1].detach().abs().max() * 0, at=10))
    assert found[2][-1] is Replay


def test_the_optimizer_runs_without_us_when_nothing_is_to_be_done(monkeypatch):
    calls = []
    honest = Succession.call
    monkeypatch.setattr(
        Succession, "call", lambda self, facts, *rest: (calls.append(facts.name), honest(self, facts, *rest))[1]
    )
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with limit(BUDGET) as limited:
        for _ in range(6):
            opt.zero_grad()
            net(torch.ones(128, 48)).backward()
            calls.clear()
            opt.step()
            replayed = isinstance(limited._executor, Replay)
            assert bool(calls) != replayed or not replayed
    assert replayed and not calls


def test_an_optimizer_that_raises_does_not_leave_the_limit_open():
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(broken):
        opt.zero_grad()
        loss = net(torch.ones(128, 48))
        assert not limited._listening._paused  # a module has run
        loss.backward()
        if broken:
            opt.param_groups[0]["lr"] = "nonsense"
        opt.step()

    with warnings.catch_warnings(), limit(BUDGET) as limited:
        warnings.simplefilter("ignore")
        for _ in range(6):
            step(False)
        with pytest.raises(TypeError):
            step(True)
        assert limited._listening._paused
        opt.param_groups[0]["lr"] = 0.1
        for _ in range(4):
            step(False)
        assert limited._executor.hold_of(net.layers[0].weight) is not None


class Constants(nn.Module):
    """Makes tensors of plain numbers, of which no operator tells."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(48, 48), nn.GELU()) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([torch.tensor([]), layer(x) * torch.tensor(0.5)])
        return x.square().mean()


@pytest.mark.parametrize("fake", [True, False])
def test_a_given_plan_of_a_model_that_makes_constants_is_followed(fake):
    net, x = Constants(), torch.ones(128, 48)
    traced = trace(net, x, optimizer=torch.optim.AdamW, fake=fake)
    planned, opt = plan(traced, traced.peak * 4 // 5), torch.optim.AdamW(net.parameters())
    assert planned.checked.repeated
    with limit(planned, model=net) as limited, meter(net, opt) as m:
        m.count(x, "input")
        for _ in range(2):
            opt.zero_grad()
            net(x).backward()
            opt.step()
            assert isinstance(limited._executor, Replay)
    assert limited.notes == [] and m.peak <= planned.budget
