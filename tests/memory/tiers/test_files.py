"""Reading and writing past the page cache."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import warnings

import pytest
import torch

from weft.errors import CheckpointDamaged, DiskFull
from weft.memory.tiers.files import ALIGN, Disk, DiskFile, LimitReached, aligned, describe, measure, round_up

MIB = 1 << 20
SIZES = [1, 511, 512, 513, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB + 17]


@pytest.fixture
def disk():
    made = Disk(threads=3, block=64 << 10)
    yield made
    made.close()


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("size", SIZES)
def test_round_trip(tmp_path, disk, size, direct):
    content = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    buffer, back = aligned(size), aligned(size)
    buffer[:size] = content
    file = DiskFile(tmp_path / "x", 3 * round_up(size), direct=direct)
    offset = round_up(size)  # between two other records
    disk.write(file, buffer, offset).wait()
    file.sync()
    disk.read(file, back, offset).wait()
    file.close()
    assert torch.equal(back[:size], content)
    whole = (tmp_path / "x").read_bytes()
    assert len(whole) == 3 * round_up(size) and whole[offset : offset + size] == bytes(content.tolist())
    assert disk.bytes_read == disk.bytes_written == round_up(size)


def test_long_transfers_are_cut_into_near_equal_parts(tmp_path, disk, monkeypatch):
    file, buffer, parts = DiskFile(tmp_path / "x", MIB), aligned(9 * 16 * 1024), []
    real = file.write_now
    monkeypatch.setattr(file, "write_now", lambda view, offset: (parts.append((offset, len(view))), real(view, offset)))
    disk.write(file, buffer, 0).wait()  # 144 KiB in blocks of at most 64: three, not two and a small one
    assert sorted(parts) == [(0, 48 << 10), (48 << 10, 48 << 10), (96 << 10, 48 << 10)]
    disk.write(file, buffer[:0], 0).wait()
    assert len(parts) == 3
    file.close()


def test_buffers_are_aligned():
    for size in SIZES:
        buffer = aligned(size)
        assert buffer.data_ptr() % ALIGN == 0 and buffer.numel() == round_up(size) and buffer.dtype == torch.uint8


@pytest.mark.parametrize("what", ["offset", "length", "address", "dtype", "outside"])
def test_what_the_disk_would_refuse_is_refused_before(tmp_path, disk, what):
    file, buffer, offset = DiskFile(tmp_path / "x", 2 * ALIGN), aligned(2 * ALIGN), 0
    if what == "offset":
        buffer, offset = buffer[:ALIGN], 512
    elif what == "length":
        buffer = buffer[: ALIGN + 1]
    elif what == "address":
        buffer = aligned(3 * ALIGN)[1 : 1 + ALIGN]
    elif what == "dtype":
        buffer = buffer.view(torch.float32)
    else:
        offset = ALIGN
    with pytest.raises(ValueError):
        disk.write(file, buffer, offset)
    file.close()


def test_a_file_cut_short_is_seen(tmp_path, disk):
    path = tmp_path / "x"
    file = DiskFile(path, 4 * ALIGN)
    os.truncate(path, ALIGN)
    with pytest.raises(CheckpointDamaged, match="ends at byte 4096"):
        disk.read(file, aligned(4 * ALIGN), 0).wait()
    file.close()


def test_too_large_is_found_before_anything_is_written(tmp_path):
    place = describe(tmp_path)
    with pytest.raises(DiskFull) as caught:
        DiskFile(tmp_path / "x", place.free + (1 << 40))
    assert caught.value.need > caught.value.have > 0
    assert not (tmp_path / "x").exists() or (tmp_path / "x").stat().st_size == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up(tmp_path, disk, monkeypatch, number):
    file = DiskFile(tmp_path / "x", MIB)

    def full(fd, views, offset):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(DiskFull) as caught:
        disk.write(file, aligned(MIB), 0).wait()
    again = pickle.loads(pickle.dumps(caught.value))  # it travels between ranks
    assert str(again) == str(caught.value) and str(file.path) in str(again)
    assert isinstance(again, OSError)
    assert ("free some space" in str(again)) == (number == errno.ENOSPC)
    assert ("quota" in str(again)) == (number == errno.EDQUOT)
    assert ("no file of that size" in str(again)) == (number == errno.EFBIG)  # of this process no size is limited
    file.close()


@pytest.mark.parametrize("when", ["made", "grown", "written"])
def test_a_limit_of_the_process_is_named(tmp_path, disk, when):
    """`ulimit -f`: there is room on the disk, so nobody should go and look for some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = DiskFile(tmp_path / "x", MIB if when == "grown" else 4 * MIB)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
        with pytest.raises(LimitReached, match=rf"no file of more than {2 * MIB} bytes; .*ulimit -f") as caught:
            if when == "made":
                DiskFile(tmp_path / "y", 4 * MIB)
            elif when == "grown":
                file.grow(4 * MIB)
            else:
                disk.write(file, aligned(4 * MIB), 0).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value, DiskFull) and "free some" not in str(caught.value)
    assert file.size == (MIB if when == "grown" else 4 * MIB)
    file.close()


def test_a_file_that_was_longer(tmp_path, disk):
    """As one that a killed job has left: what is behind its end is not ours."""
    (tmp_path / "x").write_bytes(bytes(5 * ALIGN))
    file = DiskFile(tmp_path / "x", 2 * ALIGN)
    assert file.size == (tmp_path / "x").stat().st_size == 2 * ALIGN
    with pytest.raises(ValueError, match="outside the file"):
        disk.write(file, aligned(ALIGN), 2 * ALIGN)
    file.close()


def test_short_writes_and_reads_are_continued(tmp_path, disk, monkeypatch):
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, [views[0][:ALIGN]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:ALIGN]], offset))
    file, buffer, back = DiskFile(tmp_path / "x", 8 * ALIGN), aligned(8 * ALIGN).random_(), aligned(8 * ALIGN)
    disk.write(file, buffer, 0).wait()
    disk.read(file, back, 0).wait()
    file.close()
    assert torch.equal(buffer, back)


def test_without_o_direct_there_is_one_warning(tmp_path, monkeypatch):
    from weft.memory.tiers import files

    open_ = os.open

    def refuses(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return open_(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    monkeypatch.setattr(files, "_WARNED", set())
    with pytest.warns(UserWarning, match="O_DIRECT"):
        file = DiskFile(tmp_path / "x", ALIGN)
    assert not file.direct
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = DiskFile(tmp_path / "y", ALIGN)
    with pytest.raises(ValueError, match="O_DIRECT"):
        DiskFile(tmp_path / "z", ALIGN, direct=True)
    assert not describe(tmp_path).direct
    file.close()
    other.close()


def test_reserved_bytes_are_the_disks(tmp_path):
    file = DiskFile(tmp_path / "x", 5 * MIB + 1)
    assert file.size == round_up(5 * MIB + 1)
    assert os.stat(tmp_path / "x").st_blocks * 512 >= file.size
    file.grow(7 * MIB)
    assert file.size == 7 * MIB and os.stat(tmp_path / "x").st_blocks * 512 >= file.size
    file.close()


def test_describe_and_measure(tmp_path):
    place = describe(tmp_path)
    assert place.filesystem != "unknown" and place.free > 0
    assert place.is_memory == (place.filesystem in ("tmpfs", "ramfs"))
    rates = measure(tmp_path, 4 * MIB, threads=2, block=MIB)
    assert rates["read"] > 0 and rates["write"] > 0
    assert list(tmp_path.iterdir()) == []
