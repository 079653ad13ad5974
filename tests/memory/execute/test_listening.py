"""A limit listens to one thread and its backward passes: what others do is none of its business, and it leaves nothing behind."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode as innermost
from torch.utils.flop_counter import FlopCounterMode

from weft.memory.execute.limit import limit
from weft.memory.execute.replay import Replay

BUDGET = 400_000


def elsewhere(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


class Interrupted(torch.optim.SGD):
    """Does something in the middle of its step."""

    meanwhile: Callable[[], Any] = staticmethod(lambda: None)

    def step(self, closure: Any = None) -> Any:
        self.meanwhile()
        return super().step(closure)


class Training:
    """A small net and its steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(48, 48), nn.Tanh()) for _ in range(8)))
        self.opt = Interrupted(self.net.parameters(), lr=1e-3)
        self.x = torch.ones(128, 48)

    def step(self, between: Callable[[], Any] = lambda: None) -> None:
        self.opt.zero_grad()
        half = self.net[:4](self.x)
        between()
        self.net[4:](half).square().sum().backward()
        self.opt.step()


def assert_nothing_is_left() -> None:
    assert innermost() is None
    assert not hasattr(torch.Tensor.numpy, "__wrapped__")


def test_a_module_on_another_thread_does_not_end_a_pause() -> None:
    training, seen = Training(), []

    def meanwhile() -> None:
        assert limited._listening._paused
        elsewhere(lambda: (nn.Identity()(torch.ones(2)), seen.append(innermost())))

    with limit(BUDGET, model=training.net) as limited:
        for _ in range(8):
            training.step()
        assert isinstance(limited._executor, Replay)
        training.opt.meanwhile = meanwhile
        training.step()
        assert seen == [None] and innermost() is limited._listening._mode
        del training.opt.meanwhile
        training.step()
        assert isinstance(limited._executor, Replay)
    assert_nothing_is_left()


def test_an_optimizer_on_another_thread_does_not_end_the_step() -> None:
    training, other = Training(), nn.Linear(4, 4)
    opt = torch.optim.SGD(other.parameters(), lr=0.1)
    other.weight.grad = torch.zeros(4, 4)
    with limit(BUDGET, model=training.net) as limited:
        for done in range(8):
            training.step(between=lambda: elsewhere(opt.step))
            assert limited.steps == done
        assert isinstance(limited._executor, Replay) and not limited.notes


def test_an_optimizer_on_a_thread_of_autograds_ends_the_step() -> None:
    """On CUDA, an optimizer in a hook of a gradient runs on the device's thread, to which autograd has given our mode."""
    training = Training()

    def on_the_devices_thread() -> None:
        with limited._listening._mode:
            training.opt.step()
            assert limited._succession.ended and innermost() is limited._listening._mode

    with limit(BUDGET, model=training.net) as limited:
        training.opt.meanwhile = lambda: seen.append(limited._listening._paused)
        for done in range(8):
            seen: list[Any] = []
            training.opt.zero_grad()
            training.net(training.x).square().sum().backward()
            assert limited.steps == done
            elsewhere(on_the_devices_thread)
            assert limited._succession.ended and seen == [False]  # a pause would have to end there, too
            assert innermost() is limited._listening._mode
        assert isinstance(limited._executor, Replay) and not limited.notes
    assert_nothing_is_left()


def test_left_on_another_thread() -> None:
    limited = limit(BUDGET)
    limited.__enter__()
    mode = limited._listening._mode
    x = torch.ones(3) * 2
    elsewhere(lambda: limited.__exit__(None, None, None))
    assert not hasattr(torch.Tensor.numpy, "__wrapped__")
    assert torch.equal(x + 1, torch.full((3,), 3.0))  # nobody is asked
    mode.leave()
    assert_nothing_is_left()


def test_a_mode_that_is_left_later_stays() -> None:
    flops = FlopCounterMode(display=False)
    with limit(BUDGET):
        flops.__enter__()
    torch.ones(8, 8) @ torch.ones(8, 8)
    flops.__exit__(None, None, None)
    assert flops.get_total_flops() == 2 * 8**3
    assert_nothing_is_left()


def in_a_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does some work."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("run", [elsewhere, lambda work: work()], ids=["another thread", "this thread"])
def test_nothing_is_limited_in_a_child_whoever_forks(run: Callable[[Callable[[], Any]], None]) -> None:
    training, statuses = Training(), []

    def child() -> None:
        assert_nothing_is_left()
        assert not any(parameter._post_accumulate_grad_hooks for parameter in training.net.parameters())
        with limit("1 MiB", replay=False) as own:
            assert own._executor.hold_of(torch.ones(3) * 2) is not None
        assert_nothing_is_left()

    with limit(BUDGET, model=training.net) as limited:
        training.step()
        training.opt.zero_grad()
        run(lambda: statuses.append(in_a_child(child)))
        training.step()
        assert innermost() is limited._listening._mode
    assert statuses == [0]
    assert_nothing_is_left()
