"""Joint graphs read as traces, and schedules written into them: any legal schedule leaves every bit as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.memory.compiled.schedules import random_schedule
from tests.memory.models import Made, make, run, snapshot
from torch import nn
from torch.nn import functional as F

from weft.memory.compiled.emit import from_state, keep_state, promptly, write_joint
from weft.memory.compiled.joint import Joint, read_joint
from weft.memory.planning.check import check
from weft.memory.planning.retention import Retention
from weft.memory.planning.shape import Shape
from weft.memory.private import compiling
from weft.memory.record import CATEGORIES, Trace
from weft.memory.schedule import Action, Schedule


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def rebuilding(choose: Any, seen: list[Joint]) -> Any:
    """A backend that carries out the schedule that `choose(trace)` makes of each joint graph."""

    def partition(
        module: Any, inputs: Any, *, num_fwd_outputs: int, static_lifetime_input_indices: Any = None, **_: Any
    ) -> Any:
        joint = read_joint(module.graph, num_fwd_outputs, static_lifetime_input_indices or (), lambda node: (1.0, 0))
        seen.append(joint)
        module.graph = write_joint(joint, choose(joint.trace))
        return compiling().default_partition(
            module, inputs, num_fwd_outputs=num_fwd_outputs, static_lifetime_input_indices=static_lifetime_input_indices
        )

    boxed = compiling().boxed
    return compiling().aot_autograd(fw_compiler=boxed, bw_compiler=boxed, partition_fn=partition)


def step(made: Made, backend: Any) -> dict[str, torch.Tensor]:
    """Everything that a compiled step leaves behind: parameters, gradients, buffers, loss, and the generator."""
    torch._dynamo.reset()
    loss = run(made._replace(model=torch.compile(made.model, backend=backend, dynamic=False)))
    return {**snapshot(made.model), "loss": loss, "generator": torch.get_rng_state()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("name", [pytest.param("gpt", marks=pytest.mark.slow), "resnet", "tied"])
def test_any_schedule_leaves_every_bit(name):
    want = step(make(name), "aot_eager")
    seen: list[Joint] = []
    repeated = []

    def choose(trace: Trace) -> Schedule:
        schedule = random_schedule(trace, seed=3, chance=0.1)
        repeated.append(check(trace, schedule).repeated)
        return schedule

    assert_same(step(make(name), rebuilding(choose, seen)), want)
    assert repeated[0] > 50  # else nothing was tried


class _OneNorm(nn.Module):
    """Statistics that two normalisations read and six move, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("var", torch.ones(64))

    def forward(self, x):
        x = self.first(x)
        for number in range(8):
            x = torch.tanh(F.batch_norm(x, self.mean, self.var, training=number >= 2)) + 1
        return self.last(x).square().mean()


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_statistics_that_several_norms_move(chance):
    """With a chance of 1 every large value that may go is dropped, and the norms between are repeated."""

    def made():
        torch.manual_seed(0)
        return Made(_OneNorm(), (torch.randn(256, 64),), None)

    def choose(trace: Trace) -> Schedule:
        plan = Retention(Shape(trace))
        for v, start, stop in plan.droppable(4096):
            if chance and plan.is_kept(v, start, stop):
                plan.drop(v, stop)
        repeated.append(check(trace, plan.schedule()).repeated)
        return plan.schedule()

    repeated: list[int] = []
    want = step(made(), "aot_eager")
    assert_same(step(made(), rebuilding(choose, [])), want)
    assert bool(repeated[0]) == bool(chance)


@pytest.mark.slow
@pytest.mark.parametrize("chance", [0.02, 0.3])
@pytest.mark.parametrize("name", ["gpt", "resnet", "tied", "unet", "bert", "swin"])
def test_any_schedule_leaves_every_bit_of_any_model(name, chance):
    want = step(make(name), "aot_eager")
    assert_same(step(make(name), rebuilding(lambda trace: random_schedule(trace, 1, chance), [])), want)


