"""DGC's memory: the properties of the method, against momentum SGD written out."""

from __future__ import annotations

import math

import pytest
import torch

from weft.comm.agree import describe
from weft.comm.codec import Spec
from weft.comm.codecs import TopK
from weft.comm.memories import MomentumCorrection

SPEC = Spec("w", (30, 20))


def gradients(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(600, generator=g) for _ in range(count)]


def one_step(memory, codec, x, state, setting, step):
    y = memory.before(x.clone(), SPEC, state)
    message = codec.encode(y, SPEC, state, setting, step)
    values, where = codec.sent(message, SPEC, setting)
    memory.after(y, values, where, state)
    return codec.decode(message, SPEC, setting), where


def dense_step(memory, x, state):
    """A selected tensor that goes uncompressed for a step: everything is sent, nothing masked."""
    y = memory.before(x.clone(), SPEC, state)
    sent = y.clone()
    memory.after(y, y, None, state)
    return sent


@pytest.mark.parametrize("ratio", [0.002, 0.1, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_conservation_without_masking(ratio, nesterov):
    """sum of sent + v = sum of u (Nesterov: of u + g), to float32's rounding."""
    memory = MomentumCorrection(0.9, nesterov=nesterov, masking=False)
    codec, state = TopK(ratio), {"seed": 1, "shared_seed": 2}
    u, sent, total = torch.zeros(600).double(), torch.zeros(600).double(), torch.zeros(600).double()
    for step, g in enumerate(gradients(40)):
        u = 0.9 * (u + g) if nesterov else 0.9 * u + g
        total += u + g if nesterov else u
        sent += one_step(memory, codec, g, state, ratio, step)[0]
        assert torch.allclose(sent + state["velocity"], total, atol=1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_masking_clears_both_where_sent_and_touches_nothing_else(nesterov):
    memory, codec, state = MomentumCorrection(0.9, nesterov=nesterov), TopK(0.05), {"seed": 1, "shared_seed": 2}
    for step, g in enumerate(gradients(10)):
        before = {name: state[name].clone() for name in ("momentum", "velocity") if name in state}
        u, v = before.get("momentum", torch.zeros(600)), before.get("velocity", torch.zeros(600))
        u = 0.9 * (u + g) if nesterov else g + 0.9 * u
        v = v + (u + g if nesterov else u)
        _, where = one_step(memory, codec, g, state, 0.05, step)
        sent = torch.zeros(600, dtype=torch.bool)
        sent[where] = True
        assert (state["momentum"][sent] == 0).all() and (state["velocity"][sent] == 0).all()
        assert torch.allclose(state["momentum"][~sent], u[~sent], atol=1e-5)
        assert torch.allclose(state["velocity"][~sent], v[~sent], atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("way", ["dense step", "codec at ratio 1 without masking", "tensor that is never compressed"])
def test_everything_sent_is_momentum_sgd(nesterov, way):
    """Two workers; the mean of what they deliver drives plain SGD to the parameters of torch's momentum SGD."""
    ranks = [gradients(25, seed) for seed in (0, 1)]
    memory = MomentumCorrection(0.9, nesterov=nesterov, masking=way == "dense step")
    codec, states = TopK(1.0), [{"seed": rank, "shared_seed": 2} for rank in range(2)]
    reference = torch.nn.Parameter(torch.zeros(600))
    optimizer = torch.optim.SGD([reference], lr=0.1, momentum=0.9, nesterov=nesterov)
    x = torch.zeros(600)
    for step, pair in enumerate(zip(*ranks, strict=True)):
        mean = (pair[0] + pair[1]) / 2
        reference.grad = mean.clone()
        optimizer.step()
        if way == "tensor that is never compressed":
            x = x - 0.1 * memory.dense(mean, SPEC, states[0])
        elif way == "dense step":
            x = x - 0.1 * sum(dense_step(memory, g, state) for g, state in zip(pair, states, strict=True)) / 2
        else:
            delivered = [one_step(memory, codec, g, s, 1.0, step)[0] for g, s in zip(pair, states, strict=True)]
            x = x - 0.1 * sum(delivered) / 2
    assert torch.allclose(x, reference.detach(), atol=2e-5)


def test_masking_at_ratio_one_would_lose_the_momentum():
    """Why ratio 1 bypasses the codec: masking clears u every step, which is SGD without momentum."""
    memory, codec, state = MomentumCorrection(0.9), TopK(1.0), {"seed": 1, "shared_seed": 2}
    for step, g in enumerate(gradients(5)):
        delivered, _ = one_step(memory, codec, g, state, 1.0, step)
        assert torch.allclose(delivered, g)
    assert codec.bypass(SPEC, 1.0)


def test_half_precision_values_leave_nothing_at_masked_positions():
    memory, codec, state = MomentumCorrection(), TopK(0.1, values=torch.float16), {"seed": 1, "shared_seed": 2}
    _, where = one_step(memory, codec, gradients(1)[0], state, 0.1, 0)
    assert (state["velocity"][where] == 0).all()


def test_local_clipping():
    """Each tensor to clip / sqrt(N) before it is added, and only if it is longer."""
    memory, state = MomentumCorrection(0.9, clip=2.0).sized(4), {}
    assert describe(memory) == describe(
        MomentumCorrection(0.9, clip=2.0)
    )  # a checkpoint of other numbers of ranks fits
    assert MomentumCorrection(ranks=2).sized(4).ranks == 2
    g = gradients(1)[0]
    y = memory.before(g.clone(), SPEC, state)
    assert math.isclose(float(y.norm()), 1.0, rel_tol=1e-5)
    assert torch.allclose(y / y.norm(), g / g.norm(), atol=1e-6)
    short = 0.01 * g / g.norm()
    assert torch.allclose(MomentumCorrection(0.9, clip=2.0).before(short.clone(), SPEC, {}), short)
    assert float(MomentumCorrection(clip=1.0).before(torch.zeros(600), SPEC, {}).abs().max()) == 0


def test_states_of_earlier_steps_and_the_gradient_are_left_alone():
    memory, codec, state = MomentumCorrection(), TopK(0.1), {"seed": 1, "shared_seed": 2}
    first, second = gradients(2)
    one_step(memory, codec, first, state, 0.1, 0)
    held = {name: (state[name], state[name].clone()) for name in ("momentum", "velocity")}
    y = memory.before(second, SPEC, state)
    memory.after(y, torch.ones(1), torch.tensor([3]), state)
    second.fill_(9)
    assert all(torch.equal(tensor, copy) for tensor, copy in held.values())
    assert float(state["momentum"].abs().max()) < 9


def test_uncompressed_result_is_not_the_state_itself():
    """The exchange writes results into DDP's buckets and may scale them there."""
    memory, state = MomentumCorrection(), {}
    memory.dense(torch.ones(600), SPEC, state).mul_(5)
    assert float(state["momentum"].max()) == 1


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"momentum": 1.0}, "momentum"), ({"momentum": -0.1}, "momentum"), ({"clip": 0.0}, "clip"),
     ({"clip": math.inf}, "clip"), ({"ranks": 0}, "ranks"), ({"momentum": 0.0, "nesterov": True}, "nesterov")],
)  # fmt: skip
def test_bad_options_are_named(options, argument):
    with pytest.raises(ValueError, match=argument):
        MomentumCorrection(**options)
