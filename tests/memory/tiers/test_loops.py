"""Training loops as people write them, on tiers: the bits of the optimizer in memory, or an error that names the parameter."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from tests.memory.tiers.training import ADAMW, SMALL, differing, gpt, tokens
from tests.slow import slow
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from weft.memory.tiers import DiskOptimizer, Tiered, Tiers

LOWER, STAYS, MEMORY = Tiers("disk", "host", "disk"), Tiers("device", "device", "disk"), Tiers("host", "host", "host")


class Parts(nn.Module):
    """Trained by a method that calls its parts: the model itself is never called. A convolution saves its weight as a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(200, 6))
        self.decode = nn.Sequential(nn.Linear(6, 40), nn.PReLU(40), nn.Linear(40, 147))
        self.scale = nn.Parameter(torch.zeros(1))
        self.again = False

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        code = checkpoint(self.encode, x, use_reentrant=True) if self.again else self.encode(x)
        return (self.decode(code) - x.flatten(1)).square().mean() * self.scale.exp() + code.square().mean()


def parts(again: bool = False) -> Parts:
    torch.manual_seed(0)
    model = Parts()
    model.again = again
    return model


def image(turn: int) -> torch.Tensor:
    return torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(turn)).requires_grad_()


def steps(model, optimizer, turns=range(3), before=lambda turn: None, after=lambda turn: True):
    """Losses; `before` each step, and `after` its backward, which says whether to step at all."""
    losses = []
    for turn in turns:
        before(turn)
        optimizer.zero_grad()
        loss = model.loss(image(turn))
        losses.append(loss.item())
        loss.backward()
        if after(turn):
            optimizer.step()
    return losses


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_parts_called_by_a_method(tmp_path, update, again):
    model, ours = parts(again), parts(again)
    with Tiered(ours, ADAMW, LOWER, tmp_path, update=update, **{**SMALL, "ahead": 1}) as tiered:
        assert steps(ours, tiered.optimizer) == steps(model, ADAMW(model.parameters()))
        assert not differing(tiered.state_dict(), model.state_dict())


@pytest.mark.parametrize("who", ["optimizer", "model"])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_batch_that_is_skipped(tmp_path, update, who):
    """Its gradients are dropped wherever they went, and what backward has updated with them is undone."""
    model, ours = parts(), parts()
    steps(model, ADAMW(model.parameters()), after=lambda turn: turn != 1)
    with Tiered(ours, ADAMW, LOWER, tmp_path, update=update, **SMALL) as tiered:

        class Zeroed:
            zero_grad, step = (ours if who == "model" else tiered.optimizer).zero_grad, tiered.optimizer.step

        steps(ours, Zeroed, after=lambda turn: turn != 1)
        assert not differing(named(tiered), named(model))
    assert "zero_grad" not in vars(ours)


def named(model) -> dict[str, torch.Tensor]:
    """Parameters by name, whole."""
    if isinstance(model, Tiered):
        return {name: model.read(name) for name, _ in model.model.named_parameters()}
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tiers", [LOWER, STAYS])
def test_a_parameter_that_is_thawed(tmp_path, tiers):
    def thaw(model):
        return lambda turn: model.decode[0].requires_grad_(turn > 0)

    model, ours, other = (parts() for _ in range(3))
    for each in (model, ours, other):
        thaw(each)(0)
    steps(model, ADAMW(model.parameters()), before=thaw(model))
    everything = [{"params": [name for name, _ in ours.named_parameters()]}]
    with Tiered(ours, ADAMW, tiers, tmp_path / "a", groups=everything, **SMALL) as tiered:
        steps(ours, tiered.optimizer, before=thaw(ours))
        assert not differing(named(tiered), named(model))
    with Tiered(other, ADAMW, tiers, tmp_path / "b", **SMALL) as tiered:  # a group of what was not frozen
        with pytest.raises(ValueError, match=r"decode\.0\.weight has a gradient, but was frozen"):
            steps(other, tiered.optimizer, before=thaw(other))
        assert tiered.steps == 1


