"""Methods of a comparison take turns: what else the machine does then meets all of them alike.

    rotated           whoever was first in one round is last in the next: 0 1 2, 1 2 0, 2 0 1, ...
    there_and_back    every other round runs in the opposite order: 0 1 2, 2 1 0, ...
    watch             what a block took on this process                                          `Taken`
    across            what rounds took on all processes: medians over the rounds
    least             the shortest of several rounds, for work that nothing waits for

CPU seconds are the steadier number on a shared machine; wall seconds also see who waited for whom.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["Taken", "across", "least", "rotated", "there_and_back", "watch"]

T = TypeVar("T")


@dataclass
class Taken:
    """CPU seconds of all threads of this process, wall seconds, and bytes if the caller counts them."""

    cpu: float = 0.0
    wall: float = 0.0
    nbytes: float = 0.0


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The order of one round."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def there_and_back(items: Sequence[T], turn: int) -> list[T]:
    """The order of one round."""
    return list(items) if turn % 2 == 0 else list(items)[::-1]


@contextmanager
def watch() -> Iterator[Taken]:
    """Fills in what is yielded when the block has ended."""
    taken = Taken()
    cpu, wall = time.process_time(), time.perf_counter()
    yield taken
    taken.cpu, taken.wall = time.process_time() - cpu, time.perf_counter() - wall


def across(processes: Sequence[Sequence[Taken]]) -> dict[str, float]:
    """Medians over the rounds of every process: CPU seconds of all, wall seconds of the slowest, bytes of the first."""
    rounds = list(zip(*processes, strict=True))
    return {
        "cpu_seconds": statistics.median(sum(taken.cpu for taken in round_) for round_ in rounds),
        "wall_seconds": statistics.median(max(taken.wall for taken in round_) for round_ in rounds),
        "wire_bytes": statistics.median(round_[0].nbytes for round_ in rounds),
    }


def least(
    rivals: Mapping[str, Callable[[], Any]], rounds: int, enough: float = math.inf
) -> tuple[dict[str, float], dict[str, Any]]:
    """Least CPU seconds of each in so many rounds, and what they returned; one that takes over `enough` seconds is the last."""
    best = dict.fromkeys(rivals, math.inf)
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in rivals.items():
            found.pop(name, None)  # so that two results never lie in memory
            with watch() as taken:
                found[name] = call()
            best[name] = min(best[name], taken.cpu)
        if sum(best.values()) > enough:
            break
    return best, found
