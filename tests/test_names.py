from __future__ import annotations

import pytest

from weft.names import nearest, pick


def test_exact_and_differently_written():
    table = {"top-k": 1, "sign-sgd": 2}
    assert pick("top-k", table, "compressor") == 1
    assert pick("Sign_SGD", table, "compressor") == 2


def test_misspelt_names_the_nearest():
    with pytest.raises(ValueError, match=r"no compressor is called 'top-j'; did you mean top-k\?"):
        pick("top-j", {"top-k": 1, "power-sgd": 2}, "compressor")


def test_nothing_near_lists_all():
    with pytest.raises(ValueError, match="known are power-sgd, top-k"):
        pick("zzzzzz", {"top-k": 1, "power-sgd": 2}, "compressor")
    with pytest.raises(ValueError, match="there are none"):
        pick("x", {}, "task")


def test_two_names_that_differ_only_in_writing_are_not_confused():
    assert pick("a_b", {"a_b": 1, "a-b": 2}, "x") == 1
    with pytest.raises(ValueError, match="did you mean"):
        pick("A_B", {"a_b": 1, "a-b": 2}, "x")


def test_nearest_is_best_first():
    assert nearest("H10", ["T4", "H100", "A100"])[0] == "H100"
    assert nearest("", ["a"]) == []
