"""Machines that come and go: a rendezvous over TCP, and a member's side of it. All waits have limits.

    `Rendezvous`  one thread anywhere all members can reach; sockets around the decisions of `hub.Hub`; holds no model
    `Open`        the transport of a member: scalars out, records in; catches up whenever the group went on without it;
                  goes on alone if the rendezvous is gone or silent

What a member sends in a step is `HEADER.size` bytes and its codes; what it receives is the step's record, everybody's codes.
Nothing is encrypted or authenticated: use it inside a private network or a tunnel, as torch.distributed itself.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
import warnings
from typing import final

from weft.comm.zeroth.hub import Frame, Hub, Kind, Sends
from weft.comm.zeroth.log import Log, Passport, Record, unpack_records
from weft.comm.zeroth.transport import HEADER, Outcome, Outgoing, Replica, Transport
from weft.errors import PeerLost, WeftError

__all__ = ["MemberRefused", "Open", "Rendezvous"]

LONGEST_IN = 2**20  # bytes of a frame that a rendezvous takes: nobody sends more than codes and a passport
LONGEST_OUT = 2**30  # and of one that a member takes: a whole log
PATIENCE = 10.0  # seconds that a connection may take to say hello
PULSE = 0.2  # seconds between looks at the clock


class MemberRefused(WeftError, ValueError):
    """The rendezvous did not take this machine, or sent it away; `why` is its reason."""

    def __init__(self, address: str, why: str):
        super().__init__(address, why)
        self.address, self.why = address, why

    def __str__(self) -> str:
        return f"the rendezvous at {self.address} refused this machine: {self.why}"


class _Connection:
    """A socket with what has come and what is still to go."""

    def __init__(self, sock: socket.socket):
        self.sock, self.inbox, self.outbox = sock, bytearray(), bytearray()
        self.opened, self.greeted, self.closing = time.monotonic(), False, False


class _Gone(Exception):
    """The other side is gone or silent: apart from errors of the disk or of the user's code, which are `OSError`s too."""


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
        self.listener = socket.create_server((host, port))
        self.listener.setblocking(False)
        name, number = self.listener.getsockname()[:2]
        self.address = f"{name}:{number}"
        self.connections: dict[int, _Connection] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
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
        self.thread.join(timeout=10)

    # ---- in the thread

    def _serve(self) -> None:
        try:
            while not self.stop.is_set():
                for key, events in self.selector.select(PULSE):
                    if key.data is None:
                        self._accept()
                    elif key.data in self.connections:
                        self._turn(key.data, events)
                now = time.monotonic()
                self._send(self.hub.tick(now))
                for number, conn in list(self.connections.items()):
                    if not conn.greeted and now - conn.opened > PATIENCE:
                        self._drop(number)
        finally:
            for number in list(self.connections):
                self._close(number)
            self.selector.close()
            self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the caller may have gone already
            sock, _ = self.listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            number = sock.fileno()
            self.connections[number] = _Connection(sock)
            self.selector.register(sock, selectors.EVENT_READ, number)

    def _turn(self, number: int, events: int) -> None:
        conn = self.connections[number]
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(number)
            if events & selectors.EVENT_READ:
                data = conn.sock.recv(2**16)
                if not data:
                    raise ConnectionError("closed")
                conn.inbox += data
                while number in self.connections and (frame := _take(conn.inbox, LONGEST_IN)) is not None:
                    self._send(self._heard(number, conn, frame))
        except BlockingIOError:
            pass
        except (OSError, ValueError):  # gone, or talks nonsense
            self._drop(number)

    def _heard(self, number: int, conn: _Connection, frame: Frame) -> Sends:
        now = time.monotonic()
        if conn.closing:
            return []
        if frame.kind == Kind.HELLO:
            conn.greeted = True
            passport, chain, name = frame.payload.decode().split("\n", 2)
            return self.hub.hello(number, Passport.from_json(passport), name, frame.step, bytes.fromhex(chain))
        if frame.kind == Kind.READY:
            return self.hub.ready(number, frame.step)
        if frame.kind == Kind.SCALARS:
            return self.hub.scalars(number, frame, now)
        if frame.kind == Kind.LEAVE:
            self._close(number)
            return self.hub.lost(number, now)
        raise ValueError(f"a member does not send {frame.kind.name}")

    def _send(self, sends: Sends) -> None:
        for number, frame in sends:
            assert isinstance(number, int)
            conn = self.connections.get(number)
            if conn is None:
                continue
            conn.outbox += frame.pack()
            conn.closing |= frame.kind == Kind.REFUSED
            try:
                self._flush(number)
            except OSError:
                self._drop(number)

    def _flush(self, number: int) -> None:
        conn = self.connections[number]
        with contextlib.suppress(BlockingIOError):
            while conn.outbox:
                del conn.outbox[: conn.sock.send(conn.outbox)]
        if conn.closing and not conn.outbox:
            self._close(number)
        else:
            write = selectors.EVENT_WRITE if conn.outbox else 0
            self.selector.modify(conn.sock, selectors.EVENT_READ | write, number)

    def _drop(self, number: int) -> None:
        """The connection is of no use any more: tell the hub."""
        self._close(number)
        self._send(self.hub.lost(number, time.monotonic()))

    def _close(self, number: int) -> None:
        conn = self.connections.pop(number, None)
        if conn is not None:
            self.selector.unregister(conn.sock)
            conn.sock.close()


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
        self.inbox = bytearray()
        self.sock: socket.socket | None = None
        self.sent = self.received = 0  # bytes on the socket so far

    def enter(self, replica: Replica) -> None:
        """Join the group: catch up by its log, then become a member at a step boundary.

        Raises:
            MemberRefused: name taken, another run's passport, a log that is not the group's.
            PeerLost: nobody answers at the address, or not within the timeout.
        """
        log = replica.log
        try:
            self._connect()
            hello = f"{log.passport.to_json()}\n{log.chain(len(log)).hex()}\n{self.name}"
            self._send(Frame(Kind.HELLO, hello.encode(), len(log)))
            self._until_in(replica)
        except _Gone as error:
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
        frame = Frame(Kind.SCALARS, codes, outgoing.step, outgoing.digest, outgoing.lr)
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
        except _Gone as error:
            if self.sock is not None:
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
        if self.sock is not None:
            with contextlib.suppress(OSError):
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
                raise _Gone(f"it sent {frame.kind.name} out of turn")
            if frame.kind == Kind.ADMIT:
                self.own = (frame.digest,)
                return
            self._send(Frame(Kind.READY, step=len(replica.log)))
            frame = None

    def _connect(self) -> None:
        try:
            self.sock = socket.create_connection(self.place, timeout=self.timeout)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise _Gone(str(error) or "no answer") from error

    def _send(self, frame: Frame) -> None:
        if self.sock is None:
            raise _Gone("no rendezvous")
        data = frame.pack()
        try:
            self.sock.settimeout(self.timeout)
            self.sock.sendall(data)
        except OSError as error:
            raise _Gone(str(error) or "no answer") from error
        self.sent += len(data)

    def _receive(self) -> Frame:
        if self.sock is None:
            raise _Gone("no rendezvous")
        deadline = time.monotonic() + self.timeout
        try:
            while (frame := _take(self.inbox, LONGEST_OUT)) is None:
                self.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                data = self.sock.recv(2**16)
                if not data:
                    raise _Gone("it has closed the connection")
                self.received += len(data)
                self.inbox += data
        except OSError as error:
            raise _Gone(str(error) or "no answer") from error
        except ValueError as error:
            raise _Gone(f"it talks nonsense: {error}") from error
        return frame

    def _hang_up(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.inbox.clear()


def _take(inbox: bytearray, longest: int) -> Frame | None:
    """The first frame of the bytes that have come, taken out of them; None if it is not whole yet.

    Raises:
        ValueError: the bytes are no frame, or one longer than `longest`.
    """
    if len(inbox) < HEADER.size:
        return None
    kind, size, step, digest, lr = HEADER.unpack_from(inbox)
    if size > longest:
        raise ValueError(f"a frame of {size} bytes; at most {longest} are taken")
    kind = Kind(kind)
    end = HEADER.size + size
    if len(inbox) < end:
        return None
    payload = bytes(inbox[HEADER.size : end])
    del inbox[:end]
    return Frame(kind, payload, step, digest, lr)


def _records(frame: Frame) -> list[Record]:
    try:
        return unpack_records(frame.payload)
    except ValueError as error:
        raise _Gone(f"it sent broken records: {error}") from error
