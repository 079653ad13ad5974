"""`TorchGroup` over real gloo processes: values, exact byte counts, errors of lost peers."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch

from weft.errors import PeerLost
from weft.placement.comms import Comms, Group
from weft.placement.layout import Mesh, deal


def contributions(size: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 5).to(dtype) for _ in range(size)]


def native(group: Group) -> Group:
    """The same process group, used as NCCL's is: its own collectives, and sends and receives in batches."""
    from weft.placement.torch_group import TorchGroup

    result = TorchGroup(group.pg, native=True)  # type: ignore[attr-defined]
    result.direct = False
    return result


def collectives(own: bool) -> bool:
    comms = Comms.torch(Mesh((torch.distributed.get_world_size(),)))
    group = native(comms.group(0)) if own else comms.group(0)
    p, me = group.size, group.index
    xs = contributions(p, 7, 6, 5)
    total = sum(xs[1:], xs[0])
    group.barrier()
    torch.testing.assert_close(group.all_reduce(xs[me]), total)
    torch.testing.assert_close(group.all_reduce(xs[me].transpose(0, 2), "max"), torch.stack(xs).amax(0).transpose(0, 2))
    torch.testing.assert_close(group.all_reduce(xs[me], "avg"), total / p)
    for dim, n in enumerate((7, 6, 5)):
        for sizes in (deal(n, p), (n - p + 1,) + (1,) * (p - 1), (0,) * (p - 1) + (n,)):
            pieces = [x.split(sizes, dim)[j] for j, x in enumerate(xs)]
            torch.testing.assert_close(group.all_gather(pieces[me], dim, sizes), torch.cat(pieces, dim))
            torch.testing.assert_close(group.reduce_scatter(xs[me], dim, sizes), total.split(sizes, dim)[me])
    equal = [x[:6] for x in xs]
    torch.testing.assert_close(group.all_gather(equal[me]), torch.cat(equal))
    got = group.all_to_all([xs[me][j : 2 * j + 1] for j in range(p)], [(me + 1, 6, 5)] * p)
    for j in range(p):
        torch.testing.assert_close(got[j], xs[j][me : 2 * me + 1])
    torch.testing.assert_close(group.broadcast(xs[me], p - 1), xs[p - 1])
    if me == 0:
        group.send(xs[0][:, 1], to=1)
    if me == 1:
        torch.testing.assert_close(group.recv(torch.empty(7, 5, dtype=torch.float64), source=0), xs[0][:, 1])
    in_place(group)
    return True


def in_place(group: Group) -> None:
    """The asynchronous forms, several of them under way at once."""
    p, me = group.size, group.index
    flats = contributions(p, 101)
    total = sum(flats[1:], flats[0])
    reduced, averaged = flats[me].clone(), flats[me].clone()
    sizes = deal(101, p)
    piece, whole = torch.empty(sizes[me], dtype=torch.float64), torch.empty(101, dtype=torch.float64)
    buckets = [x.clone() for x in flats[me].split(sizes)]
    handles = [
        group.all_reduce_async(reduced),
        group.reduce_scatter_async(piece, flats[me], sizes),
        group.all_gather_async(whole, flats[me].split(sizes)[me]),
        group.all_reduce_async(averaged, "avg"),
        group.reduce_scatter_async(buckets[me], buckets),
    ]
    for handle in handles[::-1]:
        handle.wait()
    torch.testing.assert_close(reduced, total)
    torch.testing.assert_close(averaged, total / p)
    torch.testing.assert_close(piece, total.split(sizes)[me])
    torch.testing.assert_close(buckets[me], piece)
    torch.testing.assert_close(whole, torch.cat([flat.split(sizes)[j] for j, flat in enumerate(flats)]))


@pytest.mark.parametrize("own", [False, True], ids=["pairwise", "native"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives(pool, size, own):
    assert all(pool(size).run(collectives, own))


DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip


def every_dtype() -> bool:
    group = Comms.torch(Mesh((torch.distributed.get_world_size(),))).group(0)
    p, me = group.size, group.index
    for dtype in DTYPES:
        xs = [torch.arange(6).add(j).remainder(3).to(dtype) for j in range(p)]
        total = sum(xs[1:], xs[0])
        assert torch.equal(group.all_reduce(xs[me]), total), dtype
        flat = xs[me].clone()
        group.all_reduce_async(flat).wait()
        assert torch.equal(flat, total), dtype
        assert torch.equal(group.all_gather(xs[me]), torch.cat(xs)), dtype
        assert torch.equal(group.reduce_scatter(xs[me]), total.split(deal(6, p))[me]), dtype
        if not dtype.is_complex:
            largest = torch.stack([x.to(torch.float64) for x in xs]).amax(0).to(dtype)
            assert torch.equal(group.all_reduce(xs[me], "max"), largest), dtype
    return True


def test_every_dtype(pool):
    assert all(pool(3).run(every_dtype))


def test_mean_of_integers_is_refused(pool):
    with pytest.raises(ValueError, match="avg"):
        pool(2).run(mean_of_integers)


def mean_of_integers() -> None:
    Comms.torch(Mesh((2,))).group(0).all_reduce(torch.ones(2, dtype=torch.int64), "avg")


def mesh_of_four() -> tuple[tuple[int, ...], ...]:
    comms = Comms.torch(Mesh((2, 2), ranks=(3, 1, 0, 2)))
    assert comms is Comms.torch(Mesh((2, 2), ranks=(3, 1, 0, 2)))
    gathered = [comms.group(axis).all_gather(torch.tensor([comms.rank])) for axis in (0, 1)]
    return (*(tuple(g.tolist()) for g in gathered), comms.world.ranks)


def test_a_mesh_has_a_group_per_line_in_its_own_order(pool):
    assert pool(4).run(mesh_of_four) == [
        ((3, 0), (0, 2), (3, 1, 0, 2)),
        ((1, 2), (3, 1), (3, 1, 0, 2)),
        ((1, 2), (0, 2), (3, 1, 0, 2)),
        ((3, 0), (3, 1), (3, 1, 0, 2)),
    ]


def test_a_mesh_too_large_is_refused(pool):
    with pytest.raises(ValueError, match="there are only 2 processes"):
        pool(2).run(too_large)


def too_large() -> None:
    Comms.torch(Mesh((3,)))


def die_in_the_middle(how: str) -> None:
    group = Comms.torch(Mesh((3,)), timeout=timedelta(seconds=2)).group(0)
    x = torch.ones(1000)
    group.all_reduce(x)
    if group.index == 1:
        if how == "exit":
            os._exit(1)
        time.sleep(4)
        return
    if how == "bucket":
        group.all_reduce_async(x).wait()
    else:
        group.all_reduce(x)


@pytest.mark.parametrize("how", ["exit", "stall", "bucket"])
def test_a_lost_peer_is_an_error_and_no_hang(pool, how):
    outcomes = pool(3).collect(die_in_the_middle, how, timeout=40)
    assert isinstance(outcomes[0].error, PeerLost) and isinstance(outcomes[2].error, PeerLost)
    assert outcomes[0].error.rank in ((1, 2) if how == "exit" else (-1, 1, 2))
    assert outcomes[1].finished == (how != "exit")
