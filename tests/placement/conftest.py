"""Memory that nothing wrote holds NaN in these tests, so that an operator that leaves a result unwritten is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_memory_is_seen() -> Iterator[None]:
    """What is left of the memory before is mostly zeros or tiny, and would pass (`multi_margin_loss` of no rows did)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
