"""Exchanges beside ZeRO: plain reduce-scatters along one axis of a mesh, coded pieces along the other.

And what groups side by side decide as one: rules by inner products, controllers by numbers that add up over parts.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan
from tests.runtime.test_coded import DECAYING, HEAVY, PLAIN, interrupted
from tests.runtime.test_coded_rows import (
    KEEPING,
    LOSSY,
    broken,
    by_the_book,
    cut,
    equal,
    loaded,
    numbers,
    plan_of,
    saved,
    trained,
)
from tests.runtime.test_coded_zero import everything, in_small_buckets, in_two
from tests.runtime.test_coded_zero import trained as trained_values
from torch import Tensor

from weft.comm import (
    Accordion,
    Combine,
    ErrorFeedback,
    Exchange,
    Flag,
    GeometricMedian,
    Identity,
    Krum,
    LayerwiseBudget,
    MomentumCorrection,
    RandK,
    ScatterGather,
    Spec,
    Star,
    TopK,
)
from weft.comm.combine import Info
from weft.comm.controllers.layerwise import plan_layers
from weft.placement.layout import Mesh

HYBRID = ("dp", "zero-1")
slow = pytest.mark.slow


# ---- nothing is lost


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        (HYBRID, Mesh((2, 2))),
        pytest.param(("zero-1", "dp"), Mesh((2, 2)), marks=slow),
        pytest.param(("dp", "zero-3"), Mesh((2, 2), weights=(None, (3.0, 1.0))), marks=slow),
    ],
)
def test_identity_has_the_bits_of_collectives(pool, strategy, mesh):
    """With uneven pieces, too."""
    plan = plan_of(strategy, mesh, cut, numbers)
    plain = pool(4).run(trained_values, plan, None, PLAIN, cut, numbers)
    for run in (trained_values, in_small_buckets):
        for ours, theirs in zip(pool(4).run(run, plan, Exchange, PLAIN, cut, numbers), plain, strict=True):
            if strategy[0] == "dp":
                assert equal(ours, theirs)
            for name, value in ours.items():  # summed inside first: two pairs are added in another order
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_are_scattered_as_they_come_and_sent_once(pool, stage):
    plan = plan_of(("dp", f"zero-{stage}"))
    pairs = zip(pool(4).run(in_two, plan, Exchange), pool(4).run(in_two, plan, None), strict=True)
    for ours, plain in pairs:
        for name, value in ours.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


@slow
def test_momentum_in_the_memory_of_pieces_is_that_of_the_optimizer(pool):
    plan, make = plan_of(("dp", "zero-3")), partial(Exchange, TopK(1.0), MomentumCorrection(0.9))
    plain = pool(4).run(trained, plan, None, partial(HEAVY, weight_decay=0.1))
    for (ours, _), (expected, _) in zip(pool(4).run(trained, plan, make, DECAYING), plain, strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# ---- by the book


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=slow)])
def test_error_feedback_is_what_two_nodes_do_by_the_book(pool, stage):
    """A node is one worker: it sends the largest entries of each half of its gradient, and owes the rest."""
    expected = by_the_book(0.1, 4, 0.05, {"embed.weight": 0, "up.weight": 0, "down.weight": 0})
    for found, _ in pool(4).run(trained, plan_of(("dp", f"zero-{stage}")), KEEPING):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# ---- the same bits on all that hold the same


@pytest.mark.parametrize("name", ["velocities", *(pytest.param(n, marks=slow) for n in LOSSY if n != "velocities")])
def test_all_replicas_get_the_same(pool, name):
    """Quantised, drawn, largest, low rank, signs, velocities: also on a mesh whose ranks stand in another order."""
    plan, mesh = plan_of(HYBRID), Mesh((2, 2), ranks=(0, 3, 2, 1))
    plan = replace(plan, assignment=replace(plan.assignment, mesh=mesh))
    held = [local for _, local in pool(4).run(trained, plan, LOSSY[name])]
    assert all(equal(local, held[0]) for local in held)


# ---- faults and checkpoints


def test_a_step_that_is_bad_in_one_group_changes_nothing_in_any(pool):
    """Its last row is not finite on one process: of a weight that two groups hold a half each of."""
    found = pool(4).run(broken, plan_of(HYBRID), "up.weight")
    for told, same, skipped, values in found:
        assert "not finite" in told or "the loss of step" in told
        assert same and skipped == 1 and equal(values, found[0][3])


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        (1, partial(Exchange, RandK(0.2, unbiased=False), ErrorFeedback())),
        pytest.param(3, LOSSY["velocities"], marks=slow),
        pytest.param(1, LOSSY["signs by segments"], marks=slow),
        pytest.param(3, LOSSY["low rank"], marks=slow),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(pool, tmp_path, stage, make):
    for without, resumed in pool(4).run(interrupted, plan_of(("dp", f"zero-{stage}")), make, tmp_path / "c"):
        assert equal(without, resumed)


@slow
def test_more_nodes_go_on_with_what_is_owed(pool, tmp_path):
    """Their number may change; that of the pieces may not, and pieces of ZeRO may become those of another stage."""
    ranks = pool(4).run(saved, plan_of(HYBRID), tmp_path / "c")
    assert ranks[1][1]["up.weight"] == "[15:30, 0:10]" and ranks[0][1]["embed.weight"] == "[0:7, 0:10]"
    for rank, (remark, kept) in enumerate(pool(6).run(loaded, plan_of(("dp", "zero-3"), (3, 2)), tmp_path / "c")):
        assert "2 processes of each group" in remark and "this run has 3" in remark
        for name, value in kept.items():
            mean = sum(ranks[place][0][name].double() for place in (rank % 2, 2 + rank % 2)) / 2
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=0)
    for told, same in pool(4).run(loaded, plan_of(("dp", "tp")), tmp_path / "c"):
        assert "ExchangeMismatch" in told and "parts of 'down." in told and same


# ---- rules by inner products of the whole model


@dataclass(frozen=True)
class Longest(Combine):
    """The longest message; of two ranks one has more in what groups hold alike, the other more in each part."""

    needs = "gram"

    def weights(self, info: Info) -> Tensor:
        assert info.gram is not None
        squares = info.gram.diagonal().nan_to_num(-1.0)
        return (squares == squares.max()).double()


PARTS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {  # name -> what ranks 0 and 1 have, in groups 0 and 1
    "alike": ((3.0, 3.0), (0.0, 0.0)), "apart": ((0.0, 0.0), (1.0, 3.5)),
}  # fmt: skip


def in_two_groups(topology: Any, worse: int = -1) -> tuple[dict[str, float], int]:
    """What one of four ranks gets: two groups of two, of which `alike` is held by both and `apart` half by each."""
    import torch.distributed as dist

    rank = dist.get_rank()
    group, own = rank % 2, rank // 2
    exchange = Exchange(Identity(), combine=Longest(), topology=topology, select=everything)
    specs = [Spec("alike", (4,), copies=2), Spec("apart", (4,), part=f"[{4 * group}:{4 * group + 4}]")]
    exchange.open(specs, [(0, 2), (1, 3)])
    flats = [torch.full((4,), PARTS[spec.name][own][group]) for spec in specs]
    if rank == worse:
        flats[1][0] = math.nan
    over: queue.Queue[Any] = queue.Queue()
    for spec, flat in zip(specs, flats, strict=True):  # each a bucket of its own
        exchange.submit([(spec, flat)], 0, spec is specs[-1], over.put)
    assert [over.get(timeout=30) for _ in specs] == [None, None]
    exchange.close()
    return {spec.name: float(flat[-1]) for spec, flat in zip(specs, flats, strict=True)}, exchange.skipped


def test_a_rule_weighs_ranks_by_all_parts_and_by_what_groups_share_once(pool):
    """Squared norms / 4: rank 0 has 9 (18 if counted in both groups), rank 1 has 1 + 12.25, in group 0 alone 1."""
    for topology in (ScatterGather(), Star()):
        for group, (found, skipped) in enumerate(pool(4).run(in_two_groups, topology)):
            assert found == {"alike": 0.0, "apart": (1.0, 3.5)[group % 2]} and skipped == 0
    for found, skipped in pool(4).run(in_two_groups, "auto", 2):  # rank 1's part in group 0 is not finite: out in both
        assert found == {"alike": 3.0, "apart": 0.0} and skipped == 0


RULES: dict[str, Any] = {"geometric median": GeometricMedian(), "krum": Krum(0), "flag": Flag()}


@slow
@pytest.mark.parametrize("strategy", [("dp", "tp"), HYBRID, ("dp", "zero-3")])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_over_parts_is_the_rule_over_whole_models(pool, name, strategy):
    """Three workers of two processes each, against three that have it all."""
    robust = partial(Exchange, Identity(), combine=RULES[name], select=everything)
    expected, _ = pool(3).run(trained, plan_of("dp", (3,)), robust)[0]
    results = pool(6).run(trained, plan_of(strategy, (3, 2)), robust)
    for found, _ in results:
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
        assert equal(found, results[0][0])


# ---- controllers


CHOICES = (0.1, 0.5)


def budgeted() -> Exchange:
    return Exchange(TopK(0.1, "exact"), ErrorFeedback(), controller=controller_of())


def controller_of() -> LayerwiseBudget:
    return LayerwiseBudget(CHOICES, 0.1, alpha=0.9, every=2, smallest=1)


def settled(plan: HandPlan, make: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Settings after three steps, the values, and what the controller's decision was made from."""
    from tests.runtime.plans import batch, tiny
    from tests.runtime.test_equal import engine_of

    from weft.runtime.engine import Job

    engine = engine_of(plan, tiny(), PLAIN, exchange=make())
    core, seen = engine.coded.exchange.core, {}  # type: ignore[union-attr]
    decide = core.controller.decide

    def watched(step: int, specs: Mapping[str, Spec], *total: Any) -> Any:
        if step:
            numbers = lambda rows: seen.update({"parts": rows, "whole": total[0](rows)}) or seen["whole"]
            return decide(step, specs, numbers) if total else decide(step, specs)
        return decide(step, specs, *total)

    core.controller.decide = watched
    for number in range(3):
        engine.step([Job(batch(seed=number))])
    values = {name: engine.whole(name).clone() for name in engine.names}
    engine.coded.exchange.close()  # type: ignore[union-attr]
    return dict(core.settings), values, seen


