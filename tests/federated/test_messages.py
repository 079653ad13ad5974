"""Changes on their way: what is coded, what is not, and what a memory keeps."""

from __future__ import annotations

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.codecs.top_k import TopK
from weft.comm.memories.error_feedback import ErrorFeedback
from weft.comm.memories.momentum_correction import MomentumCorrection
from weft.federated.messages import Coder

SPECS = [Spec("weight", (4, 5)), Spec("bias", (4,))]


def test_without_a_codec_a_message_is_the_change():
    coder, x = Coder(SPECS), torch.randn(24)
    message = coder.encode(x, 0, 0, {})
    assert torch.equal(coder.decode(message), x)
    assert coder.nbytes() == 96


def test_vectors_travel_whole_and_nothing_is_lost_for_good():
    coder, states, total = Coder(SPECS, TopK(0.1), ErrorFeedback()), {}, torch.zeros(24)
    x = torch.randn(24)
    for job in range(40):
        message = coder.encode(x, 3, job, states)
        assert [(tuple(m.shape), m.dtype) for m in message] == [(tuple(s), d) for s, d in coder.layout()]
        assert sum(m.numel() * m.element_size() for m in message) == coder.nbytes() < 96
        found = coder.decode(message)
        assert torch.equal(found[20:], x[20:])
        total += found
    assert torch.allclose(total / 40, x, atol=0.25 * float(x.abs().max()))


def test_a_change_that_is_not_finite_leaves_the_memory_alone():
    coder, states = Coder(SPECS, TopK(0.1), ErrorFeedback()), {}
    coder.encode(torch.randn(24), 0, 0, states)
    before = {name: dict(state) for name, state in states.items()}
    assert coder.encode(torch.full((24,), float("inf")), 0, 1, states) is None
    assert all(states[n][k] is v for n, state in before.items() for k, v in state.items())


def test_a_memory_with_momentum_is_refused():
    with pytest.raises(ValueError, match="memory must not carry momentum, got MomentumCorrection"):
        Coder(SPECS, TopK(0.1), MomentumCorrection(0.9))


def test_a_change_of_another_type_is_sent_as_this_one():
    coder = Coder(SPECS)
    for x in (torch.arange(24), torch.randn(24, dtype=torch.float64), torch.randn(24).half()):
        (message,) = coder.encode(x, 0, 0, {})
        assert message.dtype == torch.float32 and torch.equal(message, x.float())
    for wrong in (torch.zeros(23), torch.zeros(24, 1), None, [0.0] * 24):
        with pytest.raises(ValueError, match=r"a vector \(24,\), got"):
            coder.encode(wrong, 0, 0, {})


def test_what_means_something_else_has_another_fingerprint():
    coders = [Coder(SPECS), Coder(SPECS[:1]), Coder(SPECS, TopK(0.1)), Coder(SPECS, TopK(0.2)), Coder(SPECS[::-1])]
    coders.append(Coder([Spec("weight", (5, 4)), Spec("bias", (4,))]))
    assert len({coder.fingerprint() for coder in coders}) == len(coders)
    assert Coder(SPECS).fingerprint() == coders[0].fingerprint()
