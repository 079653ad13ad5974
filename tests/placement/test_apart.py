"""Work in a forked child: a crash costs one result, not the process."""

from __future__ import annotations

import ctypes
import os
import time

import pytest
import torch

from weft.placement.apart import each_apart
from weft.placement.layout import Replicate
from weft.placement.probe import discover

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_results_come_in_order():
    assert each_apart(lambda n: n * n, range(50)) == [n * n for n in range(50)]


def test_a_crash_costs_its_own_result_only():
    def work(n):
        if n in (2, 5):
            ctypes.string_at(0)
        return n

    assert each_apart(work, range(8)) == [0, 1, None, 3, 4, None, 6, 7]


def test_too_many_crashes_end_it():
    assert each_apart(lambda n: os.abort(), range(9), crashes=3) == [None] * 9


def test_a_stalled_task_has_no_result():
    assert each_apart(lambda n: time.sleep(60) if n == 1 else n, range(3), seconds=0.5) == [0, None, 2]


def test_large_results_come_whole():
    [found] = each_apart(lambda n: bytes(range(256)) * n, [20_000])
    assert found == bytes(range(256)) * 20_000


def test_no_child_is_left():
    children = each_apart(lambda n: os.getpid(), range(2))
    assert len(set(children)) == 1  # both tasks were done by one child
    with pytest.raises(
        ChildProcessError
    ):  # reaped already, so it is no child of ours any more; other tests may have some
        os.waitpid(children[0], os.WNOHANG)


def test_an_operator_that_reads_out_of_bounds_is_probed_in_peace(tmp_path, monkeypatch):
    """torch's `_weight_norm` does not check that g fits v."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    found = discover("aten._weight_norm.default", (torch.randn(6, 4), torch.randn(6, 1), 0))
    assert any(s.outputs[0] != Replicate() for s in found)
