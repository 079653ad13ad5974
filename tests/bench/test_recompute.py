from __future__ import annotations

import pytest

from weft.bench.recompute import Way, measured


def test_what_slows_a_whole_round_down_slows_no_way_down():
    quiet = [[1.0] * 7, [1.1] * 7, [1.5] * 7]
    load = [1.0, 1.4, 1.0, 1.0, 2.0, 1.3, 1.0]  # of the machine, by others, in each round
    ways = []
    for number, taken in enumerate(quiet):
        seconds = [x * share for x, share in zip(taken, load, strict=True)]
        ways.append(Way(f"way {number}", None, seconds=seconds, wall=seconds))
    found = [row["cpu_seconds"] for row in measured(ways)]
    assert found == pytest.approx([1.0, 1.1, 1.5])
    ways[1].seconds[3] *= 3.0  # and one step alone
    found = [row["cpu_seconds"] for row in measured(ways)]
    assert found[1] / found[0] == pytest.approx(1.1)
