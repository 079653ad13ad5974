"""The policy core: what is dropped, rebuilt and where it lies, decided without I/O.

    blocks     Block, Step: what a policy knows of memory; what a rebuild would cost
    arena      Arena (addresses), PagedArena (bytes only): room for blocks
    policy     POLICIES: coop, dtr, dte, with and without partition, and the pager
    core       Core: brings back, makes room, drops
    machine    Machine: what it asks of whoever holds the bytes
    simulate   a Trace run through a Core on paper, written down as a Schedule

The simulator and online execution drive the same `Core`, so that a plan on paper is what would happen.
"""

from __future__ import annotations

from weft.memory.core.arena import Arena, PagedArena, Piece, Space
from weft.memory.core.blocks import Block, Step, price
from weft.memory.core.core import MOVE_RATE, Core
from weft.memory.core.machine import Machine
from weft.memory.core.policy import POLICIES, QUICK, Greedy, Policy, Window
from weft.memory.core.simulate import Simulation, simulate

__all__ = [
    "MOVE_RATE",
    "POLICIES",
    "QUICK",
    "Arena",
    "Block",
    "Core",
    "Greedy",
    "Machine",
    "PagedArena",
    "Piece",
    "Policy",
    "Simulation",
    "Space",
    "Step",
    "Window",
    "price",
    "simulate",
]
