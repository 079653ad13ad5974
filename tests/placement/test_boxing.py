"""Every boxing pair: the same value before and after, the exact adjoint as backward, the table's bytes. Members are threads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.placement.whole import random_pieces, whole_of
from torch import Tensor

from weft.placement.boxing import box, compile_boxing
from weft.placement.boxing_steps import lacking, steps
from weft.placement.comms import Comms, run_threads, thread_comms
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard, dual, local_shape

R, P, AVG, MAX, MIN = Replicate(), Partial(), Partial("avg"), Partial("max"), Partial("min")
ITEM = 8


def moved(
    src: Placements, dst: Placements, mesh: Mesh, shape: Sequence[int], pieces: Sequence[Tensor], back: Sequence[Tensor]
):
    """Per device: the piece after the boxing, the gradient for cotangents `back`, the bytes sent forward and backward."""

    def program(comms: Comms) -> tuple[Tensor, Tensor, int, int]:
        me = mesh.ranks.index(comms.rank)
        x = pieces[me].clone().requires_grad_()
        y = box(x, src, dst, comms, shape)
        there = comms.sent.total()
        (y * back[me]).sum().backward()
        return y.detach(), x.grad, there, comms.sent.total() - there

    return list(zip(*run_threads(mesh, program, timeout=30), strict=True))


def check(src: Placements, dst: Placements, mesh: Mesh, shape: tuple[int, ...]) -> None:
    pieces = random_pieces(src, mesh, shape)
    back = [torch.randn(local_shape(shape, dst, mesh, position), dtype=torch.float64) for position in mesh.positions()]
    after, gradients, there, here = moved(src, dst, mesh, shape, pieces, back)
    path = steps(src, dst, mesh, shape)
    torch.testing.assert_close(
        whole_of(after, dst, mesh, shape), whole_of(pieces, src, mesh, shape), rtol=1e-13, atol=1e-13
    )
    assert sum(there) == ITEM * sum(step.elements for step in path), path
    if not any(p in (MAX, MIN) for p in (*src, *dst)):  # linear: <box(x), y> = <x, box^T(y)>
        forward = sum((y * g).sum() for y, g in zip(after, back, strict=True))
        backward = sum((x * g).sum() for x, g in zip(pieces, gradients, strict=True))
        torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-10)
        assert sum(here) == sum(there), path


LINE = (Shard(0), Shard(1), Shard(0, weights=(3, 0, 1)), Shard(1, unit=2, blocks=3), R, P, AVG, MAX, MIN)


@pytest.mark.parametrize("src", LINE, ids=str)
@pytest.mark.parametrize("dst", LINE, ids=str)
def test_every_pair_on_a_line(src, dst):
    for mesh in (Mesh((3,)), Mesh((3,), weights=((1, 5, 2),))):
        check((src,), (dst,), mesh, (7, 12, 2))
    if Shard(0, weights=(3, 0, 1)) not in (src, dst):
        check((src,), (dst,), Mesh((2,)), (1, 6))  # an empty piece
        check((src,), (dst,), Mesh((1,)), (3, 6))


GRID = (Shard(0), Shard(1), Shard(1, unit=2, blocks=3), R, P)


@pytest.mark.parametrize("src", list(itertools.product(GRID, GRID)), ids=lambda pair: " ".join(map(str, pair)))
def test_every_pair_on_a_grid(src):
    """Nested cuts included; those that disagree in unit and blocks are errors."""
    for mesh in (Mesh((2, 2)), Mesh((2, 3), weights=((3, 1), None), ranks=(5, 3, 1, 0, 2, 4))):
        for dst in itertools.product(GRID, GRID):
            cuts = [{(p.unit, p.blocks) for p in side if isinstance(p, Shard) and p.dim == 1} for side in (src, dst)]
            if max(map(len, cuts)) > 1:
                with pytest.raises(ValueError, match="needs one unit and blocks"):
                    steps(src, dst, mesh, (7, 12))
            else:
                check(src, dst, mesh, (7, 12))


@st.composite
def cases(draw):
    mesh = Mesh(tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))))
    shape = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 5, 6, 12)), max_size=3)))
    forms = {}
    for dim, size in enumerate(shape):
        forms[dim] = draw(st.sampled_from([(u, b) for u in (1, 2, 3) for b in (1, 2, 3) if size % (u * b) == 0]))

    def placement(p):
        weights = st.none() | st.tuples(*[st.integers(0, 4)] * p).filter(any)
        cut = (
            st.builds(lambda dim, w: Shard(dim, w, *forms[dim]), st.sampled_from([*forms]), weights)
            if forms
            else st.just(R)
        )
        return st.one_of(cut, st.just(R), st.builds(Partial, st.sampled_from(("sum", "sum", "avg", "max", "min"))))

    src, dst = (tuple(draw(placement(p)) for p in mesh.shape) for _ in range(2))
    return src, dst, mesh, shape


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_pair_on_any_mesh(case):
    check(*case)


def table(src, dst, p: int) -> float | None:
    """The card's volume on one line of p devices, in units of |T|, for even cuts."""
    match src, dst:
        case (Shard(), Shard()):
            return 0 if src == dst else (p - 1) / p
        case (Shard(), Replicate()) | (Partial(), Shard()):
            return p - 1
        case (Partial(), Replicate()):
            return 2 * (p - 1)
    return 0


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_volumes_are_the_cards(p):
    for src, dst in itertools.product((Shard(0), Shard(1), R, P), repeat=2):
        path = steps((src,), (dst,), Mesh((p,)), (24, 48))
        assert sum(step.elements for step in path) == table(src, dst, p) * 24 * 48
        assert len(path) <= 1
        there, back = (steps(*pair, Mesh((p,)), (24, 48)) for pair in (((src,), (dst,)), ((dual(dst),), (dual(src),))))
        assert sum(s.elements for s in there) == sum(s.elements for s in back)