@pytest.mark.parametrize("tiers", [LOWER, STAYS, MEMORY])
def test_the_state_of_the_optimizer_in_memory_and_back(tmp_path, tiers):
    model, ours, third = parts(), parts(), parts()
    optimizer = ADAMW(model.parameters(), amsgrad=True)
    steps(model, optimizer)
    options = dict(SMALL, groups=[{"params": [n for n, _ in ours.named_parameters()], "amsgrad": True}])
    with Tiered(ours, ADAMW, tiers, tmp_path / "a", **options) as tiered:
        steps(ours, tiered.optimizer)
        packed = tiered.optimizer.state_dict()
        third.load_state_dict(tiered.state_dict())
    expected = optimizer.state_dict()["state"]
    assert packed["state"].keys() == expected.keys()
    for index, state in expected.items():
        assert not differing(packed["state"][index], state)
    optimizer.load_state_dict(copy.deepcopy(packed))
    with Tiered(third, ADAMW, tiers, tmp_path / "b", **options) as tiered:
        tiered.optimizer.load_state_dict(packed)
        steps(model, optimizer, range(3, 4))
        steps(third, tiered.optimizer, range(3, 4))
        assert not differing(named(tiered), named(model))


def channels_last() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)


def test_states_lie_as_their_parameters_do(tmp_path):
    def step(model, optimizer, turn):
        optimizer.zero_grad()
        model(image(turn)).square().mean().backward()
        optimizer.step()

    model, ours = channels_last(), channels_last()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    given = copy.deepcopy(optimizer.state_dict())
    ours.load_state_dict(model.state_dict())
    with DiskOptimizer(ours.parameters(), torch.optim.AdamW, tmp_path, lr=0.1) as streamed:
        streamed.load_state_dict(given)
        for index, state in streamed.state_dict()["state"].items():
            assert not differing(state, given["state"][index])
        step(model, optimizer, 1)
        step(ours, streamed, 1)
        assert not differing(ours.state_dict(), model.state_dict())


def test_a_state_that_is_not_the_optimizers(tmp_path):
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    with DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, amsgrad=True) as streamed:
        before = streamed.state_dict()
        turned = {0: {**state[0], "exp_avg": state[0]["exp_avg"].t()}}
        for given, said in ((state, r"lacks \['max_exp_avg_sq'\]"), (turned, r"of shape \(4, 8\)")):
            with pytest.raises(ValueError, match=said):
                streamed.load_state_dict({"state": given, "param_groups": before["param_groups"]})
        assert streamed.state_dict() == before


@pytest.mark.parametrize("kind", ["tiered", "disk optimizer"])
def test_a_schedule_goes_on_where_it_was(tmp_path, kind):
    """A learning rate is an option of the groups, which come back with the step."""

    def make(model, resume):
        if kind == "tiered":
            tiered = Tiered(model, ADAMW, STAYS, tmp_path, resume=resume, **SMALL)
            return tiered, tiered.optimizer
        streamed = DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, lr=1e-2, resume=resume)
        return streamed, streamed

    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    model, ours = parts(), parts()
    optimizer = ADAMW(model.parameters())
    falling = schedule(optimizer)
    steps(model, optimizer, range(4), after=lambda turn: optimizer.step() or falling.step())
    for resume, turns in ((False, range(2)), (True, range(2, 4))):
        run, front = make(ours, resume)
        with run:
            falling = schedule(front)
            if resume:
                falling.load_state_dict(run.notes["schedule"])
                falling.step()

            def advance(turn, run=run, front=front, falling=falling):
                run.notes["schedule"] = falling.state_dict()
                front.step()
                falling.step()

            steps(ours, front, turns, after=advance)
            found = named(run) if kind == "tiered" else named(ours)
    assert not differing(found, named(model))


SCHEDULES = {
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 6], 0.1),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 7)], [2]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=False),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_as_the_docs_say(tmp_path, name):
    """Resumed after every step, as docs/make-it-fit.md shows it: the learning rates of a run without a break."""
    momentum = {"lr": 0.05, "momentum": 0.9}
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], **momentum)
    schedule, expected = SCHEDULES[name](optimizer), []
    for _ in range(8):
        weight.grad = torch.ones(3)
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours, found = torch.ones(3, requires_grad=True), []
    for turn in range(8):
        with DiskOptimizer([ours], torch.optim.SGD, tmp_path, resume=turn > 0, **momentum) as streamed:
            schedule = SCHEDULES[name](streamed)
            if turn:
                schedule.load_state_dict(streamed.notes["schedule"])
                for group, rate in zip(streamed.param_groups, schedule.get_last_lr(), strict=True):
                    group["lr"] = rate
                schedule.step()
            ours.grad = torch.ones(3)
            found.append(streamed.param_groups[0]["lr"])
            streamed.notes["schedule"] = schedule.state_dict()
            streamed.step()
    assert found == expected and torch.equal(ours, weight)


