from __future__ import annotations

import importlib

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


def test_a_package_loads_its_names_when_they_are_used(tmp_path, monkeypatch):
    package = tmp_path / "sparse_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from weft.names import lazily\n"
        "__getattr__, __dir__ = lazily(__name__, {'one': 'first', 'two': 'second'}, ('third',))\n"
    )
    (package / "first.py").write_text("one = 1\n")
    (package / "second.py").write_text("raise ImportError('not needed')\n")
    (package / "third.py").write_text("three = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module("sparse_package")
    assert found.one == 1 and "one" in vars(found)  # the second look costs nothing
    assert found.third.three == 3
    assert {"one", "two"} <= set(dir(found))
    with pytest.raises(AttributeError, match="'sparse_package' has no attribute 'three'; it has one, two"):
        found.three  # noqa: B018
    with pytest.raises(ImportError, match="not needed"):
        found.two  # noqa: B018
