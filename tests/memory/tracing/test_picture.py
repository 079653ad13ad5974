"""A trace as text and as a page: what it says adds up, and names are where one looks for them."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from tests.memory.models import make

from weft.memory.record import Op, Trace, Value
from weft.memory.schedule import Action, Schedule
from weft.memory.tracing.moments import by_category, curves, held_at, peak_operator, table
from weft.memory.tracing.picture import show
from weft.memory.tracing.tracer import trace

MIB = 2**20


def tiny() -> Trace:
    """w is there; a = f(w); b = g(a), with workspace; a is overwritten; b dies with it."""
    values = (
        Value(4 * MIB, 0, "parameter", "w", -1, 3),
        Value(8 * MIB, 1, "activation", "first", 0, 2),
        Value(2 * MIB, 2, "activation", "second", 1, 2),
        Value(8 * MIB, 1, "activation", "first", 2, 3),
    )
    ops = (
        Op("aten.f", "first", "forward", (0,), (1,), seconds=1.0),
        Op("aten.g", "second", "forward", (1,), (2,), workspace=MIB, seconds=3.0),
        Op("aten.h_", "second", "backward", (1, 2), (3,), ((1, 3),), seconds=1.0),
    )
    return Trace(ops, values, "toy", "Net")


class Page(HTMLParser):
    """Tags that open and close, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_what_is_held():
    found = tiny()
    assert found.live == (12 * MIB, 15 * MIB, 14 * MIB) and peak_operator(found) == 1
    assert by_category(found, 1) == {"parameter": 4 * MIB, "activation": 10 * MIB, "workspace": MIB}
    assert [v.name for v in held_at(found, 2)] == ["first", "w", "second"] and held_at(found, 2)[0].born == 2
    assert curves(found) == {
        "parameter": [4 * MIB] * 3,
        "activation": [8 * MIB, 10 * MIB, 10 * MIB],
        "workspace": [0, MIB, 0],
    }


@pytest.mark.parametrize("name", ["gpt", "tied", "bilstm"])
def test_curves_add_up(name):
    found = trace(*make(name), costs="cpu-core")
    assert [sum(column) for column in zip(*curves(found).values(), strict=True)] == list(found.live)
    for index in (0, len(found.ops) // 2, len(found.ops) - 1):
        assert sum(by_category(found, index).values()) == found.live[index]


def test_the_table():
    text = str(tiny())
    assert text == table(tiny())
    assert "peak 15.0 MiB at operator 1, aten.g in second (forward); 4.0 MiB are there all the time" in text
    assert "8.0 MiB  activation first: f" in text and "activation      10.0 MiB   66.7 %" in text
    assert "no operators" in str(Trace((), ()))


def test_the_page(tmp_path):
    found = trace(*make("gpt"), costs="cpu-core")
    path = found.show(tmp_path / "memory.html")
    text = path.read_text()
    page = Page(text)
    assert not page.open
    words = " ".join(page.words)
    assert "blocks.2.expand" in words and "blocks.0.attention: div_.Scalar" in words and "parameter" in words
    assert "http" not in text  # self-contained
    for number in text.split('d="M')[1].split('"')[0].replace("L", " ").replace("Z", " ").replace(",", " ").split():
        assert -1 <= float(number) <= 1060


def test_the_plans_curve_and_budget(tmp_path):
    class Plan:
        schedule = Schedule((Action("run", 0), Action("run", 1), Action("run", 2)))
        budget = 20 * MIB

    text = show(tiny(), tmp_path / "plan.html", Plan).read_text()
    assert 'class="plan"' in text and 'class="budget"' in text and "20.0 MiB" in text and "slower with the plan" in text
    assert 'class="plan"' not in show(tiny(), tmp_path / "plain.html").read_text()
    with pytest.raises(ValueError, match="Schedule"):
        show(tiny(), tmp_path / "wrong.html", Schedule((Action("run", 1),)))