def test_options_that_are_tensors(tmp_path):
    options = {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": False}
    weight, ours = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([weight], **options)
    for resume in (False, True):
        with DiskOptimizer([ours], torch.optim.AdamW, tmp_path, resume=resume, **options) as streamed:
            weight.grad, ours.grad = torch.arange(3.0), torch.arange(3.0)
            optimizer.step()
            streamed.step()
            assert all(isinstance(beta, torch.Tensor) for beta in streamed.param_groups[0]["betas"])
    assert torch.equal(ours, weight)


def test_a_state_dict_has_no_released_parameter(tmp_path):
    model = gpt()
    expected, part = copy.deepcopy(model.state_dict()), copy.deepcopy(model.blocks[0].state_dict())
    with Tiered(model, ADAMW, LOWER, tmp_path, **SMALL):
        assert not differing(model.state_dict(), expected) and not differing(model.blocks[0].state_dict(), part)
    assert not model._state_dict_hooks


@pytest.mark.parametrize("then", [False, True])
def test_options_that_keep_other_states_are_not_resumed(tmp_path, then):
    model = nn.Linear(8, 4)
    with DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, amsgrad=not then) as streamed:
        model(torch.ones(1, 8)).sum().backward()
        streamed.step()
    with pytest.raises(ValueError, match="differ in whether they keep 'max_exp_avg_sq'"):
        DiskOptimizer(model.parameters(), torch.optim.AdamW, tmp_path, resume=True, amsgrad=then)


def test_a_folder_that_goes_away(tmp_path):
    model = gpt()
    with Tiered(model, ADAMW, LOWER, tmp_path / "run", **SMALL) as tiered:
        before = tiered.state_dict()
        shutil.rmtree(tmp_path / "run")
        model(*tokens(0)).backward()
        with pytest.raises(FileNotFoundError, match="was removed or renamed while it was in use"):
            tiered.step()
        assert tiered.steps == 0 and not differing(tiered.state_dict(), before)


@pytest.mark.parametrize(("first", "update"), [slow(True, "step"), (False, "backward")])
def test_a_compiled_model(tmp_path, update, first):
    """By dynamo, which leaves out what brings parameters; compiled before it is put on tiers, or after."""

    def turns(model, optimizer):
        return [losses(model, optimizer, turn) for turn in range(3)]

    def losses(model, optimizer, turn):
        torch.manual_seed(turn)
        loss = model(*tokens(turn))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    torch._dynamo.reset()
    compiled = lambda model: torch.compile(model, backend="aot_eager")
    reference, model = gpt(), gpt()
    expected = turns(compiled(reference), ADAMW(reference.parameters()))
    given = compiled(model) if first else model
    with Tiered(given, ADAMW, Tiers("disk", "host", "disk", "disk"), tmp_path, update=update, **SMALL) as tiered:
        assert turns(given if first else compiled(model), tiered.optimizer) == expected
        found = {name.removeprefix("_orig_mod."): value for name, value in tiered.state_dict().items()}
        assert not differing(found, dict(reference.state_dict()))


def test_models_that_cannot_be_on_tiers(tmp_path):
    x = torch.zeros(2, 4)
    for made in (torch.jit.script(nn.Linear(4, 4)), torch.jit.trace(nn.Linear(4, 4), x)):
        with pytest.raises(ValueError, match=r"^Tiered: 1 was made by torch\.jit.*give the nn\.Module"):
            Tiered(nn.Sequential(nn.Linear(4, 4), made), ADAMW, LOWER, tmp_path)
    noisy = nn.Sequential(nn.Linear(4, 4), nn.RReLU())
    with pytest.raises(ValueError, match=r"1 is an RReLU.*activations='device'"):
        Tiered(noisy, ADAMW, Tiers("host", activations="disk"), tmp_path)
    Tiered(noisy, ADAMW, LOWER, tmp_path).close()
