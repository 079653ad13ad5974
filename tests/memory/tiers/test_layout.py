"""Who holds which elements, and where they lie: every element once, nothing overlaps."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.memory.tiers.files import ALIGN, round_up
from weft.memory.tiers.layout import LANE, QUANTUM, Record, Shard, cut, shard_length, share

QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine


def test_cuts_fall_between_vectors():
    """512 bits hold 32 half-precision elements, and kernels take two such vectors at a time."""
    assert LANE % 64 == 0 and QUANTUM % LANE == 0 and QUANTUM % ALIGN == 0


@QUIET
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_shares_cover_a_tensor(numel, world):
    each = shard_length(numel, world)
    at = 0
    for rank in range(world):
        start, stop = share(numel, rank, world)
        assert start == min(at, numel) and start <= stop <= start + each
        assert world == 1 or start == numel or start % LANE == 0  # vectorised kernels see the same elements
        at += each
    assert share(numel, world - 1, world)[1] == numel


dtypes = st.sampled_from([torch.float32, torch.bfloat16])
sizes = st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 1), st.booleans(), dtypes), min_size=1, max_size=8)


@QUIET
@given(sizes, st.integers(1, 400_000), st.integers(0, 1))
def test_chunks_hold_every_element_once(sizes, nbytes, rank):
    shards = []
    for index, (numel, group, on_disk, dtype) in enumerate(sizes):
        start, stop = share(numel, rank, 2)
        shards.append(Shard(str(index), (numel,), dtype, start, stop, group, on_disk))
    found: dict[int, list[tuple[int, int]]] = {}
    for chunk in cut(shards, nbytes):
        assert chunk.segments
        held = sum(s.length for s in chunk.segments) * chunk.dtype.itemsize
        assert held <= max(nbytes, QUANTUM * chunk.dtype.itemsize)
        for segment in chunk.segments:
            shard = shards[segment.shard]
            assert (shard.group, shard.dtype, shard.on_disk) == (chunk.group, chunk.dtype, chunk.on_disk)
            # any segment can be read alone from a file that holds the shard in one piece
            assert (segment.start - shard.start) * shard.dtype.itemsize % ALIGN == 0
            found.setdefault(segment.shard, []).append((segment.start, segment.stop))
    for index, shard in enumerate(shards):
        parts = found.get(index, [])
        assert [p for part in parts for p in part][:1] == ([shard.start] if shard.length else [])
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        assert sum(stop - start for start, stop in parts) == shard.length
        # no more pieces than it takes, of near-equal length: an update waits for none but what must be in its chunk
        room = max(nbytes // shard.dtype.itemsize // QUANTUM, 1) * QUANTUM
        assert len(parts) <= -(-shard.length // room)
        assert len({stop - start for start, stop in parts[:-1]}) <= 1


@QUIET
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=5), st.integers(1, 3))
def test_areas_of_a_record_tile_it(lengths, count):
    arrays = tuple((f"a{i}", torch.float32 if i else torch.bfloat16) for i in range(count))
    record = Record(tuple(lengths), arrays)
    at = 0
    for a in range(count):
        assert record.start(a) == at
        for offset, nbytes in record.areas[a]:
            assert offset == at and offset % ALIGN == 0
            at += round_up(nbytes)
    assert record.nbytes == at == record.start(count)
    buffer = torch.zeros(record.nbytes, dtype=torch.uint8)
    for a in range(count):
        for k, length in enumerate(lengths):
            view = record.view(buffer, a, k)
            assert view.shape == (length,) and view.dtype == arrays[a][1] and not view.any()
            view.fill_(1)
