"""Mail between peers that nobody waits for: the newest vectors of each peer, whoever is late or dead.

Problem    a peer goes on with the first n - f - 1 vectors that arrive. The others may come late, never, or be nonsense, and must
           neither block it nor fill its memory. torch.distributed on gloo cannot say so: a receive that has been posted cannot be
           taken back, and one that times out breaks the connection it was for.
Method     one TCP connection per pair and one thread per process that reads and writes whatever is ready      `Post._serve`
           Frames are of one fixed size, (round, vector): a peer can lie about values, not about lengths.
           Of each peer two vectors are kept, and two wait to be sent to it: the older in progress, the newest behind it.
Guarantee  `collect(t)` returns vectors of round t, or of a later one where the sender is ahead; never older ones. With f = 0 no
           peer can be more than one round ahead, and the vectors are exactly those of round t.
The process group is used once, to tell each other addresses and to compare shapes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque

import torch.distributed as dist

__all__ = ["Post"]

HEADER = struct.Struct("<Q")  # the round
HELLO = struct.Struct("<16sI")  # the group's token, the sender's rank
CHUNK = 1 << 20  # bytes read or written at a time, so that no peer holds the thread for long
LINGER = 5.0  # seconds that a closed post may still need to send what waits: a peer may be waiting for the last round


class _Link:
    """The connection to one peer."""

    def __init__(self, channel: socket.socket, nbytes: int):
        self.channel = channel
        self.frame = bytearray(HEADER.size + nbytes)
        self.filled = 0
        self.box: list[tuple[int, int, bytes]] = []  # (round, number of arrival, vector), oldest first, two at most
        self.out: deque[memoryview] = deque()  # two at most; the first may be half sent
        self.alive = True


class Post:
    """This rank's mail. Made by all ranks of a group together.

    Args:
        nbytes: size of a vector.
        fingerprint: what must be equal on all ranks, such as a hash of shapes.
        group: process group, None for all ranks.
        address: where the others reach this process; None finds the interface that leads to MASTER_ADDR.
        seconds: limit for making the connections.
    Raises:
        ValueError: fingerprints differ; on every rank, naming the ranks.
    """

    def __init__(
        self,
        nbytes: int,
        fingerprint: str = "",
        group: dist.ProcessGroup | None = None,
        address: str | None = None,
        seconds: float = 30.0,
    ):
        self.rank, self.size, self.nbytes = dist.get_rank(group), dist.get_world_size(group), nbytes
        self.late = 0
        self._links: dict[int, _Link] = {}
        self._changed = threading.Condition()
        self._arrivals = 0
        self._closed = False
        self._until = 0.0  # when a closed post gives up sending
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._connect(fingerprint, group, address or _own_address(), seconds)
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        for peer, link in self._links.items():
            link.channel.setblocking(False)
            self._selector.register(link.channel, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._serve, name="weft-post", daemon=True)
        self._thread.start()

    def send(self, round: int, vector: bytes, to: int | None = None) -> None:
        """Send a vector to all peers, or to one; returns at once."""
        if len(vector) != self.nbytes:
            raise ValueError(f"Post: a vector must have {self.nbytes} bytes, got {len(vector)}")
        frame = HEADER.pack(round) + vector
        with self._changed:
            for peer, link in self._links.items():
                if link.alive and to in (None, peer):
                    if len(link.out) == 2:  # it is slow: what it has not begun to read is replaced
                        link.out.pop()
                    link.out.append(memoryview(frame))
        self._ring()

    def collect(self, round: int, count: int, seconds: float) -> dict[int, bytes]:
        """The first `count` peers' vectors of this round or a later one; fewer after `seconds`, or if no more can come."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                ready = []
                for peer, link in self._links.items():
                    while link.box and link.box[0][0] < round:
                        link.box.pop(0)
                        self.late += 1
                    if link.box:
                        ready.append((link.box[0][1], peer))
                possible = len(ready) + sum(link.alive and not link.box for link in self._links.values())
                left = deadline - time.monotonic()
                if len(ready) >= min(count, possible) or left <= 0:
                    return {peer: self._take(self._links[peer], round) for _, peer in sorted(ready)[:count]}
                self._changed.wait(left)

    @staticmethod
    def _take(link: _Link, round: int) -> bytes:
        """The link's oldest vector. One of this round is taken out: the box must hold the next two, a peer may be that far.

        One of a later round stays, so that whoever is behind need not wait for peers that have finished.
        """
        arrived, _, vector = link.box[0]
        if arrived == round:
            link.box.pop(0)
        return vector

    def alive(self) -> list[int]:
        """Peers whose connection stands."""
        with self._changed:
            return sorted(peer for peer, link in self._links.items() if link.alive)

    def close(self) -> None:
        """Send what still waits, for a few seconds at most, and end the thread and the connections."""
        if not self._closed:
            self._until = time.monotonic() + LINGER
            self._closed = True
            self._ring()
            self._thread.join(LINGER + 5)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            self._bell.send(b"x")

    def _connect(self, fingerprint: str, group: dist.ProcessGroup | None, address: str, seconds: float) -> None:
        with socket.create_server((address, 0), backlog=self.size) as listener:
            mine = (address, listener.getsockname()[1], fingerprint, secrets.token_bytes(16))
            cards: list[tuple[str, int, str, bytes]] = [mine] * self.size
            dist.all_gather_object(cards, mine, group=group)
            unlike = [peer for peer, card in enumerate(cards) if card[2] != cards[0][2]]
            if unlike:
                raise ValueError(
                    f"peers exchange vectors of one shape, but ranks {unlike} have other parameters than rank 0: "
                    f"{cards[unlike[0]][2]} against {cards[0][2]}"
                )
            token, deadline = cards[0][3], time.monotonic() + seconds
            for peer in range(self.rank):
                channel = socket.create_connection(cards[peer][:2], timeout=max(deadline - time.monotonic(), 0.1))
                channel.sendall(HELLO.pack(token, self.rank))
                self._links[peer] = _Link(channel, self.nbytes)
            while len(self._links) < self.size - 1:
                listener.settimeout(max(deadline - time.monotonic(), 0.1))
                channel, _ = listener.accept()
                channel.settimeout(max(deadline - time.monotonic(), 0.1))
                hello = channel.recv(HELLO.size, socket.MSG_WAITALL)
                if len(hello) == HELLO.size and HELLO.unpack(hello)[0] == token:
                    self._links[HELLO.unpack(hello)[1]] = _Link(channel, self.nbytes)
                else:
                    channel.close()  # a stranger
        for link in self._links.values():
            link.channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _sending(self) -> bool:
        with self._changed:
            return any(link.out for link in self._links.values()) and time.monotonic() < self._until

    def _serve(self) -> None:
        while not self._closed or self._sending():
            with self._changed:
                for peer, link in self._links.items():
                    if link.alive:
                        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.out else 0)
                        self._selector.modify(link.channel, events, peer)
            for key, events in self._selector.select(1.0):
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        self._ear.recv(4096)
                    continue
                link = self._links[key.data]
                try:
                    if events & selectors.EVENT_READ:
                        self._read(link)
                    if events & selectors.EVENT_WRITE and link.alive:
                        self._write(link)
                except BlockingIOError:
                    continue
                except OSError:
                    self._lost(link)
        self._selector.close()
        for link in self._links.values():
            link.channel.close()
        self._bell.close()
        self._ear.close()

    def _read(self, link: _Link) -> None:
        got = link.channel.recv_into(memoryview(link.frame)[link.filled : link.filled + CHUNK])
        if got == 0:
            self._lost(link)
            return
        link.filled += got
        if link.filled < len(link.frame):
            return
        link.filled = 0
        (round,) = HEADER.unpack_from(link.frame)
        with self._changed:
            self._arrivals += 1
            if len(link.box) == 2:  # it is far ahead of us, or floods us: the newest is enough
                link.box.pop()
            link.box.append((round, self._arrivals, bytes(link.frame[HEADER.size :])))
            self._changed.notify_all()

    def _write(self, link: _Link) -> None:
        with self._changed:
            if not link.out:
                return
            view = link.out[0]
        sent = link.channel.send(view[:CHUNK])
        with self._changed:
            link.out.popleft()  # the same one: `send` replaces only the second
            if sent < len(view):
                link.out.appendleft(view[sent:])

    def _lost(self, link: _Link) -> None:
        with self._changed:
            link.alive = False
            link.out.clear()
            self._selector.unregister(link.channel)
            link.channel.close()
            self._changed.notify_all()


def _own_address() -> str:
    """The address of the interface that leads to MASTER_ADDR, without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
