"""How the scalars of a step reach everybody: what a transport promises, and the two that need no sockets of their own.

    `Alone`    one process; it may stand for several members, and then evaluates what n machines would
    `Fixed`    a torch.distributed group whose members stay: one all-gather of K codes and `MEMBER.size` bytes a step
    `Open`     machines that come and go, over TCP through a rendezvous                          (tcp.py)

Every transport hands the same records to every member, and the record alone decides what is applied. Members whose step, or
whose digest of the parameters, is not that of most are left out of it                          `outliers`
"""

from __future__ import annotations

import abc
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from weft.comm.zeroth.log import Log, Record
from weft.errors import WeftError, together

__all__ = [
    "HEADER",
    "LR",
    "MEMBER",
    "Alone",
    "Fixed",
    "Outgoing",
    "Outcome",
    "OutOfStep",
    "Replica",
    "Transport",
    "outliers",
]

HEADER = struct.Struct("<BIII")  # of a frame: kind, bytes that follow, step, digest of the parameters
LR = struct.Struct("<d")  # a learning rate, where it is not the last record's
MEMBER = struct.Struct("<IId")  # of a rank of a fixed group, all messages of one length: step, digest, learning rate


class OutOfStep(WeftError, RuntimeError):
    """This machine's parameters are not those of the group at `step`, and it has no way to get them by itself."""

    def __init__(self, step: int, why: str):
        super().__init__(step, why)
        self.step, self.why = step, why

    def __str__(self) -> str:
        return (
            f"at step {self.step} this machine's parameters are not the group's: {self.why}. Give SharedSeed the values of the "
            "start (start=...) so that it can replay the log, or load them and join again."
        )


