"""`torch.compile` within a budget: bits, bytes by the meter, and refusals that come before anything is held."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._functorch.config as functorch_config
from tests.memory.models import Made, make, run, snapshot
from torch import nn
from torch.nn import functional as F

from weft.errors import BudgetError
from weft.graph.batch import flatten_batch
from weft.memory.compiled import Backend, backend
from weft.memory.compiled.book import Book
from weft.memory.compiled.fused import Watch
from weft.memory.meters import meter
from weft.memory.tracing.state import state_now, state_to_come

VAST = 1 << 40


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(made: Made, engine: object) -> Made:
    return made._replace(model=torch.compile(made.model, backend=engine, dynamic=False))


def stepped(name: str, engine: object) -> dict[str, torch.Tensor]:
    """What one compiled step leaves behind."""
    torch._dynamo.reset()
    made = make(name)
    loss = run(compiled(made, engine))
    return {**snapshot(made.model), "loss": loss, "generator": torch.get_rng_state()}


def bytes_of(name: str) -> tuple[int, int]:
    """(bytes always there, peak) of the compiled step without a plan."""
    free = backend(VAST)
    stepped(name, free)
    trace = free.regions[0].trace
    return trace.fixed, trace.peak


def measured(made: Made) -> int:
    """Peak of a step that compiles nothing (the compiler itself keeps copies of the generator), without gradients before it."""
    made.model.zero_grad(set_to_none=True)
    run(made)
    made.model.zero_grad(set_to_none=True)
    with meter(made.model) as m:
        m.count(flatten_batch(made.batch)[0], "input")
        run(made)
        return m.peak


@pytest.mark.parametrize(
    ("name", "shares"),
    [pytest.param("gpt", (0.8, 0.6), marks=pytest.mark.slow), ("resnet", (0.94,)), ("tied", (0.9,))],
)
def test_bits_and_bytes(name, shares):
    want, (fixed, peak) = stepped(name, "aot_eager"), bytes_of(name)
    eager = make(name)
    run(eager)
    for key, value in snapshot(eager.model).items():
        torch.testing.assert_close(want[key], value)
    for share in shares:
        torch._dynamo.reset()
        budget = int(fixed + share * (peak - fixed))
        made, engine = make(name), backend(budget)
        loss = run(compiled(made, engine))
        got = {**snapshot(made.model), "loss": loss, "generator": torch.get_rng_state()}
        assert [key for key in want if not torch.equal(got[key], want[key])] == []
        (region,) = engine.regions
        assert region.repeated > 0
        peak_now = measured(compiled(made, engine))
        assert peak_now <= budget
        assert abs(peak_now - region.peak) <= 0.02 * region.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "resnet", "tied", "unet", "bert", "swin"])
def test_bits_and_bytes_of_any_model_at_any_budget(name):
    want, (fixed, peak) = stepped(name, "aot_eager"), bytes_of(name)
    tried = 0
    for share in (0.95, 0.8, 0.65, 0.5, 0.4, 0.3):
        torch._dynamo.reset()
        budget = int(fixed + share * (peak - fixed))
        made, engine = make(name), backend(budget)
        try:
            loss = run(compiled(made, engine))
        except BudgetError as error:
            assert error.least > budget
            continue
        tried += 1
        got = {**snapshot(made.model), "loss": loss, "generator": torch.get_rng_state()}
        assert [key for key in want if not torch.equal(got[key], want[key])] == []
        assert measured(compiled(made, engine)) <= budget
    assert tried


def test_a_budget_that_suffices_changes_nothing():
    engine = backend(VAST)
    made = make("gpt")
    run(compiled(made, engine))
    (region,) = engine.regions
    assert region.repeated == 0
    assert measured(compiled(made, engine)) == region.peak == region.trace.peak


@pytest.mark.slow
def test_torch_own_budget_is_wrong_with_dropout_and_ours_is_not():
    """`activation_memory_budget` repeats dropout with fresh numbers: the gradient belongs to no loss that was computed."""

    def gradient(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.flatten() for key, value in state.items() if key.endswith(".grad")])

    eager = make("gpt")
    run(eager)
    want = gradient(snapshot(eager.model))
    functorch = torch._dynamo.backends.common.aot_autograd
    from functorch.compile import min_cut_rematerialization_partition

    boxed = torch._dynamo.backends.debugging.boxed_nop
    theirs = functorch(fw_compiler=boxed, bw_compiler=boxed, partition_fn=min_cut_rematerialization_partition)
    with functorch_config.patch(activation_memory_budget=0.3):
        got = gradient(stepped("gpt", theirs))
    assert (got - want).norm() > 0.1 * want.norm()

    fixed, peak = bytes_of("gpt")
    ours = backend(int(fixed + 0.6 * (peak - fixed)))
    assert torch.equal(gradient(stepped("gpt", ours)), want)
    again = {action.index for action in ours.regions[0].schedule.actions if action.kind == "again"}
    assert any(ours.regions[0].trace.ops[index].random for index in again)


def test_what_cannot_be_kept_is_refused_before_it_runs():
    fixed, _ = bytes_of("gpt")
    torch._dynamo.reset()
    made = make("gpt")
    with pytest.raises(BudgetError) as refusal:
        run(compiled(made, backend(fixed + 1000)))
    assert refusal.value.budget == fixed + 1000
    assert refusal.value.least > fixed + 1000
    assert all(p.grad is None for p in made.model.parameters())
    torch._dynamo.reset()
    engine = backend(refusal.value.least)
    run(compiled(made, engine))
    assert engine.regions[0].peak <= refusal.value.least


def test_gradients_that_are_kept_count():
    fixed, peak = bytes_of("gpt")
    torch._dynamo.reset()
    made = compiled(make("gpt"), backend(peak + 100))
    run(made)
    with pytest.raises(BudgetError, match="zero_grad"):
        run(made)  # gradients of the first step are still there
    made.model.zero_grad(set_to_none=True)
    run(made)


class Twice(nn.Module):
    """Two graphs: the compiler cannot follow the print."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.second = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x).square().mean()


