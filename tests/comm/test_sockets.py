"""Frames over sockets: torn, lying, broken off, too slow; and many connections in one thread."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import pytest

from weft.comm import sockets
from weft.comm.sockets import Broken, Connection, Framing, Switchboard, dial

HEAD = struct.Struct("<BI")
FRAMES = Framing(HEAD, {1: 1000})


def frame(kind: int, body: bytes) -> bytes:
    return HEAD.pack(kind, len(body)) + body


def pair(framing: Framing = FRAMES) -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5.0)
    return Connection(ours, framing), theirs


def bodies(connection: Connection, count: int) -> list[bytes]:
    found = [connection.receive(5.0) for _ in range(count)]
    return [parts[1] for parts in found if parts]


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 7, 999])
def test_frames_come_whole_however_they_are_torn(cut):
    ours, peer = pair()
    stream, found = frame(1, b"abc") + frame(2, b"") + frame(3, bytes(1000)), []
    for start in range(0, len(stream), cut):
        peer.sendall(stream[start : start + cut])
        ours.read()
        while (parts := ours.take()) is not None:
            found.append(parts)
    assert found == [((1, 3), b"abc"), ((2, 0), b""), ((3, 1000), bytes(1000))]


def test_a_fixed_body_and_several_lengths():
    head = struct.Struct("<HHH")
    inbox = bytearray(head.pack(3, 7, 2) + b"abcdeFGHI" + b"rest")
    assert Framing(head, {0: 3, 2: 2}, fixed=4).take(inbox) == ((3, 7, 2), b"abcdeFGHI")
    assert inbox == b"rest"


@pytest.mark.parametrize("size, body", [(1001, b""), (2**32 - 1, b""), (1001, bytes(1001))])
def test_a_size_beyond_the_limit_is_broken_before_its_body_is_waited_for(size, body):
    ours, peer = pair()
    peer.sendall(frame(1, b"x") + HEAD.pack(1, size) + body)
    assert bodies(ours, 1) == [b"x"]
    with pytest.raises(Broken, match=f"announces {size} bytes where 1000 is the most"):
        ours.receive(5.0)


@pytest.mark.parametrize(
    "left, said", [(b"", "$"), (HEAD.pack(1, 6)[:3], " within a frame$"), (frame(1, b"ab")[:-1], " within a frame$")]
)
def test_closing_in_the_middle(left, said):
    """What came whole is given out first."""
    ours, peer = pair()
    peer.sendall(frame(1, b"x") + left)
    peer.close()
    assert bodies(ours, 1) == [b"x"]
    with pytest.raises(Broken, match=f"has closed the connection{said}"):
        ours.receive(5.0)


def test_a_connection_that_is_reset():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = dial(server.getsockname(), FRAMES, 5.0)
        theirs, _ = server.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        with pytest.raises(Broken, match="lost while receiving"):
            ours.receive(5.0)
        with pytest.raises(Broken, match="lost while sending"):
            for _ in range(2):
                ours.put(b"x")
                ours.flush()


def test_a_peer_that_drips_does_not_prolong_a_wait():
    ours, peer = pair()
    peer.sendall(HEAD.pack(1, 1000))
    stop = threading.Event()

    def drip():
        while not stop.wait(0.005):
            peer.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    assert ours.receive(0.15) is None
    assert time.monotonic() - start < 1.0
    stop.set()
    thread.join()
    peer.sendall(bytes(1000))
    assert len(bodies(ours, 1)[0]) == 1000  # what had come was kept


def test_a_reader_that_sleeps_holds_up_nobody():
    ours, peer = pair(Framing(HEAD, {1: 4_000_000}))
    theirs = Connection(peer, ours.framing)
    start = time.monotonic()
    for body in (bytes(4_000_000), b"old", b"new"):  # the first has begun and is left whole; the others share one place
        ours.put(frame(1, body), newest=True)
        ours.flush()
    assert ours.busy and ours.receive(0.05) is None and time.monotonic() - start < 2
    threading.Thread(target=lambda: ours.receive(1.0), daemon=True).start()  # sends while it waits
    assert bodies(theirs, 2) == [bytes(4_000_000), b"new"]
    theirs.put(frame(1, b""))
    theirs.flush()


def test_nobody_to_call():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(Broken, match=f"no answer at 127.0.0.1:{address[1]}"):
        dial(address, FRAMES, 1.0)


# ---- many connections


@pytest.fixture
def board():
    board = Switchboard(FRAMES, socket.create_server(("127.0.0.1", 0)))
    board.address = board._listener.getsockname()
    yield board
    board.close()


def call(board: Switchboard) -> socket.socket:
    return socket.create_connection(board.address, timeout=5.0)


def until(board: Switchboard, count: int, seconds: float = 5.0) -> list:
    """The first `count` things that `poll` tells, or fewer after so many seconds."""
    found, deadline = [], time.monotonic() + seconds
    while len(found) < count and (left := deadline - time.monotonic()) > 0:
        found += board.poll(left)
    return found


def test_a_board_answers_and_tells_who_has_gone(board):
    first, second = call(board), call(board)
    first.sendall(frame(1, b"first"))
    second.sendall(frame(2, b"second")[:-1])
    ((connection, (fields, body)),) = until(board, 1)
    assert (fields, body) == ((1, 5), b"first")
    board.put(connection, frame(9, b"answer"))
    assert first.recv(100) == frame(9, b"answer")
    first.close()
    assert until(board, 1) == [(connection, None)]
    second.sendall(b"d")
    assert until(board, 1)[0][1] == ((2, 6), b"second")
    board.put(connection, b"to nobody")  # nothing happens


def test_who_never_says_who_it_is_is_hung_up_on(board, monkeypatch):
    monkeypatch.setattr(sockets, "PATIENCE", 0.2)
    known, silent = call(board), call(board)
    known.sendall(frame(1, b""))
    ((connection, _),) = until(board, 1)
    board.trust(connection)
    start = time.monotonic()
    assert [ended for _, ended in until(board, 1)] == [None] and time.monotonic() - start < 2
    assert silent.recv(1) == b""
    assert until(board, 1, 0.3) == []
    known.sendall(frame(1, b"still"))
    assert until(board, 1)[0] == (connection, ((1, 5), b"still"))


@pytest.mark.parametrize("reads", [True, False])
def test_the_last_frame_ends_a_connection(board, monkeypatch, reads):
    """At once when it has gone; of one who does not read, when patience ends. Nothing that it says meanwhile counts."""
    monkeypatch.setattr(sockets, "PATIENCE", 60.0 if reads else 0.2)
    peer = call(board)
    peer.sendall(frame(1, b""))
    ((connection, _),) = until(board, 1)
    board.trust(connection)
    board.put(connection, bytes(100 if reads else 20_000_000), last=True)
    peer.sendall(frame(1, b"too late"))
    assert until(board, 1) == [(connection, None)]
    if reads:
        assert len(peer.recv(200)) == 100


def test_nonsense_ends_one_connection_and_no_other(board):
    good, bad = call(board), call(board)
    bad.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert [parts for _, parts in until(board, 1)] == [None]
    with contextlib.suppress(ConnectionResetError):  # by what it sent and nobody read
        assert bad.recv(1) == b""
    good.sendall(frame(1, b"x"))
    assert until(board, 1)[0][1] == ((1, 1), b"x")


def test_what_is_made_of_a_frame_decides_about_the_next(board):
    """A framing that changes, and a connection that is hung up on, count for bytes that are here already."""
    peer, other = call(board), call(board)
    peer.sendall(frame(1, b"") + b"\x07\x08")
    other.sendall(frame(1, b"") * 3)
    seen = {}
    while len(seen) < 2 or max(map(len, seen.values())) < 3:
        for connection, (fields, _) in board.poll(5.0):
            seen.setdefault(connection, []).append(fields)
            if peer.getsockname() == connection._sock.getpeername():
                connection.framing = Framing(struct.Struct("B"))
            else:
                board.hang_up(connection)
    assert sorted(seen.values()) == [[(1, 0)], [(1, 0), (7,), (8,)]]


def test_closing_sends_what_waits_even_if_both_close_at_once():
    frames, big = Framing(HEAD, {1: 1 << 25}), frame(1, bytes(1 << 24))
    sides = [Connection(sock, frames) for sock in socket.socketpair()]
    boards = [Switchboard(frames), Switchboard(frames)]
    for board, side in zip(boards, sides, strict=True):
        board.add(side)
        board.put(side, big)
    threads = [threading.Thread(target=board.close, args=(10.0,)) for board in boards]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 5


def test_closing_does_not_wait_for_who_does_not_read(board):
    peer = call(board)
    peer.sendall(frame(1, b""))
    ((connection, _),) = until(board, 1)
    board.put(connection, bytes(20_000_000))
    start = time.monotonic()
    board.close(0.2)
    assert 0.15 < time.monotonic() - start < 2


def test_another_thread_ends_a_wait(board):
    threading.Timer(0.1, board.wake).start()
    start = time.monotonic()
    assert list(board.poll(30.0)) == []
    assert time.monotonic() - start < 5
