"""Boxing over real gloo processes: values, and the bytes that the kernel says were sent, against the cost table."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.placement.whole import random_pieces, whole_of
from tests.placement.wire import needs_tcp_counters, tcp_bytes_sent

from weft.placement.boxing import compile_boxing
from weft.placement.boxing_steps import steps
from weft.placement.comms import Comms
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard

R, P, MAX = Replicate(), Partial(), Partial("max")
REPEATS = 3


Pairs = list[tuple[Placements, Placements]]


def box_pairs(mesh: Mesh, shape: tuple[int, ...], pairs: Pairs) -> list[tuple[torch.Tensor, int, float]]:
    """Per pair: this device's piece afterwards, and the bytes sent per boxing as the Group and as the kernel count them."""
    comms = Comms.torch(mesh)
    result = []
    for src, dst in pairs:
        x = random_pieces(src, mesh, shape)[mesh.ranks.index(comms.rank)]
        boxing = compile_boxing(src, dst, shape, comms)
        y = boxing(x)
        comms.world.barrier()
        counted, sent = comms.sent.total(), tcp_bytes_sent()
        for _ in range(REPEATS):
            boxing.run(x)
        comms.world.barrier()
        result.append((y, (comms.sent.total() - counted) // REPEATS, (tcp_bytes_sent() - sent) / REPEATS))
    return result


def check(pool, mesh: Mesh, shape: tuple[int, ...], pairs: Pairs) -> None:
    ranks = pool(mesh.size).run(box_pairs, mesh, shape, pairs, timeout=180)
    for number, (src, dst) in enumerate(pairs):
        pieces = [ranks[rank][number][0] for rank in mesh.ranks]
        counted, sent = (sum(ranks[rank][number][what] for rank in mesh.ranks) for what in (1, 2))
        expected = 8 * sum(step.elements for step in steps(src, dst, mesh, shape))
        before = whole_of(random_pieces(src, mesh, shape), src, mesh, shape)
        torch.testing.assert_close(whole_of(pieces, dst, mesh, shape), before, rtol=1e-13, atol=1e-13)
        assert counted == expected, (src, dst)
        # gloo's headers and handshakes, and the barrier: a few hundred bytes per message
        assert expected <= sent <= 1.02 * expected + 10_000, (src, dst, sent, expected)


LINE = (Shard(0), Shard(1), Shard(0, weights=(3, 1, 2, 2)), R, P, MAX)


@needs_tcp_counters
@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
def test_bytes_on_the_wire_are_the_tables(pool, size):
    def fit(placement):
        return Shard(0, weights=placement.weights[:size]) if getattr(placement, "weights", None) else placement

    pairs = [((fit(a),), (fit(b),)) for a, b in itertools.product(LINE, LINE)]
    check(pool, Mesh((size,)), (97, 37, 61), pairs)  # 1.7 MiB; nothing divides evenly


@needs_tcp_counters
def test_bytes_on_the_wire_on_a_grid(pool):
    grid = (Shard(0), Shard(1), Shard(2, unit=3, blocks=4), R, P)
    sources = list(itertools.product(grid, grid))
    pairs = [(src, sources[(7 * number + 3) % len(sources)]) for number, src in enumerate(sources)]
    check(pool, Mesh((2, 2), weights=(None, (3, 1))), (73, 37, 60), pairs)


def train_step(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A two-layer perceptron, columns then rows of its weights split: the loss's gradient for x and one weight's piece."""
    comms = Comms.torch(Mesh((torch.distributed.get_world_size(),)))
    generator = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in (shape, (12, shape[1]), (shape[1], 12))
    )
    x.requires_grad_()
    rank, p = comms.rank, comms.mesh.size
    mine = up.tensor_split(p, 0)[rank].clone().requires_grad_()
    to_all = compile_boxing((R,), (R,), shape, comms)(x)
    owed = torch.tanh(to_all @ mine.T) @ down.tensor_split(p, 1)[rank].T
    y = compile_boxing((P,), (R,), shape, comms)(owed)
    (y.square().sum() / p).backward()  # seeds of a replicated loss sum to 1
    whole_x = compile_boxing((P,), (R,), shape, comms).run(x.grad)  # the gradient of R is P
    return whole_x, compile_boxing((Shard(0),), (R,), (12, shape[1]), comms).run(mine.grad)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_through_boxings_are_those_of_one_device(pool, size):
    generator = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((5, 7), (12, 7), (7, 12))
    )
    (torch.tanh(x @ up.T) @ down.T).square().sum().backward()
    for gradient_x, gradient_up in pool(size).run(train_step, (5, 7)):
        torch.testing.assert_close(gradient_x, x.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient_up, up.grad, rtol=1e-12, atol=1e-12)
