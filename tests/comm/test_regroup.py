"""Memories on another number of ranks: what all owe together stays the same, or a named refusal."""

from __future__ import annotations

import pytest
import torch

from weft.comm import ErrorFeedback, Mean, Median
from weft.comm.regroup import regrouped
from weft.errors import ExchangeMismatch


def saved(*errors, of_owner=None, dtype=torch.float32):
    """What ranks with these errors of one tensor saved; the last one serves, with or without a memory."""
    states = [{"w": {"seed": 1, "error": torch.tensor(error, dtype=dtype), "w[0:1]": {"seed": 2}}} for error in errors]
    states[-1]["server of w"] = {"seed": 3, **(of_owner or {})}
    return [{"tensors": {"w": ((2,), str(dtype))}, "states": own, "rank": r} for r, own in enumerate(states)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_is_conserved_and_a_server_without_memory_is_no_hindrance(dtype):
    ranks = saved([1.0, -2.0], [3.0, 5.0], dtype=dtype)
    found = [regrouped(ranks, ErrorFeedback(), Mean(), 0, own, 3) for own in range(3)]
    for own, state in enumerate(found):
        assert state["states"]["w"]["error"].tolist() == [2.0, 1.5] and (state["rank"], state["ranks"]) == (own, 3)
    assert len({state["states"]["w"]["seed"] for state in found}) == 3
    assert len({state["states"]["w"]["shared_seed"] for state in found}) == 1


@pytest.mark.parametrize(
    ("rule", "of_owner", "reason"),
    [(Mean(), {"error": torch.ones(2)}, "server or owner keeps"), (Median(), None, "mistrusts ranks")],
)
def test_what_has_no_exact_form_is_refused(rule, of_owner, reason):
    with pytest.raises(ExchangeMismatch, match=reason):
        regrouped(saved([1.0, 2.0], [3.0, 4.0], of_owner=of_owner), ErrorFeedback(), rule, 0, 0, 3)
