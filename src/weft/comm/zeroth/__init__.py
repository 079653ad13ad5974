"""Tuning by forward passes alone, one byte per pair of them on the wire.

SharedSeed   the method: project, exchange scalars, make every direction again   shared_seed.py
Direction    directions from numbers                                            Rademacher, Normal
Wire         one number in bytes                                                Byte, Float32
Transport    who gets the scalars                                               Alone, Fixed (gloo), Open (TCP)
Rendezvous   where machines that come and go meet                               tcp.py, decisions in hub.py
Log          the scalars of all steps: checkpoint, and the way to catch up      log.py
"""

from __future__ import annotations

from weft.comm.zeroth.directions import DIRECTIONS, Direction, Normal, Rademacher, seed_of
from weft.comm.zeroth.log import Log, OtherRun, Passport, Record
from weft.comm.zeroth.scalars import WIRES, Byte, Float32, Wire
from weft.comm.zeroth.shared_seed import SharedSeed, StepInfo
from weft.comm.zeroth.tcp import MemberRefused, Open, Rendezvous
from weft.comm.zeroth.transport import Alone, Fixed, OutOfStep, Transport

__all__ = [
    "DIRECTIONS",
    "WIRES",
    "Alone",
    "Byte",
    "Direction",
    "Fixed",
    "Float32",
    "Log",
    "MemberRefused",
    "Normal",
    "Open",
    "OtherRun",
    "OutOfStep",
    "Passport",
    "Rademacher",
    "Record",
    "Rendezvous",
    "SharedSeed",
    "StepInfo",
    "Transport",
    "Wire",
    "seed_of",
]
