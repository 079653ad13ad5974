"""What a run goes on from and what it leaves behind: resuming before any batch, other groups, errors of the user's own code."""

from __future__ import annotations

import copy
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weft.cluster import Cluster
from weft.comm import Exchange
from weft.errors import NotFinite, PlanMismatch
from weft.planner import Plan
from weft.runtime import read_whole, run
from weft.runtime.checkpoint import check
from weft.runtime.launch import Spawned

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(8, width, generator=generator, dtype=torch.float64)
    return draw(6), draw(3)


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    theirs = other.state_dict()
    return [name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])]


@pytest.fixture(scope="module")
def planned() -> Plan:
    return Plan.manual(small(), data(), loss=F.mse_loss, cluster=Cluster.local(processes=1), strategy="dp")


@pytest.fixture(params=["planned here", "from a file"])
def plan(planned: Plan, request: Any) -> Plan:
    return planned if request.param == "planned here" else Plan.from_json(planned.to_json())


@pytest.fixture(scope="module")
def checkpoint(planned: Plan, tmp_path_factory: Any) -> tuple[Path, nn.Module, float]:
    """After three steps: the folder, the model, and the first number drawn after it was written."""
    model, path = small(), tmp_path_factory.mktemp("resume") / "checkpoint"
    with run(planned, model, SGD, loss=F.mse_loss) as trainer:
        for seed in range(3):
            trainer.step(data(seed))
        trainer.save(path)
        drawn = float(torch.rand(()))
    return path, model, drawn


def test_all_is_there_before_the_first_batch(plan: Plan, checkpoint: Any) -> None:
    path, trained, drawn = checkpoint
    model = small()
    torch.manual_seed(5)
    with run(plan, model, SGD, loss=F.mse_loss, resume=path) as trainer:
        assert trainer.steps == 3 and len(trainer.losses) == 3
        assert float(torch.rand(())) == drawn
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        trainer.step(data(3))
        assert trainer.steps == 4
    assert differences(model, trained) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_a_run_without_a_step_leaves_what_it_resumed_in_the_model(plan: Plan, checkpoint: Any) -> None:
    path, trained, _ = checkpoint
    model = small()
    with run(plan, model, SGD, loss=F.mse_loss, resume=path):
        pass
    assert not differences(model, trained)


def test_weights_after_a_checkpoint_leave_the_rest_of_it(plan: Plan, checkpoint: Any) -> None:
    model, other = small(), small()
    with torch.no_grad():
        other[0].weight.mul_(2)
    with run(plan, model, SGD, loss=F.mse_loss, resume=checkpoint[0]) as trainer:
        trainer.load_state_dict(other.state_dict())
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        trainer.step(data())
        assert trainer.steps == 4
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_schedule_back_at_its_first_rate_is_followed(planned: Plan, tmp_path: Path) -> None:
    schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2)
    through, model = small(), small()
    with run(planned, through, SGD, loss=F.mse_loss, scheduler=schedule) as trainer:
        wanted = [trainer.step(data(seed)) for seed in range(4)]
    with run(planned, model, SGD, loss=F.mse_loss, scheduler=schedule, checkpoint=tmp_path / "c") as trainer:
        found = [trainer.step(data(seed)) for seed in range(2)]
    with run(planned, model, SGD, loss=F.mse_loss, scheduler=schedule, resume=tmp_path / "c") as trainer:
        found += [trainer.step(data(seed)) for seed in (2, 3)]
    assert found == wanted and not differences(model, through)


def test_a_rate_changed_before_a_step_that_fails_holds_for_the_next(planned: Plan) -> None:
    model, before = small(), small()
    with run(planned, model, SGD, loss=F.mse_loss) as trainer:
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        with pytest.raises(NotFinite):
            trainer.step((data()[0] * float("nan"), data()[1]))
        trainer.step(data())
    assert torch.equal(model[0].weight, before[0].weight)


def grouped(*groups: tuple[int, ...]) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(
        [{"params": [list(p)[i] for i in each], "weight_decay": 0.5 * (0 in each)} for each in groups], lr=0.1
    )


