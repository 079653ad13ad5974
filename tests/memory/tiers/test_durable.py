"""What the disk is asked to hold, in which order: what is left when the power fails, which no killed process can show."""

from __future__ import annotations

import os

import pytest
import torch
from tests.memory.tiers.training import ADAMW, SMALL, gpt, train_tiered

from weft.memory.tiers.manifest import Manifest, withdraw
from weft.memory.tiers.store import Tiers
from weft.memory.tiers.tiered import Tiered


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is asked of the disk below `tmp_path`, as ("what", "where") in its order."""
    found: list[tuple[str, str]] = []

    def watch(name: str, path) -> None:
        real = getattr(os, name)

        def watched(*args, **options):
            result = real(*args, **options)
            where = os.fspath(path(args))
            if where.startswith(str(tmp_path)):
                found.append((name, os.path.relpath(where, tmp_path)))
            return result

        monkeypatch.setattr(os, name, watched)

    for name in ("pwritev", "fdatasync", "fsync"):
        watch(name, lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))
    for name in ("rename", "unlink", "mkdir"):
        watch(name, lambda args: args[-1] if args[-1:] and not isinstance(args[-1], int) else args[0])
    return found


def test_a_step_is_on_the_disk_before_its_manifest_says_so(tmp_path, asked):
    model = gpt()
    with Tiered(model, ADAMW, Tiers("disk", "host", "disk"), tmp_path / "run", **SMALL) as tiered:
        asked.clear()
        train_tiered(model, tiered, range(1))
    own = "run/0/rank0"
    writes = [place for place, (what, _) in enumerate(asked) if what == "pwritev"]
    assert len(writes) > 1 and all(asked[place] == ("pwritev", f"{own}/state.bin") for place in writes)
    assert asked[writes[-1] + 1 :][:4] == [
        ("fdatasync", f"{own}/state.bin"), ("fsync", f"{own}/manifest.1.part"), ("rename", f"{own}/manifest.1"), ("fsync", own)
    ]  # fmt: skip


def test_so_are_the_folders_that_it_is_in(tmp_path, asked):
    Tiered(gpt(), ADAMW, Tiers("disk", "host", "disk"), tmp_path / "run", **SMALL).close()
    counts = asked.index(("rename", "run/0/rank0/manifest.0"))
    for folder in ("run", "run/0", "run/0/rank0"):
        above = os.path.dirname(folder) or "."
        assert ("fsync", above) in asked[asked.index(("mkdir", folder)) : counts], f"nobody has the disk hold {folder}"


def test_a_manifest_is_gone_before_its_places_are_written_again(tmp_path, asked):
    Manifest(3, 0, 1, "AdamW", {}, [], []).write(tmp_path)
    asked.clear()
    withdraw(tmp_path, 3)
    assert asked == [("unlink", "manifest.1"), ("fsync", ".")]


def test_the_manifest_of_before_is_back_before_its_places_are_written_again(tmp_path, asked):
    Manifest(4, 0, 1, "AdamW", {}, [], []).write(tmp_path)
    before = (tmp_path / "manifest.0").read_bytes()
    Manifest(4, 0, 1, "AdamW", {}, [], []).write(tmp_path, {"more": torch.zeros(1)})
    asked.clear()
    withdraw(tmp_path, 4, before)
    assert asked == [("fsync", "manifest.0.part"), ("rename", "manifest.0"), ("fsync", ".")]
