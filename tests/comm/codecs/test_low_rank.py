"""PowerSGD: exact on matrices of that rank, the best approximation in the limit, dense where nothing is saved."""

from __future__ import annotations

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.codecs import LowRank
from weft.comm.codecs.low_rank import matrix_shape


def drive(codec, xs, states, spec, rank, step):
    """The rounds of several ranks in one process, exact means between them."""
    talks = [codec.rounds(x, spec, state, rank, step) for x, state in zip(xs, states, strict=True)]
    sent = [next(talk) for talk in talks]
    while True:
        mean, sent, ended = torch.stack(sent).mean(0), [], []
        for talk in talks:
            try:
                sent.append(talk.send(mean))
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            return ended


def low(rows, columns, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_a_matrix_of_that_rank_arrives_whole(scale):
    spec, m, state = Spec("w", (30, 20)), scale * low(30, 20, 4), {"seed": 1, "shared_seed": 1}
    for step in range(4):  # warm starts must not carry the scale along: it would be squared
        found = drive(LowRank(), [m.view(-1)], [state], spec, 4, step)[0]
        assert torch.allclose(found / scale, m.view(-1) / scale, atol=1e-4)


def test_warm_start_tends_to_the_best_approximation():
    g = torch.Generator().manual_seed(2)
    m = low(40, 30, 3, seed=3) + 0.3 * torch.randn(40, 30, generator=g)
    spec, warm, cold = Spec("w", (40, 30)), {"seed": 0, "shared_seed": 0}, {"seed": 0, "shared_seed": 0}
    best = LowRank().error(m.view(-1), spec, [3])[0]
    errors = [
        float((drive(LowRank(), [m.view(-1)], [warm], spec, 3, s)[0] - m.view(-1)).square().sum()) for s in range(30)
    ]
    assert errors[0] > errors[-1] and best <= errors[-1] <= best * 1.001
    again = [
        float((drive(LowRank(warm=False), [m.view(-1)], [cold], spec, 3, s)[0] - m.view(-1)).square().sum())
        for s in range(30)
    ]
    assert min(again) > errors[-1] and "q" not in cold


def test_ranks_share_the_subspace_of_the_mean():
    """With three ranks the result is P P^T mean(M), the same bits on all, for P from the mean."""
    spec = Spec("w", (24, 18))
    xs = [low(24, 18, 6, seed).view(-1) for seed in range(3)]
    states = [{"seed": rank, "shared_seed": 5} for rank in range(3)]
    mean = torch.stack(xs).mean(0).view(24, 18)
    for step in range(40):
        results = drive(LowRank(), xs, states, spec, 4, step)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert torch.equal(states[0]["q"], states[2]["q"])
    u, s, v = torch.linalg.svd(mean)
    best = (u[:, :4] * s[:4]) @ v[:4]
    assert torch.allclose(results[0].view(24, 18), best, atol=2e-2 * float(s[0]))


def test_the_rank_may_change_and_the_start_is_kept():
    spec, m, state = Spec("w", (30, 20)), low(30, 20, 6), {"seed": 1, "shared_seed": 1}
    for step, rank in enumerate((2, 6, 6, 3, 6)):
        found = drive(LowRank(), [m.view(-1)], [state], spec, rank, step)[0]
        assert len(state["q"]) == rank
    assert torch.allclose(found, m.view(-1), atol=1e-3)


def test_state_is_replaced_not_overwritten():
    """An undone step puts the old tensors back; they must not have changed meanwhile."""
    spec, state = Spec("w", (30, 20)), {"seed": 1, "shared_seed": 1}
    drive(LowRank(), [low(30, 20, 6).view(-1)], [state], spec, 4, 0)
    held, copy = state["q"], state["q"].clone()
    drive(LowRank(), [low(30, 20, 6, 1).view(-1)], [state], spec, 4, 1)
    assert state["q"] is not held and torch.equal(held, copy)


@pytest.mark.parametrize(
    ("shape", "rank", "dense"),
    [
        ((10,), 1, True),
        ((), 1, True),
        ((8, 8), 4, True),
        ((8, 8), 3, False),
        ((64, 3, 3, 3), 4, False),
        ((2, 100), 2, True),
    ],
)
def test_goes_dense_where_the_factors_are_no_smaller(shape, rank, dense):
    spec = Spec("w", shape)
    codec = LowRank()
    assert codec.bypass(spec, rank) == dense
    rows, columns = matrix_shape(spec)
    assert codec.nbytes(spec, rank) == 4 * (spec.numel if dense else rank * (rows + columns))
    x = torch.randn(spec.numel, generator=torch.Generator().manual_seed(0))
    if dense:
        assert torch.equal(drive(codec, [x], [{"seed": 0, "shared_seed": 0}], spec, rank, 0)[0], x)
