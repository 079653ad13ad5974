from __future__ import annotations

import math

import pytest

from weft.bench.harness import judge, render, run_system
from weft.bench.system import Claim, Results, Row, System, difference, ratio, value


def system(*claims: Claim) -> System:
    return System(
        name="a-system", title="A system", paper="arXiv:0000.00000", solves="nothing", use=("weft.plan",),
        baselines=("theirs",), claims=claims, tests=("tests/x.py",),
    )  # fmt: skip


FASTER = Claim("seconds, ours / theirs", ratio("seconds", "ours", "theirs"), at_most=0.5)


def test_medians_over_seeds():
    results = Results([Row("ours", seconds=s) for s in (1.0, 9.0, 2.0)])
    assert results["ours", "seconds"] == 2.0
    assert results.get("ours", "nbytes") is None
    with pytest.raises(KeyError, match="methods"):
        results["theirs", "seconds"]


def test_measures():
    results = Results([Row("ours", seconds=1.0), Row("theirs", seconds=4.0)])
    assert value("seconds", "ours")(results) == 1.0
    assert ratio("seconds", "ours", "theirs")(results) == 0.25
    assert difference("seconds", "ours", "theirs")(results) == 0.75


def test_claims_are_judged_on_the_rows_of_all_seeds():
    outcome = run_system(
        system(FASTER), lambda seed: [Row("ours", seconds=1.0 + seed), Row("theirs", seconds=4.0)], seeds=(0, 1, 2)
    )
    assert outcome.met
    assert outcome.claims[0].number == 0.5
    slow = run_system(system(FASTER), lambda seed: [Row("ours", seconds=2.1), Row("theirs", seconds=4.0)])
    assert not slow.met


def test_a_claim_without_its_rows_is_missed():
    (judged,) = judge(system(FASTER), Results([Row("theirs", seconds=1.0)]))
    assert not judged.met
    assert math.isnan(judged.number)


def test_nan_never_holds():
    assert not FASTER.holds(math.nan)
    assert Claim("x", value("a", "b"), at_least=1).holds(1.0)
    assert not Claim("x", value("a", "b"), at_least=1).holds(math.nan)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1, "at_most": 2}])
def test_a_claim_has_one_bound(bounds):
    with pytest.raises(ValueError, match="exactly one"):
        Claim("x", value("a", "b"), **bounds)


@pytest.mark.parametrize("change", [{"name": "Bad Name"}, {"claims": ()}, {"use": ()}, {"tests": ()}])
def test_an_entry_is_complete(change):
    options = {
        "name": "a",
        "title": "",
        "paper": "",
        "solves": "",
        "use": ("x",),
        "baselines": (),
        "claims": (FASTER,),
        "tests": ("t",),
    }
    with pytest.raises(ValueError, match="System"):
        System(**{**options, **change})


def test_seeds_are_needed_and_rows_are_told():
    with pytest.raises(ValueError, match="seed"):
        run_system(system(FASTER), lambda seed: [], seeds=())
    told = []
    run_system(
        system(FASTER),
        lambda seed: [Row("ours", seconds=seed)],
        (3, 4),
        lambda seed, row: told.append((seed, row.method)),
    )
    assert told == [(3, "ours"), (4, "ours")]


def test_the_table_shows_methods_and_verdicts():
    from rich.console import Console

    outcome = run_system(system(FASTER), lambda seed: [Row("ours", seconds=3.0), Row("theirs", seconds=4.0)])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(outcome))
    text = console.export_text()
    assert "theirs" in text
    assert "missed" in text
    assert "≤ 0.5" in text


def test_methods_of_one_kind_share_a_table():
    rows = [
        Row("ours", seconds=1.0, nbytes=2.0), Row("plan", share=0.5), Row("theirs", seconds=4.0),
        Row("ours, replayed", seconds=1.0, nbytes=2.0, peak=3.0),
    ]  # fmt: skip
    assert Results([*rows, *rows]).tables == [
        (["ours", "theirs", "ours, replayed"], ["seconds", "nbytes", "peak"]),
        (["plan"], ["share"]),
    ]


def test_curves_are_drawn_and_not_recorded():
    rows = [Row("ours", seconds=1.0).drawn([(0.0, 2.0), (1.0, 0.5)]), Row("theirs", seconds=4.0)]
    outcome = run_system(system(FASTER), lambda seed: rows, seeds=(0, 1))
    assert outcome.picture().count("<polyline") == 1 and "curve" not in rows[0].to_dict()
    assert run_system(system(FASTER), lambda seed: rows[1:]).picture() is None
