"""Where values live, and what follows from it.

    placements, meshes, pieces          layout        Shard, Replicate, Partial, Mesh, intervals, take, dual
    how an operator may be split        rows          one row per operator; `row_of`
                                        verify        proves a row numerically; `probe` finds signatures of unknown operators
                                        axes          cuts that a graph can carry on; the signatures that follow
    moving between placements           boxing        `compile_boxing`, `box`, `box_between`: differentiable, backward is the dual
                                        boxing_cost   its seconds and bytes
                                        comms         groups of devices: over torch.distributed, or threads for tests
    everything decided                  assignment    `Assignment`, `ParameterPlacement`, `refit`
    the program of one device           localize      `localize` -> `LocalModule`
    models larger than memory           deferred      `deferred`, `materialise`: initialise piece by piece

Imports `weft.graph` and `weft.cluster`. A value has one placement per mesh axis; see docs/concepts.md.
"""

from __future__ import annotations

from weft.placement.assignment import Assignment, ParameterPlacement, refit, replicated
from weft.placement.axes import Cuts, find_cuts, nests, signatures
from weft.placement.boxing import box, compile_boxing
from weft.placement.boxing_between import box_between
from weft.placement.boxing_cost import BoxingCost, boxing_cost
from weft.placement.comms import Comms, Group, run_threads, thread_comms
from weft.placement.deferred import deferred, materialise
from weft.placement.layout import (
    Mesh,
    Partial,
    Placement,
    Placements,
    Replicate,
    Shard,
    dual,
    intervals,
    local_shape,
    parse,
    take,
)
from weft.placement.localize import LocalModule, ParameterHooks, localize
from weft.placement.probe import discover
from weft.placement.rows import ROWS, row_of
from weft.placement.signature import Call, Link, Local, Position, Row, Signature
from weft.placement.verify import VerificationError, verify

__all__ = [
    "ROWS", "Assignment", "BoxingCost", "Call", "Comms", "Cuts", "Group", "Link", "Local", "LocalModule", "Mesh",
    "ParameterHooks", "ParameterPlacement", "Partial", "Placement", "Placements", "Position", "Replicate", "Row", "Shard",
    "Signature", "VerificationError", "box", "box_between", "boxing_cost", "compile_boxing", "deferred", "discover", "dual",
    "find_cuts", "intervals", "local_shape", "localize", "materialise", "nests", "parse", "refit", "replicated", "row_of",
    "run_threads", "signatures", "take", "thread_comms", "verify",
]  # fmt: skip
