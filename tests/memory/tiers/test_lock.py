"""One job per folder."""

from __future__ import annotations

import errno
import os

import pytest

from weft.errors import FolderInUse
from weft.memory.tiers.lock import Lock


def test_a_lock_is_for_one(tmp_path):
    lock = Lock(tmp_path, 0)
    with pytest.raises(FolderInUse, match="rank 0"):
        Lock(tmp_path, 0)
    other = Lock(tmp_path, 1)
    lock.close()
    Lock(tmp_path, 0).close()
    other.close()


def test_a_lock_that_cannot_be_signed_is_not_held(tmp_path, monkeypatch):
    """The disk is full. The error is kept, as a notebook does, and with it the frame in which the file is."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", full)
        with pytest.raises(OSError, match="No space") as kept:
            Lock(tmp_path, 0)
    Lock(tmp_path, 0).close()
    assert kept.value.errno == errno.ENOSPC


@pytest.mark.parametrize("how", ["closed", "gone"])
def test_a_forked_child_does_not_hold_the_lock(tmp_path, monkeypatch, how):
    """As a loader's workers, which outlive what they were forked in."""
    lock = Lock(tmp_path, 0)
    if how == "closed":
        monkeypatch.setattr("weft.memory.tiers.lock._HELD", set())  # a fork that Python is not told of
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        if how == "closed":
            lock.close()
        else:
            lock._file.close()  # what the end of a process does
        Lock(tmp_path, 0).close()
    finally:
        os.write(done[1], b".")
        os.waitpid(pid, 0)
