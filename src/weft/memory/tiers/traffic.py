"""What tiers cost: bytes per step, the bandwidth that hides them, and the tiers to choose.

Per process and step, P bytes of parameters in all, N processes, s arrays of state per parameter, f fetches per step
(2: forward and backward; 3 with recomputation):                                              `traffic`
    parameters on a tier       read  f P/N
    gradients on a tier        write P/N, read P/N
    states on a tier           read  s P/N, write s P/N
    parameters or states on disk: the update writes the parameters, P/N, and (unless it is done in backward) reads those there
Overlapped, a step takes max(compute, time of the bytes); in turns, their sum.               `Traffic.seconds`

How much bandwidth is enough (mixed precision, Adam, recomputation; b sequences of s tokens, width d, a checkpoint per c layers):
    efficiency = ait bandwidth / (ait bandwidth + peak)                                       `efficiency`
    ait, FLOPs per byte:  parameters and gradients  b s,   states  b s / 4,   activations  24 d c      `intensity`
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, section 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from weft.errors import BudgetError
from weft.memory.tiers.store import TIERS, Tiers

__all__ = ["Room", "Traffic", "choose", "efficiency", "intensity", "traffic"]


def intensity(what: str, *, tokens: int = 0, width: int = 0, every: int = 1) -> float:
    """FLOPs that a step does per byte of `what` that it moves: "parameters", "states" or "activations".

    Args:
        tokens: of one process's batch (b s). width: of the model (d). every: layers per activation checkpoint (c).

    >>> intensity("parameters", tokens=2048), intensity("states", tokens=2048), intensity("activations", width=8192)
    (2048.0, 512.0, 196608.0)
    """
    known = {"parameters": float(tokens), "states": tokens / 4, "activations": 24.0 * width * every}
    if what not in known:
        raise ValueError(f"intensity: what must be one of {', '.join(known)}, got {what!r}")
    return known[what]


def efficiency(ait: float, bandwidth: float, peak: float) -> float:
    """Share of a device's time that computes, if moving bytes is not overlapped.

    Args:
        ait: FLOPs per byte moved. bandwidth: bytes per second and device. peak: FLOP/s of the device.

    >>> round(efficiency(2048, 60e9, 70e12), 2)
    0.64
    """
    return ait * bandwidth / (ait * bandwidth + peak)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process moves per step, by tier: {"host": ..., "disk": ...}."""

    read: Mapping[str, int]
    write: Mapping[str, int]

    def seconds(self, compute: float, rooms: Mapping[str, Room], *, overlapped: bool = True) -> float:
        """Predicted seconds of a step; tiers move at the same time, reads and writes of one tier in turns."""
        moving = max(
            (
                self.read[tier] / rooms[tier].read + self.write[tier] / rooms[tier].write
                for tier in self.read
                if tier in rooms
            ),
            default=0.0,
        )
        return max(compute, moving) if overlapped else compute + moving


@dataclass(frozen=True)
class Room:
    """A tier as the planner sees it: bytes that may be used, and bytes per second to and from one process."""

    capacity: float
    read: float = float("inf")
    write: float = float("inf")


def traffic(
    tiers: Tiers,
    parameters: int,
    *,
    arrays: int = 2,
    world: int = 1,
    fetches: int = 2,
    activations: int = 0,
    reused: bool = False,
) -> Traffic:
    """Bytes per step and process; see the file's header.

    Args:
        parameters: bytes of all parameters. arrays: of optimizer state per parameter. activations: bytes that autograd saves.
        reused: updates are done in backward, with the parameters that it has fetched.
    """
    part = -(-parameters // world)
    read, write = {"host": 0, "disk": 0}, {"host": 0, "disk": 0}

    def move(tier: str, reads: int, writes: int) -> None:
        if tier != "device":
            read[tier] += reads
            write[tier] += writes

    move(tiers.parameters, fetches * part, 0)
    move(tiers.gradients, part, part)
    move(tiers.optimizer, arrays * part, arrays * part)
    move(tiers.activations, activations, activations)
    if tiers.optimizer == "disk":
        move("disk", part if tiers.parameters == "disk" and not reused else 0, part)
    elif tiers.parameters == "disk":
        move("disk", 0 if reused else part, part)  # read and rewritten by the update
    return Traffic(read, write)


def choose(
    rooms: Mapping[str, Room],
    parameters: int,
    *,
    compute: float,
    arrays: int = 2,
    world: int = 1,
    largest: int = 0,
    activations: int = 0,
) -> tuple[Tiers, float]:
    """The tiers of least predicted time that fit; the highest ones among equals.

    Args:
        rooms: "device", and "host" and "disk" where there are such.
        parameters, arrays, world, activations: as for `traffic`.
        compute: seconds of the step's computing.
        largest: bytes of the largest parameter, which is on the device while it is used.
    Returns:
        The tiers, and the predicted seconds of a step.
    Raises:
        BudgetError: nothing fits; `least` is what the device would have to hold.
    """
    part, best = -(-parameters // world), None
    needed = []
    for names in itertools.product([tier for tier in TIERS if tier in rooms], repeat=4):
        tiers = Tiers(*names)
        used = dict.fromkeys(TIERS, 0)
        used[tiers.parameters] += parameters if tiers.parameters == "device" else part
        used["device"] += 0 if tiers.parameters == "device" else 2 * largest
        used[tiers.gradients] += part
        used["device"] += 0 if tiers.gradients == "device" else largest
        used[tiers.optimizer] += arrays * part * (2 if tiers.optimizer == "disk" else 1)
        used[tiers.activations] += activations
        if tiers.optimizer == "disk" or tiers.parameters == "disk":  # parameters have two places there
            used["disk"] += part if tiers.parameters == "disk" else 2 * part
        needed.append(used["device"])
        if all(used[tier] <= (rooms[tier].capacity if tier in rooms else 0) for tier in TIERS):
            moved = traffic(tiers, parameters, arrays=arrays, world=world, activations=activations)
            seconds = moved.seconds(compute, rooms)
            key = (seconds, *(TIERS.index(name) for name in names))
            if best is None or key < best[0]:
                best = (key, tiers, seconds)
    if best is None:
        raise BudgetError(
            int(rooms["device"].capacity), min(needed), "parameters, gradients and optimizer states on any tiers"
        )
    return best[1], best[2]
