"""Gradients on their tier: sums of micro-batches are exact, whatever the disk has not done yet."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch

from weft.memory.tiers.files import Disk
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.layout import QUANTUM, Segment, Shard


@pytest.mark.parametrize("on_disk", [False, True])
def test_sums_and_segments(tmp_path, monkeypatch, on_disk):
    pwritev = os.pwritev

    def slow(fd, views, offset):
        time.sleep(0.05)  # whoever reads before this is done reads nothing
        return pwritev(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", slow)
    shards = [
        Shard("a", (3 * QUANTUM,), torch.float32, 100, 100 + 2 * QUANTUM + 9, 0, False),
        Shard("b", (5,), torch.bfloat16, 0, 5, 0, False),
        Shard("c", (5,), torch.float32, 5, 5, 0, False),  # this process has none of it
    ]
    disk = Disk()
    kept = Gradients(shards, disk=disk if on_disk else None, folder=tmp_path if on_disk else None)
    sums = [torch.zeros(shard.length, dtype=shard.dtype) for shard in shards]
    generator = torch.Generator().manual_seed(0)
    for index, shard in enumerate(shards):
        for _ in range(3):
            gradient = torch.randn(shard.length, generator=generator).to(shard.dtype)
            sums[index] += gradient
            kept.add(index, gradient.clone())
    assert all(index in kept for index in range(3))
    first, rest = Segment(0, 100, 100 + QUANTUM), Segment(0, 100 + QUANTUM, shards[0].stop)
    kept.fetch(first)
    assert torch.equal(kept.get(rest), sums[0][QUANTUM:])
    assert torch.equal(kept.get(first), sums[0][:QUANTUM])
    assert torch.equal(kept.get(first), sums[0][:QUANTUM])  # once more: a step that failed is tried again
    assert torch.equal(kept.get(Segment(1, 0, 5)), sums[1])
    kept.drop(1)
    assert kept.get(Segment(1, 0, 5)) is None and 1 not in kept
    kept.clear()
    assert kept.get(first) is None
    kept.add(0, torch.ones(shards[0].length))
    assert kept.get(first).eq(1).all()
    kept.close()
    disk.close()
    assert list(tmp_path.iterdir()) == []


def three_shards(tmp_path, disk):
    shards = [Shard(name, (4096,), torch.float32, 0, 4096, 0, False) for name in "abc"]
    return Gradients(shards, disk=disk, folder=tmp_path)


def test_the_later_of_two_writes_to_one_place_stays(tmp_path, monkeypatch):
    pwritev, calls = os.pwritev, []

    def first_slow(fd, views, offset):
        calls.append(offset)
        if len(calls) == 1:
            time.sleep(0.3)  # long enough for the second to overtake it
        return pwritev(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", first_slow)
    disk = Disk()
    kept = three_shards(tmp_path, disk)
    kept.add(0, torch.ones(4096))
    kept.replace(0, torch.full((4096,), 2.0))
    assert kept.get(Segment(0, 0, 4096)).eq(2).all()
    kept.close()
    disk.close()


def test_gradients_that_a_failing_disk_has_lost(tmp_path, monkeypatch):
    """Whoever asks for one gets the error, however often; dropping them and closing need no disk that works."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    disk = Disk()
    kept = three_shards(tmp_path, disk)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        kept.add(0, torch.ones(4096))
        kept.add(1, torch.ones(4096))
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                kept.add(2, torch.ones(4096))  # waits for the first
            for index in range(2):
                with pytest.raises(OSError, match="Input/output"):
                    kept.get(Segment(index, 0, 4096))
        kept.clear()
        assert 0 not in kept and 1 not in kept
    kept.add(0, torch.ones(4096))  # to nothing
    assert kept.get(Segment(0, 0, 4096)).eq(1).all()
    monkeypatch.setattr(os, "pwritev", fail)
    kept.add(1, torch.ones(4096))
    kept.close()
    assert kept.file.fd == -1 and list(tmp_path.iterdir()) == []
    disk.close()
