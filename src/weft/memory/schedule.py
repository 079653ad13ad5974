"""What is done, in order, to run one traced step within a budget: the contract between planning and execution.

A `Schedule` is a list of actions over the operators and values of a `Trace`:

    run i          operator i, as the user's program calls it; every operator once, in order
    again i        operator i once more; the values of it that are not there come back, the others are thrown away
    drop v         give the bytes of value v back; it can come back through `again` or `load`
    save v, load v copy value v to the lower tier (it stays here until dropped), bring it back
    move v         copy v to another address of the arena

A value whose last reference dies (`Value.dies`) gives its bytes back by itself after that operator, whether or not it is
there; what a recomputation makes of such a value is a temporary, which must be dropped by an action.
An overwritten value (v0 of a storage that now holds v1) comes back into a scratch allocation of its own.
`offset` of an action is the address in the arena, in bytes, that the value gets (for `run` and `again`: `places`).

In particular (as `check` judges and the simulator writes it):
- `places` of `again i` holds every output of operator i: where a value comes back to, or where the second copy of one that is
  there lies until the operator ends. What comes back and nobody wants is dropped by an action right after.
- For (old, new) in `overwrites`, `run` and `again` alike end old: its bytes become those of new, so that new stands in
  `places` with the address of old. If new is there already, the bytes of old are given back.
- The simulator repeats operators in the order of the original program, so that every reader of an overwritten value comes
  before the operator that overwrites it.
- What lies outside of the arena (parameters, and what is written over them) has no place.

`check(trace, schedule)` carries a schedule out on sets of numbers and says what it costs: the plain, slow judge of every
planner and of replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "Schedule"]

Kind = Literal["run", "again", "drop", "save", "load", "move"]


@dataclass(frozen=True, slots=True)
class Action:
    """One action.

    Attributes:
        kind: see above.
        index: of an operator for "run" and "again", of a value for the others.
        places: (value, offset) for each value that comes to lie in the arena by this action; offset -1 where there is no arena
            (bytes are only counted).
        workspace: offset of the operator's workspace, -1 if it has none or there is no arena.
    """

    kind: Kind
    index: int
    places: tuple[tuple[int, int], ...] = ()
    workspace: int = -1


@dataclass(frozen=True)
class Schedule:
    """Actions in order; `arena` is the size in bytes of the arena that the offsets address, 0 for none."""

    actions: tuple[Action, ...]
    arena: int = 0
