"""One battery over the whole table of memories: what `weft.comm.memory` promises of every one."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.codecs import CODECS as TABLE
from weft.comm.codecs import Identity, LowRank, Quantise, RandK, ScalarSeed, SharedRandK, Sign, TopK
from weft.comm.memories import MEMORIES, ErrorFeedback, MomentumCorrection, Shift
from weft.comm.memory import Memory

OPTIONS = {  # a memory that is not named here is tested with its defaults
    "error-feedback": (ErrorFeedback(), ErrorFeedback(0.9)),
    "momentum-correction": (MomentumCorrection(), MomentumCorrection(0.5, nesterov=True, masking=False, clip=1.0)),
    "shift": (Shift(), Shift(0.5)),
}
CASES = [(name, memory) for name in MEMORIES for memory in OPTIONS.get(name, (MEMORIES[name](),))]
BAD = [
    ("error-feedback", {"decay": 0.0}), ("error-feedback", {"decay": 1.5}),
    ("momentum-correction", {"momentum": 1.0}), ("momentum-correction", {"momentum": -0.1}),
    ("momentum-correction", {"clip": 0.0}), ("momentum-correction", {"ranks": 0}),
    ("shift", {"rate": 0.0}), ("shift", {"rate": 2.0}),
]  # fmt: skip
SPEC = Spec("w", (5, 8))
CODECS = (TopK(0.2), Quantise(3, 16), Identity())
IDS = [repr(memory) if dataclasses.is_dataclass(memory) else name for name, memory in CASES]
cases = pytest.mark.parametrize(("name", "memory"), CASES, ids=IDS)


def gradient(step, rank):
    return torch.randn(SPEC.numel, generator=torch.Generator().manual_seed(10 * step + rank))


def start(rank):
    return {"seed": 7 + rank, "shared_seed": 7}


def step_of(memory, codec, states, step):
    """One step of every rank around a server: (what is delivered coded, what if it goes dense), as `states` go on."""
    total = torch.zeros(SPEC.numel)
    for rank, state in enumerate(states):
        y = memory.before(gradient(step, rank), SPEC, state)
        message = codec.encode(y, SPEC, state, codec.default(SPEC), step)
        message = tuple(part.clone() for part in message)  # it has been sent
        before = copy.deepcopy(message)
        values, where = codec.sent(message, SPEC, codec.default(SPEC))
        memory.after(y, values, where, state)
        assert all(torch.equal(a, b) for a, b in zip(message, before, strict=True)), "what was sent is not the memory's"
        codec.add_to(total, message, SPEC, codec.default(SPEC), 1 / len(states))
    found = [memory.delivered(total.clone(), SPEC, state).clone() for state in states]
    assert all(torch.equal(one, found[0]) for one in found), "all ranks deliver the same"
    return found[0]


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def test_every_class_of_the_table_is_a_frozen_memory_that_needs_no_options():
    for name, memory in MEMORIES.items():
        assert issubclass(memory, Memory), name
        assert memory() == memory() or not dataclasses.is_dataclass(memory), name


@cases
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_run_goes_on_from_its_states_bit_by_bit(name, memory, codec):
    memory = memory.sized(2)
    straight, found = [start(0), start(1)], []
    for step in range(8):
        found.append(step_of(memory, codec, straight, step))
    states = [start(0), start(1)]
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(states, file)
            file.seek(0)
            states = torch.load(file, weights_only=True)  # tensors and plain values only
        assert torch.equal(step_of(memory, codec, states, step), found[step])
    assert all(same(a, b) for a, b in zip(states, straight, strict=True))


@cases
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_step_is_undone_by_putting_the_old_entries_back(name, memory, codec):
    memory, states = memory.sized(2), [start(0), start(1)]
    for step in range(5):
        entries = [dict(state) for state in states]
        values = copy.deepcopy(entries)
        first = step_of(memory, codec, states, step)
        assert all(same(a, b) for a, b in zip(entries, values, strict=True)), "entries are replaced, not written into"
        states = [dict(state) for state in entries]
        assert torch.equal(step_of(memory, codec, states, step), first)


@cases
def test_states_are_flat_float32_and_hold_no_memory_of_the_gradient(name, memory):
    memory, state = memory.sized(2), start(0)
    for step in range(3):
        x = gradient(step, 0)
        y = memory.before(x, SPEC, state)
        memory.after(y, torch.zeros(0), torch.zeros(0, dtype=torch.int64), state)
        result = torch.zeros(SPEC.numel)
        delivered = memory.delivered(result, SPEC, state)
        memory.dense(x, SPEC, {}).add_(1)  # what is delivered is the caller's
        for key, kept in state.items():
            if isinstance(kept, torch.Tensor):
                assert kept.shape == (SPEC.numel,) and kept.dtype == torch.float32, key
                assert kept.data_ptr() not in (x.data_ptr(), result.data_ptr(), delivered.data_ptr()), key


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_bad_options_are_named(name, options):
    kind = MEMORIES[name]
    with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{next(iter(options))}"):
        kind(**options)


CODES = {  # a codec that is not named here is tested with its defaults
    "low-rank": (LowRank(1), LowRank(1, warm=False)),
    "quantise": tuple(
        Quantise(bits, scale=scale, stochastic=drawn)
        for scale in ("range", "max", "norm")
        for bits in (2, 3, 8)
        for drawn in (True, False)
    ),
    "rand-k": (RandK(0.1), RandK(0.1, unbiased=False), RandK(0.7)),
    "scalar-seed": (ScalarSeed(), ScalarSeed(12, unbiased=False)),
    "shared-rand-k": (SharedRandK(0.1), SharedRandK(0.1, unbiased=True)),
    "sign": (Sign(), Sign(8, "sides")),
    "top-k": (TopK(0.1),),
}
KEEP = (ErrorFeedback(), MomentumCorrection(0.5), MomentumCorrection(0.5, masking=False), Shift())
GROW = [RandK(0.1), ScalarSeed(), SharedRandK(0.1, unbiased=True), Quantise(2, scale="norm")]


def descend(codec, memory, steps, lr):
    """Two ranks of a quadratic whose gradients differ at its minimum: (distance of the last third's mean, relative; the last)."""
    memory, setting = memory.sized(2), codec.default(SPEC)
    lr *= 1 - getattr(memory, "momentum", 0.0)
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(2, SPEC.numel, generator=generator) + torch.tensor([[-1.5], [1.5]])
    best, x, tail = centres.mean(0), torch.zeros(SPEC.numel), torch.zeros(SPEC.numel)
    states = [start(0), start(1)]
    for step in range(steps):
        total = torch.zeros(SPEC.numel)
        for centre, state in zip(centres, states, strict=True):
            y = memory.before(x - centre, SPEC, state)
            message = tuple(part.clone() for part in codec.encode(y, SPEC, state, setting, step))
            memory.after(y, *codec.sent(message, SPEC, setting), state)
            codec.add_to(total, message, SPEC, setting, 0.5)
        delivered, _ = [memory.delivered(total, SPEC, state) for state in states]
        x = x - lr * delivered
        tail += x * (3 * step >= 2 * steps) / (steps / 3)
    return float((tail - best).norm() / best.norm()), float(x.norm() / best.norm())


@pytest.mark.parametrize("memory", KEEP, ids=str)
@pytest.mark.parametrize("codec", [code for name in TABLE for code in CODES.get(name, (TABLE[name](),))], ids=str)
def test_descent_reaches_the_minimum_with_every_code_that_a_memory_takes(codec, memory):
    setting = codec.default(SPEC)
    if memory.suits(codec, SPEC, setting):
        assert descend(codec, memory, 450, 0.04)[0] < 0.1
    else:  # nothing is refused that has the promise which error feedback asks for
        assert codec.contraction(SPEC, setting) == 0 and codec.variance(SPEC, setting) >= 1


@pytest.mark.parametrize("codec", GROW, ids=str)
@pytest.mark.parametrize("memory", [ErrorFeedback(), MomentumCorrection(0.5, masking=False), Shift()], ids=str)
def test_a_code_that_errs_by_more_than_it_codes_is_none_for_a_memory(codec, memory):
    assert not memory.suits(codec, SPEC, codec.default(SPEC))
    last = descend(codec, memory, 450, 0.04)[1]
    assert not math.isfinite(last) or last > 100


@pytest.mark.parametrize("codec", [RandK(0.2), SharedRandK(0.2, unbiased=True), ScalarSeed(10)], ids=str)
def test_a_reference_that_follows_slowly_takes_an_unbiased_code(codec):
    """DIANA: a rate of 1/(1 + omega); from 2/(1 + omega) on what is coded grows."""
    omega = codec.variance(SPEC, codec.default(SPEC))
    assert Shift(1 / (1 + omega)).suits(codec, SPEC, codec.default(SPEC))
    assert not Shift(2 / (1 + omega)).suits(codec, SPEC, codec.default(SPEC))
    assert descend(codec, Shift(1 / (1 + omega)), 450, 0.04)[0] < 0.01
