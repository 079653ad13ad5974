"""Cases that only `make test-slow` runs: the default suite has to end within a quarter of an hour on two cores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["slow", "slow_but"]


def slow(*values: Any) -> Any:
    """One case."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(default: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases of one parameter; those that are not among `default` are slow."""
    always = list(default)
    return [case if case in always else slow(case) for case in cases]
