"""Train within a number of bytes: measure, plan, keep to it, bit-equal to plain torch.

    meter      how many bytes tensors take, now and at most, by category                         `meters`
    trace      one step on paper: what it allocates, for how long, what each operator costs      `tracing`
    plan       the cheapest way found to run that step within a budget, or the least that will do   `planning`
    limit      a context around an unchanged training loop that keeps to a budget or a plan      `execute`
    simulate   what published policies (Coop, DTR, DTE, a pager) would do                        `core`
    compiled   the same for `torch.compile`                                                      `compiled`
    tiers      parameters, gradients, optimizer state and activations on device, host or disk    `tiers`

Imports `weft.graph` and `weft.cluster` only. What is private to torch stands in `private`, tested when it is first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.names import lazily

if TYPE_CHECKING:
    from weft.memory.core import POLICIES, Simulation, simulate
    from weft.memory.execute.limit import Limit, limit
    from weft.memory.meters import Meter, meter
    from weft.memory.planning.check import Checked, Tier, check
    from weft.memory.planning.choose import frontier, least, plan
    from weft.memory.planning.memory_plan import MemoryPlan
    from weft.memory.record import Op, Trace, Value
    from weft.memory.schedule import Action, Schedule
    from weft.memory.tiers import DiskOptimizer, Tiered, Tiers, tile
    from weft.memory.tracing import CostTable, Recorder, show, trace

__all__ = [
    "POLICIES", "Action", "Checked", "CostTable", "DiskOptimizer", "Limit", "MemoryPlan", "Meter", "Op", "Recorder", "Schedule",
    "Simulation", "Tier", "Tiered", "Tiers", "Trace", "Value",
    "check", "frontier", "least", "limit", "meter", "plan", "show", "simulate", "tile", "trace",
]  # fmt: skip

_HOME = {  # public name -> the module that has it
    **dict.fromkeys(("POLICIES", "Simulation", "simulate"), "core"),
    **dict.fromkeys(("Limit", "limit"), "execute.limit"),
    **dict.fromkeys(("Meter", "meter"), "meters"),
    **dict.fromkeys(("Checked", "Tier", "check"), "planning.check"),
    **dict.fromkeys(("frontier", "least", "plan"), "planning.choose"),
    "MemoryPlan": "planning.memory_plan",
    **dict.fromkeys(("Op", "Trace", "Value"), "record"),
    **dict.fromkeys(("Action", "Schedule"), "schedule"),
    **dict.fromkeys(("DiskOptimizer", "Tiered", "Tiers", "tile"), "tiers"),
    **dict.fromkeys(("CostTable", "Recorder", "show", "trace"), "tracing"),
}


__getattr__, __dir__ = lazily(__name__, _HOME)
