"""`weft.run` with processes of its own: training, other batch sizes, schedules, bad input, death, Ctrl-C."""

from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan, Tiny, batch, plan_of, tiny
from tests.slow import slow
from torch import nn

from weft.cluster import Cluster
from weft.errors import CheckpointDamaged, NotFinite, WorkerDied
from weft.graph import capture
from weft.placement.assignment import Assignment
from weft.placement.layout import Mesh
from weft.planner import Plan
from weft.runtime import run
from weft.runtime.progress import Meter

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
ROOT = Path(__file__).resolve().parents[2]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Uneven last batches, a schedule, an optimizer instance with groups, save and load, export, values back in the model."""
    model, reference = tiny(), tiny()
    plan = plan_of(model, batch(), (2,), 3)

    def groups(m: nn.Module) -> torch.optim.Optimizer:
        bias = [p for n, p in m.named_parameters() if n.endswith("bias")]
        rest = [p for n, p in m.named_parameters() if not n.endswith("bias")]
        return torch.optim.AdamW([{"params": rest}, {"params": bias, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1)

    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    optimizer = groups(reference)
    plain = schedule(optimizer)
    data = [batch(6, seed=0), batch(6, seed=1), batch(3, seed=2), batch(1, seed=3), batch(5, tokens=3, seed=4)]
    with run(
        plan, model, groups(model), scheduler=lambda o: schedule(o), log_dir=tmp_path / "log", progress=True
    ) as trainer:
        for number, example in enumerate(data):
            optimizer.zero_grad()
            want = reference(*example)
            want.backward()
            optimizer.step()
            plain.step()
            assert trainer.step(example) == pytest.approx(want.item(), rel=1e-5)
            assert trainer.optimizer.param_groups[1]["lr"] == optimizer.param_groups[1]["lr"]
            if number == 2:
                trainer.save(tmp_path / "checkpoint")
        before = trainer.losses[3:]
        trainer.load(tmp_path / "checkpoint")
        assert trainer.steps == 3 and len(trainer.losses) == 3
        again = [trainer.step(example) for example in data[3:]]
        assert again == pytest.approx(before, rel=1e-6)
        reference.eval()
        assert trainer.evaluate(data[0]) == pytest.approx(reference(*data[0]).item(), rel=1e-4)
        pids = trainer.driver.pids  # type: ignore[attr-defined]
    for (name, parameter), want_parameter in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, want_parameter, rtol=1e-3, atol=1e-4, msg=name)
    assert all(gone(pid) for pid in pids)
    assert len((tmp_path / "log" / "log.jsonl").read_text().splitlines()) == 7


def test_a_killed_process_ends_the_run_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tiny(), batch(), (2,), 0)
    pids: list[int] = []
    with pytest.raises(WorkerDied) as caught, run(plan, tiny(), ADAMW) as trainer:
        trainer.step(batch())
        pids = trainer.driver.pids  # type: ignore[attr-defined]
        threading.Timer(0.1, os.kill, (pids[1], signal.SIGKILL)).start()
        while True:
            trainer.step(batch())
    error = caught.value
    assert (error.rank, error.pid) == (1, pids[1]) and "SIGKILL" in error.how and error.step >= 1
    assert all(gone(pid) for pid in pids)
    said = capfd.readouterr().err
    assert f"weft, rank 0 (pid {pids[0]}): WorkerDied: rank 1 (pid {pids[1]}) was killed by SIGKILL" in said


def test_all_that_are_silent_are_named() -> None:
    plan = plan_of(tiny(), batch(), (2,), 0)
    with (
        pytest.raises(WorkerDied, match=r"within 1 s \(nor did rank 1; any of them"),
        run(plan, tiny(), ADAMW) as trainer,
    ):
        trainer.step(batch())
        driver: Any = trainer.driver
        driver.options = replace(driver.options, timeout=1.0)
        for pid in driver.pids:
            os.kill(pid, signal.SIGSTOP)
        trainer.step(batch())


def test_bad_input_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    model = tiny()
    plan = plan_of(model, batch(), (2,), 0)
    good, (tokens, targets) = batch(), batch()
    with run(plan, model, ADAMW) as trainer:
        with pytest.raises(ValueError, match="nothing has been built yet"):
            trainer.save(tmp_path / "x")
        with pytest.raises(ValueError, match="no checkpoint at"):
            trainer.load(tmp_path / "x")
        first = trainer.step(good)
        with pytest.raises(ValueError, match="must be int64"):
            trainer.step((tokens.float(), targets))
        with pytest.raises(ValueError, match="batch"):
            trainer.step({"tokens": tokens})
        trainer.save(tmp_path / "checkpoint")
        (tmp_path / "checkpoint" / "about.pt").write_bytes(b"short")
        with pytest.raises(CheckpointDamaged, match=r"about\.pt"):
            trainer.load(tmp_path / "checkpoint")
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="has shape"):
            trainer.load_state_dict({**state, "up.bias": torch.zeros(3)})
        trainer.load_state_dict({**state, "up.bias": torch.full_like(state["up.bias"], float("nan"))})
        with pytest.raises(NotFinite) as caught:
            trainer.step(good)
        assert "up.weight" in caught.value.parameters
        trainer.load_state_dict(state)
        assert trainer.step(good) == pytest.approx(first, rel=1e-6)


class Centred(torch.optim.Optimizer):
    """Subtracts the mean gradient of each tensor: not elementwise."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad - p.grad.mean()))


