"""Mail between peers that nobody waits for: the newest vectors of each peer, whoever is late or dead.

Problem    a peer goes on with the first n - f - 1 vectors that arrive. The others may come late, never, or be nonsense, and must
           neither block it nor fill its memory. torch.distributed on gloo cannot say so: a receive that has been posted cannot be
           taken back, and one that times out breaks the connection it was for.
Method     one TCP connection per pair and one thread per process that serves them all                         `Post._serve`
           Frames are of one fixed size, (round, vector): a peer can lie about values, not about lengths.
           Of each peer two vectors are kept, and two wait to be sent to it: the older in progress, the newest behind it.
Guarantee  `collect(t)` returns vectors of round t, or of a later one where the sender is ahead; never older ones. With f = 0 no
           peer can be more than one round ahead, and the vectors are exactly those of round t.
The process group is used once, to tell each other addresses and to compare shapes.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
import time

import torch.distributed as dist

from weft.comm.sockets import Broken, Connection, Framing, Parts, Switchboard, dial
from weft.errors import PeerLost

__all__ = ["Post"]

HEADER = struct.Struct("<Q")  # the round
HELLO = struct.Struct("<16sI")  # the group's token, the sender's rank
LINGER = 5.0  # seconds that a closed post may still need to send what waits: a peer may be waiting for the last round


class _Link:
    """The connection to one peer."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.box: list[tuple[int, int, bytes]] = []  # (round, number of arrival, vector), oldest first, two at most
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
        PeerLost: a rank cannot be reached, or does not call.
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
        self._framing = Framing(HEADER, fixed=nbytes)
        self._changed = threading.Condition()
        self._arrivals = 0
        self._closed = False
        self._board = self._connect(fingerprint, group, address or _own_address(), seconds)
        self._thread = threading.Thread(target=self._serve, name="weft-post", daemon=True)
        self._thread.start()

    def send(self, round: int, vector: bytes, to: int | None = None) -> None:
        """Send a vector to all peers, or to one; returns at once."""
        if len(vector) != self.nbytes:
            raise ValueError(f"Post: a vector must have {self.nbytes} bytes, got {len(vector)}")
        frame = HEADER.pack(round) + vector
        with self._changed:
            for peer, link in self._links.items():
                if link.alive and to in (None, peer):  # of a slow one's, what has not begun to go is replaced
                    link.connection.put(frame, newest=True)
        self._board.wake()

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
            self._closed = True
            self._board.wake()
            self._thread.join(LINGER + 5)

    def _connect(self, fingerprint: str, group: dist.ProcessGroup | None, address: str, seconds: float) -> Switchboard:
        listener = socket.create_server((address, 0), backlog=self.size)
        board = Switchboard(Framing(HELLO), listener)
        try:
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
                connection = dial(cards[peer][:2], self._framing, deadline - time.monotonic())
                self._links[peer] = _Link(connection)
                board.add(connection)
                board.put(connection, HELLO.pack(token, self.rank))
            while missing := set(range(self.size)) - {self.rank} - set(self._links):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Broken(f"ranks {sorted(missing)} have not called within {seconds:g} s")
                for connection, frame in board.poll(left):
                    if frame is not None and connection.framing is not self._framing:
                        self._greet(board, connection, frame, token)
                    else:
                        self._came(connection, frame)
            board.stop_listening()
        except Broken as error:
            board.close()
            raise PeerLost(-1, "connecting peers", str(error)) from error
        except BaseException:
            board.close()
            raise
        return board

    def _greet(self, board: Switchboard, connection: Connection, frame: Parts, token: bytes) -> None:
        """Whoever has the group's token is who it says; the frames behind this one are vectors."""
        said, peer = frame[0]
        if said == token and self.rank < peer < self.size and peer not in self._links:
            connection.framing = self._framing
            board.trust(connection)
            self._links[peer] = _Link(connection)
        else:
            board.hang_up(connection)

    def _serve(self) -> None:
        while not self._closed:
            for connection, frame in self._board.poll(1.0):
                self._came(connection, frame)
        self._board.close(LINGER)

    def _came(self, connection: Connection, frame: Parts | None) -> None:
        """A peer's vector, or its end."""
        link = next((link for link in self._links.values() if link.connection is connection), None)
        if link is None:
            return  # a stranger has gone
        with self._changed:
            if frame is None:
                link.alive = False
            else:
                ((round,), vector) = frame
                self._arrivals += 1
                if len(link.box) == 2:  # it is far ahead of us, or floods us: the newest is enough
                    link.box.pop()
                link.box.append((round, self._arrivals, vector))
            self._changed.notify_all()


def _own_address() -> str:
    """The address of the interface that leads to MASTER_ADDR, without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
