"""Who is in the group, and what a step consists of: the rendezvous' decisions, without sockets and clocks.

A replica is the start plus the records of all steps, so the group stays equal if everybody applies the same records. One place
must therefore decide what is in a record; it needs no model, only the scalars, and remembers all of them:

    hello     a newcomer names itself: refused if its name is taken, its passport or its history another's;     `Hub.hello`
              else it is sent the records it lacks, and says `ready` when it has applied them
    admit     at a step boundary, those that are ready and at most `near` steps behind become members;          `Hub._admit`
              nor need they wait for members that say nothing
    scalars   of the open step are kept; of any other step dropped and counted                                  `Hub.scalars`
    close     when every member has answered, or `late_seconds` after the first did: who is late, or whose
              digest is not that of most, is left out of the record and told so; it may get ready again         `Hub._close`

Events are method calls that return the messages to be sent, as (connection, `Frame`) pairs; a `REFUSED` frame is the last one
of its connection. The driver with sockets is tcp.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from weft.comm.sockets import Parts
from weft.comm.zeroth.log import LONGEST, Log, Passport, Record, pack_records
from weft.comm.zeroth.scalars import WIRES
from weft.comm.zeroth.transport import HEADER, LR, outliers
from weft.names import pick

__all__ = ["Frame", "Hub", "Kind"]


RATED = 0x80  # beside a kind: a learning rate comes before the payload


class Kind(IntEnum):
    """What a frame says. To the hub: HELLO, READY, SCALARS, LEAVE. From it: the others."""

    HELLO = 1  # payload: lines of passport in JSON, chain of its log in hexadecimal, name; step: length of its log
    READY = 2  # step: length of its log
    SCALARS = 3  # payload: codes; digest: of the parameters, or 0
    LEAVE = 4
    RECORDS = 5  # payload: records from the receiver's step onwards; answer READY
    ADMIT = 6  # payload: the last records it lacks; digest: its number; it is a member from `step` on
    RESULT = 7  # payload: the record of `step`; digest: how many scalars were dropped since the last
    LATE = 8  # it is no member any more, its scalars came too late; answer READY
    RESYNC = 9  # it is no member any more, its parameters are not the group's; repair them, answer READY
    REFUSED = 10  # payload: why


@dataclass(frozen=True)
class Frame:
    """One message: a fixed header of `HEADER.size` bytes, a learning rate if there is one, and a payload."""

    kind: Kind
    payload: bytes = b""
    step: int = 0
    digest: int = 0
    lr: float | None = None  # None: that of the last record

    def pack(self) -> bytes:
        kind, body = int(self.kind), self.payload
        if self.lr is not None:
            kind, body = kind | RATED, LR.pack(self.lr) + body
        return HEADER.pack(kind, len(body), self.step, self.digest) + body

    @classmethod
    def of(cls, came: Parts) -> Frame:
        """A message from what came: the header's fields and what follows. Raises `ValueError` if it is none."""
        (kind, _, step, digest), body = came
        if not kind & RATED:
            return cls(Kind(kind), body, step, digest)
        try:
            (lr,) = LR.unpack_from(body)
        except struct.error as error:
            raise ValueError(f"no learning rate in {len(body)} bytes") from error
        return cls(Kind(kind & ~RATED), body[LR.size :], step, digest, lr)


Sends = list[tuple[Hashable, Frame]]


@dataclass
class _Peer:
    name: str
    number: int = -1
    state: str = "catching up"  # "catching up" -> "ready" -> "member" -> "catching up" (late, or out of step)
    at: int = 0  # how many records it has
    answer: Frame | None = None


