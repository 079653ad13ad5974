"""Files that hold something else than they are read as: one error, which names the file."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from torch import nn

from weft.errors import Unreadable
from weft.memory import CostTable, MemoryPlan, Trace, plan, trace


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one file of each kind."""
    folder = tmp_path_factory.mktemp("saved")
    traced = trace(nn.Linear(4, 4), torch.ones(2, 4), lambda out, _: out.sum())
    for ending in ("json", "z"):
        traced.save(folder / f"Trace.{ending}")
        plan(traced).save(folder / f"MemoryPlan.{ending}")
        CostTable("cpu", {"a": 1.0}).save(folder / f"CostTable.{ending}")
    return folder


KINDS = [Trace, MemoryPlan, CostTable]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["json", "z"])
def test_damaged_files(kind, ending, saved, tmp_path):
    whole = (saved / f"{kind.__name__}.{ending}").read_bytes()
    other_form = (saved / f"{kind.__name__}.{'z' if ending == 'json' else 'json'}").read_bytes()
    assert kind.load(saved / f"{kind.__name__}.{ending}")
    contents = [b"", os.urandom(200), whole[: len(whole) // 2], whole[:-1], other_form, b"[" * 100_000]
    if ending == "json":
        contents += [b"[1, 2]", b"3", b"null", b"{}", b'{"format": 1}', b'{"format": 99}']
    path = tmp_path / f"plan.{ending}"
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(Unreadable, match=r"plan\.") as caught:
            kind.load(path)
        assert caught.value.path == str(path) and kind.__name__ in caught.value.remedy
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for place in (tmp_path / "missing", tmp_path):
        with pytest.raises(Unreadable, match=r"No such file|directory"):
            kind.load(place)


@pytest.mark.parametrize("kind", KINDS)
def test_any_entry_that_is_wrong(kind, saved, tmp_path):
    data, path = json.loads((saved / f"{kind.__name__}.json").read_text()), tmp_path / "altered.json"
    for entry in {*data} - {"result", "notes", "workspace"}:  # told, or to be left out
        path.write_text(json.dumps({key: value for key, value in data.items() if key != entry}))
        with pytest.raises(Unreadable):
            kind.load(path)
    for entry in {*data} & {"format", "ops", "values", "trace", "actions", "seconds"}:
        for wrong in (None, 3, "text", [3], {"a": 1}, [[]]):
            if not (kind is CostTable and isinstance(wrong, (dict, list))):
                path.write_text(json.dumps({**data, entry: wrong}))
                with pytest.raises(Unreadable):
                    kind.load(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_files_of_another_kind_say_what_they_are(kind, other, saved):
    if kind is not other:
        with pytest.raises(Unreadable, match=f"it holds a weft.memory.{other.__name__}, whose load"):
            kind.load(saved / f"{other.__name__}.json")
