"""Memory that cannot be pinned is used unpinned, with one warning. No device is needed to be told no."""

from __future__ import annotations

import warnings

import pytest
import torch

from weft.memory.tiers import pinned
from weft.memory.tiers.files import ALIGN, aligned


@pytest.fixture
def limited(monkeypatch):
    """As with locked memory over its limit; the sizes that were asked for."""
    real, asked = torch.empty, []

    def empty(*size, pin_memory=False, **options):
        if pin_memory:
            asked.append(size)
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(pinned, "_warned", False)
    return asked


def test_memory_that_cannot_be_pinned_is_not(limited):
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error: out of memory\), and .*ulimit -l"):
        buffer = aligned(3 * ALIGN + 1, pin=True)
    assert limited and buffer.data_ptr() % ALIGN == 0 and buffer.numel() == 4 * ALIGN and not buffer.is_pinned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second says nothing
        aligned(ALIGN, pin=True)
        assert not pinned.host_memory((2, 3), torch.bfloat16, pin=True).is_pinned()
        aligned(ALIGN)
    assert len(limited) == 3


def test_no_memory_at_all_is_an_error(limited):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="allocate"):
            aligned(1 << 60, pin=True)