class Counting(nn.Module):
    """Adds a buffer, which it then changes: what was computed from the old numbers cannot be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x) + self.scale)
        self.scale.add_(1.0)
        return self.last(torch.sigmoid(y)).square().mean()


def test_what_reads_an_overwritten_buffer_runs_once():
    def made() -> Made:
        torch.manual_seed(0)
        return Made(Counting(), torch.randn(5, 6), None)

    want = step(made(), "aot_eager")
    seen: list[Joint] = []
    assert_same(step(made(), rebuilding(lambda trace: random_schedule(trace, 2, 0.5), seen)), want)
    ops = seen[0].trace.ops
    sums = [op for op in ops if op.name == "aten.add.Tensor" and op.phase == "forward"]
    assert len(sums) == 2  # x + scale, scale + 1
    assert not any(op.repeatable for op in sums)
    assert next(op for op in ops if op.name == "aten.tanh.default").repeatable


def test_batch_norm_is_repeatable_without_its_statistics():
    seen: list[Joint] = []

    def everything_twice(trace: Trace) -> Schedule:
        return random_schedule(trace, 0, 1.0)

    made = make("resnet")
    step(made, rebuilding(everything_twice, seen))
    norms = [op for op in seen[0].trace.ops if "batch_norm_legit" in op.name]
    assert norms
    assert all(op.repeatable for op in norms)
    assert all(b.item() == 1 for name, b in made.model.named_buffers() if name.endswith("num_batches_tracked"))


def test_a_trace_has_phases_names_and_what_the_user_holds():
    seen: list[Joint] = []
    step(make("gpt"), rebuilding(lambda trace: random_schedule(trace, 0, 0.0), seen))
    (joint,) = seen
    trace = joint.trace
    trace.check()
    assert [op.phase for op in trace.ops] == ["forward"] * joint.boundary + ["backward"] * (
        len(trace.ops) - joint.boundary
    )
    model = make("gpt").model
    held = dict.fromkeys(CATEGORIES, 0)
    for value in trace.values:
        held[value.category] += value.nbytes
    parameters = sum(p.nbytes for p in model.parameters())
    assert held["parameter"] == parameters
    assert held["gradient"] >= parameters
    assert any(
        op.module == "blocks.1" or op.module.startswith("blocks.1.") for op in trace.ops if op.phase == "forward"
    )
    assert any(op.module.startswith("blocks.1") for op in trace.ops if op.phase == "backward")
    randoms = [op for op in trace.ops if op.random]
    assert randoms
    assert all(op.repeatable for op in randoms)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_only_random_operators_that_come_back_keep_their_generators_state(chance):
    seen: list[Joint] = []
    kept, wanted = [], []

    def choose(trace: Trace) -> Schedule:
        schedule = random_schedule(trace, 0, chance)
        wanted.extend({a.index for a in schedule.actions if a.kind == "again" and trace.ops[a.index].random})
        kept.extend(node for node in write_joint(seen[-1], schedule).nodes if node.target is keep_state)
        return schedule

    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
    torch.compile(net, backend=rebuilding(choose, seen), dynamic=False)(torch.randn(5, 6)).sum().backward()
    assert sum(op.random for op in seen[0].trace.ops) == 2
    assert len(kept) == len(wanted) and bool(wanted) == bool(chance)


def test_random_operators_come_back_and_leave_the_generator():
    torch.manual_seed(5)
    cpu, x = torch.device("cpu"), torch.ones(400)
    state, out, mask = keep_state(cpu, torch.ops.aten.native_dropout.default, x, 0.5, True)
    after = torch.get_rng_state()
    torch.rand(7)
    moved = torch.get_rng_state()
    again, same = from_state(state, cpu, torch.ops.aten.native_dropout.default, x, 0.5, True)
    assert torch.equal(out, again)
    assert torch.equal(mask, same)
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(moved, after)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_operators_come_back_on_a_gpu():
    gpu = torch.device("cuda", 0)
    x = torch.ones(400, device=gpu)
    state, out, _ = keep_state(gpu, torch.ops.aten.native_dropout.default, x, 0.5, True)
    torch.rand(7, device=gpu)
    assert torch.equal(from_state(state, gpu, torch.ops.aten.native_dropout.default, x, 0.5, True)[0], out)


def test_drops_come_right_after_the_last_reader():
    seen: list[Joint] = []
    step(make("gpt"), rebuilding(lambda trace: random_schedule(trace, 0, 0.0), seen))
    trace = seen[0].trace
    lazy = random_schedule(trace, 4, 0.05)
    early = promptly(trace, lazy)
    one, other = check(trace, lazy), check(trace, early)
    assert other.peak <= one.peak
    assert (other.repeated, other.seconds) == (one.repeated, one.seconds)
    assert sorted((a.kind, a.index) for a in early.actions) == sorted((a.kind, a.index) for a in lazy.actions)


def test_a_schedule_of_another_graph_is_refused():
    seen: list[Joint] = []
    step(make("gpt"), rebuilding(lambda trace: random_schedule(trace, 0, 0.0), seen))
    (joint,) = seen
    actions = [Action("run", i) for i in range(len(joint.trace.ops))]
    victim = next(v for v, x in enumerate(joint.trace.values) if x.category == "activation" and x.dies > x.born + 3 > 2)
    actions.insert(joint.trace.values[victim].born + 1, Action("drop", victim))
    with pytest.raises(ValueError, match="not there"):
        write_joint(joint, Schedule(tuple(actions)))
    with pytest.raises(ValueError, match="no lower tier"):
        write_joint(joint, Schedule((Action("save", 0),)))