def twice() -> Made:
    torch.manual_seed(0)
    return Made(Twice(), torch.randn(64, 32), None)


def test_graphs_share_a_budget():
    want = twice()
    run(want)
    engine = backend(VAST)
    made = compiled(twice(), engine)
    run(made)
    assert len(engine.regions) == 2
    alone = [region.peak for region in engine.regions]
    with meter(made.model) as m:
        made.model.zero_grad(set_to_none=True)
        m.count(made.batch, "input")
        run(made)
    assert m.peak > max(alone)

    torch._dynamo.reset()
    with pytest.raises(BudgetError, match="other graphs"):
        run(compiled(twice(), backend(max(alone) + 1000)))
    torch._dynamo.reset()
    made = compiled(twice(), backend(int(1.6 * m.peak)))
    for _ in range(3):
        made.model.zero_grad(set_to_none=True)
        run(made)
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(want.model.parameters(), made.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "make_optimizer",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.Adafactor,
    ],
)
def test_bytes_of_an_optimizer_that_has_not_stepped(make_optimizer):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    optimizer = make_optimizer(model.parameters())
    expected = Book(1, 0, optimizer).elsewhere
    assert expected == state_now(optimizer) + state_to_come(optimizer)
    model(torch.randn(2, 7)).sum().backward()
    optimizer.step()
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    assert expected == held == state_now(optimizer)
    assert state_to_come(optimizer) == 0


def test_bytes_of_an_optimizer_that_wants_a_closure_are_not_foretold():
    assert state_to_come(torch.optim.LBFGS(nn.Linear(7, 5).parameters())) == 0


def test_what_goes_wrong_with_us_is_not_taken_for_no_state(monkeypatch):
    monkeypatch.delattr("weft.memory.tracing.fakes.Fakes.of")
    with pytest.raises(AttributeError):
        state_to_come(torch.optim.SGD(nn.Linear(7, 5).parameters()))


@pytest.mark.slow
def test_the_optimizer_is_part_of_the_budget():
    fixed, peak = bytes_of("gpt")
    made = make("gpt")
    optimizer = torch.optim.AdamW(made.model.parameters())
    state = state_to_come(optimizer)
    budget = int(0.8 * peak) + state
    engine = backend(budget, optimizer=optimizer)
    torch._dynamo.reset()
    run(compiled(made, engine))
    assert engine.regions[0].repeated > 0
    assert engine.regions[0].peak <= budget - state
    torch._dynamo.reset()
    with pytest.raises(BudgetError, match="outside of the compiled graph"):
        run(compiled(made, backend(peak, outside=peak - fixed)))


def test_evaluation_is_planned_too():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]).eval()
    x = torch.randn(512, 64)
    with torch.no_grad():
        want = model(x)
        engine = backend(VAST)
        assert torch.equal(torch.compile(model, backend=engine, dynamic=False)(x), want)
        assert not engine.regions[0].training
        torch._dynamo.reset()
        with pytest.raises(BudgetError):
            torch.compile(model, backend=backend(engine.regions[0].trace.fixed + 1000), dynamic=False)(x)
        torch._dynamo.reset()
        # What is outside leaves less than nothing.
        with pytest.raises(BudgetError, match="outside of the compiled graph") as refused:
            torch.compile(model, backend=backend("1KiB", outside="1MiB"), dynamic=False)(x)
        assert refused.value.budget == 1024 and refused.value.least > 2**20


def test_symbolic_sizes_are_refused():
    model = nn.Linear(4, 4)
    step = torch.compile(model, backend=backend(VAST), dynamic=True)
    with pytest.raises(ValueError, match="dynamic=False"):
        step(torch.randn(6, 4)).sum().backward()


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        ("lots", {}, "budget: must be bytes"),
        ("6 GB/s", {}, "budget"),
        (-1, {}, "at least 1"),
        (0, {}, "at least 1"),
        ("1GiB", {"outside": -5}, "outside: must be at least 0"),
        ("1GiB", {"outside": float("inf")}, "finite"),
    ],
)
def test_sizes_that_are_none(budget, options, says):
    with pytest.raises(ValueError, match=says):
        backend(budget, **options)


