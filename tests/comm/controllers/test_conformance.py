"""One battery over the whole table of controllers: what `weft.comm.controller` promises of every one."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from weft.comm.agree import describe
from weft.comm.codec import Spec
from weft.comm.codecs import TopK
from weft.comm.controller import Controller
from weft.comm.controllers import CONTROLLERS, Accordion, LayerwiseBudget, Schedule, Uniform

MAKE = {  # with settings of TopK
    "accordion": lambda: Accordion(0.5, 0.1, every=3),
    "l-greco": lambda: LayerwiseBudget((0.1, 0.25, 0.5), 0.25, every=3, smallest=1),
    "schedule": lambda: Schedule([0.5, 0.25], 0.1, stage_steps=3),
    "uniform": lambda: Uniform(0.25),
}
SETTINGS = {0.1, 0.25, 0.5}
BAD = [
    ("accordion", {"low": 0.5, "high": 0.1, "eta": 0.0}, "eta"),
    ("accordion", {"low": 0.5, "high": 0.1, "every": 0}, "every"),
    ("l-greco", {"settings": (), "default": 0.1}, "settings"),
    ("l-greco", {"settings": (0.1,), "default": 0.2}, "default"),
    ("l-greco", {"settings": (0.1,), "default": 0.1, "alpha": 0.0}, "alpha"),
    ("l-greco", {"settings": (0.1,), "default": 0.1, "every": 0}, "every"),
    ("schedule", {"warmup": [], "final": 0.1}, "warmup"),
    ("schedule", {"warmup": [0.5], "final": 0.1, "stage_steps": 0}, "stage_steps"),
    ("uniform", {"setting": 0.1, "every": 0}, "every"),
]
SPECS = {"a": Spec("a", (8, 30)), "b": Spec("b", (200,))}
STEPS = 13
names = pytest.mark.parametrize("name", CONTROLLERS)


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    scale = (1.0, 1.0, 9.0, 9.0)[step // 3 % 4]  # some changes are fast, some are not
    return {name: scale * torch.randn(spec.numel, generator=generator).exp() for name, spec in SPECS.items()}


def bound(name):
    controller = MAKE[name]()
    controller.bind(TopK(0.25))
    return controller


def go(controller, steps, look=gradients):
    """Decisions in the order of an exchange: those of a step first, then its gradients."""
    found = []
    for step in steps:
        if step % controller.every == 0:
            found.append(dict(controller.decide(step, SPECS)))
        if controller.needs_gradient:
            for name, gradient in look(step).items():
                controller.observe(SPECS[name], gradient, step)
    return found


def test_the_table_is_the_battery():
    assert set(MAKE) == set(CONTROLLERS)
    for name, kind in CONTROLLERS.items():
        assert issubclass(kind, Controller) and type(MAKE[name]()) is kind


@names
def test_decides_the_same_again_and_for_settings_it_was_given(name):
    found = go(bound(name), range(STEPS))
    assert found == go(bound(name), range(STEPS))
    assert any(found), "it decides something"
    for decision in found:
        assert set(decision) <= set(SPECS) and set(decision.values()) <= SETTINGS
    first = bound(name).initial(SPECS["a"], 0.25)
    assert first in SETTINGS


@names
@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_goes_on_from_its_state_dict_also_between_decisions(name, stop):
    straight = go(bound(name), range(STEPS))
    controller = bound(name)
    found = go(controller, range(stop))
    file = io.BytesIO()
    state = controller.state_dict()
    torch.save(state, file)
    kept = copy.deepcopy(state)
    go(controller, range(stop, stop + 2))
    assert str(kept) == str(state), "a state that was taken stays as it is"
    file.seek(0)
    again = bound(name)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert found + go(again, range(stop, STEPS)) == straight


@names
def test_gradients_are_looked_at_only(name):
    seen = {}

    def look(step):
        seen[step] = gradients(step)
        return seen[step]

    go(bound(name), range(STEPS), look)
    for step, named in seen.items():
        assert all(torch.equal(named[key], gradients(step)[key]) for key in named)


@names
def test_what_is_agreed_depends_on_the_step_alone(name):
    controller = bound(name)
    if not controller.agreed:
        pytest.skip("its decisions are broadcast")
    assert not controller.needs_gradient
    assert [controller.decide(step, SPECS) for step in (6, 0)] == [bound(name).decide(step, SPECS) for step in (6, 0)]


def numbers_of(controller, step, specs):
    """What a controller passes through `total`, once, whatever it has seen."""
    asked = []
    copy.deepcopy(controller).decide(step, specs, lambda numbers: asked.append(numbers) or {})
    assert len(asked) == 1 and set(asked[0]) == set(specs)
    return asked[0]


@names
def test_parts_decide_as_the_whole_does_where_it_says_so(name):
    """Two groups with half of each tensor's rows, which add up what `decide` asks for."""
    if not bound(name).additive:
        pytest.skip("it is not additive")
    halves = {key: Spec(key, (spec.numel // 2,)) for key, spec in SPECS.items()}
    whole, groups = bound(name), [bound(name), bound(name)]
    for step in range(7):
        if step % whole.every == 0:
            parts = [numbers_of(group, step, halves) for group in groups]
            both = {
                key: [sum(column) for column in zip(*(part[key] for part in parts), strict=True)]
                for key in halves
                if None not in [part[key] for part in parts]
            }
            first, second = (dict(group.decide(step, halves, lambda numbers, both=both: both)) for group in groups)
            expected = dict(whole.decide(step, SPECS))
            assert first == second
            if name != "l-greco":  # top-k of halves errs otherwise than of the whole
                assert first == expected
        for key, gradient in gradients(step).items():
            whole.observe(SPECS[key], gradient, step)
            for group, part in zip(groups, gradient.chunk(2), strict=True):
                group.observe(halves[key], part, step)


@names
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_decides_nothing_odd(name, value):
    controller = bound(name)
    go(controller, range(4))
    if controller.needs_gradient:
        bad = gradients(4)
        bad["a"][3] = value
        for key, gradient in bad.items():
            controller.observe(SPECS[key], gradient, 4)
    assert set(controller.decide(6, SPECS).values()) <= SETTINGS
    after = go(controller, range(6, STEPS))
    assert any(after) and all(set(decision.values()) <= SETTINGS for decision in after)


@names
def test_options_are_told_apart_in_words(name):
    """By these ranks and checkpoints are compared: what has been seen is no option."""
    used = bound(name)
    before = describe(used)
    go(used, range(5))
    assert describe(used) == before == describe(bound(name))
    assert len({describe(MAKE[other]()) for other in MAKE}) == len(MAKE)
    assert all(hasattr(used, option) for option in used.options)


@pytest.mark.parametrize(("name", "options", "what"), BAD, ids=str)
def test_bad_options_are_named(name, options, what):
    kind = CONTROLLERS[name]
    with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{what}"):
        kind(**options)
