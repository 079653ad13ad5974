"""Backward operators that write over the gradient they are given, where nobody else has it.

Problem    autograd gives a node a gradient and takes another one; elementwise operators make it in fresh bytes though nobody
           reads the first again. At the beginning of a backward pass, where memory is shortest, that is one more activation.
Method     `over_its_gradient`: the operator's overload that writes where it is told, told to write there. To trace, plan and
           recipes it is an operator that writes in place, like the program's own.
Guarantee  the same bits, since the kernel is the same (`tracing.operators.OVER_GRADIENT`), and nobody misses the old ones:
           nobody else has them (`tracing.lone`), and no graph is made of the backward pass.
           The rule looks at one call and remembers nothing, so that online, replay and tracer follow the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.memory.execute.facts import Facts, facts_of
from weft.memory.tracing.lone import alone

__all__ = ["over_its_gradient"]


def over_its_gradient(
    facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Facts, dict[str, Any]] | None:
    """The operator (one with `Facts.over`) and keyword arguments with which the same call writes over its first argument; None
    if somebody may still want what is there."""
    if not alone(facts.name, args):
        return None
    _, variant, argument = facts.over
    return facts_of(variant), {**kwargs, argument: args[0]}
