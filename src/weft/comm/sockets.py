"""Frames over TCP that hold up nobody: what everything in weft that speaks over sockets of its own shares.

Problem    the other side may be slow, die, stop in the middle of a frame, stop reading, or lie about sizes. That must neither
           block its owner, nor fill its memory, nor pass for a frame.
Method     frame = head | body; fields of the head count the body's bytes, each up to a limit          `Framing`
           bytes wait in two boxes of a connection and move when the socket is ready                    `Connection`
           one thread serves many connections, and hangs up on those that never say who they are        `Switchboard`
Guarantee  a frame comes whole or not at all, and a size beyond its limit ends the connection before anything of the body is
           kept: a connection holds at most one frame of the largest size and `CHUNK` bytes of what has come.
           Every wait takes the seconds it may last (`dial`, `receive`, `poll`, `close`), however slowly bytes drip in.
           What is wrong with the other side is `Broken`, apart from errors of a disk or of a caller, which are `OSError`s too.
Nothing is encrypted or authenticated: use it inside a private network or a tunnel, as torch.distributed itself.
"""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

__all__ = ["Broken", "Connection", "Framing", "Parts", "Switchboard", "dial"]

CHUNK = 1 << 20  # bytes read or written at a time, so that no peer holds a thread for long
PATIENCE = 10.0  # seconds until a newcomer must be trusted, or a last frame sent
Parts = tuple[tuple[Any, ...], bytes]  # the fields of the head, the body


class Broken(ConnectionError):
    """The other side is gone, or sends what no honest peer sends."""


@final
@dataclass(frozen=True)
class Framing:
    """What a frame looks like.

    Attributes:
        head: what every frame begins with.
        limits: places of the head's fields, unsigned, that count bytes of the body; the most that each may say.
        fixed: bytes of the body that no field counts.
    """

    head: struct.Struct
    limits: Mapping[int, int] = field(default_factory=dict)
    fixed: int = 0

    def take(self, inbox: bytearray) -> Parts | None:
        """The first frame of the bytes that have come, taken out of them; None if it is not whole yet.

        Raises:
            Broken: a size is beyond its limit.
        """
        if len(inbox) < self.head.size:
            return None
        fields = self.head.unpack_from(inbox)
        end = self.head.size + self.fixed
        for place, most in self.limits.items():
            if fields[place] > most:
                raise Broken(f"it announces {fields[place]} bytes where {most} is the most")
            end += fields[place]
        if len(inbox) < end:
            return None
        with memoryview(inbox) as view:
            body = bytes(view[self.head.size : end])
        del inbox[:end]
        return fields, body