def test_refusals_before_any_process_talks() -> None:
    model = tiny()
    plan = plan_of(model, batch(), (1,), 0)
    for arguments, words in [
        ({"clip_norm": 0.0}, "clip_norm must be a number > 0"),
        ({"clip_norm": "1"}, "clip_norm must be a number > 0, got '1'"),
        ({"checkpoint": "/dev/null/x"}, "checkpoint /dev/null/x: /dev/null is a file"),
        ({"log_dir": "/dev/null/x"}, "log_dir /dev/null/x: /dev/null is a file"),
        ({"accumulate": 0}, "accumulate must be a whole number"),
        ({"autocast": "fp16"}, "autocast must be"),
        ({"checkpoint_every": 5}, "needs checkpoint="),
        ({"timeout": 0}, "timeout must be a number > 0"),
        ({"accumulate": True}, "accumulate must be a whole number"),
        ({"autocast": []}, r"autocast must be 'bf16' or None, got \[\]"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"checkpoint_every": 2.5, "checkpoint": "x"}, "checkpoint_every must be a whole number of steps"),
        ({"checkpoint_every": True, "checkpoint": "x"}, "checkpoint_every must be a whole number of steps"),
        ({"device": 0}, "device must be 'cpu', 'cuda' or None, got 0"),
        ({"scheduler": lambda optimizer: None}, "scheduler must give a torch.optim.lr_scheduler .* got None"),
    ]:
        with pytest.raises(ValueError, match=words), run(plan, model, ADAMW, **arguments):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="not parameters of the model"), run(plan, model, ADAMW(Tiny().parameters())):
        pass
    with pytest.raises(ValueError, match="must be a class"), run(plan, model, "adam"):
        pass


def test_rates_leave_the_start_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 8.0, 8.0, 9.0, 9.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    meter, rates = Meter(), []
    for _ in range(3):
        meter.begin()
        meter.end(10, 2)
        rates.append((meter.samples_per_second, meter.tokens_per_second, meter.seconds))
    assert rates == [(0.25, 1.25, 8.0), (2.0, 10.0, 1.0), (2.0, 10.0, 1.0)]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_be_a_step_is_said(processes: int) -> None:
    example = (torch.randn(6, 4), torch.randint(3, (6,)))
    loss = nn.functional.cross_entropy
    model = nn.Linear(4, 3)
    plan = plan_of(model, example, (processes,), loss=loss)
    loaded = HandPlan(plan.assignment)
    with pytest.raises(ValueError, match="pass the same loss="), run(loaded, model, ADAMW) as trainer:
        trainer.step(example)
    with run(plan, model, ADAMW, loss=loss) as trainer:
        with pytest.raises(ValueError, match="it is empty"):
            trainer.step((example[0][:0], example[1][:0]))
        trainer.step(example)
    for act in (trainer.step, trainer.evaluate, trainer.gradients):
        with pytest.raises(ValueError, match="this run has ended"):
            act(example)
    with pytest.raises(ValueError, match="this run has ended"):
        trainer.load_state_dict(model.state_dict())