def test_other_groups_are_refused(planned: Plan, plan: Plan, tmp_path: Path) -> None:
    with run(planned, small(), grouped((0, 4), (1, 2, 3, 5)), loss=F.mse_loss, checkpoint=tmp_path / "c") as trainer:
        trainer.step(data())
    for groups, words in [
        (((0, 1, 2, 3, 4, 5),), "has 2 parameter groups, but this run's optimizer has 1"),
        (((1, 2, 3, 5), (0, 4)), r"has '0\.bias' in parameter group 1, but this run's optimizer has it in group 0"),
        (((0,), (1, 2, 3, 5, 4)), r"has '2\.weight' in parameter group 0"),
    ]:
        with (
            pytest.raises(ValueError, match=words),
            run(plan, small(), grouped(*groups), loss=F.mse_loss, resume=tmp_path / "c"),
        ):
            pass
    with run(plan, small(), grouped((0,), (1, 2, 3, 5)), loss=F.mse_loss, resume=tmp_path / "c") as trainer:
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.0]
    with (
        pytest.raises(ValueError, match=r"is of a run with SGD, but this one uses AdamW"),
        run(plan, small(), torch.optim.AdamW, loss=F.mse_loss, resume=tmp_path / "c"),
    ):
        pass


def test_another_schedule_is_refused(planned: Plan, plan: Plan, tmp_path: Path) -> None:
    of = torch.optim.lr_scheduler
    steps = lambda o: of.StepLR(o, 2)
    cosine = lambda o: of.CosineAnnealingLR(o, 5)
    first, second = (
        lambda o, one=one: of.SequentialLR(o, [of.LinearLR(o), one(o)], milestones=[2]) for one in (cosine, steps)
    )
    for number, (saved, other, words) in enumerate([
        (cosine, steps, "the schedule CosineAnnealingLR, but this one uses StepLR"),
        (first, second, r"SequentialLR\(LinearLR, CosineAnnealingLR\), but this one uses SequentialLR\(LinearLR, StepLR\)"),
    ]):  # fmt: skip
        path = tmp_path / str(number)
        with run(planned, small(), SGD, loss=F.mse_loss, scheduler=saved, checkpoint=path) as trainer:
            trainer.step(data())
        model = small()
        with (
            pytest.raises(ValueError, match=words),
            run(plan, model, SGD, loss=F.mse_loss, scheduler=other, resume=path),
        ):
            pass
        with run(plan, model, SGD, loss=F.mse_loss, scheduler=other) as trainer:
            trainer.step(data())
            with pytest.raises(ValueError, match=words):
                trainer.load(path)
            assert trainer.steps == 1 and trainer.scheduler.last_epoch == 1
        for agreeing in (saved, None):
            with run(plan, model, SGD, loss=F.mse_loss, scheduler=agreeing, resume=path) as trainer:
                assert trainer.steps == 1


def test_a_plan_serves_its_own_loss_alone(planned: Plan) -> None:
    """Another function that computes the same is no other loss: the graph of what is given counts, as for a plan from a file."""
    wanted = copy.deepcopy(small())
    F.mse_loss(wanted(data()[0]), data()[1]).backward()
    with run(planned, small(), SGD, loss=lambda output, target: F.mse_loss(output, target)) as trainer:
        gradients = trainer.gradients(data())[1]
    torch.testing.assert_close(gradients["0.weight"], wanted[0].weight.grad)
    with pytest.raises(PlanMismatch), run(planned, small(), SGD, loss=F.smooth_l1_loss) as trainer:
        trainer.step(data())


# ---- what leaves everything as it was