@pytest.mark.parametrize("strategy", [("dp", "tp"), pytest.param(HYBRID, marks=slow)])
def test_groups_choose_settings_as_one(pool, strategy):
    """Rank 0 of each group decides from the same sums: what both hold counted once, parts added; and it is the best choice."""
    found = pool(4).run(settled, plan_of(strategy), budgeted)
    first, values, seen = found[0]
    assert set(first) == {"embed.weight", "up.weight", "down.weight"}
    assert all(settings == first and equal(other, values) for settings, other, _ in found)
    parts = [found[rank][2]["parts"] for rank in (0, 1)]  # the first of each group
    for name, row in seen["whole"].items():
        copies = 2 if parts[0][name] == parts[1][name] else 1
        assert row == [a / copies + b / copies for a, b in zip(parts[0][name], parts[1][name], strict=True)]
        assert (copies == 2) == (name == "embed.weight" and strategy[1] == "tp")
    err, size = ([row[k : k + 2] for row in seen["whole"].values()] for k in (0, 2))
    best = plan_layers(err, size, 0.9 * sum(row[0] for row in err))
    assert [first[name] for name in seen["whole"]] == [CHOICES[j] for j in best] and len(set(best)) == 2


@slow
def test_accordion_compares_norms_of_whole_tensors(pool):
    make = partial(Exchange, TopK(0.1), ErrorFeedback(), controller=Accordion(0.5, 0.1, every=2))
    found = pool(4).run(settled, plan_of(("dp", "tp")), make)
    assert all(settings == found[0][0] and equal(values, found[0][1]) for settings, values, _ in found)
