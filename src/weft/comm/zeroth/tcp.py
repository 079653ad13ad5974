"""Machines that come and go: a rendezvous over TCP, and a member's side of it. All waits have limits.

    `Rendezvous`  one thread anywhere all members can reach; sockets around the decisions of `hub.Hub`; holds no model
    `Open`        the transport of a member: scalars out, records in; catches up whenever the group went on without it;
                  goes on alone if the rendezvous is gone or silent

What a member sends in a step is `HEADER.size` bytes and its codes, and its learning rate where that is not the last step's;
what it receives is the step's record, everybody's codes.
Nothing is encrypted or authenticated: use it inside a private network or a tunnel, as torch.distributed itself.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import warnings
from typing import final

from weft.comm.sockets import Broken, Connection, Framing, Parts, Switchboard, dial
from weft.comm.zeroth.hub import Frame, Hub, Kind, Sends
from weft.comm.zeroth.log import Log, Passport, Record, unpack_records
from weft.comm.zeroth.transport import HEADER, Outcome, Outgoing, Replica, Transport
from weft.errors import PeerLost, WeftError

__all__ = ["MemberRefused", "Open", "Rendezvous"]

CALLS = Framing(HEADER, {1: 2**20})  # what a rendezvous takes: nobody sends more than codes and a passport
ANSWERS = Framing(HEADER, {1: 2**30})  # what a member takes: a whole log
PULSE = 0.2  # seconds between looks at the clock


class MemberRefused(WeftError, ValueError):
    """The rendezvous did not take this machine, or sent it away; `why` is its reason."""

    def __init__(self, address: str, why: str):
        super().__init__(address, why)
        self.address, self.why = address, why

    def __str__(self) -> str:
        return f"the rendezvous at {self.address} refused this machine: {self.why}"


@final
class Rendezvous:
    """A meeting place: `with Rendezvous(port=29600) as place: ... place.address ...`.

    Args:
        host, port: where to listen; port 0 takes a free one.
        start_with: members that must be there before step 0 begins.
        late_seconds: how long a step waits for the others after its first answer.
        log: records so far, for a rendezvous that starts again.
    Raises:
        OSError: the address is taken.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        start_with: int = 1,
        late_seconds: float = 30.0,
        log: Log | None = None,
    ):
        self.hub = Hub(start_with=start_with, late_seconds=late_seconds, log=log)
        listener = socket.create_server((host, port))
        name, number = listener.getsockname()[:2]
        self.address = f"{name}:{number}"
        self.board = Switchboard(CALLS, listener)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._serve, name="weft-rendezvous", daemon=True)
        self.thread.start()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the meeting place; members go on alone."""
        self.stop.set()
        self.board.wake()
        self.thread.join(timeout=10)

    # ---- in the thread

    def _serve(self) -> None:
        try:
            while not self.stop.is_set():
                for connection, frame in self.board.poll(PULSE):
                    self._send(self._heard(connection, frame))
                self._send(self.hub.tick(time.monotonic()))
        finally:
            self.board.close()

    def _heard(self, connection: Connection, came: Parts | None) -> Sends:
        now = time.monotonic()
        with contextlib.suppress(ValueError):  # it talks nonsense
            frame = Frame(Kind.LEAVE) if came is None else Frame.of(came)
            if frame.kind == Kind.HELLO:
                passport, chain, name = frame.payload.decode().split("\n", 2)
                self.board.trust(connection)
                return self.hub.hello(connection, Passport.from_json(passport), name, frame.step, bytes.fromhex(chain))
            if frame.kind == Kind.READY:
                return self.hub.ready(connection, frame.step)
            if frame.kind == Kind.SCALARS:
                return self.hub.scalars(connection, frame, now)
        self.board.hang_up(connection)
        return self.hub.lost(connection, now)

    def _send(self, sends: Sends) -> None:
        for connection, frame in sends:
            assert isinstance(connection, Connection)
            self.board.put(connection, frame.pack(), last=frame.kind == Kind.REFUSED)


@final
class Open(Transport):
    """A member of an open group.

    Args:
        address: `host:port` of the rendezvous.
        name: of this machine, unlike any other member's.
        timeout: seconds to wait for an answer before going on alone; more than the rendezvous' `late_seconds`.
    Raises:
        ValueError: the address is none, the name is empty, the timeout not positive.
    """

    def __init__(self, address: str, name: str, timeout: float = 120.0):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"Open: address must be host:port, got {address!r}")
        if not name:
            raise ValueError("Open: name must not be empty; give every machine one of its own")
        if not timeout > 0:
            raise ValueError(f"Open: timeout must be > 0 seconds, got {timeout}")
        self.address, self.name, self.timeout = address, name, timeout
        self.place = (host, int(port))
        self.own: tuple[int, ...] = ()
        self.connection: Connection | None = None
        self.sent = 0  # bytes so far

    def enter(self, replica: Replica) -> None:
        """Join the group: catch up by its log, then become a member at a step boundary.

        Raises:
            MemberRefused: name taken, another run's passport, a log that is not the group's.
            PeerLost: nobody answers at the address, or not within the timeout.
        """
        log = replica.log
        try:
            self.connection = dial(self.place, ANSWERS, self.timeout)
            hello = f"{log.passport.to_json()}\n{log.chain(len(log)).hex()}\n{self.name}"
            self._send(Frame(Kind.HELLO, hello.encode(), len(log)))
            self._until_in(replica)
        except Broken as error:
            self._hang_up()
            raise PeerLost(-1, f"joining the rendezvous at {self.address}", str(error)) from error
        except BaseException:
            self._hang_up()
            raise

    def exchange(self, outgoing: Outgoing, replica: Replica) -> Outcome:
        """See `Transport`; without a rendezvous this machine goes on alone.

        Raises:
            MemberRefused: the rendezvous sent this machine away.
            OutOfStep: its parameters are not the group's, and it has no values of the start to repair them with.
        """
        (codes,) = outgoing.codes
        known = len(replica.log) > 0 and replica.log[-1].lr == outgoing.lr
        frame = Frame(Kind.SCALARS, codes, outgoing.step, outgoing.digest, None if known else outgoing.lr)
        before = self.sent
        try:
            self._send(frame)
            first = self._receive()
            if first.kind == Kind.RESULT:
                replica.apply(_records(first))
                return Outcome(self.sent - before, first.digest)
            self._until_in(replica, first)
            resync = first.kind == Kind.RESYNC
            return Outcome(self.sent - before, late=not resync, resynchronised=resync)
        except Broken as error:
            if self.connection is not None:
                warnings.warn(f"the rendezvous at {self.address} is lost ({error}); going on alone", RuntimeWarning)
                self._hang_up()
            if len(replica.log) == outgoing.step:  # not where it went while the group's records were coming in
                replica.apply([Record(outgoing.step, outgoing.lr, ((self.own[0], codes),))])
            return Outcome(self.sent - before, alone=True)
        except BaseException:
            self._hang_up()
            raise

    def leave(self) -> None:
        """Say good-bye; the log and the parameters stay."""
        if self.connection is not None:
            with contextlib.suppress(Broken):
                self._send(Frame(Kind.LEAVE))
            self._hang_up()

    def _until_in(self, replica: Replica, frame: Frame | None = None) -> None:
        """Answer the rendezvous until it admits this machine."""
        while True:
            frame = frame or self._receive()
            if frame.kind == Kind.RESYNC:
                replica.reload()
            elif frame.kind in (Kind.RECORDS, Kind.ADMIT):
                replica.apply(_records(frame))
            elif frame.kind == Kind.REFUSED:
                raise MemberRefused(self.address, frame.payload.decode(errors="replace"))
            elif frame.kind != Kind.LATE:
                raise Broken(f"it sent {frame.kind.name} out of turn")
            if frame.kind == Kind.ADMIT:
                self.own = (frame.digest,)
                return
            self._send(Frame(Kind.READY, step=len(replica.log)))
            frame = None

    def _send(self, frame: Frame) -> None:
        if self.connection is None:
            raise Broken("no rendezvous")
        data = frame.pack()
        self.connection.put(data)
        self.connection.flush()  # what does not go at once goes while `_receive` waits
        self.sent += len(data)

    def _receive(self) -> Frame:
        if self.connection is None:
            raise Broken("no rendezvous")
        came = self.connection.receive(self.timeout)
        if came is None:
            raise Broken(f"no answer within {self.timeout:g} s")
        try:
            return Frame.of(came)
        except ValueError as error:
            raise Broken(f"it talks nonsense: {error}") from error

    def _hang_up(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _records(frame: Frame) -> list[Record]:
    try:
        return unpack_records(frame.payload)
    except ValueError as error:
        raise Broken(f"it sent broken records: {error}") from error