def test_the_sum_over_a_grid_is_one_all_reduce_of_all_its_devices():
    mesh, shape = Mesh((4, 8)), (64, 32)
    path = steps((P, P), (R, R), mesh, shape)
    assert [(step.kind, step.axis) for step in path] == [("reduce_scatter", 1), ("all_reduce", 0), ("all_gather", 1)]
    assert sum(step.elements for step in path) == 2 * (mesh.size - 1) * 64 * 32


def test_swapping_axes_moves_only_what_is_lacking():
    mesh, shape = Mesh((2, 2)), (8, 3)
    (step,) = steps((Shard(0), R), (R, Shard(0)), mesh, shape)
    assert step.kind == "recut" and step.elements == 2 * 4 * 3  # half of the devices already hold their piece
    assert lacking((Shard(0), R), (R, Shard(0)), mesh, shape).tolist() == [[0, 12], [12, 0]]


@pytest.mark.parametrize(("src", "dst"), [
    ((Shard(0),), (Shard(0),)), ((Shard(0, unit=4),), (Shard(0),)), ((Shard(0, weights=(2, 2)),), (Shard(0),)),
    ((R,), (MAX,)), ((R,), (AVG,)),
])  # fmt: skip
def test_what_has_nothing_to_do_returns_its_argument(src, dst):
    comms = thread_comms(2)[0]
    x = torch.randn(local_shape((8, 3), src, comms.mesh, (0,)), requires_grad=True)
    assert box(x, src, dst, comms, (8, 3)) is x
    assert compile_boxing(src, dst, (8, 3), comms).identity


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("dst", [R, Shard(0)], ids=str)
def test_gradient_of_an_extreme_goes_to_its_holders_in_equal_parts(reduce, dst):
    mesh, shape = Mesh((3,)), (4,)
    pieces = [
        torch.tensor([3.0, 1.0, 5.0, -1.0]),
        torch.tensor([3.0, 2.0, 5.0, 0.0]),
        torch.tensor([3.0, 1.0, 0.0, 0.0]),
    ]
    pieces = [(x if reduce == "max" else -x).double() for x in pieces]
    back = [torch.full(local_shape(shape, (dst,), mesh, (i,)), 6.0, dtype=torch.float64) for i in range(3)]
    _, gradients, _, _ = moved((Partial(reduce),), (dst,), mesh, shape, pieces, back)
    seeds = 18 if dst == R else 6  # every device's copy has a cotangent
    expected = [[1 / 3, 0, 1 / 2, 0], [1 / 3, 1, 1 / 2, 1 / 2], [1 / 3, 0, 0, 1 / 2]]
    for gradient, share in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, seeds * torch.tensor(share, dtype=torch.float64))


