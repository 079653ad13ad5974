"""Frames over a socket that never blocks its owner: a short JSON header and raw bytes, nothing that is ever executed.

    frame = header length (4 bytes, big endian) | payload length (8 bytes) | header, JSON | payload

A peer that sends half a frame and stops, or does not read, leaves bytes in a `Link`'s boxes and holds up nobody. What comes from
the network is bounded before memory is given to it: a longer header or payload than agreed ends the connection (`Broken`).
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, final

__all__ = ["Broken", "Link"]

HEAD = struct.Struct(">IQ")
LONGEST_HEADER = 4096  # bytes
CHUNK = 1 << 18


class Broken(ConnectionError):
    """The other side is gone, or sends what no honest peer sends."""


@final
class Link:
    """One side of a connection. `longest`: bytes of the largest payload that may come."""

    def __init__(self, sock: socket.socket, longest: int):
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.longest = sock, longest
        self.inbox, self.outbox = bytearray(), bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def put(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Queue a frame and send what goes at once; call `flush` when the socket is writable until `busy` is over."""
        text = json.dumps(header).encode()
        self.outbox += HEAD.pack(len(text), len(payload)) + text + payload
        self.flush()

    @property
    def busy(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(self.outbox)

    def flush(self) -> None:
        try:
            while self.outbox:
                del self.outbox[: self.sock.send(memoryview(self.outbox)[:CHUNK].toreadonly())]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise Broken(f"connection lost while sending: {error}") from error

    def get(self) -> list[tuple[dict[str, Any], bytes]]:
        """All frames that are complete; call it when the socket is readable.

        Raises:
            Broken: the connection has ended, or a frame breaks the format.
        """
        ended = False
        try:
            while chunk := self.sock.recv(CHUNK):
                self.inbox += chunk
                if len(self.inbox) > self.longest + LONGEST_HEADER + HEAD.size:
                    break
            else:
                ended = True
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise Broken(f"connection lost while receiving: {error}") from error
        frames = []
        while (frame := self._frame()) is not None:
            frames.append(frame)
        if ended and not frames:
            raise Broken("the other side has closed the connection")
        return frames

    def close(self) -> None:
        self.sock.close()

    def _frame(self) -> tuple[dict[str, Any], bytes] | None:
        if len(self.inbox) < HEAD.size:
            return None
        header, payload = HEAD.unpack_from(self.inbox)
        if header > LONGEST_HEADER or payload > self.longest:
            raise Broken(f"a frame of {header} + {payload} bytes, where {LONGEST_HEADER} + {self.longest} is the most")
        end = HEAD.size + header + payload
        if len(self.inbox) < end:
            return None
        try:
            read = json.loads(self.inbox[HEAD.size : HEAD.size + header])
        except ValueError as error:
            raise Broken(f"a header that is no JSON: {error}") from error
        if not isinstance(read, dict):
            raise Broken("a header that is no JSON object")
        body = bytes(self.inbox[HEAD.size + header : end])
        del self.inbox[:end]
        return read, body