@final
class Connection:
    """One side of a connection. `put` may be called by any thread, the rest by one. Frames that come are as `framing` says."""

    def __init__(self, sock: socket.socket, framing: Framing):
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that vanished sends no good-bye
        self.framing = framing
        self._sock, self._inbox = sock, bytearray()
        self._outbox: deque[memoryview] = deque()  # only the first may be half sent
        self._lock = threading.Lock()  # of the outbox

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    @property
    def busy(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(self._outbox)

    @property
    def events(self) -> int:
        """What a selector is to look for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.busy else 0)

    def put(self, frame: bytes, *, newest: bool = False) -> None:
        """Queue a frame; with `newest` it replaces the one that waits behind the frame in progress."""
        with self._lock:
            if newest and len(self._outbox) == 2:
                self._outbox.pop()
            self._outbox.append(memoryview(frame))

    def flush(self) -> None:
        """Send what goes at once, `CHUNK` bytes at most. Raises `Broken`."""
        with self._lock:
            if not self._outbox:
                return
            view = self._outbox[0]
            try:
                sent = self._sock.send(view[:CHUNK])
            except BlockingIOError:
                return
            except OSError as error:
                raise Broken(f"connection lost while sending: {error}") from error
            if sent < len(view):
                self._outbox[0] = view[sent:]
            else:
                self._outbox.popleft()

    def read(self) -> None:
        """Take in what has come, `CHUNK` bytes at most; `take` tells what it amounts to. Raises `Broken`."""
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(f"connection lost while receiving: {error}") from error
        if not data:
            raise Broken(f"the other side has closed the connection{' within a frame' if self._inbox else ''}")
        self._inbox += data

    def take(self) -> Parts | None:
        """The first frame that is here, or None. Raises `Broken` where a size is beyond its limit."""
        return self.framing.take(self._inbox)

    def receive(self, seconds: float) -> Parts | None:
        """The next frame; None if it is not here after so many seconds. What waits to be sent is sent meanwhile.

        Raises:
            Broken: the connection has ended, or a frame breaks the format.
        """
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self, self.events)
            while (frame := self.take()) is None and (left := deadline - time.monotonic()) > 0:
                selector.modify(self, self.events)
                for _, events in selector.select(min(left, 60.0)):
                    if events & selectors.EVENT_WRITE:
                        self.flush()
                    if events & selectors.EVENT_READ:
                        self.read()
        return frame

    def close(self) -> None:
        self._sock.close()
        with self._lock:
            self._outbox.clear()


def dial(address: tuple[str, int], framing: Framing, seconds: float) -> Connection:
    """Connect to who listens at `address` (host, port), within so many seconds.

    Raises:
        Broken: nobody does, or does not answer in time.
    """
    try:
        return Connection(socket.create_connection(address, timeout=max(seconds, 1e-3)), framing)
    except OSError as error:
        raise Broken(f"no answer at {address[0]}:{address[1]}: {error}") from error


@final
class Switchboard:
    """Many connections, served by the thread that calls `poll`; other threads may `wake` it.

    Args:
        framing: of those who call.
        listener: where they call, closed with the board; None takes nobody. Whoever is not trusted within `PATIENCE` seconds is
            hung up on.
    """

    def __init__(self, framing: Framing, listener: socket.socket | None = None):
        self.framing, self._listener = framing, listener
        self._deadlines: dict[Connection, float] = {}  # until when each may stay as it is
        self._leaving: set[Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def add(self, connection: Connection) -> None:
        """Serve a connection that was dialled; it is trusted."""
        self._deadlines[connection] = math.inf
        self._selector.register(connection, connection.events)

    def trust(self, connection: Connection) -> None:
        """It has said who it is."""
        if connection in self._deadlines and connection not in self._leaving:
            self._deadlines[connection] = math.inf

    def put(self, connection: Connection, frame: bytes, *, last: bool = False) -> None:
        """Queue a frame and send what goes at once; nothing happens if the connection is gone. The `last` one ends it."""
        if connection not in self._deadlines or connection in self._leaving:
            return
        connection.put(frame)
        if last:
            self._leaving.add(connection)
            self._deadlines[connection] = time.monotonic() + PATIENCE
        try:
            connection.flush()
        except Broken:
            self._deadlines[connection] = -math.inf  # `poll` tells

    def poll(self, seconds: float) -> Iterator[tuple[Connection, Parts | None]]:
        """Wait at most so long for anything; what has come, and None for each connection that has ended.

        Read it to its end: what is left out comes only behind new bytes of the same connection.
        """
        for connection in self._deadlines:
            if self._selector.get_key(connection).events != connection.events:
                self._selector.modify(connection, connection.events)
        left = min(self._deadlines.values(), default=math.inf) - time.monotonic()
        for key, events in self._selector.select(max(0.0, min(seconds, left, 60.0))):
            if isinstance(key.fileobj, Connection):
                yield from self._serve(key.fileobj, events)
            elif key.fileobj is self._ear:
                with contextlib.suppress(BlockingIOError):
                    self._ear.recv(4096)
            else:
                self._accept()
        now = time.monotonic()
        for connection, deadline in list(self._deadlines.items()):
            if deadline <= now or (connection in self._leaving and not connection.busy):
                self.hang_up(connection)
                yield connection, None

    def wake(self) -> None:
        """End the wait of `poll`; any thread may."""
        with contextlib.suppress(OSError):  # closed, or it rings already
            self._bell.send(b"x")

    def hang_up(self, connection: Connection) -> None:
        """End a connection at once; `poll` says nothing more of it."""
        if self._deadlines.pop(connection, None) is not None:
            self._leaving.discard(connection)
            self._selector.unregister(connection)
            connection.close()

    def stop_listening(self) -> None:
        """Take no more calls."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def close(self, seconds: float = 0.0) -> None:
        """Send what still waits, for so many seconds at most, and end everything.

        What comes meanwhile is read and dropped: of two that close at once, each must read for the other to be done.
        """
        self.stop_listening()
        deadline = time.monotonic() + seconds
        while any(c.busy for c in self._deadlines) and (left := deadline - time.monotonic()) > 0:
            for _ in self.poll(left):
                pass
        for connection in list(self._deadlines):
            self.hang_up(connection)
        for rest in (self._selector, self._bell, self._ear):
            rest.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # the caller may have gone already
            connection = Connection(self._listener.accept()[0], self.framing)
            self.add(connection)
            self._deadlines[connection] = time.monotonic() + PATIENCE

    def _serve(self, connection: Connection, events: int) -> Iterator[tuple[Connection, Parts | None]]:
        """Frames are yielded one by one: what the caller makes of one may end the connection, or change its framing."""
        try:
            if connection in self._deadlines and events & selectors.EVENT_WRITE:
                connection.flush()
            if connection in self._deadlines and events & selectors.EVENT_READ:
                connection.read()
            while connection in self._deadlines and (frame := connection.take()) is not None:
                if connection not in self._leaving:
                    yield connection, frame
        except Broken:
            self.hang_up(connection)
            yield connection, None