def test_dual_is_the_adjoint():
    mesh, shape = Mesh((2, 2)), (6, 4)
    for src, dst in (((Shard(0), P), (R, Shard(1))), ((P, AVG), (Shard(1), R)), ((Shard(0), Shard(0)), (R, Shard(0)))):
        pieces = random_pieces(src, mesh, shape)
        back = [
            torch.randn(local_shape(shape, dst, mesh, position), dtype=torch.float64) for position in mesh.positions()
        ]
        _, gradients, _, _ = moved(src, dst, mesh, shape, pieces, back)

        def program(comms: Comms) -> Tensor:
            boxing = compile_boxing(src, dst, shape, comms)  # noqa: B023 - run before the loop goes on
            assert boxing.dual().dual().ops == boxing.ops
            return boxing.dual().run(back[comms.rank])  # noqa: B023

        for gradient, dual_of in zip(gradients, run_threads(mesh, program), strict=True):
            torch.testing.assert_close(dual_of, gradient)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    mesh, shape = Mesh((2,)), (5, 4)
    whole = torch.arange(20).reshape(shape).remainder(3).to(dtype)
    for src, dst in itertools.product((Shard(0), Shard(1), R, P, MAX), repeat=2):

        def program(comms: Comms) -> Tensor:
            x = box(whole, (R,), (src,), comms, shape)  # noqa: B023
            return box(box(x, (src,), (dst,), comms, shape), (dst,), (R,), comms, shape)  # noqa: B023

        for result in run_threads(mesh, program):
            assert torch.equal(result, whole), (src, dst)


def test_bad_input_is_named():
    comms = thread_comms(Mesh((2, 2)))[0]
    with pytest.raises(ValueError, match=r"holds a piece of shape \(3, 3\).*S\(0\) R.*has shape \(4, 3\)"):
        box(torch.zeros(3, 3), (Shard(0), R), (R, R), comms, (8, 3))
    with pytest.raises(ValueError, match="one placement per axis"):
        compile_boxing((R,), (R,), (8, 3), comms)
    with pytest.raises(ValueError, match="shard a dim"):
        compile_boxing((R, R), (R, Shard(2)), (8, 3), comms)
    with pytest.raises(ValueError, match="blocks of units"):
        compile_boxing((R, R), (R, Shard(0, unit=3)), (8, 3), comms)


def test_even_nested_cuts_are_gathered_from_the_outer_axis_in():
    """So that slow outer links carry small pieces; the adjoint reduces from the inner axis out."""
    mesh, shape = Mesh((2, 4)), (16, 2048)  # large: a small tensor takes one step, for latency's sake
    n = 16 * 2048
    there = steps((Shard(0), Shard(0)), (R, R), mesh, shape)
    back = steps((P, P), (Shard(0), Shard(0)), mesh, shape)
    assert [(step.kind, step.axis, step.elements) for step in there] == [("all_gather", 0, n), ("all_gather", 1, 6 * n)]
    assert [(step.kind, step.axis, step.elements) for step in back] == [
        ("reduce_scatter", 1, 6 * n),
        ("reduce_scatter", 0, n),
    ]
    for other in ((R, R), (P, P), (R, Shard(0)), (Shard(0), P)):
        check((Shard(0), Shard(0)), other, mesh, shape)
        check(other, (Shard(0), Shard(0)), mesh, shape)
    nested = (Shard(0, unit=2, blocks=3),) * 3
    for other in ((R, R, R), (P, P, P), (R, *nested[1:]), (P, R, Shard(0))):
        if other != (P, R, Shard(0)):
            check(other, nested, Mesh((2, 2, 2)), (48, 512))
        check(nested, other, Mesh((2, 2, 2)), (48, 512))
