"""Checkpoints load into other plans and process counts; damaged ones change nothing; exports load into the plain module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.runtime.plans import HandPlan, Tiny, batch, plan_of, tiny
from tests.runtime.test_equal import engine_of

from weft.errors import CheckpointDamaged
from weft.placement.layout import Mesh, Replicate, Shard
from weft.runtime import export, read_whole
from weft.runtime.checkpoint import _is_chunked, check, dtensors, load, save
from weft.runtime.engine import Engine, Job
from weft.runtime.pieces import hold

NAMES = {"names": {name: "embed.weight" if name == "head.weight" else name for name in Tiny().state_dict()}}


def values(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: engine.whole(name).clone() for name in engine.names}


def train_and_save(plan: HandPlan, path: Path) -> tuple[dict[str, torch.Tensor], float]:
    engine = engine_of(plan, tiny())
    for step in range(3):
        engine.update(engine.accumulate([Job(batch(seed=step))]))
    save(engine, path, {**NAMES, "losses": [1.0]})
    kept = values(engine)
    engine.update(engine.accumulate([Job(batch(seed=3))]))
    return kept, engine.accumulate([Job(batch(seed=4))]).loss


def load_and_train(plan: HandPlan, path: Path) -> tuple[dict[str, torch.Tensor], float, int, dict[str, Any]]:
    engine = engine_of(plan, tiny(seed=5))
    about = load(engine, path)
    kept, steps = values(engine), engine.steps
    engine.update(engine.accumulate([Job(batch(seed=3))]))
    return kept, engine.accumulate([Job(batch(seed=4))]).loss, steps, about


def test_load_into_another_plan_and_process_count(pool: Any, tmp_path: Path) -> None:
    """dp on 2 -> zero-3 on 3 -> weighted zero-3 on 2 -> one process: weights, and the step after loading, agree."""
    path = tmp_path / "checkpoint"
    example = (tiny(), batch())
    want, after = pool(2).run(train_and_save, plan_of(*example, (2,), 0), path)[0]
    for processes, stage, weights in [(3, 3, None), (2, 2, (3, 1)), (2, 0, None)]:
        plan = plan_of(*example, (processes,), stage, weights)
        for found, then, steps, about in pool(processes).run(load_and_train, plan, path):
            assert steps == 3 and about["losses"] == [1.0]
            assert then == pytest.approx(after, rel=1e-5)
            for name, value in want.items():
                assert torch.equal(found[name], value), name


def test_save_cut_pieces(pool: Any, tmp_path: Path) -> None:
    """Pieces that DTensor can and cannot say, written by three processes and read by one."""
    path = tmp_path / "checkpoint"
    for weights in (None, (3, 1, 2)):
        plan = plan_of(tiny(), batch(), (3,), 3, weights)
        want, after = pool(3).run(train_and_save, plan, path)[0]
        found, then, _, _ = load_and_train(plan_of(tiny(), batch(), (1,), 0), path)
        assert then == pytest.approx(after, rel=1e-5)
        for name, value in want.items():
            assert torch.equal(found[name], value), name
        whole = read_whole(path)
        assert set(whole) == set(Tiny().state_dict())
        assert torch.equal(whole["head.weight"], want["embed.weight"])


def refused(plan: HandPlan, path: Path) -> tuple[str, bool]:
    engine = engine_of(plan, tiny())
    before = values(engine)
    try:
        load(engine, path)
    except (CheckpointDamaged, ValueError) as error:
        unchanged = all(torch.equal(before[name], value) for name, value in values(engine).items())
        return f"{type(error).__name__}: {error}", unchanged
    return "", False


def test_damaged(pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    plan = plan_of(tiny(), batch(), (2,), 3)
    pool(2).run(train_and_save, plan, path)
    tensors = next(path.glob("*.distcp"))
    content = tensors.read_bytes()

    def expect(words: str) -> None:
        for said, unchanged in pool(2).run(refused, plan, path):
            assert said.startswith("CheckpointDamaged") and words in said and unchanged

    tensors.write_bytes(content[: len(content) // 2])
    expect("bytes instead of")
    tensors.write_bytes(content[:-8] + bytes(8 * [7]))
    expect("has changed")
    tensors.unlink()
    expect("is missing")
    tensors.write_bytes(content)
    (path / "weft.json").write_text('{"format": 1')
    expect("weft.json cannot be read")
    with pytest.raises(ValueError, match="no checkpoint at"):
        check(tmp_path / "other")


def other_model(plan: HandPlan, path: Path) -> str:
    engine = engine_of(plan, Tiny(width=12))
    with pytest.raises(ValueError, match="another model") as error:
        load(engine, path)
    return str(error.value)


def test_other_model_and_replacing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    plan = plan_of(tiny(), batch(), (1,), 0)
    train_and_save(plan, path)
    first = (path / "weft.json").read_text()
    assert "embed.weight" in other_model(plan_of(Tiny(width=12), batch(), (1,), 0), path)
    train_and_save(plan, path)
    assert check(path)["steps"] == 3 and (path / "weft.json").read_text() != ""
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"], first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="something else than a checkpoint"):
        train_and_save(plan, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_save_that_dies_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    plan = plan_of(tiny(), batch(), (1,), 0)
    train_and_save(plan, path)
    engine = engine_of(plan, tiny())
    monkeypatch.setattr("weft.runtime.checkpoint._write_synced", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(engine, path, NAMES)
    assert check(path)["steps"] == 3


def test_export_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    want, _ = train_and_save(plan_of(tiny(), batch(), (1,), 0), path)
    file = export(path, tmp_path / "weights.safetensors")
    model = Tiny()
    model.load_state_dict(load_file(file))
    assert torch.equal(model.head.weight, want["embed.weight"])
    assert torch.equal(model.up.bias, want["up.bias"])


def as_dtensors(plan: HandPlan) -> dict[str, tuple[str, bool]]:
    engine = engine_of(plan, tiny())
    engine.update(engine.accumulate([Job(batch())]))
    state = dtensors(engine)
    found = {}
    for name, tensor in state["model"].items():
        same = torch.equal(tensor.full_tensor(), engine.whole(name))
        found[name] = (str(tensor.placements[0]), same)
        assert state["optimizer"]["state"][name]["exp_avg"].shape == tensor.shape
    return found


def test_state_dict_is_dtensors(pool: Any) -> None:
    for weights in (None, (1, 3)):
        for found in pool(2).run(as_dtensors, plan_of(tiny(), batch(), (2,), 3, weights)):
            assert set(found.values()) == {("S(0)", True)} or all(same for _, same in found.values())


def test_which_cuts_are_chunks() -> None:
    from weft.placement.assignment import ParameterPlacement

    def chunked(n: int, p: int, weights: tuple[float, ...] | None = None) -> bool:
        mesh = Mesh((p,))
        placement = ParameterPlacement.zero((Replicate(),), {0: Shard(0, weights)}, 3)
        return _is_chunked((n, 2), placement, mesh)

    assert chunked(4, 2) and chunked(5, 3) and chunked(7, 4)
    assert not chunked(4, 3) and not chunked(5, 4) and not chunked(8, 2, (3, 1))


def test_nested_cuts_keep_their_pieces_local() -> None:
    """Used cut on the inner axis and stored cut on the outer one: pieces refine the used shard."""
    from weft.placement.assignment import ParameterPlacement

    mesh = Mesh((2, 2))
    used = (Replicate(), Shard(0))
    placement = ParameterPlacement.zero(used, {0: Shard(0)}, 3)
    boxes = {}
    for position in mesh.positions():
        h = hold("w", (8, 3), torch.float32, True, placement, mesh, position)
        assert h.local == (4, 3) and h.piece_shape() == (2, 3)
        offsets = h.offsets()
        assert offsets is not None
        boxes[position] = offsets[0]
    assert boxes == {(0, 0): (0, 2), (1, 0): (2, 4), (0, 1): (4, 6), (1, 1): (6, 8)}
