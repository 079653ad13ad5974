"""The choice of settings against brute force; the controller's budget, report, checkpoint and bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comm.codec import Codec, Spec
from weft.comm.controllers import layerwise
from weft.comm.controllers.greedy import greedy_layers
from weft.comm.controllers.layerwise import BudgetTooSmall, LayerwiseBudget, plan_layers
from weft.comm.controllers.uniform import uniform_layers


def total(table, choice):
    return math.fsum(row[j] for row, j in zip(table, choice, strict=True))


def brute_force(err, size, budget):
    """The least size of all combinations within the budget."""
    every = itertools.product(*(range(len(row)) for row in err))
    return min((total(size, c) for c in every if total(err, c) <= budget), default=None)


def instance(seed, integers):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 7)), int(rng.integers(1, 6)))
    if integers:
        err, size = rng.integers(0, 30, shape).astype(float), rng.integers(0, 30, shape).astype(float)
    else:
        scale = rng.lognormal(0, 2, (shape[0], 1))
        err, size = rng.random(shape) * scale, rng.random(shape) * rng.lognormal(0, 1, (shape[0], 1))
    least, most = err.min(1).sum(), err.max(1).sum()
    budget = least + rng.random() * (most - least)
    return err.tolist(), size.tolist(), float(round(budget) if integers else budget)


@pytest.mark.parametrize("integers", [True, False])
def test_equals_brute_force(integers):
    for seed in range(200):
        err, size, budget = instance(seed, integers)
        best = brute_force(err, size, budget)
        if best is None:
            with pytest.raises(BudgetTooSmall):
                plan_layers(err, size, budget)
            continue
        choice = plan_layers(err, size, budget)
        assert total(err, choice) <= budget
        assert total(size, choice) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_the_grid_alone_keeps_the_budget_and_loses_little(monkeypatch):
    monkeypatch.setattr(layerwise, "FRONT", 0)  # a front this short is never followed to its end
    losses = []
    for seed in range(200):
        err, size, budget = instance(seed, integers=False)
        if brute_force(err, size, budget) is None:
            continue
        choice = plan_layers(err, size, budget)
        assert total(err, choice) <= budget
        # What is lost is at most one cell of the budget a layer.
        assert total(size, choice) <= (brute_force(err, size, budget * (1 - len(err) / 10_000)) or math.inf) * (
            1 + 1e-12
        )
        losses.append(total(size, choice) / brute_force(err, size, budget) - 1)
    assert sorted(losses)[int(0.9 * len(losses))] <= 0.01


tables = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(0, 1e6), min_size=count, max_size=count), min_size=1, max_size=9),
        st.integers(0, 2**31),
        st.integers(0, count - 1),
    )
)


@settings(max_examples=60, deadline=None)
@given(tables, st.floats(0.5, 3))
def test_never_larger_than_uniform_and_monotone_in_alpha(case, alpha):
    err, seed, default = case
    size = np.random.default_rng(seed).integers(1, 10_000, np.shape(err)).astype(float).tolist()
    budget = math.fsum(row[default] for row in err)
    choice = plan_layers(err, size, budget)
    assert total(err, choice) <= budget
    assert total(size, choice) <= math.fsum(row[default] for row in size)
    least = math.fsum(min(row) for row in err)
    sizes = [total(size, plan_layers(err, size, b)) for b in sorted((budget, max(least, alpha * budget)))]
    assert sizes[1] <= sizes[0]


def test_greedy_is_within_the_budget_and_never_better():
    worse = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        err = np.sort(rng.random((20, 8)) * rng.lognormal(0, 2, (20, 1)), axis=1)[:, ::-1].tolist()
        size = np.sort(rng.random((20, 8)), axis=1).tolist()
        budget = math.fsum(row[4] for row in err)
        greedy, best = greedy_layers(err, size, budget), plan_layers(err, size, budget)
        assert total(err, greedy) <= budget
        assert total(size, best) <= total(size, greedy) * (1 + 1e-12)
        worse += total(size, best) < total(size, greedy) * (1 - 1e-3)
    assert worse >= 15


def test_uniform_is_the_smallest_column_within_the_budget():
    err, size = [[9.0, 4.0, 1.0], [9.0, 4.0, 1.0]], [[1, 2, 3], [1, 2, 3]]
    assert uniform_layers(err, size, 8.0) == [1, 1]
    assert uniform_layers(err, size, 18.0) == [0, 0]
    with pytest.raises(BudgetTooSmall, match="least total is 2"):
        uniform_layers(err, size, 1.5)


def test_one_setting_no_budget_and_no_layers():
    assert plan_layers([[3.0], [2.0]], [[1], [1]], 5.0) == [0, 0]
    assert plan_layers([[0.0, 1.0], [0.0, 0.0]], [[5, 1], [5, 1]], 0.0) == [0, 1]
    assert plan_layers([], [], 1.0) == []
    assert plan_layers([[0.0, math.inf]], [[5, 1]], 1e300) == [0]
    with pytest.raises(BudgetTooSmall) as caught:
        plan_layers([[3.0], [2.0]], [[1], [1]], 4.0)
    assert (caught.value.need, caught.value.have) == (5.0, 4.0)


@pytest.mark.parametrize(
    ("err", "size", "budget", "message"),
    [
        ([[1.0], [math.nan]], [[1], [1]], 1.0, "err must be >= 0, got nan for layer 1, setting 0"),
        ([[1.0, 2.0]], [[1, -1]], 1.0, "size must be >= 0, got -1.0 for layer 0, setting 1"),
        ([[]], [[]], 1.0, "layer 0 needs at least one setting"),
        ([[1.0]], [[1, 2]], 1.0, "layer 0 needs"),
        ([[1.0]], [], 1.0, "err has 1 layers and size 0"),
        ([[1.0]], [[1]], math.nan, "budget must be"),
    ],
)
def test_bad_tables_are_named(err, size, budget, message):
    with pytest.raises(ValueError, match=message):
        plan_layers(err, size, budget)


class Steps(Codec):
    """Keeps the first `setting` entries: errors and sizes that can be said by hand."""

    def default(self, spec):
        return 1

    def message(self, spec, setting):
        return (((min(setting, spec.numel),), torch.float32),)

    def encode(self, x, spec, state, setting, step):
        return (x[:setting].clone(),)

    def decode(self, message, spec, setting):
        return torch.cat([message[0], torch.zeros(spec.numel - len(message[0]))])


def bound(**options):
    controller = LayerwiseBudget(**{"settings": (1, 2, 4, 8), "default": 2, "smallest": 1, "every": 2, **options})
    controller.bind(Steps(), lambda spec, setting: 0.5 * setting)
    return controller


SPECS = {name: Spec(name, (8,)) for name in ("a", "b")}
GRADIENTS = {"a": torch.tensor([3.0, 2, 2, 2, 0, 0, 0, 0]), "b": torch.tensor([1.0, 0.1, 0.1, 0, 0, 0, 0, 0])}


def feed(controller, factor=1.0, steps=2):
    for step in range(steps):
        for name, gradient in GRADIENTS.items():
            controller.observe(SPECS[name], factor * gradient, step)


def test_decides_from_the_sum_and_reports():
    controller = bound()
    feed(controller)
    # Sums are twice the gradients: errors a (16 + 16 + 16, 16 + 16, 0, 0), b (.08, .04, 0, 0); budget 32.04.
    assert controller.decide(2, SPECS) == {"a": 2, "b": 2}  # b at 1 would be 0.04 over the budget
    report = controller.report()
    assert report["step"] == 2
    assert report["tensors"]["a"] == {"setting": 2, "error_share": pytest.approx(32 / 32.04), "bytes_saved": 0.0}
    assert controller.decide(4, SPECS) == {}  # nothing new observed: the last decision holds
    feed(controller)
    controller.alpha = 1.01
    assert controller.decide(4, SPECS) == {"a": 2, "b": 1}
    assert controller.report()["tensors"]["b"]["bytes_saved"] == 4.0


def test_a_limit_on_seconds_makes_the_error_small_instead():
    controller = bound(cost="seconds", limit=3.0)
    feed(controller)
    assert controller.decide(2, SPECS) == {"a": 4, "b": 2}  # 2 s + 1 s
    tight = bound(cost="seconds", limit=0.7)
    feed(tight)
    assert tight.decide(2, SPECS) == {"a": 1, "b": 1}
    assert tight.report()["too_small"] == 1


def test_uncompressed_is_a_setting_without_error():
    controller = bound(settings=(2, None), alpha=1e-6)
    feed(controller)
    assert controller.decide(2, SPECS) == {"a": None, "b": None}
    assert controller.report()["tensors"]["a"]["bytes_saved"] == 8 - 32


def test_what_hides_behind_the_backward_pass_is_not_squeezed():
    controller = bound(
        cost="seconds", seconds=lambda spec, setting: 0.0 if spec.name == "a" else float(setting), alpha=2.0
    )
    feed(controller)
    assert controller.decide(2, SPECS) == {"a": 4, "b": 1}


@pytest.mark.parametrize(
    ("err", "size", "budget", "expected"),
    [([[10, 11], [0, 2]], [[2, 1], [2, 1]], 12, [1, 0]),  # what is added counts, not how much there is already
     ([[0, 1], [0, 1]], [[100, 98], [4, 0]], 1, [0, 1])],  # and what is saved
)  # fmt: skip
def test_greedy_takes_what_adds_least_error_for_what_it_saves(err, size, budget, expected):
    assert greedy_layers(err, size, budget) == expected


def test_gradients_that_are_zero_or_not_finite_keep_the_last_decision():
    controller = bound()
    feed(controller, factor=0.0)
    assert controller.decide(2, SPECS) == {}
    feed(controller, factor=math.nan)
    assert controller.decide(4, SPECS) == {}
    assert controller.report()["skipped"] == 1
    feed(controller)
    assert controller.decide(6, SPECS)  # what was not finite is not carried on


def test_small_tensors_and_the_warm_up_are_left_out():
    controller = bound(smallest=9, start=0)
    feed(controller)
    assert controller.decide(2, SPECS) == {}
    warm = bound(start=2)
    feed(warm)
    assert warm.decide(2, SPECS) == {}


def test_resuming_decides_the_same():
    straight, first = bound(alpha=1.5), bound(alpha=1.5)
    for controller in (straight, first):
        feed(controller)
        controller.decide(2, SPECS)
        feed(controller, 0.3, steps=1)
    resumed = bound(alpha=1.5)
    resumed.load_state_dict(first.state_dict())
    for controller in (straight, resumed):
        feed(controller, 1.7, steps=1)
    assert resumed.decide(4, SPECS) == straight.decide(4, SPECS) != {}
    with pytest.raises(ValueError, match="lacks"):
        resumed.load_state_dict({"norms": {}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ()}, "settings must not be empty"),
        ({"default": 3}, r"default must be one of settings \(1, 2, 4, 8\), got 3"),
        ({"alpha": 0.0}, "alpha must be > 0, got 0.0"),
        ({"every": 0}, "every and grid must be >= 1"),
        ({"cost": "money"}, "'bytes' or 'seconds', got 'money'"),
        ({"limit": -1.0}, "limit must be > 0 bytes a step"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LayerwiseBudget(**{"settings": (1, 2, 4, 8), "default": 2, **options})


def test_what_cannot_be_bound_is_refused():
    with pytest.raises(TypeError, match="no `error`"):
        LayerwiseBudget((1,), 1).bind(object())
    with pytest.raises(ValueError, match="needs the argument seconds"):
        LayerwiseBudget((1,), 1, cost="seconds").bind(Steps())
    with pytest.raises(ValueError, match="no codec is bound"):
        LayerwiseBudget((1,), 1).decide(0, SPECS)