@dataclass
class Hub:
    """The group's state; see the module's header.

    Attributes:
        start_with: members that must be ready before the first of them is admitted.
        late_seconds: how long a step waits for the others after the first answer.
        near: how many steps behind a newcomer may be to be admitted, with the missing records, at the next boundary.
        log: of a rendezvous that starts again; the first newcomer's passport begins one otherwise.
        dropped: scalars that came but were not counted, so far.
    """

    start_with: int = 1
    late_seconds: float = 30.0
    near: int = 4
    log: Log | None = None
    dropped: int = 0
    peers: dict[Hashable, _Peer] = field(default_factory=dict)
    deadline: float | None = None  # of the open step, once somebody has answered
    opened: float | None = None  # when the open step was first looked at
    numbers: int = 0
    step_dropped: int = 0

    def __post_init__(self) -> None:
        if self.start_with < 1:
            raise ValueError(f"Hub: start_with must be at least 1, got {self.start_with}")
        if self.late_seconds <= 0:
            raise ValueError(f"Hub: late_seconds must be > 0, got {self.late_seconds}")
        if self.log is not None:  # numbers that have been used are never given again: they are in the seeds
            self.numbers = 1 + max((member for record in self.log for member, _ in record.entries), default=-1)

    @property
    def step(self) -> int:
        """The open step."""
        return 0 if self.log is None else len(self.log)

    @property
    def members(self) -> dict[Hashable, _Peer]:
        """The members in order of joining."""
        found = [(peer.number, conn) for conn, peer in self.peers.items() if peer.state == "member"]
        return {conn: self.peers[conn] for _, conn in sorted(found, key=lambda item: item[0])}

    # ---- events

    def hello(self, conn: Hashable, passport: Passport, name: str, step: int, chain: bytes) -> Sends:
        """A newcomer at `conn` with a log of `step` records whose chain is `chain`."""
        if conn in self.peers:
            return self._refuse(conn, "a connection must say hello once")
        if any(peer.name == name for peer in self.peers.values()):
            return self._refuse(conn, f"a member called {name!r} is here already; names must differ")
        if self.log is None and step:
            return self._refuse(conn, f"its log has {step} steps and this rendezvous has none; give it that log")
        log = Log(passport) if self.log is None else self.log
        try:
            pick(passport.wire, WIRES, "wire")
            log.passport.check(passport)
        except ValueError as error:
            return self._refuse(conn, str(error))
        if step > len(log) or log.chain(step) != chain:
            return self._refuse(conn, f"its log of {step} steps is not the group's; join with an empty log")
        self.log = log  # only now: who is refused defines no run
        self.peers[conn] = _Peer(name, at=step)
        return [(conn, Frame(Kind.RECORDS, b"".join(pack_records(log[step:])), self.step))]

    def ready(self, conn: Hashable, step: int) -> Sends:
        """`conn` has applied the first `step` records."""
        peer = self.peers.get(conn)
        if peer is None or peer.state == "member" or not 0 <= step <= self.step:
            return self._refuse(conn, f"ready at step {step} makes no sense now")
        assert self.log is not None
        peer.at = step
        if step < self.step - self.near:
            return [(conn, Frame(Kind.RECORDS, b"".join(pack_records(self.log[step:])), self.step))]
        peer.state = "ready"
        return [] if self.members else self._admit()

    def scalars(self, conn: Hashable, frame: Frame, now: float) -> Sends:
        """The scalars of a member, or of one that thinks it is."""
        peer = self.peers.get(conn)
        if peer is None:
            return self._refuse(conn, "scalars before hello")
        if peer.state != "member" or frame.step != self.step or peer.answer is not None:
            self._drop(frame)
            if peer.state == "member" and frame.step != self.step:  # it must find its place again
                return [*self._demote(conn, Kind.RESYNC), *self.tick(now)]
            return []
        assert self.log is not None
        if len(frame.payload) > LONGEST or len(frame.payload) % WIRES[self.log.passport.wire].nbytes:
            return self._refuse(conn, f"{len(frame.payload)} bytes are no scalars") + self.tick(now)
        lr = frame.lr if frame.lr is not None else self.log[-1].lr if self.step else math.nan
        if not math.isfinite(lr):
            return self._refuse(conn, f"a learning rate of {lr}") + self.tick(now)
        peer.answer = replace(frame, lr=lr)
        if self.deadline is None:
            self.deadline = now + self.late_seconds
        return self.tick(now)

    def lost(self, conn: Hashable, now: float) -> Sends:
        """The connection is gone, or its member leaves. What it has sent for the open step is no longer counted."""
        if self.peers.pop(conn, None) is None:
            return []
        if not self.peers and self.step == 0:
            self.log = None  # who defined the run has gone before it began
        return self.tick(now)

    def tick(self, now: float) -> Sends:
        """Time has passed: close the step if everybody has answered or the deadline is over."""
        members = self.members
        if not members:
            self.deadline = None
            return self._admit()
        answered = [peer for peer in members.values() if peer.answer is not None]
        if len(answered) == len(members) or (answered and self.deadline is not None and now >= self.deadline):
            self.opened = None
            return self._close()
        if self.opened is None:
            self.opened = now
        if not answered and now - self.opened >= self.late_seconds:  # nobody answers: newcomers need not wait for that
            return self._admit()
        return []

    # ---- decisions

    def _close(self) -> Sends:
        assert self.log is not None
        sends: Sends = []
        for conn, peer in self.members.items():
            if peer.answer is None:
                sends += self._demote(conn, Kind.LATE)
        members = self.members
        answers = [peer.answer for peer in members.values() if peer.answer is not None]
        out = outliers([(answer.step, answer.digest) for answer in answers])
        entries = []
        for place, ((conn, peer), answer) in enumerate(zip(members.items(), answers, strict=True)):
            if place in out:
                self._drop(answer)
                sends += self._demote(conn, Kind.RESYNC)
            else:
                entries.append((peer.number, answer.payload))
        first = next(answer for place, answer in enumerate(answers) if place not in out)
        assert first.lr is not None
        record = Record(self.step, first.lr, tuple(entries))
        self.log.append(record)
        body = b"".join(pack_records([record]))
        for conn, peer in self.members.items():
            peer.answer, peer.at = None, self.step
            sends.append((conn, Frame(Kind.RESULT, body, record.step, self.step_dropped)))
        self.deadline, self.step_dropped = None, 0
        return sends + self._admit()

    def _admit(self) -> Sends:
        """At a boundary: newcomers that are near become members, the others get what they lack."""
        ready = [(conn, peer) for conn, peer in self.peers.items() if peer.state == "ready"]
        if self.log is None or (self.step == 0 and len(ready) < self.start_with):
            return []
        sends: Sends = []
        for conn, peer in ready:
            body = b"".join(pack_records(self.log[peer.at :]))
            if peer.at < self.step - self.near:
                peer.state = "catching up"
                sends.append((conn, Frame(Kind.RECORDS, body, self.step)))
            else:
                peer.state, peer.number, peer.answer = "member", self.numbers, None
                self.numbers += 1
                sends.append((conn, Frame(Kind.ADMIT, body, self.step, digest=peer.number)))
        return sends

    def _demote(self, conn: Hashable, kind: Kind) -> Sends:
        peer = self.peers[conn]
        peer.state, peer.answer = "catching up", None
        return [(conn, Frame(kind, step=self.step))]

    def _drop(self, frame: Frame) -> None:
        assert self.log is not None
        scalars = len(frame.payload) // WIRES[self.log.passport.wire].nbytes
        self.dropped += scalars
        self.step_dropped += scalars

    def _refuse(self, conn: Hashable, why: str) -> Sends:
        self.peers.pop(conn, None)
        return [(conn, Frame(Kind.REFUSED, why.encode()))]
