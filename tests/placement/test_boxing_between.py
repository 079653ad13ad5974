"""Boxing between device sets, disjoint and overlapping: value, adjoint, and the card's volumes. Members are threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.placement.whole import random_pieces, whole_of

from weft.placement.boxing_between import Transfer, box_between, transfer_elements
from weft.placement.comms import Comms, run_threads
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard, local_shape

R, P, AVG, MAX = Replicate(), Partial(), Partial("avg"), Partial("max")


def check(src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, shape: tuple[int, ...], ranks: int) -> None:
    pieces = dict(zip(mesh_a.ranks, random_pieces(src, mesh_a, shape), strict=True))
    back = {
        r: torch.randn(local_shape(shape, dst, mesh_b, mesh_b.coordinates(r)), dtype=torch.float64)
        for r in mesh_b.ranks
    }

    def program(comms: Comms):
        x = pieces[comms.rank].clone().requires_grad_() if comms.rank in pieces else None
        y = box_between(x, src, mesh_a, dst, mesh_b, shape, comms.world, dtype=torch.float64)
        there = comms.sent.total()
        (y * back[comms.rank]).sum().backward() if comms.rank in back else y.backward()
        return y.detach(), None if x is None else x.grad, there, comms.sent.total() - there

    after, gradients, there, here = zip(*run_threads(ranks, program, timeout=20), strict=True)
    after = [after[r] for r in mesh_b.ranks]
    expected = whole_of(list(pieces.values()), src, mesh_a, shape)
    torch.testing.assert_close(whole_of(after, dst, mesh_b, shape), expected, rtol=1e-13, atol=1e-13)
    assert sum(there) == sum(here) == 8 * transfer_elements(src, mesh_a, dst, mesh_b, shape)
    if MAX not in dst:
        forward = sum((y * back[r]).sum() for r, y in zip(mesh_b.ranks, after, strict=True))
        torch.testing.assert_close(forward, sum((x * gradients[r]).sum() for r, x in pieces.items()))


MESHES = [
    (Mesh((2,)), Mesh((3,), ranks=(2, 3, 4))),
    (Mesh((3,), weights=((1, 2, 3),)), Mesh((2,), ranks=(4, 3))),
    (Mesh((3,)), Mesh((3,), ranks=(1, 2, 4))),
    (Mesh((2,), ranks=(4, 1)), Mesh((3,), ranks=(1, 0, 4))),
    (Mesh((2,)), Mesh((1,), ranks=(3,))),
]
LINE = (Shard(0), Shard(1, unit=2, blocks=3), R, P, AVG)


@pytest.mark.parametrize(("mesh_a", "mesh_b"), MESHES, ids=str)
def test_every_pair_between_lines(mesh_a, mesh_b):
    for src, dst in itertools.product(LINE, (*LINE, MAX)):
        check((src,), mesh_a, (dst,), mesh_b, (7, 12), ranks=5)
    check((P,), mesh_a, (R,), mesh_b, (), ranks=5)


def test_every_pair_between_grids():
    mesh_a, mesh_b = Mesh((2, 2)), Mesh((2, 2), ranks=(3, 4, 0, 5), weights=((3, 1), None))
    kinds = (Shard(0), Shard(1), R, P)
    pairs = list(itertools.product(itertools.product(kinds, kinds), repeat=2))
    for src, dst in pairs[::3]:
        check(src, mesh_a, dst, mesh_b, (7, 12), ranks=6)


CARD = {  # volumes on disjoint sets in units of |T|, p1 producers, p2 consumers
    (Shard(0), Shard(0)): lambda p1, p2: 1,
    (Shard(0), Shard(1)): lambda p1, p2: 1,
    (Shard(0), R): lambda p1, p2: p2,
    (Shard(0), P): lambda p1, p2: 1,
    (R, Shard(0)): lambda p1, p2: 1,
    (R, R): lambda p1, p2: p2,
    (R, P): lambda p1, p2: 1,
    (P, Shard(0)): lambda p1, p2: p1,
    (P, R): lambda p1, p2: p1 + p2 - 1,
    (P, P): lambda p1, p2: p1,
}


@pytest.mark.parametrize(("src", "dst"), CARD, ids=str)
def test_volumes_on_disjoint_sets_are_the_cards(src, dst):
    for p1, p2 in ((2, 2), (2, 3), (4, 3), (3, 8)):
        a, b = Mesh((p1,)), Mesh((p2,), ranks=tuple(range(p1, p1 + p2)))
        assert transfer_elements((src,), a, (dst,), b, (11, 13)) == CARD[src, dst](p1, p2) * 11 * 13


def test_what_is_there_already_is_not_sent():
    a, b = Mesh((2,)), Mesh((2,), ranks=(1, 2))
    assert transfer_elements((R,), a, (R,), b, (6,)) == 6
    assert transfer_elements((Shard(0),), a, (Shard(0),), a, (6,)) == 0
    assert transfer_elements((Shard(0),), a, (Shard(0),), b, (6,)) == 6


def test_bad_input_is_named():
    a, b = Mesh((2,)), Mesh((2,), ranks=(2, 3))

    def program(comms: Comms) -> None:
        if comms.rank == 0:
            with pytest.raises(ValueError, match="cannot leave its mesh"):
                Transfer((MAX,), a, (R,), b, (4,), comms.world)
            with pytest.raises(ValueError, match=r"lacks ranks \[7\]"):
                Transfer((R,), a, (R,), Mesh((2,), ranks=(2, 7)), (4,), comms.world)
        if comms.rank == 2:
            with pytest.raises(ValueError, match="pass dtype"):
                Transfer((R,), a, (R,), b, (4,), comms.world)(None)

    run_threads(4, program)
