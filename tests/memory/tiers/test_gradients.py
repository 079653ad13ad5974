"""Gradients on their tier: sums of micro-batches are exact, whatever the disk has not done yet."""

from __future__ import annotations

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