def test_nothing_to_train_is_said() -> None:
    example = (torch.randn(6, 4), torch.randint(3, (6,)))
    right = lambda output, target: (output.argmax(1) == target).sum()
    model, frozen = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)
    with run(plan_of(model, example, (1,), loss=right), model, ADAMW, loss=right) as trainer:
        assert trainer.evaluate(example) == right(model(example[0]), example[1])
        for act in (trainer.step, trainer.gradients):
            with pytest.raises(ValueError, match="nothing to train: the loss does not depend on the parameters"):
                act(example)
    loss = nn.functional.cross_entropy
    with (
        pytest.raises(ValueError, match="no parameter that requires a gradient"),
        run(plan_of(frozen, example, (1,), loss=loss), frozen, ADAMW, loss=loss) as trainer,
    ):
        trainer.step(example)


def test_changed_model_is_refused() -> None:
    from weft.errors import PlanMismatch

    model = tiny()
    plan = plan_of(model, batch(), (1,), 0)
    model.up = nn.Linear(10, 31)
    with pytest.raises(PlanMismatch, match=r"up\.weight"), run(plan, model, ADAMW) as trainer:
        trainer.step(batch())


class Averaged(nn.Module):
    """Keeps a running mean of what it computes, by two operators that write one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.first.requires_grad_(False)
        self.register_buffer("average", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.first(x).relu())
        self.average.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.last(h - self.average)


def test_a_buffer_that_two_operators_write_is_in_one_placement() -> None:
    torch.manual_seed(0)
    model = Averaged().double()
    reference = copy.deepcopy(model)
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.randint(3, (16,))
    cluster = Cluster.local(processes=2)
    plan = Plan.manual(model, (x, y), loss=nn.functional.cross_entropy, cluster=cluster, strategy="tp")
    writers = [node for node in plan.graph.calls if any(ref.node == "b_average" for ref in node.mutates)]
    assert len(writers) == 2 and len({plan.assignment.inputs(node)[0] for node in writers}) == 1
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    with run(plan, model, sgd, loss=nn.functional.cross_entropy) as trainer:
        for _ in range(2):
            optimizer.zero_grad()
            want = nn.functional.cross_entropy(reference(x), y)
            want.backward()
            optimizer.step()
            assert trainer.step((x, y)) == pytest.approx(want.item(), rel=1e-10)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_bfloat16_autocast_trains() -> None:
    model = tiny()
    with run(plan_of(model, batch(), (1,), 0), model, ADAMW, autocast="bf16") as trainer:
        losses = [trainer.step(batch()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


SCRIPT = """
import functools, os, sys, time, torch
from tests.runtime.plans import batch, plan_of, tiny
from weft.runtime import run

if __name__ == "__main__":
    model = tiny()
    plan = plan_of(model, batch(), (2,), 3)
    with run(plan, model, torch.optim.AdamW, checkpoint=sys.argv[1]) as trainer:
        while True:
            trainer.step(batch())
            if trainer.steps == 3:
                print("pids", *getattr(trainer.driver, "pids", []), flush=True)
                if os.environ.get("RANK") == "1":
                    os.kill(os.getpid(), 9)
