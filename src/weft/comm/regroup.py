"""The memories of an exchange on another number of ranks.

Problem    each of n ranks has kept what it did not send yet; n' ranks go on.
Method     an exchange delivers means, so what is owed is the mean of the ranks' memories. Every new rank begins with it:
               e'_s = 1/n sum_r e_r      so that      1/n' sum_s e'_s = 1/n sum_r e_r                       `regrouped`
           What is equal on all ranks (a warm start, a reference) stays as it is; seeds are those of the new ranks.
Guarantee  the mean is conserved, to one rounding of float32, for every memory that is linear in what it keeps
           (`Memory.additive`) under the mean; rules that mistrust ranks, and memories at a server or owner, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.comm.combine import Combine
from weft.comm.core import seeds
from weft.comm.memory import Memory
from weft.comm.rules.mean import Mean
from weft.errors import ExchangeMismatch

__all__ = ["regrouped"]


def regrouped(
    saved: Sequence[Mapping[str, Any]],
    memory: Memory,
    combine: Combine,
    seed: int,
    own: int,
    ranks: int,
    parts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A `state_dict` for rank `own` of `ranks`, made of those of all ranks that saved, in their order.

    Args:
        saved: what `Exchange.state_dict` gave on ranks 0..n-1.
        memory, combine, seed: of the exchange that goes on.
        parts: `Spec.part` by tensor name; of those left out "".
    Raises:
        ExchangeMismatch: what the ranks kept has no exact form on another number of them.
    """
    first = saved[0]
    tensors, reason = first["tensors"], ""
    keepers = {name for state in saved for name, kept in state["states"].items() if _keeps(kept)}
    if not isinstance(combine, Mean):
        reason = f"{type(combine).__name__} mistrusts ranks, so their memories are not averaged"
    elif not memory.additive:
        reason = f"{type(memory).__name__} does not say that its mean is what is owed (Memory.additive)"
    elif not keepers <= set(tensors) or any(not keepers <= set(state["states"]) for state in saved):
        reason = "a server or owner keeps a memory of its own"
    elif any(isinstance(value, dict) and _keeps(value) for name in keepers for value in first["states"][name].values()):
        reason = "codes of segments have states of their own"
    if keepers and reason:
        raise ExchangeMismatch(
            "numbers of ranks of exchange and checkpoint", str(ranks), f"{len(saved)}; {reason}",
            f"Go on with {len(saved)} ranks, or start with empty memories.",
        )  # fmt: skip
    states = {}
    for name in sorted(keepers):
        states[name] = seeds(seed, name + (parts or {}).get(name, ""), own)
        for key, value in first["states"][name].items():
            if isinstance(value, Tensor):
                states[name][key] = _mean([state["states"][name][key] for state in saved])
    return {**first, "states": states, "rank": own, "ranks": ranks}


def _keeps(state: Mapping[str, Any]) -> bool:
    """Whether a state holds more than seeds."""
    return any(_keeps(value) if isinstance(value, dict) else isinstance(value, Tensor) for value in state.values())


def _mean(values: Sequence[Tensor]) -> Tensor:
    if all(torch.equal(value, values[0]) for value in values[1:]):
        return values[0]  # also so that it stays the same to the bit
    total = values[0].to(torch.float64, copy=True)
    for value in values[1:]:
        total += value
    return (total / len(values)).to(values[0].dtype)
