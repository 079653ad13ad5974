"""Accordion's switch between two settings, by the norm of the summed gradient."""

from __future__ import annotations

import math

import pytest
import torch

from weft.comm.codec import Spec
from weft.comm.controllers.accordion import Accordion
from weft.comm.controllers.uniform import Uniform

SPECS = {"w": Spec("w", (4,))}


def decision(controller, value):
    controller.observe(SPECS["w"], torch.full((4,), value), 0)
    return controller.decide(0, SPECS).get("w")


def test_low_compression_first_and_where_the_norm_changes():
    controller = Accordion(low=0.1, high=0.01, eta=0.5)
    found = [decision(controller, value) for value in (1.0, 0.9, 0.4, 0.39, 0.7, 1.0)]
    assert found == [0.1, 0.01, 0.1, 0.01, 0.1, 0.01]
    assert decision(controller, math.nan) is None  # keeps its setting
    assert decision(controller, 1.0) == 0.01
    assert controller.decide(0, SPECS) == {}


def test_sums_between_decisions_and_resumes():
    controller = Accordion(low=2, high=1)
    decision(controller, 1.0)
    controller.observe(SPECS["w"], torch.full((4,), 0.5), 1)
    other = Accordion(low=2, high=1)
    other.load_state_dict(controller.state_dict())
    assert decision(controller, 0.5) == decision(other, 0.5) == 1  # 0.5 + 0.5 against 1
    with pytest.raises(ValueError, match="another controller"):
        other.load_state_dict({"step": 0})


def test_bad_options_and_uniform():
    with pytest.raises(ValueError, match="eta must be > 0"):
        Accordion(low=2, high=1, eta=0)
    assert Uniform(0.01).decide(3, SPECS) == {"w": 0.01}
