"""What is measured of the tier below a device: plausible figures, and refusals before anything is measured."""

from __future__ import annotations

import os
from collections import namedtuple

import pytest
import torch

from weft.cluster import Tier
from weft.cluster.profiler import tier_of
from weft.errors import DiskFull
from weft.memory.tiers import rates
from weft.memory.tiers.rates import check_folder, copies, measured


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(rates, "SIZES", (64 << 10, 1 << 20))
    monkeypatch.setattr(rates, "BESIDE", 64 << 10)
    monkeypatch.setattr(rates, "AT_ONCE", 2 << 20)


def test_a_folder_becomes_a_tier(tmp_path, small):
    found = copies(str(tmp_path), quick=True)
    assert (found.to, found.folder) == ("disk", str(tmp_path)) and found.room > 0 and found.place
    assert [nbytes for nbytes, _, _ in found.seconds] == [64 << 10, 1 << 20]
    assert all(there > 0 and back > 0 for _, there, back in found.seconds) and 0 <= found.overlap <= 1
    tier = measured(str(tmp_path))
    assert tier.name == "disk" and tier.folder == str(tmp_path) and 1e6 < tier.bandwidth < 1e11 and tier.latency < 1
    assert not any(tmp_path.iterdir())  # the file had no name


def test_copies_of_processes_that_share_a_disk_are_one_tier():
    """Seconds of a link of 1e-4 s and 1e9 bytes/s there, 0.5e9 back: on one link the mean counts. Room is shared out."""
    one = {
        "to": "disk", "folder": "/fast", "place": "", "room": 10**12, "overlap": 0.5,
        "seconds": [(n, 1e-4 + n / 1e9, 1e-4 + n / 0.5e9) for n in (10**5, 10**6, 10**7)],
    }  # fmt: skip
    tier, rows = tier_of([one, {**one, "room": 9 * 10**11}, {**one, "overlap": 0.7}], 3)
    assert tier == Tier(tier.bandwidth, tier.latency, 3 * 10**11, "disk", "/fast", 0.5)
    assert tier.bandwidth == pytest.approx(2e9 / 3, rel=0.01) and tier.latency == pytest.approx(1e-4, rel=0.05)
    assert [label for label, _, _ in rows][-2:] == ["9 MiB there", "9 MiB back"]
    assert tier_of([{**one, "overlap": None}], 1)[0].overlap is None


def test_folders_that_will_not_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no folder; make it first"):
        check_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        copies(str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(ValueError, match="one may not write"):
        check_folder(tmp_path)
    monkeypatch.undo()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rates.shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 5, 5))
    with pytest.raises(DiskFull, match="measuring an offload folder"):
        copies(str(tmp_path))


def test_tiers_that_are_not_below_a_device(tmp_path):
    with pytest.raises(ValueError, match="name a folder on a disk"):
        copies("host")
    with pytest.raises(ValueError, match="say host"):
        copies(str(tmp_path), torch.device("cuda"))
