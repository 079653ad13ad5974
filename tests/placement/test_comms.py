"""Groups of threads: collectives over uneven pieces, one order of adding, errors instead of hangs."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import PeerLost
from weft.placement.comms import Comms, run_threads, thread_comms
from weft.placement.layout import Mesh, deal


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dim=st.integers(0, 2),
    reduce=st.sampled_from(["sum", "max", "min", "avg"]),
    flip=st.booleans(),
)
def test_collectives_of_any_sizes(sizes, dim, reduce, flip):
    p, shape = len(sizes), [2, 3, 5]
    shape[dim] = sum(sizes)
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) for rank in range(p)]
    xs = [x.flip(0).transpose(0, 2) if flip else x for x in xs]
    dim = 2 - dim if flip and dim != 1 else dim
    reduced = {
        "sum": sum,
        "avg": lambda s: sum(s) / p,
        "max": lambda s: torch.stack(s).amax(0),
        "min": lambda s: torch.stack(s).amin(0),
    }
    total = reduced[reduce](xs)

    def program(comms: Comms):
        group = comms.group(0)
        before = xs[group.index].clone()
        result = (
            group.all_reduce(xs[group.index], reduce),
            group.all_gather(xs[group.index].split(sizes, dim)[group.index], dim, sizes),
            group.reduce_scatter(xs[group.index], dim, sizes, reduce),
        )
        assert torch.equal(xs[group.index], before), "an input was changed"
        return *result, group.sent

    results = run_threads(p, program)
    for rank, (everywhere, gathered, piece, _) in enumerate(results):
        torch.testing.assert_close(everywhere, total)
        assert torch.equal(everywhere, results[0][0])
        torch.testing.assert_close(gathered, torch.cat([x.split(sizes, dim)[j] for j, x in enumerate(xs)], dim))
        torch.testing.assert_close(piece, total.split(sizes, dim)[rank])
    nbytes = total.nbytes
    sent = {kind: sum(result[3][kind] for result in results) for kind in ("all_reduce", "all_gather", "reduce_scatter")}
    assert sent == {
        "all_reduce": 2 * (p - 1) * nbytes,
        "all_gather": (p - 1) * nbytes,
        "reduce_scatter": (p - 1) * nbytes,
    }


@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_buckets_under_way_do_not_mix(p):
    def program(comms: Comms) -> bool:
        group = comms.group(0)
        flats = [torch.full((11,), float(10**i) * (group.index + 1), dtype=torch.float64) for i in range(4)]
        pieces = torch.empty(deal(11, p)[group.index], dtype=torch.float64)
        whole = torch.empty(11, dtype=torch.float64)
        handles = [group.all_reduce_async(flat) for flat in flats[:3]]
        handles.append(group.reduce_scatter_async(pieces, flats[3]))
        handles.append(
            group.all_gather_async(
                whole, torch.full((deal(11, p)[group.index],), float(group.index), dtype=torch.float64)
            )
        )
        for handle in reversed(handles):
            handle.wait()
        everyone = p * (p + 1) / 2
        assert all((flat == 10**i * everyone).all() for i, flat in enumerate(flats[:3]))
        assert (pieces == 1000 * everyone).all()
        return whole.tolist() == [float(j) for j, n in enumerate(deal(11, p)) for _ in range(n)]

    assert all(run_threads(p, program))


def test_point_to_point_and_broadcast():
    def program(comms: Comms) -> list[float]:
        group = comms.group(0)
        if group.index == 0:
            group.send(torch.arange(6.0).reshape(2, 3).T, to=2)
        got = group.recv(torch.empty(3, 2), source=0) if group.index == 2 else torch.zeros(3, 2)
        group.barrier()
        return group.broadcast(got, source=2).flatten().tolist()

    assert run_threads(3, program) == [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]] * 3


def test_an_error_of_one_thread_ends_all_with_that_error():
    def program(comms: Comms) -> None:
        if comms.rank == 1:
            raise KeyError("mine")
        comms.group(0).all_reduce(torch.ones(3))

    with pytest.raises(KeyError, match="mine") as caught:
        run_threads(3, program)
    assert caught.value.__notes__ == ["in the thread of rank 1"]


def test_a_thread_that_waits_in_vain_is_told():
    with pytest.raises(PeerLost, match=r"nothing came within 0\.3 s"):
        run_threads(2, lambda comms: comms.rank or comms.group(0).all_reduce(torch.ones(3)), timeout=0.3)


def test_a_thread_that_never_ends_is_named():
    release = threading.Event()
    with pytest.raises(PeerLost, match=r"threads of ranks \[1\] did not end"):
        run_threads(2, lambda comms: comms.rank and release.wait(30), timeout=0.2)
    release.set()


def test_shapes_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"rank . sent \(.\,\) torch.float32 where rank . expects"):
        run_threads(2, lambda comms: comms.group(0).all_reduce(torch.ones(comms.rank + 2)))


def test_bad_arguments_are_named():
    group = thread_comms(2)[0].group(0)
    with pytest.raises(ValueError, match="reduce must be one of sum, avg, max, min, got 'mean'"):
        group.all_reduce(torch.ones(2), "mean")
    with pytest.raises(ValueError, match="not exact"):
        group.all_reduce(torch.ones(2, dtype=torch.int32), "avg")
    with pytest.raises(ValueError, match=r"holds 2 along dim 0, but sizes are \(1, 2\)"):
        group.all_gather(torch.ones(2), 0, (1, 2))
    with pytest.raises(ValueError, match="do not make dim 0"):
        group.reduce_scatter(torch.ones(2), 0, (1, 2))


def test_groups_of_a_mesh():
    everyone = thread_comms(Mesh((2, 3), ranks=(5, 4, 3, 2, 1, 0)))
    assert [c.rank for c in everyone] == [5, 4, 3, 2, 1, 0]
    assert everyone[4].coordinates == (1, 1)
    assert [everyone[4].group(axis).ranks for axis in (0, 1)] == [(4, 1), (2, 1, 0)]
    assert [everyone[4].group(axis).index for axis in (0, 1)] == [1, 1]
    assert everyone[4].world.index == 4
