"""Fixtures for all tests: `pool`, worker processes joined by gloo (see tests/workers.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Neither inputs nor tests are wrong because a busy machine is slow.
settings.register_profile("weft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("weft")

# Read when torch is imported: the worker processes have one thread each, and sums by two have other last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)  # `tests.workers`, here and in the worker processes

from tests.workers import Pool, Workers  # noqa: E402


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n).run(fn, *args)`: run `fn` on n processes with torch.distributed initialised; the results in rank order."""
    workers = Workers()
    yield lambda size: Pool(workers, size)
    workers.close()