@pytest.mark.parametrize("processes", [1, 2])
def test_buffers_stay_where_nothing_is_updated(processes: int) -> None:
    model = small()
    plan = Plan.manual(model, data(), loss=F.mse_loss, cluster=Cluster.local(processes=processes), strategy="dp")
    with run(plan, model, SGD, loss=F.mse_loss) as trainer:
        trainer.step(data())
        before = copy.deepcopy(trainer.sync())
        trainer.gradients(data(1))
        assert not differences(trainer.sync(), before)
        with pytest.raises(NotFinite):
            trainer.step((data()[0] * float("nan"), data()[1]))
        assert not differences(trainer.sync(), before)
        trainer.step(data(2))
        assert model[1].num_batches_tracked == 1 and trainer.sync()[1].num_batches_tracked == 2


def test_buffers_and_the_step_count_stay_where_an_exchange_skips_a_step(tmp_path: Path) -> None:
    model, (x, y) = small(), data()
    plan = Plan.manual(model, (x, y), loss=F.mse_loss, cluster=Cluster.local(processes=2), strategy="dp")
    with run(plan, model, SGD, loss=F.mse_loss, exchange=Exchange(), check_finite=False) as trainer:
        trainer.step((x, y))
        before = copy.deepcopy(trainer.sync())
        trainer.step((x, torch.where(torch.arange(8)[:, None] == 7, float("nan"), y)))
        assert not differences(trainer.sync(), before)
        trainer.save(tmp_path / "c")
        assert trainer.steps == check(tmp_path / "c")["steps"] == 1  # here as in the engines: updates count


# ---- the block ends otherwise than by its last line


class Mine(Exception):
    pass


@pytest.mark.parametrize("error", [Mine, SystemExit])
def test_an_error_of_the_users_own_loses_nothing(planned: Plan, tmp_path: Path, error: type[BaseException]) -> None:
    model = small()
    with pytest.raises(error), run(planned, model, SGD, loss=F.mse_loss, checkpoint=tmp_path / "c") as trainer:
        trainer.step(data())
        trainer.step(data(1))
        raise error
    assert check(tmp_path / "c")["steps"] == 2
    for name, value in read_whole(tmp_path / "c").items():
        assert torch.equal(value, model.state_dict()[name])
    assert differences(model, small())


def test_an_error_of_the_run_itself_replaces_no_checkpoint(planned: Plan, tmp_path: Path) -> None:
    with pytest.raises(NotFinite), run(planned, small(), SGD, loss=F.mse_loss, checkpoint=tmp_path / "c") as trainer:
        trainer.step(data())
        trainer.step((data()[0] * float("nan"), data()[1]))
    assert not (tmp_path / "c").exists()


def test_interrupts_are_raised_after_any_command_and_at_the_end(tmp_path: Path, monkeypatch: Any) -> None:
    """Ctrl-C while started processes do something other than a step, and while a block that has ended saves."""
    model = small()
    plan = Plan.manual(model, data(), loss=F.mse_loss, cluster=Cluster.local(processes=2), strategy="dp")
    answers, during, handler = Spawned._answers, [""], signal.getsignal(signal.SIGINT)

    def interrupted(self: Spawned, name: str, seconds: float) -> list[Any]:
        if name == during[0]:
            during[0] = ""
            os.kill(os.getpid(), signal.SIGINT)
        return answers(self, name, seconds)

    monkeypatch.setattr(Spawned, "_answers", interrupted)
    raised, want = [], ["evaluate", "gradients", "save", "whole", "add"]
    with (
        pytest.raises(KeyboardInterrupt),
        run(plan, model, SGD, loss=F.mse_loss, checkpoint=tmp_path / "c") as trainer,
    ):
        trainer.step(data())
        acts = [trainer.evaluate, trainer.gradients, lambda _: trainer.save(tmp_path / "s"), lambda _: trainer.sync()]
        for name, act in zip(want, [*acts, lambda pair: trainer.step((pair[0][:4], pair[1][:4]))], strict=True):
            act(data())
            during[0] = name
            try:
                trainer.step((data()[0][:2], data()[1][:2])) if name == "add" else act(data())
            except KeyboardInterrupt:
                raised.append(name)
            trainer.gradients(data())  # once is enough
        during[0] = "save"
    assert raised == want and check(tmp_path / "c")["steps"] == 2
    assert differences(model, small())
    assert signal.getsignal(signal.SIGINT) is handler