"""


def start(tmp_path: Path, *prefix: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *prefix, str(script), str(tmp_path / "checkpoint")]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )


def pids_of(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("pids"):
            return [int(word) for word in line.split()[1:]]
    raise AssertionError(process.communicate()[1])


OPERATOR = """
import torch

@torch.library.custom_op("weft_test::{name}", mutates_args=())
def {name}(x: torch.Tensor) -> torch.Tensor:
    return {factor} * x

{name}.register_fake(torch.empty_like)
{name}.register_autograd(lambda context, gradient: {factor} * gradient)
"""
WITH_OPERATORS = (
    OPERATOR.format(name="thrice", factor=3)
    + """
library = torch.library.Library("weft_test_raw", "DEF")
library.define("same(Tensor x) -> Tensor")
library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("weft_test_raw::same", torch.empty_like)

if __name__ == "__main__":
    import copy, weft, doubling
    from torch.nn import functional as F

    class Model(torch.nn.Linear):
        def forward(self, x):
            return super().forward(thrice(doubling.twice(torch.ops.weft_test_raw.same(x))))

    model, example = Model(4, 3), (torch.randn(8, 4), torch.randint(3, (8,)))
    want = F.cross_entropy(model(example[0]), example[1]).item()
    cluster = weft.Cluster.local(processes=2)
    plan = weft.Plan.manual(model, example, loss=F.cross_entropy, cluster=cluster, strategy="dp", allow_replicated=True)
    with weft.run(plan, model, torch.optim.SGD, loss=F.cross_entropy) as trainer:
        print("difference", abs(trainer.step(example) - want), abs(trainer.step((example[0][:6], example[1][:6]))) > 0)
"""
)


def test_processes_have_the_operators_of_the_users_modules_and_script(tmp_path: Path) -> None:
    (tmp_path / "doubling.py").write_text(OPERATOR.format(name="twice", factor=2))
    (tmp_path / "script.py").write_text(WITH_OPERATORS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    word, difference, again = done.stdout.split()
    assert word == "difference" and float(difference) < 1e-5 and again == "True"


def test_operators_that_no_process_could_import_are_refused_at_once() -> None:
    def somewhere(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    somewhere.__module__ = "weft_test_of_no_file"
    operator = torch.library.custom_op(
        "weft_test::somewhere", somewhere, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    operator.register_fake(torch.empty_like)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return operator(x).sum()

    graph = capture(Model(), (torch.ones(4),))
    plan = HandPlan(Assignment(Mesh((2,)), {}, {}), graph)
    with (
        pytest.raises(ValueError, match=r"weft_test\.somewhere was registered outside of any module"),
        run(plan, Model()),
    ):
        pass


def test_interrupt_ends_cleanly_with_a_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path)
    pids = pids_of(process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said and process.returncode != 0
    assert all(gone(pid) for pid in pids)
    from weft.runtime.checkpoint import check

    assert check(tmp_path / "checkpoint")["steps"] >= 3


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_no_orphans_when_the_main_process_dies(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM comes to the whole process group, as from a scheduler of jobs: nothing is left in memory either."""
    process = start(tmp_path)
    pids = pids_of(process)
    maps = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/weft-" in line]
    folders = {Path(line.split()[-1]).parent for line in maps}
    for pid in [process.pid, *pids] if number == signal.SIGTERM else [process.pid]:
        os.kill(pid, number)
    process.communicate(timeout=60)
    assert len(pids) == 2 and all(gone(pid) for pid in pids)
    assert folders and not any(folder.exists() for folder in folders)


STOPPED = """
import torch.distributed as dist
import weft
from tests.runtime.plans import batch, plan_of, tiny

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for _ in range(2):  # the watch of the second finds everybody at once, and is in the store when the program ends
        with weft.run(plan_of(tiny(), batch(), (2,), 0), tiny()):
            pass
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_programs_end_well_right_after_a_run(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "script.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchrun_names_the_dead(tmp_path: Path) -> None:
    process = start(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node=2")
    _, said = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "WorkerDied: rank 1 (pid" in said and "after step 3" in said
