"""Error feedback: nothing is lost, a contraction converges where it would not without, the state can be undone."""

from __future__ import annotations

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.codecs import CODECS, LowRank, Quantise, RandK, Sign, TopK
from weft.comm.memories import ErrorFeedback
from weft.comm.memory import NoMemory

SPEC = Spec("w", (30, 20))


def one_step(memory, codec, x, state, setting, step):
    """One worker's step as the exchange makes it; what was sent, decoded."""
    y = memory.before(x.clone(), SPEC, state)
    message = codec.encode(y, SPEC, state, setting, step)
    delivered = codec.decode(message, SPEC, setting).clone()  # Identity's message is y, which the memory then clears
    memory.after(y, *codec.sent(message, SPEC, setting), state)
    return delivered


@pytest.mark.parametrize("name", CODECS)
def test_what_was_sent_and_what_is_owed_add_up_to_all_gradients(name):
    codec, memory, state = CODECS[name](), ErrorFeedback(), {"seed": 1, "shared_seed": 2}
    if codec.unbiased and hasattr(codec, "ratio"):
        codec = CODECS[name](unbiased=False)
    g = torch.Generator().manual_seed(0)
    total, sent = torch.zeros(600, dtype=torch.float64), torch.zeros(600, dtype=torch.float64)
    for step in range(30):
        x = torch.randn(600, generator=g)
        total += x
        sent += one_step(memory, codec, x, state, codec.default(SPEC), step)
        largest = max(1.0, float(state["error"].abs().max()))
        assert torch.allclose(sent + state["error"], total, atol=2e-5 * largest)


@pytest.mark.parametrize(
    "codec",
    [TopK(0.02), RandK(0.1, unbiased=False), Sign(), LowRank(1), Quantise(2, stochastic=False, scale="max")],
    ids=str,
)
def test_gradient_descent_reaches_a_minimum_that_compression_alone_misses(codec):
    """Two workers whose gradients differ at the minimum: the mean of compressed ones is not 0 there, except in the long run."""
    g = torch.Generator().manual_seed(1)
    centres = [torch.randn(600, generator=g), torch.randn(600, generator=g)]
    best = (centres[0] + centres[1]) / 2

    def distance(memory):
        x = torch.zeros(600)
        states = [{"seed": rank, "shared_seed": 7} for rank in range(2)]
        trail = []
        for step in range(800):
            x = (
                x
                - 0.02
                * sum(
                    one_step(memory, codec, x - centre, state, codec.default(SPEC), step)
                    for centre, state in zip(centres, states, strict=True)
                )
                / 2
            )
            trail.append(x)
        return float((torch.stack(trail[-300:]).mean(0) - best).norm() / best.norm())

    with_memory = distance(ErrorFeedback())
    assert with_memory < 0.08
    if not isinstance(codec, RandK):  # its error is random, not against one direction
        assert with_memory < 0.5 * distance(NoMemory())


def test_earlier_states_stay_as_they_are():
    """An exchange undoes a step with a non-finite gradient by putting the old entries back."""
    memory, codec, state = ErrorFeedback(), TopK(0.1), {"seed": 1, "shared_seed": 2}
    one_step(memory, codec, torch.ones(600), state, 0.1, 0)
    held, copy = dict(state), state["error"].clone()
    x = torch.full((600,), float("nan"))
    memory.before(x, SPEC, state)
    assert torch.equal(held["error"], copy)


def test_the_gradient_itself_is_not_kept():
    """Its memory is DDP's bucket, which the next step overwrites."""
    memory, state, x = ErrorFeedback(), {}, torch.ones(600)
    memory.after(memory.before(x, SPEC, state), torch.zeros(600), None, state)
    x.fill_(9)
    assert torch.equal(state["error"], torch.ones(600))


def test_a_message_that_names_a_position_twice_is_taken_off_once():
    memory, state = ErrorFeedback(), {}
    y = memory.before(torch.ones(600), SPEC, state)
    memory.after(y, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([4, 8, 4]), state)
    assert state["error"][4] == 0 and state["error"][8] == 0 and float(state["error"].sum()) == 598


def test_a_dense_step_pays_the_debt():
    """A tensor that goes uncompressed for a step: all of y is sent."""
    memory, codec, state = ErrorFeedback(), TopK(0.1), {"seed": 1, "shared_seed": 2}
    one_step(memory, codec, torch.arange(600.0), state, 0.1, 0)
    y = memory.before(torch.ones(600), SPEC, state)
    memory.after(y, y, None, state)
    assert float(state["error"].abs().max()) == 0


@pytest.mark.parametrize("decay", [0.0, 1.1, -1.0])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        ErrorFeedback(decay)
