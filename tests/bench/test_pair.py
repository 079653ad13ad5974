"""The comparisons compare like with like: equal losses, every byte counted, the baselines as strong as they should be."""

from __future__ import annotations

import pytest

from weft.bench.pair import Contender, Setting, side_by_side

BASELINES = ("single", "ddp", "fsdp2", "tensor")
OURS = {"weft plan": "", "weft ZeRO-3": "zero-3", "weft tensor": "tp"}
SMALL = {"layers": 2, "width": 32, "heads": 2, "batch": 4, "tokens": 16, "count": 2}


@pytest.fixture(scope="module")
def rows():
    contenders = [Contender(name, f"weft.bench.baselines:{name}") for name in BASELINES]
    contenders += [
        Contender(name, "weft.bench.ours:planned", {"strategy": strategy}) for name, strategy in OURS.items()
    ]
    made = side_by_side(
        contenders, "weft.bench.problems:gpt_on_text", Setting(rounds=4, warmup=1, memory=True, timeout=120), SMALL
    )
    return {row.method: row.values for row in made}


@pytest.mark.slow
def test_all_train_the_same_model(rows):
    for name in (*BASELINES, *OURS):
        assert rows[name]["loss"] == pytest.approx(rows["single"]["loss"], rel=2e-5)


@pytest.mark.slow
def test_wire_bytes_are_what_the_method_must_move(rows):
    whole = rows["single"]["parameter_bytes"]
    assert rows["single"]["wire_bytes"] < 0.1 * whole
    assert whole < rows["ddp"]["wire_bytes"] < 4 * whole  # an all-reduce between two moves 2 |gradients|
    assert rows["fsdp2"]["wire_bytes"] > rows["ddp"]["wire_bytes"]


@pytest.mark.slow
def test_shards_are_shards(rows):
    whole = rows["ddp"]["parameter_bytes"]
    assert rows["fsdp2"]["parameter_bytes"] < 0.6 * whole
    assert rows["tensor"]["parameter_bytes"] < 0.7 * whole
    assert rows["fsdp2"]["peak_bytes"] > 0
    assert rows["weft ZeRO-3"]["parameter_bytes"] < 0.6 * whole
    assert rows["weft tensor"]["parameter_bytes"] < 0.7 * whole


@pytest.mark.slow
def test_every_number_is_there(rows):
    for values in rows.values():
        assert values["cpu_seconds"] > 0
        assert values["wall_seconds"] > 0


def test_a_failing_contender_fails_the_comparison():
    with pytest.raises(RuntimeError, match="worker failed"):
        side_by_side(
            [Contender("x", "weft.bench.baselines:nothing")],
            "weft.bench.problems:gpt_on_text",
            Setting(rounds=1, timeout=60),
            SMALL,
        )


@pytest.mark.parametrize("wrong", [{"processes": 0}, {"rounds": 0}, {"warmup": -1}])
def test_setting_is_checked(wrong):
    with pytest.raises(ValueError, match="Setting"):
        Setting(**wrong)