@pytest.mark.slow
def test_it_says_what_was_decided():
    fixed, peak = bytes_of("gpt")
    engine = backend(f"{int(0.8 * peak)}")
    stepped("gpt", engine)
    text = str(engine)
    assert "forward and backward" in text
    assert "operators again" in text
    assert isinstance(engine, Backend)


def test_a_loss_outside_is_not_seen_and_must_be_named():
    """What is not compiled is not planned: the documented way is to compile the loss too, or to say `outside`."""
    model, x, y = nn.Linear(16, 1000), torch.randn(64, 16), torch.randint(0, 1000, (64,))
    engine = backend(VAST)
    step = torch.compile(model, backend=engine, dynamic=False)
    with meter(model) as m:
        m.count([x, y], "input")
        F.cross_entropy(step(x), y).backward()
    assert m.peak > engine.regions[0].peak


# -- fused kernels ----------------------------------------------------------------------------------------------------------


def test_a_watch_tells_an_excess_when_backward_is_over():
    watch, weight = Watch(1 << 20), torch.zeros(1000, requires_grad=True)
    for size, excess in ((1 << 17, False), (1 << 19, True), (1 << 10, False)):
        watch.before([weight])
        loss = weight.sum()
        watch.after((loss,))
        torch.zeros(size)
        if excess:
            with pytest.raises(BudgetError, match="this step held"):
                loss.backward()
        else:
            loss.backward()
    watch.before([weight])
    torch.zeros(1 << 19)
    with pytest.raises(BudgetError):
        watch.before([weight])  # there was no backward


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_takes_the_plan():
    want = stepped("gpt", "inductor")
    free = backend(VAST, compiler="inductor")
    stepped("gpt", free)
    trace = free.regions[0].trace
    budget = int(trace.fixed + 0.75 * (trace.peak - trace.fixed))
    torch._dynamo.reset()
    engine, made = backend(budget, compiler="inductor"), make("gpt")
    loss = run(compiled(made, engine))
    got = {**snapshot(made.model), "loss": loss, "generator": torch.get_rng_state()}
    assert [key for key in want if not torch.equal(got[key], want[key])] == []
    assert engine.regions[0].repeated > 0
    del got  # whatever tensors the program makes count
    assert measured(compiled(made, engine)) <= budget


def test_there_is_no_other_compiler():
    with pytest.raises(ValueError, match="did you mean inductor"):
        backend("1GiB", compiler="inducto")  # type: ignore[arg-type]


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.GELU())))
        self.head = nn.Linear(16, 64)

    def forward(self, x, y):
        return F.mse_loss(self.head(self.body(x)), y)


def test_a_loss_that_keeps_the_bytes_of_its_summands_is_planned_so():
    """The storage of a mean squared error holds all squares: 128 KiB beside activations of 32 KiB each."""
    torch.manual_seed(0)
    made = Made(Squares(), (torch.randn(512, 16), torch.randn(512, 64)), None)
    free = backend(VAST)
    run(compiled(made, free))
    trace = free.regions[0].trace
    for share in (1, 0.8):
        torch._dynamo.reset()
        budget = int(trace.fixed + share * (trace.peak - trace.fixed))
        assert measured(compiled(made, backend(budget))) <= budget


@torch._dynamo.disable
def hoard(x: torch.Tensor) -> torch.Tensor:
    return x * torch.ones(64, *x.shape).sum(0)


class Cut(nn.Module):
    """What torch cannot follow is called first, or later."""

    def __init__(self, first: bool):
        super().__init__()
        self.layer, self.first = nn.Linear(32, 32), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(hoard(x)).sum() if self.first else hoard(self.layer(x)).sum()


@pytest.mark.parametrize("first", [True, False])
def test_bytes_between_graphs_are_told_of(first):
    """They exceed the budget, as the meter sees; the warning names the line, and `fullgraph` refuses."""
    engine, x = backend("64KiB"), torch.ones(64, 32)
    step = torch.compile(Cut(first), backend=engine, dynamic=False)
    line = Cut.forward.__code__.co_firstlineno + 1
    with meter() as m, pytest.warns(RuntimeWarning, match=rf"in pieces, at .*test_torch_compile\.py:{line}"):
        step(x)
    assert m.peak > engine.budget and "cut at" in str(engine)
    torch._dynamo.reset()
    engine = backend("64KiB")
    assert "no graph yet" in str(engine)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Cut(first), backend=engine, dynamic=False, fullgraph=True)(x)


def test_one_graph_is_told_of_nothing(recwarn):
    step = torch.compile(nn.Linear(32, 32), backend=backend("1MiB"), dynamic=False, fullgraph=True)
    step(torch.ones(64, 32)).sum().backward()
    assert not [w for w in recwarn if "pieces" in str(w.message)]