@dataclass(frozen=True)
class Outgoing:
    """What this process sends for a step: the codes of each member that it stands for; `digest` has 32 bits, 0 for none."""

    step: int
    lr: float
    digest: int
    codes: tuple[bytes, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a step, beside the records that were applied.

    Attributes:
        sent: bytes that this process put on the wire, codes and header.
        dropped: scalars that came but were not counted (wrong step, or other parameters).
        alone: nobody else is left.
        late: the group went on without this machine, which has caught up with it.
        resynchronised: this machine's parameters were not the group's, and have been repaired.
    """

    sent: int = 0
    dropped: int = 0
    alone: bool = False
    late: bool = False
    resynchronised: bool = False


class Replica(Protocol):
    """What a transport needs of the machine it serves."""

    log: Log
    samples: int

    def apply(self, records: Sequence[Record]) -> None:
        """Append records to the log and apply them to the parameters."""

    def reload(self) -> None:
        """Go back to the values of the start and replay the own log. Raises `OutOfStep` if there are none."""

    def state(self) -> list[Tensor]:
        """The tuned parameters as of the end of the log, to be read or overwritten in place."""

    def adopt(self, records: Sequence[Record]) -> None:
        """Take `records` for the own log, the tensors of `state` having been overwritten to match."""


class Transport(abc.ABC):
    """How members exchange scalars. `own` are the numbers of the members that this process stands for."""

    own: tuple[int, ...] = (0,)

    @abc.abstractmethod
    def enter(self, replica: Replica) -> None:
        """Join: afterwards the replica has the group's log and parameters, and `own` is set."""

    @abc.abstractmethod
    def exchange(self, outgoing: Outgoing, replica: Replica) -> Outcome:
        """Send this process's scalars, have `replica` apply the records that make up the group's step."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Say good-bye; the others go on."""


@final
class Alone(Transport):
    """No peers. With `members` > 1 this process evaluates what so many machines would, in the same order."""

    def __init__(self, members: int = 1):
        if members < 1:
            raise ValueError(f"Alone: members must be at least 1, got {members}")
        self.own = tuple(range(members))

    def enter(self, replica: Replica) -> None:
        """There is nobody to join."""

    def leave(self) -> None:
        """There is nobody to leave."""

    def exchange(self, outgoing: Outgoing, replica: Replica) -> Outcome:
        entries = tuple(zip(self.own, outgoing.codes, strict=True))
        replica.apply([Record(outgoing.step, outgoing.lr, entries)])
        return Outcome(alone=True)


@final
class Fixed(Transport):
    """A torch.distributed group (gloo) of members that stay; rank r is member r.

    A rank that comes back with an older log, or whose parameters differ, is given log and parameters by the others. A rank
    that dies ends the others with `PeerLost` after the group's own timeout.
    """

    def __init__(self, group: Any = None):
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ValueError("Fixed: torch.distributed must be initialised; call init_process_group first")
        self.group, self.dist = group, dist
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.own = (self.rank,)

    def enter(self, replica: Replica) -> None:
        passports: list[Any] = [None] * self.size
        mine = (replica.log.passport, len(replica.log), replica.log.chain(len(replica.log)), replica.samples)
        with together("joining the one-byte group"):
            self.dist.all_gather_object(passports, mine, group=self.group)
        for passport, _, _, samples in passports:
            passports[0][0].check(passport)  # the same comparison, and the same error, on every rank
            if samples != passports[0][3]:
                found = [samples for *_, samples in passports]
                raise ValueError(f"Fixed: samples must be the same on every rank, got {found}; Open takes any")
        steps = [(step, chain) for _, step, chain, _ in passports]
        if len(set(steps)) > 1:  # some come back from an older log: the longest is the group's
            longest = max(steps, key=lambda state: state[0])
            out = {rank for rank, state in enumerate(steps) if state != longest}
            self._heal(replica, steps.index(longest), out)

    def exchange(self, outgoing: Outgoing, replica: Replica) -> Outcome:
        (codes,) = outgoing.codes
        head = MEMBER.pack(outgoing.step, outgoing.digest, outgoing.lr)
        message = torch.frombuffer(bytearray(head + codes), dtype=torch.uint8)
        found = [torch.empty_like(message) for _ in range(self.size)]
        with together(f"step {outgoing.step} of the one-byte exchange"):
            self.dist.all_gather(found, message, group=self.group)
        messages = [bytes(tensor.numpy()) for tensor in found]
        heads = [MEMBER.unpack_from(message) for message in messages]
        out = outliers([(step, digest) for step, digest, _ in heads])
        good = [rank for rank in range(self.size) if rank not in out]
        step, _, lr = heads[good[0]]
        if out:
            self._heal(replica, good[0], out)
        entries = tuple((rank, messages[rank][MEMBER.size :]) for rank in good)
        replica.apply([Record(step, lr, entries)])
        width = len(codes)
        return Outcome(len(head) + width, width * len(out), self.size == 1, False, self.rank in out)

    def leave(self) -> None:
        """A fixed group has no way to go on without a rank: all ranks stop at the same step."""

    def _heal(self, replica: Replica, source: int, out: set[int]) -> None:
        """Ranks `out` take parameters and log of rank `source`, whose log is good; collective."""
        src = source if self.group is None else self.dist.get_global_rank(self.group, source)
        box: list[Any] = [replica.log.records if self.rank == source else None]
        with together("a member's catching up with the one-byte group"):
            self.dist.broadcast_object_list(box, src=src, group=self.group)
            for tensor in replica.state():
                self.dist.broadcast(tensor, src=src, group=self.group)
        if self.rank in out:
            replica.adopt(box[0])


def outliers(claims: Sequence[tuple[int, int]]) -> set[int]:
    """Places of the members that are not with most: (step, digest) each, digest 0 if none was made.

    First the commonest step, then among those at it the commonest digest; the earlier member wins a tie.
    """
    step = _commonest([step for step, _ in claims])
    digests = [digest for at, digest in claims if at == step and digest]
    digest = _commonest(digests) if digests else 0
    return {place for place, (at, own) in enumerate(claims) if at != step or own not in (0, digest)}


def _commonest(values: Sequence[int]) -> int:
    counts = Counter(values)  # keeps the order of first appearance, and `max` the first of equals
    return max(counts, key=lambda value: counts[value])
