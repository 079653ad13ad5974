"""Which step a folder holds, and what tells a whole manifest from half of one."""

from __future__ import annotations

import pytest
import torch

from weft.errors import CheckpointDamaged
from weft.memory.tiers.files import aligned
from weft.memory.tiers.manifest import (
    ChunkEntry,
    Manifest,
    checksum,
    decode_small,
    encode_small,
    newest,
    read_extra,
    survey,
    withdraw,
)


def manifest(step: int, rank: int = 0, world: int = 1) -> Manifest:
    entry = ChunkEntry([("w", 0, 3)], [("parameter", "float32")], 0, step % 2, [[7]], [{"step": ["float32", step]}], 0)
    return Manifest(step, rank, world, "AdamW", {"w": ([3], "float32")}, [entry], [{"lr": 0.1}], {"epoch": 1})


def write(folder, layout, *steps, rank=0, world=1):
    own = folder / str(layout) / f"rank{rank}"
    own.mkdir(parents=True, exist_ok=True)
    for step in steps:
        manifest(step, rank, world).write(own)


def found(folder, seen=None):
    return newest(folder, [survey(folder)] if seen is None else seen)


def test_round_trip(tmp_path):
    write(tmp_path, 0, 4)
    assert Manifest.read(tmp_path / "0" / "rank0" / "manifest.0") == manifest(4)  # no extra tensors
    assert found(tmp_path) == (0, 4, 1)


def test_two_are_kept(tmp_path):
    write(tmp_path, 0, 3, 4, 5)
    assert sorted(path.name for path in (tmp_path / "0" / "rank0").iterdir()) == ["manifest.0", "manifest.1"]
    assert found(tmp_path) == (0, 5, 1)


def test_a_step_counts_when_every_rank_has_it(tmp_path):
    write(tmp_path, 0, 6, 7, rank=0, world=2)  # killed between the manifests of step 7
    write(tmp_path, 0, 5, 6, rank=1, world=2)
    assert found(tmp_path) == (0, 6, 2)


def test_a_run_that_has_not_begun_on_every_rank_has_not_begun(tmp_path):
    """Killed while it opened: there is nothing to lose, and so nothing that anybody has to delete first."""
    write(tmp_path, 0, 0, rank=0, world=2)
    assert found(tmp_path) is None
    (tmp_path / "0" / "rank1").mkdir()
    (tmp_path / "0" / "rank1" / "manifest.0").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match="no whole manifest"):
        found(tmp_path)


def test_a_layout_counts_when_every_rank_has_moved(tmp_path):
    for rank in range(2):
        write(tmp_path, 0, 6, 7, rank=rank, world=2)
    write(tmp_path, 1, 7, rank=0, world=3)  # killed while resuming on three
    assert found(tmp_path) == (0, 7, 2)
    for rank in range(1, 3):
        write(tmp_path, 1, 7, rank=rank, world=3)
    assert found(tmp_path) == (1, 7, 3)


def test_ranks_that_see_only_their_own_disk(tmp_path):
    seen = []
    for rank in range(2):
        write(tmp_path / str(rank), 0, 3, 4, rank=rank, world=2)
        seen.append(survey(tmp_path / str(rank)))
    assert found(tmp_path, seen) == (0, 4, 2)


def test_nothing_and_nothing_whole(tmp_path):
    assert found(tmp_path) is None and found(tmp_path / "not there") is None
    write(tmp_path, 0, 4, rank=0, world=2)
    with pytest.raises(CheckpointDamaged, match="every rank"):
        found(tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_half_a_manifest_is_none(tmp_path, cut):
    write(tmp_path, 0, 4, 5)
    path = tmp_path / "0" / "rank0" / "manifest.1"
    path.write_bytes(path.read_bytes()[:cut])
    assert found(tmp_path) == (0, 4, 1)


def test_another_version(tmp_path):
    import zlib

    write(tmp_path, 0, 4)
    path = tmp_path / "0" / "rank0" / "manifest.0"
    text = path.read_bytes().split(b"\n")[1].replace(b'"format":1', b'"format":9')
    path.write_bytes(b"%08x\n%s\n" % (zlib.crc32(text), text))
    with pytest.raises(ValueError, match="format 9"):
        found(tmp_path)


def test_small_states_come_back_exactly():
    state = {
        "step": torch.tensor(7.0),
        "product": torch.tensor(0.1, dtype=torch.float64),
        "eta": torch.tensor(1e-45),
        "count": torch.tensor(2**53 + 1),
        "plain": 0.1,
        "none": None,
        "flag": True,
    }
    import json

    back = decode_small(json.loads(json.dumps(encode_small(state))))
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert back[key].dtype == value.dtype and torch.equal(back[key], value)
        else:
            assert back[key] is value or back[key] == value


def test_checksums_see_bits_and_order():
    buffer = aligned(4 * 4096).random_(generator=torch.Generator().manual_seed(0))
    own = checksum(buffer)
    for position in (0, 4095, 4096, 16383):
        buffer[position] ^= 1
        assert checksum(buffer) != own
        buffer[position] ^= 1
    assert checksum(buffer) == own
    swapped = torch.cat([buffer[4096:8192], buffer[:4096], buffer[8192:]])
    assert checksum(swapped) != own
    assert checksum(torch.zeros_like(buffer)) != own


def test_extra_tensors(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.tensor([10, 2])}
    entry = manifest(4)
    entry.write(tmp_path, tensors)
    back = read_extra(tmp_path, Manifest.read(tmp_path / "manifest.0"))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    path = tmp_path / "manifest.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointDamaged, match="after it is cut short"):
        Manifest.read(path)
    manifest(5).write(tmp_path)
    assert read_extra(tmp_path, Manifest.read(tmp_path / "manifest.1")) == {}


def test_a_step_that_is_withdrawn(tmp_path):
    write(tmp_path, 0, 3, 4, 5)
    own = tmp_path / "0" / "rank0"
    before = (own / "manifest.0").read_bytes()
    withdraw(own, 5)
    assert found(tmp_path) == (0, 4, 1)
    withdraw(own, 5)
    manifest(4).write(own, {"more": torch.zeros(3)})
    for _ in range(2):
        withdraw(own, 4, before)
        assert (own / "manifest.0").read_bytes() == before
    withdraw(own, 6)  # it is of another step, and stays
    assert found(tmp_path) == (0, 4, 1)
    withdraw(tmp_path / "gone", 5)


def test_notes_go_with_a_step(tmp_path):
    made = manifest(4)
    made.notes = {"milestones": (1, {2: 3})}
    made.write(tmp_path)
    assert Manifest.read(tmp_path / "manifest.0").notes == made.notes
    made.notes = {"loss": torch.tensor(1.0)}
    before = (tmp_path / "manifest.0").read_bytes()
    with pytest.raises(ValueError, match="is a Tensor"):
        made.write(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
