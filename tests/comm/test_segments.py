"""Partial -> Shard: `reduce_scatter` against `reduce` and a cut, against the book in one process, and what it sends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from weft.comm.codec import Spec
from weft.comm.codecs.low_rank import LowRank
from weft.comm.codecs.plain import Cast, Identity
from weft.comm.codecs.quantise import Quantise
from weft.comm.codecs.top_k import TopK
from weft.comm.exchange import Exchange
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection
from weft.comm.memories.shift import Shift
from weft.comm.rules.centre import GeometricMedian
from weft.comm.rules.elementwise import Median
from weft.comm.segments import Cut
from weft.comm.topology import AllGather, Peer, Ring, ScatterGather, Star
from weft.errors import ExchangeMismatch

SHAPES = {"a": (5, 7), "b": (11,), "c": (1, 3, 2), "d": (4, 3)}
DIMS = {"a": 1, "b": 0, "c": 0, "d": -2}  # on 3 ranks none is even, and two of the three pieces of c are empty


def data(step, rank):
    g = torch.Generator().manual_seed(10 * step + rank)
    named = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return {**named, "d": named["d"].bfloat16()}


def everything(spec):
    return True


def cut(named, ranks, rank):
    return {name: x.tensor_split(ranks, DIMS[name])[rank] for name, x in named.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_cut_is_that_of_tensor_split_and_loses_no_position(ranks):
    for shape in [(5,), (2, 3), (4, 1, 6), (2, 3, 4), (0, 3), (1,)]:
        flat = torch.arange(math.prod(shape))
        for dim in range(-len(shape), len(shape)):
            found = Cut.of(shape, dim, ranks)
            pieces = [found.piece(flat, rank) for rank in range(ranks)]
            for rank, expected in enumerate(flat.view(shape).tensor_split(ranks, dim)):
                assert torch.equal(pieces[rank].view(found.piece_shape(rank)), expected)
                assert torch.equal(found.whole(torch.arange(len(pieces[rank])), rank), pieces[rank])
            assert torch.equal(found.joined(pieces), flat)


def test_boxes_may_cut_several_dims():
    flat, boxes = torch.arange(4 * 3 * 2), [((a, b), (0, 3), (c, c + 1)) for a, b in ((0, 1), (1, 4)) for c in (0, 1)]
    found = Cut((4, 3, 2), tuple(boxes))
    for rank, box in enumerate(boxes):
        expected = flat.view(4, 3, 2)[tuple(slice(*ends) for ends in box)]
        assert found.name(rank) == f"[{box[0][0]}:{box[0][1]}, :, {box[2][0]}:{box[2][1]}]"
        assert torch.equal(found.window(flat, rank), expected)
        assert torch.equal(found.whole(torch.arange(expected.numel()), rank), expected.reshape(-1))
    assert torch.equal(found.joined([found.piece(flat, rank) for rank in range(4)]), flat)


# ---- what is sent as it is


def plain(topology):
    """Pieces of two steps both ways, and bytes a step of either."""
    own, found, nbytes = dist.get_rank(), [], []
    for scattering in (False, True):
        exchange = Exchange(topology=topology, select=everything, timeout=20)
        assert exchange.scatters
        go = exchange.reduce_scatter if scattering else lambda named, step, dims, go=exchange.reduce: go(named, step)
        found.append([go(data(step, own), step, DIMS).wait() for step in range(2)])
        nbytes.append({name: tensor.nbytes for name, tensor in exchange.report().tensors.items()})
        exchange.close()
    return *found, *nbytes


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("topology", [Ring(), AllGather(), ScatterGather()])
def test_pieces_are_those_of_reduce_and_a_cut_for_the_owners_bytes_alone(pool, topology, ranks):
    for rank, (whole, pieces, before, after) in enumerate(pool(ranks).run(plain, topology)):
        for step in range(2):
            for name, expected in cut(whole[step], ranks, rank).items():
                piece = pieces[step][name]
                assert piece.dtype == expected.dtype and piece.shape == expected.shape
                if isinstance(topology, Ring) and ranks > 2:  # a ring adds in another order
                    torch.testing.assert_close(piece, expected, rtol=1e-2 if name == "d" else 1e-5, atol=1e-6)
                else:
                    assert torch.equal(piece, expected)
        for name, shape in SHAPES.items():
            sent = math.prod(shape) - pieces[0][name].numel()
            assert after[name] == 4 * sent
            if shape[0] % ranks == 0:
                factor = ranks if isinstance(topology, AllGather) else 2
                assert before[name] == pytest.approx(factor * after[name])


# ---- codes


def coded(options, steps):
    own, total = dist.get_rank(), {}
    exchange = Exchange(**options, select=everything, timeout=20)
    for step in range(steps):
        for name, piece in exchange.reduce_scatter(data(step, own), step, DIMS).wait().items():
            total[name] = total.get(name, 0) + piece.double()
    states = exchange.state_dict()["states"]
    owed = {name: states[name]["error"].view(SHAPES[name]).double() for name in SHAPES}
    report = exchange.report()
    exchange.close()
    return total, owed, {name: tensor.nbytes for name, tensor in report.tensors.items()}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("codec", [TopK(0.3), Quantise(4)])
def test_what_owners_get_and_what_is_still_owed_is_all_there_was(pool, codec, ranks):
    for topology in (AllGather(), ScatterGather(memory=ErrorFeedback())):
        results = pool(ranks).run(coded, {"codec": codec, "memory": ErrorFeedback(), "topology": topology}, 3)
        for name, shape in SHAPES.items():
            got = torch.cat([total[name] for total, _, _ in results], DIMS[name]) * ranks
            owed = sum(owed[name] for _, owed, _ in results)
            given = sum(data(step, rank)[name].double() for step, rank in itertools.product(range(3), range(ranks)))
            torch.testing.assert_close(
                got + owed, given, rtol=1e-5, atol=0.02 if name == "d" else 1e-5
            )  # d is bfloat16
            pieces = [Cut.of(shape, DIMS[name], ranks).piece_shape(rank) for rank in range(ranks)]
            for rank, (_, _, nbytes) in enumerate(results):
                others = [Spec(name, piece) for r, piece in enumerate(pieces) if r != rank and math.prod(piece)]
                assert nbytes[name] == sum(codec.nbytes(spec, codec.default(spec)) for spec in others)


# ---- rules


def ruled(rule, broken):
    own, found = dist.get_rank(), []
    for topology in (AllGather(), ScatterGather()):
        exchange = Exchange(combine=rule, topology=topology, timeout=20)
        named = data(0, own)
        if broken and own == 1:
            named["b"][3] = float("inf")
        found.append(exchange.reduce_scatter(named, 0, DIMS).wait())
        assert exchange.skipped == 0
        exchange.close()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("rule", [GeometricMedian(), Median()])
def test_rules_judge_whole_messages_though_owners_see_pieces(pool, rule, broken):
    given = [data(0, rank) for rank in range(3)]
    stack = torch.stack([torch.cat([x.float().flatten() for x in named.values()]) for named in given])
    if broken:
        stack[1] = float("nan")
    flats = rule(stack).split([math.prod(shape) for shape in SHAPES.values()])
    whole = {name: flat.view(shape) for flat, (name, shape) in zip(flats, SHAPES.items(), strict=True)}
    for rank, found in enumerate(pool(3).run(ruled, rule, broken)):
        for pieces, (name, expected) in itertools.product(found, cut(whole, 3, rank).items()):
            torch.testing.assert_close(pieces[name].float(), expected, rtol=1e-2 if name == "d" else 1e-4, atol=1e-5)


# ---- what else is promised


def promises():
    own = dist.get_rank()
    exchange = Exchange(Cast("float16"), ErrorFeedback(), timeout=20)
    x = torch.full((4, 6), 1.0 + own)
    assert exchange.reduce_scatter({"w": x}, 0, 1).wait()["w"].tolist() == [[1.5] * 3] * 4
    before = exchange.state_dict()["states"]["w"]["error"]
    x[0, 0] = [1e6, 1.0][own]  # which float16 cannot say
    assert bool(exchange.reduce_scatter({"w": x}, 1, 1).wait()["w"].isnan().all())
    assert exchange.skipped == 1 and exchange.state_dict()["states"]["w"]["error"] is before
    with pytest.raises(ExchangeMismatch, match="bucket"):
        exchange.reduce_scatter({"v": x}, 2, own).wait()
    for options, scatters in [
        ({"codec": LowRank(1)}, False),
        ({"codec": LowRank(1), "topology": AllGather()}, True),
        ({"codec": Identity(), "topology": Star()}, False),
        ({"codec": Identity(), "topology": Peer()}, False),
        ({"codec": TopK(0.5), "memory": Shift()}, False),
    ]:
        assert Exchange(**options).scatters == scatters
    both = []
    for scattering in (False, True):  # through `reduce`, where pieces cannot be had
        exchange = Exchange(LowRank(1), timeout=20)
        named = {"w": torch.arange(30.0).view(5, 6) * (1 + own)}
        done = exchange.reduce_scatter(named, 0, 1) if scattering else exchange.reduce(named, 0)
        both.append(done.wait()["w"])
        exchange.close()
    assert torch.equal(both[0].tensor_split(2, 1)[own], both[1])
    return True


def test_promises(pool):
    for outcome in pool(2).collect(promises):
        assert outcome.value is True, outcome.trace


def velocities():
    """With momentum in the memory: what goes coded, and a bias, which is averaged first."""
    own, exchange, found = (
        dist.get_rank(),
        Exchange(TopK(0.9999), MomentumCorrection(0.5, masking=False), timeout=20),
        [],
    )
    for step in range(3):
        named = {"w": torch.full((3, 4), 1.0 + own + step), "b": torch.full((3,), 2.0 * own)}
        found.append(exchange.reduce_scatter(named, step).wait())
    exchange.close()
    return found


def test_momentum_in_the_memory_is_momentum(pool):
    for rank, found in enumerate(pool(2).run(velocities)):
        u = v = 0.0
        for step, pieces in enumerate(found):
            u, v = 0.5 * u + 1.5 + step, 0.5 * v + 1.0
            assert pieces["w"].shape == (2 - rank, 4) and pieces["b"].shape == (2 - rank,)
            torch.testing.assert_close(pieces["w"], torch.full_like(pieces["w"], u))
            torch.testing.assert_close(pieces["b"], torch.full_like(pieces["b"], v))
