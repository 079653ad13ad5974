"""`Exchange.reduce` by itself, on three processes, against the same arithmetic done in one."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
import torch.distributed as dist

from weft.comm.agree import hashed
from weft.comm.codec import Spec
from weft.comm.codecs.low_rank import LowRank
from weft.comm.codecs.plain import Cast, Identity
from weft.comm.codecs.quantise import Quantise
from weft.comm.codecs.rand_k import RandK
from weft.comm.codecs.scalar_seed import ScalarSeed
from weft.comm.codecs.top_k import TopK
from weft.comm.controller import Controller
from weft.comm.controllers.schedule import Schedule
from weft.comm.exchange import Exchange
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection
from weft.comm.memories.shift import Shift
from weft.comm.memory import NoMemory
from weft.comm.routes import overflowed
from weft.comm.rules.centre import GeometricMedian
from weft.comm.rules.elementwise import Median, TrimmedMean
from weft.comm.rules.flag import Flag
from weft.comm.rules.krum import Krum
from weft.comm.rules.mean import Mean
from weft.comm.rules.subset import NearestToOwn
from weft.comm.topology import AllGather, Gossip, Peer, Ring, ScatterGather, Star
from weft.errors import ExchangeMismatch, PeerLost

RANKS = 3
SHAPES = {"a": (5, 7), "b": (11,), "c": (4, 3, 2)}
WEIGHTS = ((0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5))


def data(step, rank):
    g = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


def reduced(options, steps=2):
    exchange = Exchange(**options, timeout=20)
    found = [exchange.reduce(data(step, dist.get_rank()), step).wait() for step in range(steps)]
    report = exchange.report()
    exchange.close()
    return [flat(named) for named in found], report.nbytes


def everything(spec):
    return True


@pytest.mark.parametrize("topology", [Ring(), AllGather(), ScatterGather(), Star(2), Peer()])
def test_identity_gives_the_mean_over_every_topology(pool, topology):
    ranks = pool(RANKS).run(reduced, {"topology": topology})
    for step in range(2):
        mean = torch.stack([flat(data(step, rank)) for rank in range(RANKS)]).double().mean(0)
        for found, _ in ranks:
            torch.testing.assert_close(found[step].double(), mean, rtol=0, atol=1e-6)
            assert torch.equal(found[step], ranks[0][0][step])


def wide(topology):
    exchange = Exchange(Quantise(4), ErrorFeedback(), topology=topology, timeout=20)
    named = {name: tensor.double() / 3 for name, tensor in data(0, dist.get_rank()).items()}
    found, report = exchange.reduce(named, 0).wait(), exchange.report()
    exchange.close()
    return found, {name: tensor.rounded for name, tensor in report.tensors.items()}, str(report)


@pytest.mark.parametrize("topology", [AllGather(), ScatterGather(), Star()])
def test_float64_is_taken_as_float32_by_a_lossy_code_alone_and_the_report_says_so(pool, topology):
    for found, rounded, text in pool(2).run(wide, topology):
        assert torch.equal(found["b"], sum(data(0, rank)["b"].double() / 3 * 0.5 for rank in range(2)))
        assert rounded == {"a": True, "b": False, "c": True} and text.count("float64 taken as float32") == 2


def test_gossip_mixes_by_its_weights(pool):
    ranks = pool(RANKS).run(reduced, {"topology": Gossip(WEIGHTS)})
    stack = torch.stack([flat(data(1, rank)) for rank in range(RANKS)])
    for rank, (found, _) in enumerate(ranks):
        torch.testing.assert_close(found[1], torch.tensor(WEIGHTS[rank]) @ stack)


def coded_in_one_process(codec, memory, steps):
    """All-gather by the book: y = memory(x), message = encode(y), result = mean of decode(message)."""
    specs = {name: Spec(name, shape) for name, shape in SHAPES.items()}
    states = [
        {name: {"seed": hashed(0, name, rank), "shared_seed": hashed(0, name)} for name in SHAPES}
        for rank in range(RANKS)
    ]
    found = []
    for step in range(steps):
        out = {name: torch.zeros(spec.numel) for name, spec in specs.items()}
        for rank in range(RANKS):
            for name, x in data(step, rank).items():
                spec, state = specs[name], states[rank][name]
                setting = codec.default(spec)
                y = memory.before(x.flatten(), spec, state)
                message = codec.encode(y, spec, state, setting, step)
                out[name] += codec.decode([part.clone() for part in message], spec, setting) / RANKS
                sent, where = codec.sent([part.clone() for part in message], spec, setting)
                memory.after(y, sent, where, state)
        found.append(flat(out))
    return found


@pytest.mark.parametrize("codec", [TopK(0.3), Quantise(4)])
def test_a_coded_exchange_is_the_book_in_one_process(pool, codec):
    options = {"codec": codec, "memory": ErrorFeedback(), "select": everything}
    expected = coded_in_one_process(codec, ErrorFeedback(), 3)
    for found, nbytes in pool(RANKS).run(reduced, options, 3):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        message = sum(codec.nbytes(Spec(n, s), codec.default(Spec(n, s))) for n, s in SHAPES.items())
        assert nbytes == (RANKS - 1) * message


def test_owners_that_encode_again_with_memory_lose_nothing_in_the_long_run(pool):
    """The same tensors every step: with error feedback at both ends the mean of the results tends to the mean."""
    options = {"codec": TopK(0.4), "memory": ErrorFeedback(), "select": everything}
    for topology in (ScatterGather(memory=ErrorFeedback()), Star(0, down=TopK(0.4), memory=ErrorFeedback())):
        ranks = pool(RANKS).run(repeated, {**options, "topology": topology})
        mean = torch.stack([flat(data(0, rank)) for rank in range(RANKS)]).mean(0)
        for found in ranks:
            assert torch.equal(found, ranks[0])
            assert float((found - mean).norm() / mean.norm()) < 0.15


def repeated(options, steps=30):
    exchange = Exchange(**options, timeout=20)
    total = sum(flat(exchange.reduce(data(0, dist.get_rank()), step).wait()) for step in range(steps))
    exchange.close()
    return total / steps


# ---- rules


OVER = (AllGather(), Star(1), ScatterGather())


def robust(rule, broken):
    return [robust_over(topology, rule, broken) for topology in OVER]


def robust_over(topology, rule, broken):
    """Three tensors in three buckets of one step; rank 1's middle one may be infinite."""
    exchange = Exchange(combine=rule, topology=topology, timeout=20)
    exchange.open([Spec(name, shape) for name, shape in SHAPES.items()])
    named = data(0, dist.get_rank())
    if broken and dist.get_rank() == 1:
        named["b"][3] = float("inf")
    done = [torch.futures.Future() for _ in named]
    flats = [tensor.flatten() for tensor in named.values()]
    for number, (name, future) in enumerate(zip(named, done, strict=True)):
        last = number == len(named) - 1

        def over(error, future=future):
            future.set_result(None) if error is None else future.set_exception(error)

        exchange.submit([(Spec(name, SHAPES[name]), flats[number])], 0, last, over)
    for future in done:
        future.wait()
    skipped = exchange.skipped
    exchange.close()
    return torch.cat(flats), skipped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rule", "broken"), [(GeometricMedian(), 0), (GeometricMedian(), 1), (Median(), 0), (Median(), 1), (Flag(), 0)]
)
def test_a_rule_sees_the_whole_model_and_goes_on_without_a_broken_rank(pool, rule, broken):
    stack = torch.stack([flat(data(0, rank)) for rank in range(RANKS)])
    ranks = pool(RANKS).run(robust, rule, broken)
    whole = [slice(None)] if isinstance(rule, GeometricMedian | Flag) else [slice(0, 35), slice(35, 46), slice(46, 70)]
    if broken:  # an elementwise rule judges bucket by bucket
        stack[1, whole[len(whole) // 2]] = float("nan")
    expected = torch.cat([rule(stack[:, part]) for part in whole])
    for rank in ranks:
        for number, (found, skipped) in enumerate(rank):
            assert skipped == 0 and torch.equal(found, ranks[0][number][0])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def broken_once(topology):
    exchange = Exchange(TopK(0.5), Shift(), Median(), topology=topology, select=everything, timeout=20)
    found = []
    for step in range(3):
        named = data(step, dist.get_rank())
        if step == 1 and dist.get_rank() == 1:
            named["b"][3] = float("nan")
        found.append(flat(exchange.reduce(named, step).wait()))
    exchange.close()
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_was_left_out_once_follows_what_the_others_agreed_on(pool):
    for topology in (AllGather(), Star(1), ScatterGather()):
        ranks = pool(RANKS).run(broken_once, topology)
        for step in range(3):
            assert all(torch.equal(found[step], ranks[0][step]) for found in ranks)


# ---- what reduce promises


def nobody_left(rule, topology):
    """A step in which no rank's gradient is finite, in one tensor of three, between two good ones."""
    exchange = Exchange(TopK(0.5), ErrorFeedback(), rule, topology, select=everything, timeout=20)
    found, spoiled = [], data(1, dist.get_rank())
    spoiled["b"][0] = float("nan")
    for step, named in enumerate((data(0, dist.get_rank()), spoiled, data(2, dist.get_rank()))):
        pairs = [(Spec(name, tuple(x.shape), x.dtype), x.flatten().clone()) for name, x in named.items()]
        over = [threading.Event() for _ in pairs]
        for number, (pair, event) in enumerate(zip(pairs, over, strict=True)):  # each a bucket of its own
            exchange.submit([pair], step, number == 2, lambda error, event=event: event.set())
        assert all(event.wait(20) for event in over)
        found.append(torch.cat([flat for _, flat in pairs]))
        if step == 0:
            before = str(exchange.state_dict()["states"])
        elif step == 1:
            assert str(exchange.state_dict()["states"]) == before and exchange.skipped == 1
    exchange.close()
    return found


@pytest.mark.parametrize("topology", [AllGather(), Star(1), ScatterGather()])
@pytest.mark.parametrize("rule", [Median(), GeometricMedian()])
def test_a_rule_skips_a_step_in_which_nobody_is_finite(pool, rule, topology):
    ranks = pool(RANKS).run(nobody_left, rule, topology)
    for first, second, third in ranks:
        assert torch.equal(first, ranks[0][0]) and torch.equal(third, ranks[0][2])
        assert first.isfinite().all() and third.isfinite().all() and second.isnan().any()


def twice_in_a_bad_step():
    """A tensor in two buckets of a step, of which the second is not finite on one rank; then on from a checkpoint."""
    exchange, own = Exchange(TopK(0.5), ErrorFeedback(), select=everything, timeout=20), dist.get_rank()
    exchange.reduce({"w": data(0, own)["b"]}, 0).wait()
    before, over = exchange.state_dict()["states"]["w"]["error"], [threading.Event() for _ in range(2)]
    for last, event in enumerate(over):
        flat = data(1, own)["b"]
        flat[3] = math.nan if last and own == 1 else 1.0
        exchange.submit([(Spec("w", (11,)), flat)], 1, bool(last), lambda error, event=event: event.set())
    assert all(event.wait(20) for event in over)
    assert exchange.state_dict()["states"]["w"]["error"] is before and exchange.skipped == 1
    exchange.close()
    again = Exchange(TopK(0.5), ErrorFeedback(), select=everything, timeout=20)
    again.load_state_dict(exchange.state_dict())
    again.open([Spec("w", (11,))])
    found = again.skipped, again.next_step
    again.close()
    return found


def test_a_tensor_that_comes_twice_in_a_bad_step_has_the_memory_of_before_both(pool):
    assert pool(RANKS).run(twice_in_a_bad_step) == [(1, 2)] * RANKS


def too_long(options):
    """Velocities that grow out of float16: of a tensor that goes as it is, and of one row of a coded one, in pieces or whole."""
    exchange, skipped = Exchange(memory=MomentumCorrection(0.9, masking=False), **options, timeout=20), []
    piecewise, row = exchange.scatters, torch.tensor([[3e4], [0.0]], dtype=torch.float16)
    for step in range(6):
        named = {"v": torch.full((3,), 3e4, dtype=torch.float16)} if step < 3 else {"w": row.expand(2, 5)}
        done = exchange.reduce_scatter(named, step) if piecewise and step >= 3 else exchange.reduce(named, step)
        found = done.wait()
        skipped.append((exchange.skipped, all(bool(x.isfinite().all()) for x in found.values())))
    exchange.close()
    return skipped


@pytest.mark.parametrize(
    "options",
    [
        {"codec": Cast("bfloat16"), "topology": Ring()},
        {"codec": TopK(1.0), "topology": AllGather()},
        {"codec": TopK(1.0), "topology": ScatterGather()},
        {"codec": TopK(1.0), "topology": Star()},
        {"codec": TopK(1.0), "topology": Peer()},
        {"codec": TopK(1.0), "topology": AllGather(), "combine": GeometricMedian()},
    ],
    ids=lambda options: " ".join(type(option).__name__ for option in options.values()),
)
def test_results_that_a_memory_makes_too_large_for_their_dtype_are_a_skipped_step_on_all_ranks(pool, options):
    for skipped in pool(2).run(too_long, options):
        assert [count for count, _ in skipped] == [0, 0, 1, 1, 1, 2]  # u = 3e4 (1, 1.9, 2.71) against 65,504
        assert all(fine for number, (_, fine) in enumerate(skipped) if number not in (2, 5))


def owes_too_much(topology, codec):
    """What is owed and a gradient are finite, their sum is not; then the gradient is small again."""
    exchange = Exchange(codec, ErrorFeedback(), topology=topology, select=everything, timeout=20)
    found = []
    for step, size in enumerate((3e38, 3e38, -1e38)):
        w = torch.zeros(40)
        w[dist.get_rank()] = size
        exchange.reduce({"w": w}, step).wait()
        owed = exchange.state_dict()["states"]["w"]["error"]
        found.append((exchange.skipped, bool(owed.isfinite().all())))
    exchange.close()
    return found


@pytest.mark.parametrize(
    "topology",
    [AllGather(), ScatterGather(), Star(), Star(down=RandK(0.02, unbiased=False), memory=ErrorFeedback())],
    ids=str,
)
def test_a_memory_that_outgrows_its_dtype_is_put_back(pool, topology):
    """The code would not show it: it sends other entries."""
    assert pool(2).run(owes_too_much, topology, RandK(0.02, unbiased=False)) == [[(0, True), (1, True), (1, True)]] * 2


def test_what_of_a_message_is_looked_at():
    spec, message = Spec("w", (2,)), (torch.tensor([1.0, math.inf]),)
    assert overflowed([(Cast(), spec, 16)], [message]) and not overflowed([(Identity(), spec, 32)], [message])


def too_large(topology, memory, combine):
    """A finite gradient above what float16 holds, on one rank; then a small one."""
    exchange = Exchange(Cast("float16"), memory, combine, topology, select=everything, timeout=20)
    named = data(0, dist.get_rank())
    if dist.get_rank() == 1:
        named["a"][0, 0] = 1e6
    first = flat(exchange.reduce(named, 0).wait())
    second = flat(exchange.reduce(data(1, dist.get_rank()), 1).wait())
    skipped = exchange.skipped
    exchange.close()
    return first, second, skipped


@pytest.mark.parametrize("memory", [NoMemory(), ErrorFeedback()])
@pytest.mark.parametrize(
    "topology", [Ring(), AllGather(), Star(0), ScatterGather(), ScatterGather(memory=ErrorFeedback())]
)
def test_what_is_too_large_for_sixteen_bits_is_a_skipped_step(pool, topology, memory):
    mean = torch.stack([flat(data(1, rank)) for rank in range(RANKS)]).mean(0)
    for first, second, skipped in pool(RANKS).run(too_large, topology, memory, Mean()):
        assert skipped == 1 and first.isnan().any()
        torch.testing.assert_close(second, mean, rtol=2e-3, atol=2e-3)


def test_a_rule_goes_on_without_what_is_too_large_for_sixteen_bits(pool):
    for first, second, skipped in pool(RANKS).run(too_large, AllGather(), ErrorFeedback(), Median()):
        assert skipped == 0 and first.isfinite().all() and second.isfinite().all()


def promises():
    own = dist.get_rank()
    exchange = Exchange(Cast("float16"), ErrorFeedback(), timeout=20)
    named = {"w": torch.full((2, 6), 1.0 + own, dtype=torch.float64), "v": torch.ones(3, dtype=torch.bfloat16)}
    future = exchange.reduce(named, 0)
    named["w"].zero_()  # read before `reduce` returned
    found = future.wait()
    assert found["w"].dtype == torch.float64 and float(found["w"][0, 0]) == pytest.approx(2.0, abs=0.01)
    assert found["v"].dtype == torch.bfloat16 and found["v"].shape == (3,)
    piece = exchange.reduce_scatter(
        {"w": torch.full((2, 6), 1.0 + own, dtype=torch.float64), "v": torch.ones(3, dtype=torch.bfloat16)},
        1,
        {"w": 1, "v": 0},
    ).wait()
    assert piece["w"].shape == (2, 2) and piece["v"].shape == (1,)
    with pytest.raises(ValueError, match="no dimension 5"):
        exchange.reduce_scatter({"w": torch.ones(2, 2)}, 2, 5)
    with pytest.raises(TypeError, match="sparse=False"):
        exchange.reduce({"w": torch.eye(3).to_sparse()}, 2)
    for kind in (torch.complex64, torch.int64, torch.bool):
        with pytest.raises(TypeError, match="real floating-point"):
            exchange.reduce({"w": torch.ones(3, dtype=kind)}, 2)
    bad = {
        "w": torch.full((2, 6), float("nan") if own == 2 else 1.0, dtype=torch.float64),
        "v": torch.ones(3, dtype=torch.bfloat16),
    }
    before = exchange.state_dict()["states"]["w"]["error"]
    assert bool(exchange.reduce(bad, 2).wait()["w"].isnan().all()) and exchange.skipped == 1
    assert exchange.state_dict()["states"]["w"]["error"] is before
    both = [exchange.reduce({"w": torch.full((2, 6), float(step), dtype=torch.float64)}, step) for step in (3, 4)]
    assert [float(future.wait()["w"].mean()) for future in both] == pytest.approx([3.0, 4.0], abs=0.01)
    assert "steps" in str(exchange.report())
    exchange.close()
    return True


def test_reduce_keeps_its_promises(pool):
    assert pool(RANKS).run(promises) == [True] * RANKS


def unlike_steps(codec):
    exchange = Exchange(codec, select=everything, timeout=8)
    exchange.open([Spec("w", (8,))])
    with pytest.raises(ExchangeMismatch, match="steps of the ranks"):
        exchange.reduce({"w": torch.ones(8)}, 5 if dist.get_rank() == 1 else 4).wait()
    return True


@pytest.mark.parametrize("codec", [TopK(0.5), Cast("bfloat16")])
def test_ranks_at_different_steps_are_named(pool, codec):
    assert [o.value for o in pool(RANKS).collect(unlike_steps, codec)] == [True] * RANKS


def refused(options):
    """What each rank is told that opens an exchange which some cannot use."""
    exchange = Exchange(**options[dist.get_rank()], timeout=8)
    try:
        exchange.open([Spec("w", (8, 2))])
    except (ValueError, PeerLost) as error:
        return type(error).__name__, str(error).split(",")[0]
    return "nothing", ""


def test_a_rank_that_refuses_its_rule_does_not_look_lost_to_the_others(pool):
    found = pool(RANKS).run(refused, [{}, {"combine": Krum(5), "topology": AllGather()}, {}])
    assert [kind for kind, _ in found] == ["ExchangeMismatch"] * RANKS, found
    for options, said in (
        ({"combine": Krum(1)}, "Krum: needs n >= 5 messages for f = 1"),
        ({"topology": Star(7)}, "Star: root must be < 3"),
        ({"topology": Gossip(((1.0,),))}, "Gossip: weights must be 3 x 3"),
        ({"combine": NearestToOwn(0)}, "NearestToOwn: needs the inner products and the own message's number"),
    ):
        assert pool(RANKS).run(refused, [options] * RANKS) == [("ValueError", said)] * RANKS


def test_a_code_that_is_none_for_the_memory_is_refused_on_each_rank(pool):
    """Also on the way back; and not where it is another one that is coded there, or nothing."""
    down = Star(down=RandK(0.1), memory=ErrorFeedback())
    for options, memory in (
        ({"codec": ScalarSeed(), "memory": ErrorFeedback()}, ErrorFeedback()),
        ({"codec": RandK(0.1), "memory": MomentumCorrection()}, MomentumCorrection()),
        ({"codec": RandK(0.1), "memory": Shift(0.5)}, Shift(0.5)),
        ({"codec": TopK(0.1), "topology": down}, ErrorFeedback()),
        ({"codec": RandK(0.1), "topology": ScatterGather(memory=ErrorFeedback())}, ErrorFeedback()),
    ):
        said = f"Exchange: {memory} may keep ever more of w, ".split(",")[0]
        assert pool(RANKS).run(refused, [options] * RANKS) == [("ValueError", said)] * RANKS
    for options in (
        {"codec": RandK(0.1), "memory": Shift(0.1)},
        {"codec": RandK(0.1), "topology": Star(down=TopK(0.1), memory=ErrorFeedback())},
        {"codec": ScalarSeed(), "memory": ErrorFeedback(), "select": nothing},
    ):
        assert pool(RANKS).run(refused, [options] * RANKS) == [("nothing", "")] * RANKS


def nothing(spec):
    return False


def coarser():
    """A schedule from a setting that suits the memory to one that does not."""
    exchange = Exchange(RandK(0.9), ErrorFeedback(), controller=Schedule([0.9, 0.1], 0.9, stage_steps=2), timeout=8)
    for step in range(6):
        try:
            exchange.reduce({"w": torch.ones(8, 2)}, step).wait()
        except ValueError as error:
            return step, "may keep ever more of w" in str(error)
    return 6, False


def test_a_setting_that_is_none_for_the_memory_ends_the_exchange_on_each_rank(pool):
    assert pool(RANKS).run(coarser) == [(2, True)] * RANKS


class Undecided(Controller):
    """Its decision, which rank 0 alone makes, fails."""

    def observe(self, spec, gradient, step):
        return None

    def decide(self, step, specs, total=None):
        raise ArithmeticError("no setting")


def undecided():
    exchange = Exchange(TopK(0.5), controller=Undecided(), timeout=8)
    try:
        exchange.reduce({"w": torch.ones(8, 2)}, 0).wait()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_a_decision_that_fails_on_rank_0_fails_on_every_rank_by_its_words(pool):
    first, *others = pool(RANKS).run(undecided)
    assert first == ("ArithmeticError", "no setting")
    assert others == [("RuntimeError", "the controller's decision failed on rank 0: ArithmeticError: no setting")] * (
        RANKS - 1
    )


def unlike_checkpoints():
    """One rank goes on from a checkpoint, and the others begin."""
    exchange = Exchange(Cast("bfloat16"), ErrorFeedback(), timeout=8)
    exchange.reduce({"w": torch.ones(4, 2)}, 6).wait()
    exchange.close()
    again = Exchange(Cast("bfloat16"), ErrorFeedback(), timeout=8)
    if dist.get_rank() == 1:
        again.load_state_dict(exchange.state_dict())
    with pytest.raises(ExchangeMismatch, match="checkpoints of the ranks"):
        again.open([Spec("w", (4, 2))])
    return True


def test_ranks_with_different_checkpoints_are_named(pool):
    assert [o.value for o in pool(RANKS).collect(unlike_checkpoints)] == [True] * RANKS


def unlike_tensors():
    exchange = Exchange(TopK(0.5), timeout=8)
    with pytest.raises(ExchangeMismatch, match="bucket"):
        exchange.reduce({"w": torch.ones(4, 2 + dist.get_rank())}, 0).wait()
    return True


def test_ranks_whose_sizes_differ_are_named_before_anything_is_sent(pool):
    assert [o.value for o in pool(RANKS).collect(unlike_tensors)] == [True] * RANKS


def sent_and_told(topology):
    """Bytes that this rank hands to torch's collectives, and those that the report has of one tensor."""
    exchange, seen = Exchange(TopK(0.01), topology=topology, select=everything, timeout=20), []

    def watched(call, counted):
        def counting(*args, **options):
            seen.append(counted(*args))
            return call(*args, **options)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "gather", watched(dist.gather, lambda send, *_: send.nbytes * (dist.get_rank() != 0)))
        patch.setattr(dist, "broadcast", watched(dist.broadcast, lambda row, *_: row.nbytes * (dist.get_rank() == 0)))
        patch.setattr(
            dist, "all_to_all_single", watched(dist.all_to_all_single, lambda _, send, own, sizes: sum(sizes) - own[0])
        )
        patch.setattr(dist, "all_gather_single", watched(dist.all_gather_single, lambda _, send: send.nbytes))
        exchange.reduce({"w": torch.randn(30_000)}, 0).wait()
        seen.clear()  # the first compares tensors, too
        exchange.reduce({"w": torch.randn(30_000)}, 1).wait()
    told = exchange.report().nbytes
    exchange.close()
    return seen, told


@pytest.mark.parametrize("down", [None, TopK(0.02)])
def test_the_report_counts_the_way_back(pool, down):
    star = pool(RANKS).run(sent_and_told, Star(0, down=down))
    up, back = star[1][0][0], star[0][0][1]
    assert star[0][1] == pytest.approx((RANKS - 1) * (up + back), rel=0.02)
    (scattered, gathered), told = pool(RANKS).run(sent_and_told, ScatterGather(down=down))[0]
    assert told == pytest.approx(scattered + (RANKS - 1) * gathered, rel=0.02)


def test_cost_counts_latencies_and_bytes():
    from weft.cluster import Link

    link, spec = Link(1e-3, 1e6), Spec("w", (1000, 10))
    assert Exchange().cost(spec, link, 4) == pytest.approx(6e-3 + 1.5 * 40_000 / 1e6)
    top = TopK(0.01)
    assert Exchange(top).cost(spec, link, 4) == pytest.approx(3e-3 + 3 * top.nbytes(spec, 0.01) / 1e6)
    assert Exchange(Identity(), select=lambda s: False).cost(spec, link, 2) == pytest.approx(2e-3 + 40_000 / 1e6)


def test_an_exchange_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        Exchange().open()


def too_few(rule):
    exchange = Exchange(combine=rule, timeout=8)
    with pytest.raises(ValueError, match="n >="):
        exchange.open([Spec("w", (8,))])
    return True


@pytest.mark.parametrize("rule", [TrimmedMean(f=2), Krum(f=1)])
def test_a_rule_that_ranks_are_too_few_for_is_refused_on_each_before_anything_is_sent(pool, rule):
    assert pool(RANKS).run(too_few, rule) == [True] * RANKS


def one_by_one(exchange, step, broken=""):
    """A step of three buckets, one tensor each; `broken` is not finite on rank 1."""
    named = data(step, dist.get_rank())
    if broken and dist.get_rank() == 1:
        named[broken].view(-1)[0] = float("nan")
    over = [threading.Event() for _ in named]
    for number, ((name, x), event) in enumerate(zip(named.items(), over, strict=True)):
        pair = Spec(name, tuple(x.shape), x.dtype), x.flatten()
        exchange.submit([pair], step, number == 2, lambda error, event=event: event.set())
    assert all(event.wait(20) for event in over)
    return copy.deepcopy(exchange.state_dict()["states"])


def undone(topology):
    """What codes and memories keep is as before a step that is not finite."""
    exchange = Exchange(LowRank(1), ErrorFeedback(), topology=topology, select=everything, timeout=20)
    before = one_by_one(exchange, 0)
    after = one_by_one(exchange, 1, "c")
    skipped = exchange.skipped
    exchange.close()
    return skipped == 1 and str(before) == str(after) and "'q'" in str(before)


@pytest.mark.parametrize("topology", [Ring(), AllGather()])
def test_a_step_that_is_not_finite_is_undone_in_every_state(pool, topology):
    assert pool(RANKS).run(undone, topology) == [True] * RANKS


def left_out():
    """Of a rank that a rule goes on without in one bucket, that bucket alone has not been sent."""
    exchange = Exchange(TopK(0.5), ErrorFeedback(), Median(), AllGather(), select=everything, timeout=20)
    before = one_by_one(exchange, 0)
    after = one_by_one(exchange, 1, "b")
    exchange.close()
    return [torch.equal(before[name]["error"], after[name]["error"]) for name in SHAPES]


@pytest.mark.filterwarnings("ignore")
def test_what_was_left_out_of_a_step_is_one_bucket(pool):
    assert pool(RANKS).run(left_out) == [[False] * 3, [False, True, False], [False] * 3]
